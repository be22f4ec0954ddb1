"""From argv and YAML to one checked, resolved run. Imports no torch."""
