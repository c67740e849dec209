"""Servers that this project did not write, each in an environment of its own: does the program run against them?"""
