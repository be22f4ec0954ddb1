"""A run folder becomes one page. Reads files alone."""
