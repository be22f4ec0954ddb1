"""Fleet: RLOO training of Qwen2.5-VL on tool-call tasks. The commands and what a user changes are in the root."""
