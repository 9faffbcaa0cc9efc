"""`python -m opd_mcp.cli`: the same as `opd-mcp`."""

from opd_mcp.cli import main

if __name__ == "__main__":
    main()
