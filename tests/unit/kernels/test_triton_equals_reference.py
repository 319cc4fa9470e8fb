"""Every Triton kernel, forward and backward, against its torch reference in fp64.

Without a GPU the kernels run in Triton's interpreter, whose casts to bf16 truncate; fp32 is compared tightly.

Shape legend: T rows, S samples, D channels, H heads, R pairs of a head, A axes.
"""

import pytest
import torch

from flagdit.kernels import flow_noise
from flagdit.kernels.gated_residual_norm import gated_residual, gated_residual_norm
from flagdit.kernels.layer_norm_rope import layer_norm_rope
from flagdit.kernels.qk_norm_rope import qk_norm_rope
from flagdit.kernels.rms_norm_modulate import rms_norm_modulate, rms_norm_modulate_residual
from flagdit.kernels.rope import Angles, frequencies, rope
from flagdit.kernels.segments import Segments
from flagdit.kernels.swiglu import swiglu

pytest.importorskip("triton", reason="Triton exists on Linux only")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SEQLENS = (5, 1, 0, 19, 2)  # uneven, a single token, none
ROWS, SAMPLES, EPS = sum(SEQLENS), len(SEQLENS), 1e-5
WIDTHS = [48, 130]


def tensors(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [None if s is None else torch.randn(s, generator=generator).to(DEVICE) for s in shapes]


def compare(operation, inputs, tolerance=2e-6):
    """Outputs and gradients of every input, `operation(inputs, backend)`, Triton in fp32 against fp64."""
    results = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        leaves = [None if x is None else x.detach().to(dtype).requires_grad_() for x in inputs]
        outputs = operation(leaves, backend)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        assert all(y.dtype == dtype for y in outputs)
        weights = tensors(*(y.shape for y in outputs), seed=1)
        loss = sum((y.double() * w.double()).sum() for y, w in zip(outputs, weights, strict=True))
        given = [x for x in leaves if x is not None]
        results.append([*outputs, *torch.autograd.grad(loss, given)])
    for i, (got, want) in enumerate(zip(*results, strict=True)):
        assert got.shape == want.shape
        error = (got.double() - want).abs().max() / want.abs().max().clamp(min=1e-3)
        assert error < tolerance, f"tensor {i}: relative error {error:.2g}"


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("parts", ["weight shift scale", "weight scale", "scale", "weight", ""])
@pytest.mark.parametrize("residual", [False, True])
def test_rms_norm_modulate(width, parts, residual):
    segments = Segments.build(SEQLENS, DEVICE)
    shapes = [("weight", (width,)), ("shift", (SAMPLES, width)), ("scale", (SAMPLES, width))]
    inputs = tensors((ROWS, width), *(shape if name in parts else None for name, shape in shapes))
    function = rms_norm_modulate_residual if residual else rms_norm_modulate
    compare(lambda a, backend: function(*a, segments, EPS, backend), inputs)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("next_block", [False, True])
def test_gated_residual_norm(width, next_block):
    segments = Segments.build(SEQLENS, DEVICE)
    rows, vectors = (ROWS, width), (SAMPLES, width)
    inputs = tensors(rows, rows, vectors, (width,), None if next_block else vectors, vectors)
    sandwich = tensors((width,)) if next_block else [None]

    def with_norm(a, backend):
        return gated_residual_norm(*a[:6], segments, EPS, f_weight_D=a[6], tanh=next_block, backend=backend)

    def without_norm(a, backend):
        return gated_residual(*a[:3], segments, EPS, f_weight_D=a[3], tanh=next_block, backend=backend)

    compare(with_norm, inputs + sandwich)
    compare(without_norm, inputs[:3] + sandwich)


def make_angles(head_dim, axes, table):
    position_TA = torch.randint(0, 60, (ROWS, axes), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    angles = Angles(position_TA=position_TA, frequency_R=frequencies(head_dim, axes, 1e4, DEVICE))
    return Angles(*angles.table()) if table else angles


ROTATIONS = [(48, 2, True), (48, 3, False), (10, 1, False), (128, 2, False)]


@pytest.mark.parametrize(("head_dim", "axes", "table"), ROTATIONS)
def test_rope(head_dim, axes, table):
    angles = make_angles(head_dim, axes, table)
    compare(lambda a, backend: rope(a[0], angles, backend=backend), tensors((ROWS, 3, head_dim)), 5e-6)
    (x,) = tensors((ROWS, 3, head_dim))
    turned = rope(x, angles, backend="triton")
    assert rope(x, angles, in_place=True, backend="triton") is x
    assert torch.equal(x, turned)


@pytest.mark.parametrize(("head_dim", "axes", "table"), ROTATIONS)
def test_qk_norm_rope_with_fewer_key_heads_from_packed_qkv(head_dim, axes, table):
    angles = make_angles(head_dim, axes, table)
    qkv, q_weight, k_weight = tensors((ROWS, (4 + 2 + 2) * head_dim), (head_dim,), (head_dim,))

    def packed(a, backend):
        q, k, _ = a[0].unflatten(1, (8, head_dim)).split((4, 2, 2), dim=1)
        return qk_norm_rope(q, k, a[1], a[2], angles, EPS, backend)

    compare(packed, [qkv, q_weight, k_weight], 1e-5)


@pytest.mark.parametrize(("head_dim", "axes", "table"), ROTATIONS)
def test_layer_norm_rope(head_dim, axes, table):
    angles = make_angles(head_dim, axes, table)
    inputs = tensors((ROWS, 3 * head_dim), (3 * head_dim,), (3 * head_dim,))
    compare(lambda a, backend: layer_norm_rope(*a, angles, head_dim, EPS, backend), inputs, 1e-5)


@pytest.mark.parametrize("width", WIDTHS)
def test_swiglu_of_two_halves(width):
    compare(lambda a, backend: swiglu(*a[0].chunk(2, dim=1), backend), tensors((ROWS, 2 * width)))


@pytest.mark.parametrize("unit", [1, 12, 16])
def test_noise_is_the_same_bits(unit):
    ids, lengths = torch.tensor([5, 2**40, 7]), [unit * n for n in (9, 1, 30)]
    drawn = [flow_noise.normal(7, 3, ids, lengths, DEVICE, backend=b) for b in ("triton", "reference")]
    assert torch.equal(*drawn)
    part = flow_noise.normal(7, 3, ids[:1], [5 * unit], DEVICE, starts_S=[4 * unit], backend="triton")
    assert torch.equal(part, drawn[0][4 * unit : 9 * unit])
    (data,), t_S = tensors((sum(lengths),)), torch.tensor([0.1, 0.5, 0.9])
    both = [flow_noise.flow_noise(data, t_S, 7, 3, ids, lengths, backend=b) for b in ("triton", "reference")]
    for got, want in zip(*both, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-6, atol=2e-6)


def test_triton_cannot_be_forced_where_it_cannot_run():
    x, y = (torch.zeros(2, 4, dtype=torch.float64) for _ in range(2))
    with pytest.raises(ValueError, match=r"kernels\.backend=triton, but .*float64"):
        swiglu(x, y, "triton")
