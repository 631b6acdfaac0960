"""Bytes on disk, whatever they mean: files, tensors, the hub, atomic writes."""
