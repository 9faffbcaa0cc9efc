"""Exact reverse KL against torch's own, and over padded vocabularies; where tokens end in the text that they make."""

import pytest
import torch

from opd_mcp.engine.evaluation.model_score import reverse_kl_rows, token_ends


def test_equals_torch_kl_div() -> None:
    student, teacher = torch.randn(2, 6, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.kl_div(
        teacher.log_softmax(-1), student.log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    assert (reverse_kl_rows(student, teacher) - expected).abs().max() < 1e-12


def test_padding_of_one_vocabulary_is_left_out() -> None:
    student = torch.randn(6, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    padded = torch.cat([student, torch.randn(6, 3, dtype=torch.float64)], dim=1)
    assert reverse_kl_rows(student, padded).abs().max().item() == pytest.approx(0, abs=1e-12)


def test_tokens_end_where_their_text_does_and_bytes_of_one_character_end_with_its_last() -> None:
    words = {1: b"a", 2: "é".encode()[:1], 3: "é".encode()[1:], 4: b"", 5: "漢".encode()}

    def text_of(ids: list[int]) -> str:
        return b"".join(words[id] for id in ids).decode(errors="replace")

    assert token_ends([1, 2, 3, 5, 4], text_of) == [1, 1, 2, 3, 3]
    assert token_ends([1, 2], text_of) == [1, 1]  # cut in the middle of a character
    assert token_ends([], text_of) == []
