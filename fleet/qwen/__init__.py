"""Tensors and the model: packed groups, their passes, image features, FLOPs. Knows no trainer."""
