"""The memory of one of several ranks, by formula."""

from dataclasses import replace

import pytest

from opd_mcp.schemas.memory import AdapterSize, Division, ModelShape, StepSize, training_memory

QWEN3_8B = ModelShape(8_190_735_360, 36, 4096, 32 * 128, 8 * 128, 12288, 151936)
ROOM = 80 * 10**9
STEP = StepSize("fp32_master", 16384, "bfloat16", "cuda")


def total(ranks: int, step: StepSize = STEP) -> int:
    return training_memory(QWEN3_8B, replace(step, ranks=ranks), "auto", ROOM).total


def test_all_weights_of_8b_fit_eight_80_gb_devices_and_not_one() -> None:
    assert total(1) > 130e9
    assert 45e9 < total(8) < 0.9 * ROOM
    assert total(16) < total(8)


def test_what_is_divided_falls_with_the_ranks_and_the_gathered_vocabulary_stays() -> None:
    one, eight, many = (training_memory(QWEN3_8B, replace(STEP, ranks=ranks), "full", ROOM) for ranks in (1, 8, 10**6))
    assert eight.optimizer == one.optimizer // 8
    assert eight.activations == one.activations
    vocabulary = 2 * QWEN3_8B.vocab * QWEN3_8B.hidden
    assert many.weights == pytest.approx(4 * vocabulary, rel=0.2)
    assert many.gradients == pytest.approx(4 * vocabulary, rel=0.2)


def test_an_adapter_is_whole_on_each_rank() -> None:
    step = replace(STEP, adapter=AdapterSize(87_000_000, 32 * 7, 2))
    one, eight = (training_memory(QWEN3_8B, replace(step, ranks=ranks), "full", ROOM) for ranks in (1, 8))
    assert (eight.optimizer, eight.gradients) == (one.optimizer, one.gradients)
    assert eight.weights < one.weights / 2


def test_the_vocabulary_is_divided_in_the_step_where_gathering_it_does_not_fit() -> None:
    eight = replace(STEP, ranks=8)
    gathered, divided = (
        training_memory(QWEN3_8B, replace(eight, vocabulary=way), "auto", ROOM) for way in ("gathered", "divided")
    )
    assert (gathered.divided, divided.divided) == (False, True)
    assert training_memory(QWEN3_8B, eight, "auto", ROOM) == gathered
    tight = training_memory(QWEN3_8B, eight, "auto", 50 * 10**9)
    assert tight.divided
    assert gathered.total > 0.9 * 50 * 10**9 > tight.total


def test_a_divided_vocabulary_falls_with_the_ranks_and_one_process_has_none() -> None:
    step = replace(STEP, vocabulary="divided")
    one, eight, many = (training_memory(QWEN3_8B, replace(step, ranks=ranks), "full", ROOM) for ranks in (1, 8, 10**6))
    assert not one.divided
    assert many.gradients < eight.gradients < one.gradients / 4
    whole = 4 * QWEN3_8B.vocab * QWEN3_8B.hidden
    assert many.weights + many.gradients < 2 * whole  # less than the gathered head and its gradient
    adapter = AdapterSize(87_000_000, 32 * 7, 2)
    frozen = [
        training_memory(QWEN3_8B, replace(STEP, ranks=8, vocabulary=way, adapter=adapter), "full", ROOM).weights
        for way in ("gathered", "divided")
    ]
    assert frozen[0] - frozen[1] > 2 * QWEN3_8B.vocab * QWEN3_8B.hidden


def test_a_mixture_of_30b_fits_eight_80_gb_devices_with_a_divided_vocabulary_alone() -> None:
    qwen3_30b_a3b = ModelShape(30_532_122_624, 48, 2048, 32 * 128, 4 * 128, 8 * 768, 151936, experts=True)
    step = replace(STEP, tokens=4096, ranks=8)
    found = training_memory(qwen3_30b_a3b, step, "auto", ROOM)
    assert found.divided
    assert (
        found.total
        < 0.9 * ROOM
        < training_memory(qwen3_30b_a3b, replace(step, vocabulary="gathered"), "full", ROOM).total
    )


def test_a_rank_of_replicas_holds_what_one_of_as_many_ranks_as_a_replica_has_does() -> None:
    two_nodes, one_node = replace(STEP, ranks=16, replicas=2), replace(STEP, ranks=8)
    assert training_memory(QWEN3_8B, two_nodes, "auto", ROOM) == training_memory(QWEN3_8B, one_node, "auto", ROOM)
    # a replica on one rank is gathered there too, which one process does not do
    alone = training_memory(QWEN3_8B, replace(STEP, ranks=2, replicas=2), "full", 10**12)
    assert alone.optimizer == training_memory(QWEN3_8B, STEP, "full", 10**12).optimizer
    assert alone.gradients > 4 * QWEN3_8B.parameters


@pytest.mark.parametrize(
    ("wish", "ranks", "nodes", "gigabytes", "replicas"),
    [
        ("auto", 16, 2, 80, 2),  # 8 devices of 80 GB hold an 8B
        ("auto", 4, 2, 80, 1),  # 2 do not
        ("auto", 16, 1, 80, 1),  # one machine, or an uneven number on each
        (1, 16, 2, 80, 1),
        (4, 16, 2, 80, 4),
    ],
)
def test_by_itself_each_node_holds_a_replica_where_it_fits(wish, ranks, nodes, gigabytes, replicas) -> None:
    division = Division(wish, nodes, gigabytes * 10**9)
    assert division.replicas(QWEN3_8B, replace(STEP, ranks=ranks), "auto") == replicas
