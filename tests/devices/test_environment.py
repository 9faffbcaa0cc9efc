"""A short child under limits gets no secret and no setting that it does not need."""

from opd_mcp.devices.environment import bounded_environment


def test_a_bounded_child_inherits_its_way_to_start_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = {
        "PATH": "/bin",
        "PYTHONPATH": "here",
        "HF_TOKEN": "hf_secret",
        "DB_PASSWORD": "secret",
        "OPD_TEACHER_KEY": "secret",
        "HTTPS_PROXY": "http://user:secret@proxy",
    }
    found = bounded_environment(given)
    assert "secret" not in str(found)
    assert found["PATH"] == "/bin"
    assert found["PYTHONPATH"] == str(tmp_path / "here")
