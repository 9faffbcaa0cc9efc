"""Answers as short texts for agents and for the command line.

May import schemas only; programs read the structured answers instead.
"""
