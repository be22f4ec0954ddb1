"""What a run will need, before a weight is loaded: memory, tokens, operations, disk; and what will not work."""
