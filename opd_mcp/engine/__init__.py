"""The computation: prompts to responses to SFT to rollouts to teacher cache to distilled student to report.

May import schemas, identity and torch; never mcp, store or jobs. Entry: `from opd_mcp.engine import stages`.
"""
