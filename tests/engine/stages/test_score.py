"""What is odd is counted in the manifest, and left out or cut only where the recipe says so."""

import json
import sys

import numpy as np
import pytest

from opd_mcp.engine import stages
from opd_mcp.engine.cache.manifest import RolloutTally, read_cache, read_rollouts
from opd_mcp.engine.context import Context
from opd_mcp.engine.data.sequences import build_sequences
from opd_mcp.engine.scoring.local import ScoredRows
from opd_mcp.identity.data.scan import eval_overlap, normalised
from opd_mcp.identity.lineage import read_manifest
from opd_mcp.schemas.errors import RunError


def prompts_file(path, texts):
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return path


def test_duplicates_overlap_and_over_long_prompts_are_counted(build, tmp_path):
    prompts = prompts_file(tmp_path / "prompts.jsonl", ["1+1=?", "1+1=?", "2+2=?", "3+3=?", "1" * 40])
    evaluation = prompts_file(tmp_path / "eval.jsonl", ["2+2=?", " 3 + 3 = ? "])
    context = Context(build.recipe.runtime, build.recipe.prompting.model_copy(update={"max_prompt_tokens": 20}))
    recipe = build.recipe.rollout.model_copy(update={"count": None})
    rollouts = build.rollouts("rollouts", recipe=recipe, prompts=prompts, context=context, eval_prompts=evaluation)
    hygiene = read_manifest(build.cache(rollouts, "cache")).hygiene
    assert (hygiene.prompts, hygiene.duplicate_prompts, hygiene.over_long_prompts) == (5, 1, 1)
    assert (hygiene.eval_overlap_exact, hygiene.eval_overlap_normalised) == (1, 2)


def test_a_response_that_is_only_its_end_counts_as_empty():
    rows = build_sequences([[5]] * 4, [[2], [7, 2], [], [7]], finish_reasons=["eos", "eos", "length", "length"])
    tally = RolloutTally()
    tally.add(rows)
    assert tally.statistics().empty_responses == 2


def test_normalising_keeps_what_carries_meaning():
    assert normalised("What is  2 + 2?") == normalised("what is 2+2") == "whatis2+2"
    assert normalised("2+2") != normalised("22")
    assert eval_overlap(["A b", "c"], ["a B!"]) == {"eval_overlap_exact": 0, "eval_overlap_normalised": 1}


@pytest.fixture
def short_rollouts(build):
    """Rollouts of which some have no end."""
    sampling = build.recipe.rollout.sampling.model_copy(update={"max_new_tokens": 8})
    rollouts = build.rollouts("short", recipe=build.recipe.rollout.model_copy(update={"sampling": sampling}))
    truncated = np.asarray(read_rollouts(rollouts).finish_reasons) == "length"
    assert 0 < truncated.sum() < 40
    return rollouts, truncated


@pytest.mark.parametrize(("policy", "limit"), [("keep", None), ("drop", None), ("cap", None), ("cap", 2)])
def test_truncated_rollouts_are_kept_dropped_or_capped_and_counted(policy, limit, build, short_rollouts):
    rollouts, truncated = short_rollouts
    cache = build.cache(rollouts, "cache", recipe=build.scoring(on_truncated=policy, cap_tokens=limit))
    manifest, rows = read_cache(cache)
    count, hygiene = int(truncated.sum()), manifest.hygiene
    assert hygiene.on_truncated == policy
    assert hygiene.truncated_dropped == (count if policy == "drop" else 0)
    assert hygiene.truncated_capped == (count if policy == "cap" else 0)
    assert manifest.rollouts.rows == 40
    assert len(rows) == 40 - hygiene.truncated_dropped
    lengths = rows.response_lengths()[np.asarray(rows.finish_reasons) == "length"]
    assert set(lengths.tolist()) == {"keep": {8}, "drop": set(), "cap": {limit or 4}}[policy]
    drawn = read_rollouts(rollouts)
    whole = [row for row in range(40) if not truncated[row]]
    kept = [row for row in range(len(rows)) if rows.finish_reasons[row] == "eos"]
    assert all(np.array_equal(drawn.response(a), rows.response(b)) for a, b in zip(whole, kept, strict=True))


class Spoiling:
    """A local teacher whose log-probs of chosen prompts are spoiled: `values` by prompt id."""

    def __init__(self, teacher, values):
        self.teacher, self.values = teacher, values
        self.identity, self.vocab_size = teacher.identity, teacher.vocab_size

    def score(self, sequences, topk):
        scores = self.teacher.score(sequences, topk).scores
        for row, prompt_id in enumerate(sequences.prompt_row_ids):
            if prompt_id in self.values:
                scores.logprobs[sequences.response_offsets[row]] = self.values[prompt_id]
        return ScoredRows(scores)

    def prove(self):
        self.teacher.prove()

    def close(self):
        pass


@pytest.fixture
def spoil(monkeypatch):
    module = sys.modules[stages.score.__module__]
    real = module.open_local

    def spoiled(values):
        monkeypatch.setattr(module, "open_local", lambda *given: Spoiling(real(*given), values))

    return spoiled


def test_a_bad_row_in_a_hundred_is_left_out_with_its_reason(build, spoil):
    rollouts = build.rollouts("many", recipe=build.recipe.rollout.model_copy(update={"count": 200, "shard_rows": 100}))
    drawn = read_rollouts(rollouts)
    spoil({drawn.prompt_row_ids[7]: float("nan")})
    manifest, rows = read_cache(build.cache(rollouts, "cache"))
    assert manifest.hygiene.quarantined == {"log-prob is not finite": 1}
    assert len(rows) == 199
    assert drawn.prompt_row_ids[7] not in rows.prompt_row_ids


def test_more_than_one_in_a_hundred_fail_by_the_commonest_reason(build, drawn, spoil):
    ids = read_rollouts(drawn).prompt_row_ids[3:6]
    spoil({ids[0]: float("nan"), ids[1]: 0.5, ids[2]: 0.5})
    with pytest.raises(RunError, match=r"bad_rows.*3 of 40.*most often \(2\): log-prob above 0") as caught:
        build.cache(drawn, "cache")
    assert caught.value.value == ids[1]
    assert not (build.root / "cache" / "manifest.json").exists()


def test_engine_gap_and_teacher_delta_are_measured(build, drawn):
    manifest = read_manifest(build.cache(drawn, "cache"))  # the student's lineage proves its teacher
    assert manifest.engine_gap.tokens > 0
    assert manifest.engine_gap.largest < 1e-4
    assert (manifest.teacher_delta.basis, manifest.teacher_delta.mean_abs) == ("by_construction", 0)
    other = build.teacher.parent / "teacher_other_style"
    allowed = {"sft_teacher_path": build.teacher, "allow_teacher_mismatch": True}
    delta = read_manifest(build.cache(drawn, "other", teacher=other, **allowed)).teacher_delta
    assert delta.basis == "measured"
    assert delta.tokens > 0
    assert delta.mean_abs > 0.5
    assert delta.over_one_nat > 0.1
