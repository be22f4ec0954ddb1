"""The built-in model and its school."""
