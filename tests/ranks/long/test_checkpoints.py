"""Checkpoints of several ranks: an interrupted training ends as one that was not, and any number continues it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from opd_mcp.engine.training.checkpoints import RECORD_FILE
from opd_mcp.engine.training.rank_checkpoints import part_name

STEPS = 8
KINDS = {"tied": {"tied": True}, "untied": {"tied": False}, "adapter": {"adapter": True}}


@pytest.fixture
def case(tmp_path: Path):
    """`case("name", …)`: a training whose checkpoints are below the name and whose model is `name.safetensors`."""

    def of(name: str, **changes):
        given = {"what": "training", "steps": STEPS, "folder": str(tmp_path / name)}
        return given | {"output": str(tmp_path / f"{name}.safetensors")} | changes

    return of


def same(one: Path, other: Path) -> bool:
    left, right = load_file(one), load_file(other)
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def near(one: Path, other: Path) -> bool:
    left, right = load_file(one), load_file(other)
    close = [torch.allclose(left[name], right[name], rtol=1e-3, atol=1e-4) for name in left]
    return left.keys() == right.keys() and all(close)


def whole_state(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Everything in a checkpoint but random states, rows put together."""
    record = json.loads((checkpoint / RECORD_FILE).read_bytes())
    parts: dict[str, list[torch.Tensor]] = {}
    for name in sorted(record["files"]):
        with safe_open(checkpoint / name, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                if not key.startswith("random/"):
                    parts.setdefault(key.partition("/")[2], []).append(file.get_tensor(key))
    return {name: torch.cat(rows) if rows[0].ndim else rows[0] for name, rows in parts.items()}


def test_two_ranks_continue_to_the_bit_after_a_stop_at_any_step(on_ranks, case, tmp_path: Path) -> None:
    for kind, settings in KINDS.items():
        cases = [case(f"{kind}-whole", **settings)]
        for stop in range(1, STEPS):
            name = f"{kind}-{stop}"
            cases += [case(name, stop=stop, **settings), case(name, **settings)]
        first, second = on_ranks(2, *cases)
        losses = first[0]["losses"]
        for stop in range(1, STEPS):
            stopped, resumed = first[2 * stop - 1 : 2 * stop + 1]
            assert stopped["stopped"] == second[2 * stop - 1]["stopped"] == "run_cancelled"
            assert resumed["resumed"] == second[2 * stop]["resumed"] == stop
            assert resumed["alerts"] == []
            assert resumed["losses"] == {step: loss for step, loss in losses.items() if int(step) > stop}
            assert same(tmp_path / f"{kind}-{stop}.safetensors", tmp_path / f"{kind}-whole.safetensors")


def test_the_state_goes_from_two_to_one_to_three_and_back_to_the_bit(on_ranks, case, tmp_path: Path) -> None:
    """In between one rank trains as no rank does, up to rounding, and one goes on where two had stopped."""
    on_ranks(2, *(case(kind, stop=4, **settings) for kind, settings in KINDS.items()), case("on", stop=4), case("two"))
    at = {kind: tmp_path / kind / "step-00000004" for kind in KINDS}
    original = {kind: whole_state(path) for kind, path in at.items()}
    for size in (1, 3, 2):  # restored, stopped and saved again
        again = [case(kind, stop=4, renamed=True, **settings) for kind, settings in KINDS.items()]
        more = [case("plain", ranked=False), case("ranked"), case("on")] if size == 1 else []
        answers = on_ranks(size, *again, *more)[0]
        for kind, answer in zip(KINDS, answers, strict=False):
            assert answer["resumed"] == 4
            # an alert is told when training goes on, which it does not here; what was restored is what was saved
            copied = whole_state(at[kind])
            assert copied.keys() == original[kind].keys()
            assert all(torch.equal(copied[name], original[kind][name]) for name in copied), (kind, size)
        if size == 1:
            assert near(tmp_path / "plain.safetensors", tmp_path / "ranked.safetensors")
            assert answers[-1]["alerts"] == ["resumed_elsewhere"]
            assert near(tmp_path / "on.safetensors", tmp_path / "two.safetensors")


def test_a_damaged_part_makes_all_ranks_take_the_checkpoint_before(on_ranks, case, tmp_path: Path) -> None:
    damaged = {"first": part_name(0, 2), "second": part_name(1, 2), "record": RECORD_FILE}
    on_ranks(2, case("whole"), *(case(name, stop=6) for name in damaged))
    for name, file in damaged.items():
        path = tmp_path / name / "step-00000006" / file
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    for answers in on_ranks(2, *(case(name) for name in damaged)):
        assert [answer["resumed"] for answer in answers] == [4, 4, 4]
    for name, answer in zip(damaged, on_ranks(2, *(case(name) for name in damaged))[0], strict=True):
        assert same(tmp_path / f"{name}.safetensors", tmp_path / "whole.safetensors")
        assert answer["resumed"] == 6
        assert list((tmp_path / name).glob("damaged-step-00000006-*"))
