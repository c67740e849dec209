"""What the engine promises, told as tests."""
