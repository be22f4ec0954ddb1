"""Held-out episodes, controls, answers, and figures with intervals."""
