"""What becomes of prompts, told before a run: the preview, its bounded child process, and tasks as prompts.

May import schemas, identity, grading, store, devices and the rest of planning.
"""
