"""A model's folder, checked by names, shapes and JSON before anything loads."""
