"""What a managed engine answers, against transformers: drawn and given tokens, seeds, new weights, killed processes.

Run: `python tools/evidence/engine_wire.py --kind sglang --program V/bin/python [--dtype bfloat16] [--tied]`, where the
program is what `[engines]` of a workspace's settings names. The model is a seeded random Qwen3 of 512 ids with heads of
64 dimensions. The engine is started, asked and read by this program's own code, 16 requests at a time:

1. 48 rows drawn at temperature 0.8 and top-p 0.95, the same tokens given, and 16 greedy rows: log-probs against those
   of transformers in float32, and the server's own against each other. 8 rows are drawn again with their seeds.
2. It is given other weights in place, and scores the same tokens: against transformers with those weights.
3. Each of its processes is killed; it must answer as before, and in the end no process may be left.

It prints one JSON line and exits with 1 where a float32 log-prob is further than 1e-4 nats, or a process is left.
"""

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from opd_mcp.engine.generation.batch_state import Generated
from opd_mcp.engine.generation.served import Ask, draw_body, read_drawn
from opd_mcp.engine.scoring.connection import Access, Server
from opd_mcp.engine.scoring.dialects import PATHS, Dialect, TokenScores, read_answer, request_body
from opd_mcp.schemas.recipes import Sampling
from opd_mcp.schemas.runs import EngineSettings
from opd_mcp.worker.engines import EngineModel, EngineProgram, ManagedEngine, marked
from tools import EXAMPLE

BAR = 1e-4  # nats
ROWS, GREEDY, AGAIN, AT_A_TIME = 48, 16, 8, 16
LENGTH, TOPK, VOCAB = 120, 4, 512
DRAWN = Sampling(temperature=0.8, top_p=0.95, max_new_tokens=40)
WAIT_SECONDS = 600.0
Scored = Callable[[Sequence[int]], np.ndarray]


def random_model(path: Path, seed: int, *, tied: bool) -> Path:
    """A Qwen3 whose weights are drawn, with the files of a tokenizer that knows its first ids."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "head_dim": 64}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512}
    config = Qwen3Config(vocab_size=VOCAB, **shape, **heads, tie_word_embeddings=tied, initializer_range=0.05)
    Qwen3ForCausalLM(config).save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copyfile(EXAMPLE / "teacher" / name, path / name)
    return path


def by_transformers(path: Path) -> Scored:
    """From ids to the log-probs [T, V] of what follows each, in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)

    def scored(ids: Sequence[int]) -> np.ndarray:
        with torch.no_grad():
            return np.asarray(torch.log_softmax(model(torch.tensor([list(ids)])).logits[0].double(), -1))

    return scored


@dataclass(frozen=True)
class Asked:
    """An engine that answers, and how it is asked."""

    engine: ManagedEngine

    @property
    def dialect(self) -> Dialect:
        """Its words."""
        return "sglang" if self.engine.program.kind == "sglang" else "vllm"

    def answer(self, body: dict[str, Any]) -> Any:
        """What it answers to one request."""
        with closing(Server(self.engine.url, Access(self.engine.key, role="engine"))) as server:
            return server.ask("POST", PATHS[self.dialect], body)

    def drawn(self, ask: Ask) -> Generated:
        """One response."""
        body = draw_body(self.dialect, self.engine.model.served_name, ask)
        return read_drawn(self.dialect, self.answer(body), ask)

    def scores(self, row: tuple[Sequence[int], int]) -> TokenScores:
        """The scores of `ids[start:]`."""
        ids, start = row
        body = request_body(self.dialect, self.engine.model.served_name, ids, start, TOPK)
        return read_answer(self.dialect, self.answer(body), ids, start, TOPK)


def answers(asked: Asked, model: Scored) -> tuple[dict[str, Any], list[tuple[list[int], int]]]:
    """The figures of rows drawn and given, and those rows with the start of their responses."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(2, VOCAB, size=rng.integers(4, 40)).tolist() for _ in range(ROWS)]
    asks = [Ask(ids, DRAWN, (1,), 1000 + row) for row, ids in enumerate(prompts)]
    greedy = [Ask(ids, DRAWN.model_copy(update={"temperature": 0.0}), (1,), 5) for ids in prompts[:GREEDY]]
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        drawn = list(pool.map(asked.drawn, asks))
        rows = [([*ids, *row.response_ids], len(ids)) for ids, row in zip(prompts, drawn, strict=True)]
        given = list(pool.map(asked.scores, rows))
        best = list(pool.map(asked.drawn, greedy))
    again = [asked.drawn(ask).response_ids == row.response_ids for ask, row in zip(asks[:AGAIN], drawn, strict=False)]
    expected = [model(ids)[start - 1 : -1] for ids, start in rows]
    own = [table[range(len(table)), ids[start:]] for table, (ids, start) in zip(expected, rows, strict=True)]
    order = [np.argsort(-table, axis=-1, kind="stable")[:, :TOPK].tolist() for table in expected]
    same = [
        mine == theirs
        for table, row in zip(order, given, strict=True)
        for mine, theirs in zip(table, row.topk_ids, strict=True)
    ]
    other = 0
    for ask, row in zip(greedy, best, strict=True):
        table = model([*ask.ids, *row.response_ids])[len(ask.ids) - 1 : -1]
        other += int((table.argmax(-1) != np.array(row.response_ids)).sum())
    return {
        "drawn": distance([row.logprobs for row in drawn], own),
        "given": distance([row.logprobs for row in given], own),
        "drawn_and_given": distance([row.logprobs for row in drawn], [row.logprobs for row in given]),
        "same_top_k": f"{sum(same)} of {len(same)}",
        "other_greedy": f"{other} of {sum(len(row.response_ids) for row in best)}",
        "same_seed_same_row": f"{sum(again)} of {AGAIN}",
    }, rows


def distance(some: Sequence[Any], others: Sequence[Any]) -> dict[str, float]:
    """|difference| over all tokens."""
    gaps = np.concatenate([np.abs(np.array(a) - np.array(b)) for a, b in zip(some, others, strict=True)])
    return {"tokens": len(gaps), "mean": float(f"{gaps.mean():.2g}"), "largest": float(f"{gaps.max():.2g}")}


def rescored(asked: Asked, model: Scored, rows: Sequence[tuple[list[int], int]]) -> dict[str, float]:
    """The distance of given tokens from a model's."""
    own = [model(ids)[start - 1 : -1][range(len(ids) - start), ids[start:]] for ids, start in rows]
    return distance([asked.scores(row).logprobs for row in rows], own)


def roles(run: Path) -> dict[str, int]:
    """The engine's processes by their titles, or `server`."""
    found = dict[str, int]()
    for pid in sorted(marked(run)):
        words = psutil.Process(pid).cmdline()
        if words and "::" in words[0]:
            found.setdefault(words[0].split()[0], pid)
        elif any(word.endswith(("opd_sglang_start.py", ".api_server")) or word == "serve" for word in words[:4]):
            found.setdefault("server", pid)
    return found


def killed(asked: Asked, model: Scored, rows: Sequence[tuple[list[int], int]]) -> dict[str, Any]:
    """By process: seconds until the engine answers again after it was killed, and how near its scores are."""
    engine, found = asked.engine, dict[str, Any]()
    for role in roles(engine.run):
        before, begun = engine.restarts, time.monotonic()
        os.kill(roles(engine.run)[role], signal.SIGKILL)
        while engine.restarts == before or engine._health() != 200:
            engine.check()
            if time.monotonic() - begun > WAIT_SECONDS:
                return found | {role: "no answer"}
            time.sleep(0.5)
        found[role] = {"seconds": round(time.monotonic() - begun, 1), "given": rescored(asked, model, rows)}
    return found


def measured(given: argparse.Namespace, root: Path) -> dict[str, Any]:
    """All figures."""
    first, second = (random_model(root / name, seed, tied=given.tied) for seed, name in enumerate(("first", "second")))
    (root / "run").mkdir()
    engine = ManagedEngine(
        EngineProgram(given.kind, str(given.program.absolute()), root / "caches", on_gpu=False),
        EngineModel(first, given.dtype, LENGTH, TOPK, reloads=True),
        root / "run",
        EngineSettings(start_seconds=WAIT_SECONDS, restarts=20),
        lambda: False,
        lambda code, message: print(code, message, file=sys.stderr),
    )
    asked, begun = Asked(engine), time.monotonic()
    with engine.running():
        found: dict[str, Any] = {"kind": given.kind, "dtype": given.dtype, "tied": given.tied}
        found |= {"start_seconds": round(time.monotonic() - begun, 1)}
        figures, rows = answers(asked, by_transformers(first))
        found |= figures | {"before": rescored(asked, other := by_transformers(second), rows[:4])}
        found |= {"took_weights": engine.reload(second), "given_after": rescored(asked, other, rows)}
        found |= {"killed": {} if given.without_kills else killed(asked, other, rows[:4])}
    return found | {"left_over": len(marked(engine.run))}


def main(given: argparse.Namespace) -> int:
    """Print one JSON line; the exit status."""
    with tempfile.TemporaryDirectory() as folder:
        found = measured(given, Path(folder))
    print(json.dumps(found))
    far = [found[name]["largest"] for name in ("drawn", "given", "drawn_and_given")]
    return int(found["left_over"] > 0 or (given.dtype == "float32" and max(far) > BAR))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    found.add_argument("--kind", required=True, choices=("vllm", "sglang"))
    found.add_argument("--program", required=True, type=Path)
    found.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    found.add_argument("--tied", action="store_true", help="a head that is the embedding")
    found.add_argument("--without-kills", action="store_true")
    return found


if __name__ == "__main__":
    sys.exit(main(parser().parse_args()))
