"""llama.cpp's converter as a process: its arguments, its end, its last words; and that it inherits no secret."""

from pathlib import Path

import pytest

from opd_mcp.schemas.errors import ResourceError, RunError
from opd_mcp.schemas.requests import ExportStudent
from opd_mcp.schemas.runs import ExportSettings
from opd_mcp.worker.main import gguf_converter

CONVERTER = """
import os, sys, time
from pathlib import Path
model = Path(sys.argv[1])
given = dict(zip(sys.argv[2::2], sys.argv[3::2]))
name = (model / "name").read_text()
if name == "unknown":
    sys.exit("NotImplementedError: BPE pre-tokenizer was not recognized")
if name == "slow":
    time.sleep(600)
secrets = [key for key in os.environ if key.endswith(("TOKEN", "KEY"))]
Path(given["--outfile"]).write_text(f"GGUF {given['--outtype']} {secrets} {os.environ['HF_HUB_OFFLINE']}")
"""


@pytest.fixture
def convert(tmp_path: Path, monkeypatch):
    """`convert(name, should_stop)`: what the converter makes of a model of this name."""
    monkeypatch.setenv("HF_TOKEN", "hf_" + "a" * 30)
    script = tmp_path / "convert_hf_to_gguf.py"
    script.write_text(CONVERTER)
    (tmp_path / "model").mkdir()

    def made(name: str, should_stop=lambda: False) -> Path:
        (tmp_path / "model" / "name").write_text(name)
        file = tmp_path / "made.gguf"
        converter = gguf_converter(ExportSettings(gguf_converter=str(script)), should_stop)
        converter(tmp_path / "model", file)
        return file

    return made


def test_the_converter_writes_the_file_without_secrets_or_network(convert):
    assert convert("good").read_text() == "GGUF auto [] 1"


def test_what_the_converter_cannot_do_is_said_in_its_words(convert):
    with pytest.raises(ResourceError, match=r"child_failed.*pre-tokenizer was not recognized.*architecture"):
        convert("unknown")


def test_a_cancelled_run_ends_the_converter(convert):
    with pytest.raises(RunError, match="run_cancelled"):
        convert("slow", lambda: True)


def test_without_a_converter_the_start_is_refused_with_the_way_to_one(world, service):
    wanted = ExportStudent(model=world.student, destination=str(world.root / "out" / "x"), format="gguf")
    with pytest.raises(ResourceError, match=r"missing_package.*gguf_converter") as refused:
        service.export_student(wanted)
    assert "docs/guide/serving.md" in refused.value.fix
