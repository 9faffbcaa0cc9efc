"""Measurements of speed, memory and size: each script prints its figures next to their bars."""
