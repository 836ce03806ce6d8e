"""Training: the data stream, the loop, its checkpoints and its record."""
