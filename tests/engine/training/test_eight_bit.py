"""8-bit moments: torchao's own step to the bit, saved and restored to the bit, and as good as float32 moments."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from opd_mcp.engine.training.optim import build_optimizer
from opd_mcp.schemas.errors import ResourceError
from opd_mcp.schemas.recipes import OptimizerRecipe

pytest.importorskip("torchao", reason="make test-extras: torchao is not installed")
from torchao.optim import AdamW8bit
from torchao.optim.subclass_8bit import OptimState8bit

from opd_mcp.engine.training.eight_bit import EightBitAdamW

pytestmark = pytest.mark.needs("torchao")
RECIPE = OptimizerRecipe(learning_rate=1e-3, precision="fp32_master_8bit")
VOCAB, ROW = 512, 128


def optimizer_of(weights: list[nn.Parameter], chunk: int = 1 << 22) -> EightBitAdamW:
    return EightBitAdamW([{"params": weights, "weight_decay": 0.1}], RECIPE, exact=[], chunk=chunk)


def random_weights(*shapes: tuple[int, ...]) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(0.02 * torch.randn(*shape, generator=generator)) for shape in shapes]


def give_gradients(weights: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for weight in weights:
        weight.grad = torch.randn(weight.shape, generator=generator)


def moments(optimizer: torch.optim.Optimizer, number: int) -> dict[str, torch.Tensor]:
    return optimizer.state_dict()["state"][number]


@pytest.mark.parametrize("chunk", [512, 1 << 22])
def test_a_step_is_the_librarys_own_to_the_bit(chunk: int) -> None:
    """Whole blocks, a weight that is not a multiple of a block, a small one, and one without a gradient."""
    shapes = ((64, 132), (4099,), (32,), (64, 64))
    ours, theirs = random_weights(*shapes), random_weights(*shapes)
    reference = AdamW8bit(theirs, lr=1e-3, betas=RECIPE.betas, eps=RECIPE.eps, weight_decay=0.1)
    optimizer = optimizer_of(ours, chunk)
    for step in range(5):
        for weights, each in ((ours, optimizer), (theirs, reference)):
            give_gradients(weights[:3], step)
            with torch.compiler.set_stance("force_eager"):
                each.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    kept = [type(reference.state[weight]["exp_avg"]) is OptimState8bit for weight in theirs[:3]]
    assert kept == [True, False, False]
    assert torch.equal(moments(optimizer, 0)["exp_avg.codes"], reference.state[theirs[0]]["exp_avg"].codes)
    assert not optimizer.state[ours[3]]


def test_the_state_goes_through_safetensors_to_the_bit(tmp_path: Path) -> None:
    """Plain tensors only, and a training goes on as if it had never stopped."""
    whole, first, second = (random_weights((64, 64), (64, 3)) for _ in range(3))
    optimizers = [optimizer_of(weights) for weights in (whole, first, second)]
    for step in range(6):
        give_gradients(whole, step)
        optimizers[0].step()
    for step in range(3):
        give_gradients(first, step)
        optimizers[1].step()
    state = optimizers[1].state_dict()["state"]
    save_file({f"{n}.{name}": value for n, part in state.items() for name, value in part.items()}, tmp_path / "state")
    loaded: dict[int, dict[str, torch.Tensor]] = {0: {}, 1: {}}
    for key, value in load_file(tmp_path / "state").items():
        loaded[int(key[0])][key[2:]] = value
    assert {name: value.dtype for name, value in loaded[0].items() if name.startswith("exp_avg.")} == {
        "exp_avg.codes": torch.uint8,
        "exp_avg.scale": torch.float32,
        "exp_avg.qmap": torch.float32,
    }
    optimizers[2].load_state_dict({**optimizers[2].state_dict(), "state": loaded})
    for number in (0, 1):
        restored = moments(optimizers[2], number)
        assert all(torch.equal(value, restored[name]) for name, value in state[number].items())
    with torch.no_grad():
        for weight, saved in zip(second, first, strict=True):
            weight.copy_(saved)
    for step in range(3, 6):
        give_gradients(second, step)
        optimizers[2].step()
    assert all(torch.equal(a, b) for a, b in zip(whole, second, strict=True))


def test_a_schedule_may_set_the_rate_as_a_number() -> None:
    """torchao wants a tensor; the training loop sets a float before each step."""
    found = []
    for rate in (1e-3, torch.tensor(1e-3)):
        (weight,) = random_weights((64, 64))
        optimizer = optimizer_of([weight])
        optimizer.param_groups[0]["lr"] = rate
        give_gradients([weight], 0)
        optimizer.step()
        found.append(weight.detach())
    assert torch.equal(*found)


class Speech:
    """Token chains of a made language with a few frequent and many rare words."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(1)
        self.frequency = 1 / torch.arange(1, VOCAB + 1)
        self.next = torch.randint(VOCAB, (VOCAB, 4), generator=self.generator)

    def batch(self, rows: int = 8, length: int = 32) -> torch.Tensor:
        """Token ids [rows, length]."""
        tokens = [torch.multinomial(self.frequency, rows, replacement=True, generator=self.generator)]
        for _ in range(length - 1):
            tokens.append(self.next[tokens[-1], torch.randint(4, (rows,), generator=self.generator)])
        return torch.stack(tokens, dim=1)


def trained(
    tiny_model: Callable[..., PreTrainedModel],
    optimizer_for: Callable[[PreTrainedModel], torch.optim.Optimizer],
    steps: int = 100,
) -> tuple[float, dict[str, float]]:
    """Mean loss of the last ten steps, and the farthest that a value of each weight moved in a step, in rates."""
    sizes = {"hidden_size": ROW, "head_dim": 32, "intermediate_size": 256, "initializer_range": 0.02}
    model = tiny_model(VOCAB, seed=0, dtype=torch.float32, **sizes).train()
    optimizer, speech = optimizer_for(model), Speech()
    losses, farthest = [], dict.fromkeys(dict(model.named_parameters()), 0.0)
    for _ in range(steps):
        ids = speech.batch()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        losses.append(loss.item())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
        with torch.compiler.set_stance("force_eager"):
            optimizer.step()
        for name, weight in model.named_parameters():
            moved = (weight.detach() - before[name]).abs().max().item() / RECIPE.learning_rate
            farthest[name] = max(farthest[name], moved)
        optimizer.zero_grad()
    return sum(losses[-10:]) / 10, farthest


@pytest.mark.parametrize("beta2", [0.98, 0.999])
def test_the_loss_falls_as_with_float32_moments(tiny_model: Callable[..., PreTrainedModel], beta2: float) -> None:
    """Within 1 % of what the training gained; no value moves farther than float32 moments could make it by much."""
    recipes = [
        RECIPE.model_copy(update={"precision": precision, "betas": (0.9, beta2)})
        for precision in ("fp32_master", "fp32_master_8bit")
    ]
    (exact, _), (ours, farthest) = (
        trained(tiny_model, lambda model, recipe=recipe: build_optimizer(model, recipe, seed=0)) for recipe in recipes
    )
    start = torch.tensor(float(VOCAB)).log().item()
    assert start - exact > 1.5
    assert abs(ours - exact) <= 0.01 * (start - exact)
    assert max(farthest.values()) < 4


def test_8_bit_moments_of_the_embedding_would_throw_it_away(tiny_model: Callable[..., PreTrainedModel]) -> None:
    """Why embeddings keep float32 moments: the library's default moves single values by many learning rates."""
    name = "model.embed_tokens.weight"
    _, theirs = trained(tiny_model, lambda model: AdamW8bit(model.parameters(), lr=1e-3, betas=(0.9, 0.98)))
    assert theirs[name] > 20
    model = tiny_model(VOCAB, seed=0, dtype=torch.float32, hidden_size=ROW)
    optimizer = build_optimizer(model, RECIPE, seed=0)
    model(input_ids=torch.arange(8)[None]).logits.sum().backward()
    optimizer.step()
    assert type(optimizer.state[model.get_input_embeddings().weight]["exp_avg_sq"]) is torch.Tensor
    assert type(optimizer.state[model.lm_head.weight]["exp_avg_sq"]) is OptimState8bit


def test_without_the_library_nothing_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)  # as if it were not installed
    with pytest.raises(ResourceError, match=r"opd-mcp\[int8\]"):
        build_optimizer(nn.Linear(2, 2), RECIPE, seed=0)
