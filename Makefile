# Every target makes its own environment first: Python 3.11+, git and make are all a machine needs.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: quickstart test lint bench soak compat clean

quickstart: .venv/ready
	$(BIN)/batcher run jobs/tickets.toml
	$(BIN)/batcher results out/tickets

# Hundreds of processes are started: without bytecode on the disk each compiles the package anew.
test: .venv/ready-dev
	PYTHONDONTWRITEBYTECODE= $(BIN)/pytest -n 3

lint: .venv/ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/ready-dev
	$(BIN)/python -m benchmarks

soak: .venv/ready-dev
	$(BIN)/pytest -m soak -s
	$(BIN)/python -m tests.breaks

compat: .venv/ready-dev
	$(BIN)/python -m compat

clean:
	rm -rf .venv .compat

.venv/ready: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("batcher needs Python 3.11 or newer; say make PYTHON=python3.11") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[fast,results]'
	touch $@

.venv/ready-dev: .venv/ready
	$(BIN)/python -m pip install --quiet --group dev
	touch $@
