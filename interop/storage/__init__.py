"""File access: JSON, tensors, the hub, atomic writes."""
