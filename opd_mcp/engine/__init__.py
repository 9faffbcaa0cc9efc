"""The computation: prompts to responses to SFT to rollouts to teacher cache to distilled student to report.

May import schemas, identity, grading and torch; never mcp or the store. Entry: `from opd_mcp.engine import stages`.
"""
