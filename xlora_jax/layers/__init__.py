"""Adapted layers: the mixing arithmetic, Flax modules, stacked experts."""
