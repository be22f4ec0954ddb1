"""RLOO: the algorithm, the trainer, the records of rollouts, guards and checkpoints."""
