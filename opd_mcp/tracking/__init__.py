"""Mirrors the journals of runs to experiment trackers: one small process per run and tracker, apart from the worker.

May import store, devices and what is below them; a tracker's package only where it is used.
"""
