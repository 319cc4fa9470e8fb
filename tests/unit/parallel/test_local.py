"""The local engine against torch's AdamW written out by hand."""

import math

import pytest
import torch
from shards import tensors_of
from torch import nn

from flagdit.config.schema import OptimizerConfig
from flagdit.parallel.local import LocalEngine

CPU = torch.device("cpu")


class Net(nn.Module):
    """A matrix, a vector, and a matrix that a batch may leave out (as the stem of an absent modality)."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(4, 3))
        self.bias = nn.Parameter(torch.randn(4))
        self.other = nn.Parameter(torch.randn(2, 2))

    def forward(self, x, other=False):
        y = x.to(self.weight.dtype) @ self.weight.T + self.bias
        return y.square().sum() + (self.other.square().sum() if other else 0)


def engine_of(dtype=torch.float32, **keys) -> LocalEngine:
    return LocalEngine(Net(), OptimizerConfig(**{"lr": 0.1, "grad_clip": 0.0, **keys}), CPU, dtype)


def moments_of(engine) -> dict[str, torch.Tensor]:
    return tensors_of(engine.state()["optimizer"])


def a_step(engine, x, lr=0.1, other=False):
    engine.backward(engine.model(x, other), last=True)
    norm = engine.grad_norm()
    engine.step(lr)
    return norm.item()


def test_step_is_adamw_with_decay_on_matrices_only():
    engine = engine_of(weight_decay=0.5, betas=[0.8, 0.9], eps=1e-6)
    reference = {k: v.clone() for k, v in engine.weights().items()}
    m = {k: torch.zeros_like(v) for k, v in reference.items()}
    v2 = {k: torch.zeros_like(v) for k, v in reference.items()}
    for step, lr in enumerate([0.1, 0.02, 0.3], start=1):
        x = torch.randn(5, 3, generator=torch.Generator().manual_seed(step))
        w = {k: p.clone().requires_grad_() for k, p in reference.items()}
        (x @ w["weight"].T + w["bias"]).square().sum().add(w["other"].square().sum()).backward()
        for k in reference:
            g = w[k].grad
            m[k] = 0.8 * m[k] + 0.2 * g
            v2[k] = 0.9 * v2[k] + 0.1 * g * g
            decayed = reference[k] * (1 - lr * (0.5 if reference[k].ndim == 2 else 0))
            reference[k] = decayed - lr * (m[k] / (1 - 0.8**step)) / ((v2[k] / (1 - 0.9**step)).sqrt() + 1e-6)
        a_step(engine, x, lr, other=True)
        for k, p in engine.weights().items():
            torch.testing.assert_close(p, reference[k], rtol=1e-5, atol=1e-6)


def test_gradients_are_clipped_by_the_norm_over_all_parameters():
    x = torch.ones(2, 3)
    # One AdamW step does not see the scale of the gradient; the moments do.
    free, clipped = engine_of(), engine_of(grad_clip=0.5)
    norm = a_step(free, x)
    assert a_step(clipped, x) == norm > 0.5
    moments = moments_of(free)
    for name, moment in moments_of(clipped).items():
        if name.endswith("exp_avg"):
            torch.testing.assert_close(moment, moments[name] * (0.5 / norm), rtol=1e-4, atol=1e-7)


def test_a_gradient_below_the_limit_is_left_alone():
    free, clipped = engine_of(), engine_of(grad_clip=1e9)
    for engine in (free, clipped):
        a_step(engine, torch.ones(2, 3))
    assert all(torch.equal(a, clipped.weights()[k]) for k, a in free.weights().items())


def test_micro_batches_add_up():
    x = torch.randn(6, 3)
    whole, split = engine_of(), engine_of()
    a_step(whole, x)
    for part in x.split(2):
        split.backward(split.model(part), last=True)
    split.grad_norm()
    split.step(0.1)
    for name, p in split.weights().items():
        torch.testing.assert_close(p, whole.weights()[name], rtol=1e-6, atol=1e-6)


def test_absent_parameters_decay_their_moments_as_with_a_zero_gradient():
    engine = engine_of()
    a_step(engine, torch.ones(2, 3), other=True)
    before = moments_of(engine)["other.exp_avg"].clone()
    a_step(engine, torch.ones(2, 3), other=False)
    torch.testing.assert_close(moments_of(engine)["other.exp_avg"], before * 0.9)


def test_discard_leaves_everything_bitwise():
    engine = engine_of()
    a_step(engine, torch.ones(2, 3))
    before = {f"{g}.{k}": v.clone() for g, t in engine.state().items() for k, v in tensors_of(t).items()}
    engine.backward(engine.model(torch.full((2, 3), math.nan)), last=True)
    assert math.isnan(engine.grad_norm().item())
    engine.discard()
    after = {f"{g}.{k}": v for g, t in engine.state().items() for k, v in tensors_of(t).items()}
    assert all(torch.equal(v, after[k]) for k, v in before.items())
    assert all(p.grad is None for p in engine.model.parameters())


def test_bf16_masters_keep_updates_that_bf16_would_lose():
    engine = engine_of(torch.bfloat16)
    start = {k: v.clone() for k, v in engine.weights().items()}
    assert {p.dtype for p in engine.model.parameters()} == {torch.bfloat16}
    lost = torch.full((2, 3), 1.0)
    for _ in range(50):
        a_step(engine, lost, lr=1e-5)
    moved = start["weight"] - engine.weights()["weight"]
    assert moved.dtype == torch.float32
    torch.testing.assert_close(moved.abs(), torch.full_like(moved, 50e-5), rtol=0.05, atol=0)
    for name, p in engine.model.named_parameters():
        assert torch.equal(p, engine.weights()[name].bfloat16())


def test_bf16_gradients_accumulate_in_fp32():
    engine, single = engine_of(torch.bfloat16), engine_of()
    with torch.no_grad():
        for net in (engine, single):  # weights that bf16 holds exactly, gradients that it sums badly
            for p in net.weights().values():
                p.fill_(0.5)
            for p in net.model.parameters():
                p.fill_(0.5)
    for _ in range(300):
        engine.backward(engine.model(torch.ones(1, 3)) / 256, last=True)
        single.backward(single.model(torch.ones(1, 3)) / 256, last=True)
    torch.testing.assert_close(engine.grad_norm(), single.grad_norm(), rtol=1e-3, atol=0)


def test_other_weights_are_lent_and_the_own_come_back():
    for dtype in (torch.float32, torch.bfloat16):
        engine = engine_of(dtype)
        own = {k: p.clone() for k, p in engine.model.named_parameters()}
        zeros = {k: torch.zeros_like(v) for k, v in engine.weights().items()}
        with pytest.raises(RuntimeError, match="inside"), engine.using(zeros) as model:
            assert not model.training and model(torch.ones(1, 3)).item() == 0
            raise RuntimeError("inside")
        assert engine.model.training
        assert all(torch.equal(p, own[k]) for k, p in engine.model.named_parameters())
        a_step(engine, torch.ones(1, 3))
        assert all(not torch.equal(p, own[k]) for k, p in engine.model.named_parameters() if k != "other")
        assert all(v.count_nonzero() == 0 for v in zeros.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_loads_into_a_fresh_engine_bit_by_bit(dtype):
    first, second = engine_of(dtype), engine_of(dtype)
    for step in range(3):
        a_step(first, torch.full((2, 3), step + 0.5))
    for group, shards in second.state().items():
        saved = tensors_of(first.state()[group])
        for name, shard in shards.items():
            shard.fill(saved[name])
    second.restored()
    for engine in (first, second):
        a_step(engine, torch.full((2, 3), 0.25))
    for group, shards in first.state().items():
        theirs = tensors_of(second.state()[group])
        assert all(torch.equal(t, theirs[k]) for k, t in tensors_of(shards).items())
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True))
    assert moments_of(first)["step"].item() == 4


def test_optimizer_state_exists_before_the_first_step():
    engine = engine_of()
    moments = moments_of(engine)
    assert all(moments[f"{name}.exp_avg"].shape == p.shape for name, p in engine.model.named_parameters())
