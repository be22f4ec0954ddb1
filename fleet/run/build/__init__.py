"""Checked options become a dataset, a model and a trainer, or an evaluation. The rest of fleet/run knows no options."""
