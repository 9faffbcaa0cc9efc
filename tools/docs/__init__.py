"""What is generated: tables of README and docs/ from the code and from reports, and the Claude Desktop bundle."""
