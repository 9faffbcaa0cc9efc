"""Scores of a local teacher against transformers' own logits."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from opd_mcp.engine.data.encoding import EncodedPrompt
from opd_mcp.engine.data.sequences import Sequences, build_sequences
from opd_mcp.engine.generation.batch_state import GenerationSettings
from opd_mcp.engine.generation.generator import LocalGenerator, RankGenerator
from opd_mcp.engine.losses import logit_tiles as tiles
from opd_mcp.engine.models.loading import LoadedModel
from opd_mcp.engine.parts import Arrays, Shares
from opd_mcp.engine.runtime import Runtime
from opd_mcp.engine.scoring.local import Scoring, TeacherScores, score_sequences, scored_in_shares
from opd_mcp.identity.data.rows import PromptRow
from opd_mcp.identity.models import ModelFacts, inspect_model
from opd_mcp.schemas.recipes import Sampling

VOCAB, K = 13, 4


@pytest.fixture
def teacher(tiny_model: Callable[..., PreTrainedModel], facts: ModelFacts) -> LoadedModel:
    return LoadedModel(tiny_model(VOCAB, seed=5, dtype=torch.float32), facts, facts.path)


@pytest.fixture
def facts(example: Path) -> ModelFacts:
    return inspect_model(example / "student")


@pytest.fixture
def sequences() -> Sequences:
    rng = np.random.default_rng(1)
    sizes = [(3, 5), (1, 9), (6, 0), (2, 1)]
    return build_sequences(*[[rng.integers(0, VOCAB, size=pair[i]).tolist() for pair in sizes] for i in (0, 1)])


def expected_logprobs(teacher: LoadedModel, sequences: Sequences) -> torch.Tensor:
    """[T, V] log-probs of every response position, row by row through transformers."""
    rows = []
    for row in range(len(sequences)):
        prompt, response = sequences.prompt(row), sequences.response(row)
        ids = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))[None]
        with torch.no_grad():
            logits = teacher.model(input_ids=ids).logits[0]
        rows.append(torch.log_softmax(logits[len(prompt) - 1 : len(prompt) + len(response) - 1], dim=-1))
    return torch.cat(rows)


@pytest.mark.parametrize("tile_rows", [2, 1000])
def test_scores_and_top_k_equal_transformers(
    teacher: LoadedModel, sequences: Sequences, runtime: Runtime, tile_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(tiles.TILE_BYTES, "cpu", 4 * VOCAB * tile_rows)
    scores = score_sequences(teacher, sequences, topk=K, micro_batch_tokens=20, runtime=runtime)
    expected = expected_logprobs(teacher, sequences)
    targets = torch.from_numpy(sequences.response_ids.astype(np.int64))
    top = expected.topk(K, dim=-1)
    assert np.allclose(scores.logprobs, expected.gather(1, targets[:, None])[:, 0], atol=1e-5)
    assert (scores.topk_ids == top.indices.numpy()).all()
    assert np.allclose(scores.topk_logprobs, top.values, atol=1e-5)


def test_top_k_leaves_a_padded_vocabulary_out_of_the_ids_but_not_of_the_softmax(
    teacher: LoadedModel, sequences: Sequences, runtime: Runtime
) -> None:
    scores = score_sequences(teacher, sequences, topk=K, micro_batch_tokens=20, runtime=runtime, valid_vocab=6)
    expected = expected_logprobs(teacher, sequences)[:, :6].topk(K, dim=-1)
    assert (scores.topk_ids == expected.indices.numpy()).all()
    assert np.allclose(scores.topk_logprobs, expected.values, atol=1e-5)


def test_without_top_k_only_the_sampled_tokens_are_scored(
    teacher: LoadedModel, sequences: Sequences, runtime: Runtime
) -> None:
    scores = score_sequences(teacher, sequences, topk=0, micro_batch_tokens=20, runtime=runtime)
    assert list(scores.columns()) == ["teacher_logprobs"]


@pytest.mark.parametrize("size", [2, 5])
def test_processes_that_share_batches_have_the_rows_and_scores_of_one(teacher, runtime: Runtime, size: int) -> None:
    """To the bit, also where some have no batch."""
    lengths = [3, 1, 6, 2, 4]
    prompts = [EncodedPrompt(PromptRow(f"p{n}", "x"), [2 + n] * length) for n, length in enumerate(lengths)]
    settings = GenerationSettings(Sampling(max_new_tokens=6), [1], batch_size=2, seed=0, scope="test")
    one = LocalGenerator(teacher).draw(prompts, settings)
    how = Scoring(K, 20)
    expected = score_sequences(teacher, one, topk=K, micro_batch_tokens=20, runtime=runtime)
    left: list[Arrays] = [{}] * size
    barrier = Barrier(size)

    def work(number: int) -> tuple[Sequences, TeacherScores]:
        def exchanged(mine: Arrays) -> list[Arrays]:
            left[number] = mine
            barrier.wait()
            found = list(left)
            barrier.wait()
            return found

        shares = Shares(number, size, exchanged)
        drawn = RankGenerator(teacher, shares).draw(prompts, settings)
        return drawn, scored_in_shares(teacher, drawn, how, runtime, shares)

    with ThreadPoolExecutor(size) as pool:
        for drawn, scores in pool.map(work, range(size)):
            assert drawn.prompt_row_ids == one.prompt_row_ids
            assert drawn.finish_reasons == one.finish_reasons
            assert np.array_equal(drawn.response_ids, one.response_ids)
            assert np.array_equal(drawn.columns["behaviour_logprobs"], one.columns["behaviour_logprobs"])
            for name, values in expected.columns().items():
                assert np.array_equal(scores.columns()[name], values), name
