"""Code of the user's own, tried before the run and bounded in time."""
