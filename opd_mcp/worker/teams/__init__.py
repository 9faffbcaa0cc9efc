"""Processes that a worker starts on several devices: ranks train one model, helpers compute parts of other phases.

May import what the worker may; `rank_process` and `helper_process` load the engine.
"""
