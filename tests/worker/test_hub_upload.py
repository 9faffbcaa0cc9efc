"""Uploads to a stand-in of the Hub over HTTP, which speaks its API as huggingface_hub calls it."""

import base64
import itertools
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from huggingface_hub import constants

from opd_mcp.devices.settings import JobSettings
from opd_mcp.planning.confirmation import Question
from opd_mcp.schemas.errors import PathError, ResourceError
from opd_mcp.schemas.requests import ExportStudent
from opd_mcp.schemas.runs import ExportTarget, RunInputs
from opd_mcp.service import JobService
from opd_mcp.store.artifacts import ArtifactStore
from opd_mcp.store.journal import JournalWriter
from opd_mcp.store.roots import AllowedRoots
from opd_mcp.store.workspace import Workspace
from opd_mcp.worker.hub_upload import HubExport

TOKEN = "hf_" + "a" * 30


class StandInHub(BaseHTTPRequestHandler):
    """Repositories with their files, kept in the server; commits need the token."""

    def do_GET(self) -> None:
        name, _, rest = self.path.removeprefix("/api/models/").partition("/tree/")
        repository = self.server.repositories.get(name)
        if repository is None:
            self.answer({"error": "Repository not found"}, 404, "RepoNotFound")
        elif rest:
            self.answer([{"type": "file", "path": path, "size": 1, "oid": "0"} for path in repository["files"]])
        else:
            self.answer({"id": name, "private": repository["private"], "siblings": []})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer({"error": "Invalid token"}, 401)
        elif self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else f"me/{asked['name']}"
            # as huggingface_hub says it since its second version, and before
            private = asked.get("visibility") == "private" or asked.get("private", False)
            self.server.repositories[name] = {"private": private, "files": {".gitattributes": b""}}
            self.answer({"url": f"{self.server.url}/{name}", "id": name, "name": name})
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            modes = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]
            self.answer({"files": modes})
        elif "/commit/" in self.path:
            self.commit(body)
        else:
            self.answer({"error": self.path}, 400)

    def commit(self, body: bytes) -> None:
        if self.server.fails > 0:
            self.server.fails -= 1
            self.answer({"error": "Forbidden"}, 403)
            return
        name = self.path.removeprefix("/api/models/").partition("/commit/")[0]
        files = self.server.repositories[name]["files"]
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        self.server.commits += 1
        self.answer({"commitUrl": f"{self.server.url}/{name}/commit/abc", "commitOid": "abc", "success": True})

    def answer(self, content: object, status: int = 200, code: str | None = None) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if code is not None:
            self.send_header("X-Error-Code", code)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), StandInHub)
    server.url = f"http://127.0.0.1:{server.server_port}"
    server.repositories, server.commits, server.fails = {}, 0, 0
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def uploader(world) -> JobService:
    """A service that may upload for `me`."""
    given = world.settings
    settings = JobSettings(given.lease_folder, 2, given.examples, given.worker_command, hub_owners=("me",))
    return JobService(Workspace(world.root / "home"), AllowedRoots([world.root / "data"]), settings)


@pytest.fixture
def upload(world) -> ExportStudent:
    return ExportStudent(model=world.student, destination="hub:me/mine")


def test_a_model_is_uploaded_whole_to_a_new_private_repository(uploader, upload, hub, finished):
    question = uploader.export_question(upload)
    assert isinstance(question, Question)
    assert question.confirm == "hub:me/mine"
    assert "private" in question.text
    status = finished(uploader, uploader.export_student(upload).run_id)
    assert status.state == "succeeded", status
    [(name, repository)] = hub.repositories.items()
    assert (name, repository["private"], hub.commits) == ("me/mine", True, 1)
    assert {"README.md", "lineage.json", "model.safetensors", "tokenizer.json"} <= repository["files"].keys()
    exported = status.result["export"]
    assert (exported["url"], exported["private"]) == (f"{hub.url}/me/mine", True)
    directory = uploader.workspace.run(status.run_id)
    assert not list(directory.glob("export-*"))
    assert TOKEN not in "".join(file.read_text(errors="replace") for file in directory.iterdir() if file.is_file())


@pytest.fixture
def attempt(world, hub, monkeypatch):
    """`attempt()`: the upload of one run as its next attempt makes it, and the folder that it uploads."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)  # which it read from the environment when it was imported
    workspace = Workspace(world.root / "home")
    directory = workspace.runs / "export-mine"
    directory.mkdir()
    inputs = RunInputs(export=ExportTarget(destination="hub:me/mine"))
    numbers = itertools.count(1)

    def begin(token: str | None = TOKEN) -> tuple[HubExport, Path]:
        journal = JournalWriter(directory / "journal.jsonl", next(numbers))
        export = HubExport(inputs, directory, ArtifactStore(workspace, None), journal, token)
        building = export.building()
        for name in ("README.md", "lineage.json", "model.safetensors"):
            (building / name).write_text(name)
        return export, building

    return begin


def test_an_upload_that_failed_is_resumed_into_the_repository_that_it_made(hub, attempt):
    hub.fails = 1
    export, building = attempt()
    with pytest.raises(ResourceError, match=r"offline.*token may write"):
        export.published(building)
    assert not export.is_done()
    export, building = attempt()
    export.published(building)
    assert export.is_done()
    assert (hub.commits, len(hub.repositories)) == (1, 1)


def test_a_repository_that_is_there_stays_as_it_is(hub, attempt):
    hub.repositories["me/mine"] = {"private": True, "files": {"notes.txt": b"mine"}}
    with pytest.raises(PathError, match="destination_exists"):
        attempt()
    assert hub.repositories["me/mine"]["files"] == {"notes.txt": b"mine"}


def test_a_repository_that_somebody_else_filled_meanwhile_is_not_touched(hub, attempt):
    hub.fails = 1
    export, building = attempt()
    with pytest.raises(ResourceError, match="offline"):
        export.published(building)
    hub.repositories["me/mine"]["files"]["theirs.txt"] = b"theirs"
    export, building = attempt()
    with pytest.raises(PathError, match="destination_exists"):
        export.published(building)
    assert hub.commits == 0


def test_without_a_token_nothing_is_made(hub, attempt):
    with pytest.raises(ResourceError, match=r"missing_token.*HF_TOKEN"):
        attempt(token=None)
    assert hub.repositories == {}


@pytest.mark.parametrize(
    ("destination", "code"),
    [
        ("hub:other/mine", "outside_roots"),
        ("hub:me", "unusable_name"),
        ("hub:me/a/b", "unusable_name"),
        ("hub:me/a--b", "unusable_name"),
        ("hub:me/../x", "unusable_name"),
        ("hub:me/a b", "unusable_name"),
    ],
)
def test_what_may_not_be_uploaded_to(uploader, destination, code):
    with pytest.raises(PathError) as refused:
        uploader.exports.destination(destination)
    assert refused.value.code == code


def test_the_settings_name_owners_and_without_one_nothing_is_uploaded(world, service, upload):
    with pytest.raises(PathError, match="--export-hub"):
        service.export_student(upload)
    (service.workspace.root / "settings.toml").write_text('[export]\nhub = ["me"]\n')
    again = world.service()
    assert again.exports.destination("hub:me/mine") == "hub:me/mine"
    assert again.setup().export_roots == ["hub:me"]
