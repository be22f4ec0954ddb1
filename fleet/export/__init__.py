"""A trained model becomes a folder to use elsewhere: merged weights, processor and model card."""
