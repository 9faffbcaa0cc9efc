"""Where the kernel cannot run, the reason is known."""

import sys

import pytest
import torch

from opd_mcp.engine.losses.logit_tiles import kernel_problem


def test_without_triton_the_reason_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)  # as if it were not installed
    assert kernel_problem.__wrapped__(torch.device("cpu")) == "Triton is not installed"
