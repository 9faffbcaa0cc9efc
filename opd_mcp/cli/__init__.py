"""The command line: `opd-mcp plan | start | watch | list | compare | report | serve | demo | doctor …`, `-h` lists all.

The only place that reads the environment (`OPD_HOME`: the workspace, `OPD_TOKEN`: the HTTP token, `OPD_TEACHER_KEY`: a
teacher server's key). Every import beyond typer is inside the command that needs it, so that a server starts without
what only a worker uses, and the other way round.
"""

import os
import sys

from opd_mcp.cli import caches, following, servers, stages, starting, upkeep
from opd_mcp.cli.shared import app, fail, workspace_root

__all__ = ["app", "caches", "following", "main", "servers", "stages", "starting", "upkeep", "workspace_root"]


def main() -> None:
    """The console script: an expected failure is one line on stderr and exit status 1.

    Whatever is written is for its owner alone, and holds no secret of the environment.
    """
    from opd_mcp.schemas.errors import OpdError
    from opd_mcp.schemas.redaction import RedactingStream, environment_secrets

    os.umask(0o077)
    sys.stderr = RedactingStream(sys.stderr, environment_secrets(os.environ))
    try:
        app()
    except OpdError as error:
        fail(error)
    except OSError as error:
        from opd_mcp.store.files import expected_failure, workspace_failure

        if expected := expected_failure(error) or workspace_failure(error, workspace_root()):
            fail(expected)
        raise
