"""Measurements behind the claims about the method."""
