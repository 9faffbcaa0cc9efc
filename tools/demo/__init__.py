"""The embedded arithmetic task: its prompt sets, its teachers, and the choice of the demo's settings."""
