"""`opd-mcp cache …`: looks at, proves, converts and merges teacher caches."""

import os
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from opd_mcp.cli.shared import TEACHER_KEY, UPKEEP, AsJson, Command, Group, app, open_service, show, workspace_root

CacheArgument = Annotated[str, typer.Argument(help="A cache id, a run id, or a teacher cache's directory.")]
cache_app = typer.Typer(cls=Group, no_args_is_help=True, help="Look at, prove, convert and merge teacher caches.")
cache_command = partial(cache_app.command, cls=Command)
app.add_typer(cache_app, name="cache", rich_help_panel=UPKEEP)


@cache_command("inspect")
def cache_inspect(cache: CacheArgument, as_json: AsJson = False) -> None:
    """Show the manifest, the statistics and two decoded rows."""
    from opd_mcp.server.render.caches import inspection_text
    from opd_mcp.views.cache import inspect_cache

    found = inspect_cache(cache_directory(cache))
    show(found, as_json, inspection_text)


@cache_command("verify")
def cache_verify(
    cache: CacheArgument,
    teacher: Annotated[
        Path | None,
        typer.Option(help="The teacher's directory, to score a sample again.", exists=True, file_okay=False),
    ] = None,
    teacher_url: Annotated[
        str | None, typer.Option(help="Or the server that scores for it; its key is in OPD_TEACHER_KEY.")
    ] = None,
    sample: Annotated[int, typer.Option(help="Rows to score again.", min=1)] = 16,
    as_json: AsJson = False,
) -> None:
    """Check hashes, counts and values, and score a sample again; exit status 1 when something is wrong."""
    from opd_mcp.engine.cache.verify import verified

    directory, rescore, identity = cache_directory(cache), None, None
    if teacher is not None:
        from opd_mcp.engine.scoring.local import rescorer
        from opd_mcp.identity.models import inspect_model

        rescore, identity = rescorer(teacher), inspect_model(teacher).identity
    elif teacher_url is not None:
        from opd_mcp.engine.scoring.remote import remote_rescorer
        from opd_mcp.identity.lineage import read_manifest
        from opd_mcp.schemas.identity import RemoteTeacher

        expected = read_manifest(directory).teacher
        served = RemoteTeacher(name=expected.name, url=teacher_url)
        rescore = remote_rescorer(served, directory / "tokenizer", os.environ.get(TEACHER_KEY), expected)
    found = verified(directory, rescore, sample=sample, teacher=identity)
    show(found, as_json, lambda found: found.text())
    raise typer.Exit(bool(found.problems))


@cache_command("convert")
def cache_convert(
    source: Annotated[Path, typer.Argument(help="The paper authors' Parquet file.", exists=True, dir_okay=False)],
    output: Annotated[Path, typer.Argument(help="A new directory.")],
    student: Annotated[
        Path, typer.Option(help="The SFT student, whose tokenizer holds.", exists=True, file_okay=False)
    ],
    teacher_name: Annotated[str, typer.Option(help="The teacher's name; asserted, since the file does not say.")],
    as_json: AsJson = False,
) -> None:
    """Make a teacher cache of the paper authors' Parquet, and name what it lacks."""
    from opd_mcp.engine.cache.convert import converted
    from opd_mcp.server.render.caches import manifest_lines

    found = converted(source, output, student=student, teacher_name=teacher_name)
    show(found, as_json, lambda found: "\n".join(manifest_lines(found)))


@cache_command("merge")
def cache_merge(
    output: Annotated[Path, typer.Argument(help="A new directory.")],
    caches: Annotated[list[str], typer.Argument(help="Two or more caches of one teacher and one student.")],
    as_json: AsJson = False,
) -> None:
    """Put caches of the same teacher and student together."""
    from opd_mcp.engine.cache.merge import merged

    directories = [cache_directory(cache) for cache in caches]
    manifest = merged(output, directories)
    if workspace_root().is_dir():
        artifacts = open_service().store.artifacts
        if all(map(artifacts.made_here, directories)):  # else its lineage proves no more than theirs
            artifacts.key.key.sign(output)
    show(manifest, as_json, lambda manifest: f"{manifest.rows} rows, {manifest.tokens} tokens: {output}")


def cache_directory(reference: str) -> Path:
    """Where the teacher cache is that a directory, a cache id or a run id means; raises UnknownIdError."""
    path = Path(reference)
    return path if path.is_dir() else open_service().cache_directory(reference)
