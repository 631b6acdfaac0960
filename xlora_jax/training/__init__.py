"""Training: the step, losses, data, checkpoints, and the loop around them."""
