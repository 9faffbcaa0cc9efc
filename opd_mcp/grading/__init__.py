"""Grading: whether a response's answer is the expected one, by graders with names, and the verdict on a report.

Plain Python with `schemas` below it, so that the planner can check golds and the engine can grade with the same code.
What can hang or grow without bound (math-verify, a user's pattern, a task's scorer, generated code) runs in a child.
"""
