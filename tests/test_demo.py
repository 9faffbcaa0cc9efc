"""The demo's screens, without running it: 80 columns, the guard, and Ctrl-C."""

import os
import signal
from io import StringIO
from pathlib import Path

import anyio
import pytest
from rich.console import Console

from opd_mcp.demo import (
    ARMS,
    Arm,
    DemoResult,
    Guard,
    cancelled_runs,
    conclusion_of,
    interruptible,
    show_result,
    stopped_text,
)
from opd_mcp.store.runs import cancel_requested_at


def screen_of(result: DemoResult, width: int = 80) -> str:
    console = Console(file=StringIO(), width=width)
    show_result(result, Path("/home/somebody/.local/share/opd-mcp/demos/arithmetic-0-20261128-120000"), console)
    return console.file.getvalue()


def demo_result(*, refused: bool = True) -> DemoResult:
    times = {"seconds": 1234.5, "seconds_total": 2345.6}
    arm = Arm(accuracy=0.8125, accuracy_ci=(0.7721, 0.8514), reverse_kl=10.25, steps=12800, **times)
    return DemoResult(
        task="arithmetic",
        arms=dict.fromkeys(ARMS["arithmetic"], arm),
        consistency_guard=Guard(refused=refused, message="[plan_blocked] Another teacher. Fix: this one."),
        wall_seconds=150.0,
        seed=7,
        conclusion=["BETTER: lightning_sampled is better than sft."],
    )


def test_the_last_screen_fits_80_columns_and_begins_with_the_verdict():
    screen = screen_of(demo_result())
    lines = screen.splitlines()
    assert lines[0] == "BETTER: lightning_sampled is better than sft."
    assert max(map(len, lines)) <= 80
    assert "…" not in screen, "no name or number is cut"
    for name in ARMS["arithmetic"]:
        assert any(line.split()[:1] == [name] and "2345.6" in line for line in lines)
    assert "refused as it should be" in screen


def test_a_loss_is_red_on_a_terminal():
    console = Console(file=StringIO(), width=80, force_terminal=True, color_system="standard", no_color=False)
    worse = demo_result().model_copy(update={"conclusion": ["WORSE: it is worse than sft.", "Next: lower the rate."]})
    show_result(worse.model_copy(update={"is_bad": True}), Path("/home"), console)
    first, second, *_ = console.file.getvalue().splitlines()
    assert first.startswith("\x1b[31mWORSE")
    assert second == "Next: lower the rate."


def test_a_quick_demo_says_first_that_it_proves_nothing():
    screen = screen_of(demo_result().model_copy(update={"changed": True}))
    assert " ".join(screen.split()).startswith(
        "This shows that everything runs here. After so few steps the figures prove"
    )
    assert "prove nothing" not in screen_of(demo_result())


def test_a_guard_that_let_it_pass_is_said():
    assert "NOT REFUSED" in screen_of(demo_result(refused=False))


def test_the_conclusion_names_the_arms_and_the_page():
    verdict = {"judgement": "better", "sentence": "model-1 beats sft-2, a student.", "next_action": {"why": "Use it."}}
    scores = {"model-1": {}, "sft-2": {}, "student": {}}
    result = {"verdict": verdict, "scores": scores, "paths": {"report_page": "/r/report.html"}}
    lines = conclusion_of(result, ["lightning_sampled", "sft", "base"])
    assert lines == ["BETTER: lightning_sampled beats sft, a student.", "Next: Use it.", "/r/report.html"]


def test_ctrl_c_ends_the_work_and_cancels_its_runs(world, service, busy_machine):
    async def work() -> str:
        os.kill(os.getpid(), signal.SIGINT)
        await anyio.sleep_forever()
        return "never"

    assert anyio.run(interruptible, work) is None
    run_id = service.start_distillation(world.start_arguments()).run_id
    home = world.root / "home"
    assert cancelled_runs(home) == [run_id]
    assert cancel_requested_at(home / "runs" / run_id)
    assert f"1 of its runs are cancelled ({run_id})" in stopped_text(home, [run_id])
    assert cancelled_runs(world.root / "nothing") == []


def test_work_that_ends_or_fails_by_itself_is_not_interrupted():
    async def answers() -> str:
        return "done"

    async def fails() -> str:
        raise ValueError("by itself")

    assert anyio.run(interruptible, answers) == "done"
    with pytest.raises(ExceptionGroup):
        anyio.run(interruptible, fails)
