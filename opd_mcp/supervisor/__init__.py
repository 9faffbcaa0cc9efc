"""Starts, watches and ends worker processes.

May import planning and what is below it; never the worker or the engine.
"""
