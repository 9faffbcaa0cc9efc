"""A feed of the dashboard as a workspace with finished and active runs gives it, and a server of the page with it."""

import math
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

from opd_mcp.schemas.answers import (
    ComparedArm,
    ComparedRun,
    CurveMark,
    DashboardFeed,
    DashboardRun,
    PairedRuns,
    RunComparison,
    RunDetail,
    RunDocument,
    ShownPhase,
)
from opd_mcp.schemas.next_action import NextAction, next_call
from opd_mcp.schemas.reports import Curve, ShownAnswers, StageCost, TokenRatios, Verdict
from opd_mcp.schemas.runs import Alert, Progress, RunRow
from opd_mcp.server.page.assembly import dashboard_html

MARKUP = "<img src=x onerror=\"document.title='hacked'\">"
BETTER = Verdict(
    judgement="better",
    sentence="accuracy +0.548 [+0.499, +0.597] over the SFT student (0.868 against 0.320), 86 % of the gap to the "
    "teacher closed, for 2 min of compute.",
    next_action=next_call("plan_distillation", "A second round begins with this student."),
)
PHASES = ("generate_responses", "sft", "rollout", "score", "distill", "benchmark")
SECONDS = (2.4, 26.0, 21.0, 22.0, 39.0, 30.0)


def falling(key: str, steps: int, start: float, end: float, noise: float = 0.06) -> Curve:
    """A noisy metric that falls, the same each time."""
    draw = random.Random(key)
    values = [end + (start - end) * math.exp(-4 * step / steps) for step in range(steps)]
    return Curve(
        key=key,
        steps=[4 * (step + 1) for step in range(steps)],
        values=[round(value * (1 + draw.gauss(0, noise)), 5) for value in values],
    )


def sample(prompt: str, answer: str, before: str, after: str) -> ShownAnswers:
    """A prompt with three answers, one token a character."""
    draw = random.Random(prompt)
    responses = {"lightning-student": after, "sft-student": before, "teacher": after}
    tokens = {
        name: TokenRatios(
            ends=[*range(1, len(text) + 1), len(text)],
            log_ratios=[round(draw.gauss(-0.4 if name == "sft-student" else 0, 1), 3) for _ in range(len(text) + 1)],
        )
        for name, text in responses.items()
        if name != "teacher"
    }
    right = {name: answer in text for name, text in responses.items()}
    return ShownAnswers(prompt=prompt, answer=answer, responses=responses, tokens=tokens, right=right)


def finished_run() -> DashboardRun:
    """A distillation with everything that the page can show."""
    settings = {f"distill.setting_{number}": number for number in range(30)} | {"distill.steps": 400, "sft.steps": 250}
    return DashboardRun(
        run_id="lightning-student-ec6357",
        kind="distill",
        state="succeeded",
        verdict=BETTER,
        created_at="2026-11-28T17:40:00Z",
        name="lightning sampled, 400 steps",
        tags=["demo", "arithmetic"],
        notes=f"The embedded task. {MARKUP}",
        models="student ← teacher",
        phases=[ShownPhase(name=name, state="done") for name in PHASES],
        elapsed_s=141,
        curves=[
            falling("distill.held_out_reverse_kl", 8, 1.2, 0.1),
            falling("distill.held_out_accuracy", 8, 0.3, 0.8),
            falling("distill.reverse_kl_k1", 100, 0.7, 0.05),
            falling("distill.loss", 100, 0.3, -0.05, 0.4),
            falling("distill.reverse_kl_k3", 100, 300, 20, 0.2),
            falling("distill.gradient_norm", 100, 2.5, 1.2),
            falling("sft.loss", 60, 3.1, 0.04, 0.01),
        ],
        alerts=[
            Alert(time="2026-11-28T17:41:00Z", code="kl_rising", message=f"Reverse KL rose for 40 steps. {MARKUP}")
        ],
        costs=[
            StageCost(stage=name, seconds=seconds, tokens=int(seconds * 9000), reused=name == "sft")
            for name, seconds in zip(PHASES, SECONDS, strict=True)
        ],
        scores={
            "lightning-student": {"greedy_accuracy": [0.868, 0.836, 0.895], "reverse_kl": [0.101, 0.066, 0.151]},
            "sft-student": {"greedy_accuracy": [0.32, 0.281, 0.362], "reverse_kl": [4.47, 4.37, 4.57]},
            "live-student": {"greedy_accuracy": [0.596, 0.552, 0.638], "reverse_kl": [0.308, 0.264, 0.359]},
            "teacher": {"greedy_accuracy": [0.97, 0.951, 0.982]},
        },
        comparisons=[
            {"candidate": "lightning-student", "baseline": name, "accuracy_difference": difference}
            for name, difference in {
                "sft-student": [0.548, 0.499, 0.597],
                "live-student": [0.272, 0.229, 0.315],
                "teacher": [-0.102, -0.131, -0.073],
            }.items()
        ],
        teacher_row="teacher",
        detail=RunDetail(
            preset="demo",
            settings=settings,
            changed=["distill.steps"],
            inputs={"student": "/data/examples/arithmetic/student", "teacher": "/data/examples/arithmetic/teacher"},
            planned_seconds=dict(zip(PHASES, (3.0, 30.0, 18.0, 20.0, 45.0, 25.0), strict=True)),
            log=["255 of 256 responses of the teacher are right by `regex`", f"measuring {MARKUP}"],
            marks=[
                CurveMark(phase="distill", step=160, kind="alert", text="kl_rising"),
                CurveMark(phase="distill", step=300, kind="checkpoint", text="checkpoint"),
            ],
            samples=[
                sample("What is 17 + 25?", "42", "17 + 25 = 41\n#### 41", "17 + 25 = 42\n#### 42"),
                sample(f"What is 9 × 6? {MARKUP}", "54", MARKUP, "9 × 6 = 54\n#### 54"),
            ],
            documents=[RunDocument(kind="report", path="/w/report", resource="opd://runs/x/report")],
        ),
    )


def running_run() -> DashboardRun:
    """A distillation half way."""
    states = ("done", "done", "done", "done", "running", "waiting")
    done = finished_run()
    assert done.detail is not None
    changes = {
        "run_id": "lightning-student-7f0c11",
        "name": f"lightning top-k, warm start {MARKUP}",
        "state": "running",
        "verdict": None,
        "phases": [ShownPhase(name=name, state=state) for name, state in zip(PHASES, states, strict=True)],
        "progress": Progress(done=120, total=400, unit="steps"),
        "eta_s": 64.0,
        "costs": done.costs[:4],
        "scores": {},
        "comparisons": [],
        "curves": done.curves[2:6],
        "alerts": [],
        "detail": done.detail.model_copy(update={"samples": [], "documents": []}),
    }
    return done.model_copy(update=changes)


def compared(runs: list[DashboardRun]) -> RunComparison:
    """The table of the runs, one setting apart."""
    rows = [
        ComparedRun(
            run_id=run.run_id,
            name=run.name,
            kind="distill",
            state=run.state,
            settings={"distill.learning_rate": 0.001 / (place + 1), "distill.estimator": "sampled"},
            accuracy=(0.868 - place / 9, 0.836 - place / 9, 0.895 - place / 9),
            reverse_kl=(0.101, 0.066, 0.151),
            baseline="sft-student",
            gain=(0.548 - place, 0.499 - place, 0.597 - place),
            verdict="worse" if place else "better",
            seconds=141.0,
        )
        for place, run in enumerate(runs)
    ]
    pair = PairedRuns(
        candidate=rows[0].run_id, baseline=rows[1].run_id, accuracy_difference=(0.1, 0.05, 0.15), prompts=500
    )
    return RunComparison(
        settings=["distill.learning_rate", "distill.estimator"],
        runs=rows,
        best=rows[0].run_id,
        paired=[pair],
        arms=[
            ComparedArm(arm="asked", runs=3, accuracy=0.868, reverse_kl=0.101, seconds=141.0),
            ComparedArm(arm="live", runs=3, accuracy=0.596, seconds=230.0, gain=(0.272, 0.229, 0.315)),
        ],
        notes=["The best of 2 was chosen by these figures, which flatters it."],
        next_action=NextAction(why="Measure the best on prompts that chose nothing."),
    )


def demo_feed(chosen: list[str]) -> DashboardFeed:
    """The feed with the chosen of two runs in full, the running one by default; eleven are listed."""
    full = [running_run(), finished_run()]
    runs = [run for run in full if run.run_id in chosen] or full[:1]
    others = ("better", "worse", "no_difference", "unknown")
    listed = [
        RunRow(run_id=run.run_id, kind=run.kind, state=run.state, name=run.name, created_at=run.created_at, note=note)
        for run, note in zip(full, (None, "better"), strict=True)
    ] + [
        RunRow(
            run_id=f"lightning-student-{number}",
            kind="distill",
            state="failed" if number == 4 else "succeeded",
            name=f"learning rate {number}e-4, rank {2**number}",
            created_at=f"2026-11-28T1{number}:00:00Z",
            note=None if number == 4 else others[number % 4],
        )
        for number in range(9)
    ]
    sparks = {row.run_id: falling(row.run_id, 24, 1.0, 0.1).values for row in listed[:8]}
    comparison = compared(runs) if len(runs) > 1 else None
    return DashboardFeed(runs=runs, listed=listed, total=31, next_cursor="next", sparks=sparks, comparison=comparison)


@contextmanager
def served_page() -> Iterator[str]:
    """The address of the page with the demo's feed."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            address = urlsplit(self.path)
            chosen = parse_qs(address.query).get("run_ids", [""])[0].split(",")
            is_feed = address.path == "/dashboard/feed"
            body = demo_feed(chosen).to_json() if is_feed else dashboard_html()
            self.send_response(200)
            self.send_header("Content-Type", "application/json" if is_feed else "text/html; charset=utf-8")
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *arguments: object) -> None:
            """Nothing on stderr."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/dashboard"
        server.shutdown()
