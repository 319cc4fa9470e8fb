"""Every Triton kernel, forward and backward, against its torch reference in fp64 on the same numbers.

The kernels compute in fp32 and round once where they write, so an element may differ from the exact one by half a unit
in its last place and by what fp32 sums lose; nothing more is allowed. All inputs and upstream gradients are views with
gaps of NaN between their rows. Without a GPU the kernels run in Triton's interpreter (see conftest.py).

Shape legend: T rows, S samples, D channels, H heads, R pairs of a head, A axes.
"""

import pytest
import torch

from flagdit.kernels import flow_noise
from flagdit.kernels import gated_residual_norm as gated
from flagdit.kernels import rms_norm_modulate as norm
from flagdit.kernels.layer_norm_rope import layer_norm_rope
from flagdit.kernels.qk_norm_rope import qk_norm_rope
from flagdit.kernels.rope import Angles, frequencies, rope
from flagdit.kernels.segments import Segments
from flagdit.kernels.swiglu import swiglu

pytest.importorskip("triton", reason="Triton exists on Linux only")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SEQLENS = (5, 1, 0, 19, 2)  # uneven, a single token, none, more than one chunk
ROWS, SAMPLES, EPS = sum(SEQLENS), len(SEQLENS), 1e-5
WIDTHS = [48, 130]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HALF_UNIT = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])


def tensors(*shapes, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [None if s is None else torch.randn(s, generator=generator).to(DEVICE, dtype) for s in shapes]


def with_gaps(x, dtype):
    """x at a stride: its rows stand in a wider tensor, NaN elsewhere. Vectors stay as they are."""
    if x.dim() < 2:
        return x.to(dtype)
    gap = 8
    wide = torch.full((*x.shape[:-1], x.shape[-1] + 2 * gap), torch.nan, dtype=dtype, device=x.device)
    return wide[..., gap:-gap].copy_(x)


def assert_rounded_once(got, want, dtype, sums, name):
    """|got − want| ≤ half a unit in the last place of `dtype` + `sums`·max|want|."""
    assert got.shape == want.shape and got.dtype == dtype, name
    want = want.detach()
    allowed = HALF_UNIT[dtype] * 1.01 * want.abs() + sums * want.abs().max().clamp(min=1e-3)
    excess = ((got.detach().double() - want).abs() / allowed).nan_to_num(nan=torch.inf)
    assert (excess <= 1).all(), f"{name}: {excess.max():.3g} times what rounding explains"


def compare(operation, inputs, dtype=torch.float32, sums=3e-6):
    """Outputs and gradients of every input, `operation(inputs, backend)`."""
    given = [i for i, x in enumerate(inputs) if x is not None]
    rounded = [None if x is None else x.to(dtype) for x in inputs]
    leaves = [None if x is None else with_gaps(x, dtype).detach().requires_grad_() for x in rounded]
    exact = [None if x is None else x.double().requires_grad_() for x in rounded]
    results = []
    for backend, arguments, kind in (("triton", leaves, dtype), ("reference", exact, torch.float64)):
        outputs = operation(arguments, backend)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        upstream = [with_gaps(w, dtype) for w in tensors(*(y.shape for y in outputs), seed=1)]
        upstream = [w if kind == dtype else w.to(kind) for w in upstream]
        results.append([*outputs, *torch.autograd.grad(outputs, [arguments[i] for i in given], upstream)])
    names = [f"output {i}" for i in range(len(results[0]) - len(given))] + [f"gradient of input {i}" for i in given]
    for got, want, name in zip(*results, names, strict=True):
        assert_rounded_once(got, want, dtype, sums, name)


PARTS = ["weight shift scale", "weight scale", "scale", "weight", ""]


def modulation_inputs(rows, width, parts, samples=SAMPLES):
    shapes = [("weight", (width,)), ("shift", (samples, width)), ("scale", (samples, width))]
    return tensors((rows, width), *(shape if name in parts else None for name, shape in shapes))


@dtypes
@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("residual", [False, True])
def test_rms_norm_modulate(parts, residual, dtype):
    segments = Segments.build(SEQLENS, DEVICE)
    function = norm.rms_norm_modulate_residual if residual else norm.rms_norm_modulate
    compare(lambda a, backend: function(*a, segments, EPS, backend), modulation_inputs(ROWS, 130, parts), dtype)


class _Rounded(torch.autograd.Function):
    """x as `dtype` would hold it, in fp64; the gradient passes."""

    @staticmethod
    def forward(ctx, x, dtype):
        return x.to(dtype).double()

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def gated_pair(a, segments, tanh, dtype, backend):
    """`gated_residual_norm`; its fp64 reference norms the sum as rounded, as the kernel does."""
    x, f, gate, weight, shift, scale, f_weight = a
    if backend == "triton":
        return gated.gated_residual_norm(
            x, f, gate, weight, shift, scale, segments, EPS, f_weight_D=f_weight, tanh=tanh, backend=backend
        )
    x = gated.reference(x, f, gate.tanh() if tanh else gate, f_weight, segments, EPS)
    return x, norm.reference(_Rounded.apply(x, dtype), weight, shift, scale, segments, EPS)


@dtypes
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("next_block", [False, True])
def test_gated_residual_norm(width, next_block, dtype):
    segments = Segments.build(SEQLENS, DEVICE)
    rows, vectors = (ROWS, width), (SAMPLES, width)
    inputs = tensors(rows, rows, vectors, (width,), None if next_block else vectors, vectors)
    sandwich = tensors((width,)) if next_block else [None]

    def without_norm(a, backend):
        return gated.gated_residual(*a[:3], segments, EPS, f_weight_D=a[3], tanh=next_block, backend=backend)

    compare(lambda a, backend: gated_pair(a, segments, next_block, dtype, backend), inputs + sandwich, dtype)
    compare(without_norm, inputs[:3] + sandwich, dtype)


@pytest.mark.parametrize("seqlens", [(1,), (0, 3), (40,), (3, 0, 0), (17, 16, 15, 1, 1, 1, 0)])
@pytest.mark.parametrize("width", [3, 64, 515])
def test_segments_of_any_length(seqlens, width):
    segments, rows, samples = Segments.build(seqlens, DEVICE), sum(seqlens), len(seqlens)
    compare(
        lambda a, backend: norm.rms_norm_modulate(*a, segments, EPS, backend),
        modulation_inputs(rows, width, "weight shift scale", samples),
    )
    x, f, gate = tensors((rows, width), (rows, width), (samples, width))
    compare(lambda a, backend: gated.gated_residual(*a, segments, EPS, backend=backend), [x, f, gate])


def test_a_pack_without_rows_gives_zero_gradients():
    segments = Segments.build((0, 0), DEVICE)
    inputs = [x.requires_grad_() for x in modulation_inputs(0, 48, "weight shift scale", samples=2)]
    y = norm.rms_norm_modulate(*inputs, segments, EPS, "triton")
    assert y.shape == (0, 48)
    y.sum().backward()
    assert all((x.grad == 0).all() for x in inputs)


def make_angles(head_dim, axes, table, rows=ROWS):
    position_TA = torch.randint(0, 60, (rows, axes), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    angles = Angles(position_TA=position_TA, frequency_R=frequencies(head_dim, axes, 1e4, DEVICE))
    return Angles(*angles.table()) if table else angles


ROTATIONS = [(48, 2, True), (48, 3, False), (10, 1, False), (96, 2, True), (128, 2, False)]
rotations = pytest.mark.parametrize(("head_dim", "axes", "table"), ROTATIONS)


@dtypes
@rotations
def test_rope(head_dim, axes, table, dtype, memory):
    angles = make_angles(head_dim, axes, table)
    compare(lambda a, backend: rope(a[0], angles, backend=backend), tensors((ROWS, 3, head_dim)), dtype, 6e-6)
    (x,) = tensors((ROWS, 3, head_dim), dtype=dtype)
    turned = rope(x, angles, backend="triton")
    memory.overwritten.append(x)
    assert rope(x, angles, in_place=True, backend="triton") is x
    assert torch.equal(x, turned)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_rope_in_place_is_refused_where_it_is_not_safe(backend):
    angles = make_angles(48, 1, True)
    (x,) = tensors((ROWS, 3, 48))
    with pytest.raises(ValueError, match="gradient"):
        rope(x.clone().requires_grad_(), angles, in_place=True, backend=backend)
    for shared in (x[:1].expand(ROWS, 3, 48), x[:, :1].expand(ROWS, 3, 48), x.transpose(1, 2).contiguous().mT):
        with pytest.raises(ValueError, match="memory of its own"):
            rope(shared, angles, in_place=True, backend=backend)


@dtypes
@rotations
def test_qk_norm_rope_with_fewer_key_heads_from_packed_qkv(head_dim, axes, table, dtype):
    """Queries and keys are heads of one packed row; heads that are neither stand before, between and after them."""
    angles = make_angles(head_dim, axes, table)
    qkv, q_weight, k_weight = tensors((ROWS, 10, head_dim), (head_dim,), (head_dim,))
    qkv[:, [0, 5, 8, 9]] = torch.nan

    def packed(a, backend):
        return qk_norm_rope(a[0][:, 1:5], a[0][:, 6:8], a[1], a[2], angles, EPS, backend)

    compare(packed, [qkv, q_weight, k_weight], dtype, 1e-5)


@dtypes
@rotations
def test_layer_norm_rope(head_dim, axes, table, dtype):
    angles = make_angles(head_dim, axes, table)
    inputs = tensors((ROWS, 3 * head_dim), (3 * head_dim,), (3 * head_dim,))
    compare(lambda a, backend: layer_norm_rope(*a, angles, head_dim, EPS, backend), inputs, dtype, 1e-5)


@dtypes
@pytest.mark.parametrize("width", WIDTHS)
def test_swiglu_of_two_halves(width, dtype):
    compare(lambda a, backend: swiglu(*a[0].chunk(2, dim=1), backend), tensors((ROWS, 2 * width)), dtype)


@dtypes
def test_swiglu_of_contiguous_tensors_longer_than_a_program(dtype):
    a, b, dy = tensors((ROWS, 130), (ROWS, 130), (ROWS, 130), dtype=dtype)
    assert a.numel() > 3000 and a.is_contiguous()
    got = [x.clone().requires_grad_() for x in (a, b)]
    want = [x.double().requires_grad_() for x in (a, b)]
    y, exact = swiglu(*got, "triton"), swiglu(*want, "reference")
    y.backward(dy)
    exact.backward(dy.double())
    pairs = [(y, exact), *((g.grad, w.grad) for g, w in zip(got, want, strict=True))]
    for i, (g, w) in enumerate(pairs):
        assert_rounded_once(g, w, dtype, 3e-6, f"tensor {i}")


def test_rows_beyond_31_bits_of_offset():
    """Three rows so far apart that their offsets pass 2³¹ elements. The memory between them is never touched."""
    width, stride = 64, 2**30 + 16
    segments = Segments.build((1, 2), DEVICE)
    x = torch.empty(2 * stride + width, dtype=torch.float16, device=DEVICE).as_strided((3, width), (stride, 1))
    x.copy_(*tensors((3, width), dtype=torch.float16))
    near = x.contiguous()
    got, want = (norm.rms_norm_modulate(rows, None, None, None, segments, EPS, "triton") for rows in (x, near))
    assert torch.equal(got, want)
    got, want = (swiglu(rows, rows, "triton") for rows in (x, near))
    assert torch.equal(got, want)
    angles = make_angles(16, 1, True, rows=3)
    heads = x.unflatten(1, (4, 16)), near.unflatten(1, (4, 16))
    weight = torch.ones(16, device=DEVICE)
    got, want = (qk_norm_rope(rows, rows, weight, weight, angles, EPS, "triton")[0] for rows in heads)
    assert torch.equal(got, want)


@dtypes
@pytest.mark.parametrize("unit", [1, 12, 16])
def test_noise_is_the_same_bits(unit, dtype):
    ids, lengths = torch.tensor([5, 2**40, 6, 7]), [unit * n for n in (9, 1, 0, 30)]
    drawn = [flow_noise.normal(7, 3, ids, lengths, DEVICE, backend=b) for b in ("triton", "reference")]
    assert torch.equal(*drawn)
    part = flow_noise.normal(7, 3, ids[:1], [5 * unit], DEVICE, starts_S=[4 * unit], backend="triton")
    assert torch.equal(part, drawn[0][4 * unit : 9 * unit])
    (data,), t_S = tensors((sum(lengths),), dtype=dtype), torch.tensor([0.1, 0.5, 0.3, 0.9], device=DEVICE)
    data.requires_grad_()
    both = [flow_noise.flow_noise(data, t_S, 7, 3, ids, lengths, backend=b) for b in ("triton", "reference")]
    for got, want in zip(*both, strict=True):
        assert torch.equal(got, want)
    dmixed, dtarget = tensors(data.shape, data.shape, seed=1)
    (gradient,) = torch.autograd.grad(both[0], [data], [dmixed, dtarget])
    t = torch.repeat_interleave(t_S, torch.tensor(lengths, device=DEVICE)).double()
    assert_rounded_once(gradient, t * dmixed + dtarget, dtype, 1e-6, "gradient of the data")


DIRECTIONS = {
    "rms_norm_modulate": lambda a, s, g: norm.rms_norm_modulate(a[0], a[1], a[2], a[3], s, EPS, "triton"),
    "gated_residual_norm": lambda a, s, g: gated.gated_residual_norm(
        a[0], a[4], a[5], a[1], a[2], a[3], s, EPS, f_weight_D=a[6], tanh=True, backend="triton"
    ),
    "gated_residual": lambda a, s, g: gated.gated_residual(a[0], a[4], a[5], s, EPS, backend="triton"),
    "qk_norm_rope": lambda a, s, g: qk_norm_rope(
        a[0].unflatten(1, (-1, 16)), a[4].unflatten(1, (-1, 16)), a[1][:16], a[6][:16], g, EPS, "triton"
    ),
    "layer_norm_rope": lambda a, s, g: layer_norm_rope(a[0], a[1], a[6], g, 16, EPS, "triton"),
    "rope": lambda a, s, g: rope(a[0].unflatten(1, (-1, 16)), g, backend="triton"),
    "swiglu": lambda a, s, g: swiglu(a[0], a[4], "triton"),
}


@pytest.mark.parametrize("name", DIRECTIONS)
def test_gradients_are_the_derivatives_of_the_kernels_themselves(name):
    """Along a random direction, the change of the outputs by central differences is the gradient's product with it."""
    segments, angles, width = Segments.build(SEQLENS, DEVICE), make_angles(16, 1, True), 48
    rows, vectors = (ROWS, width), (SAMPLES, width)
    inputs = tensors(rows, (width,), vectors, vectors, rows, vectors, (width,))
    direction = tensors(*(x.shape for x in inputs), seed=2)

    def value(shift):
        moved = [x + shift * d for x, d in zip(inputs, direction, strict=True)]
        outputs = DIRECTIONS[name](moved, segments, angles)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return sum((y.double() * w).sum() for y, w in zip(outputs, tensors(*(y.shape for y in outputs)), strict=True))

    leaves = [x.clone().requires_grad_() for x in inputs]
    inputs, plain = leaves, inputs
    gradients = torch.autograd.grad(value(0.0), leaves, allow_unused=True, materialize_grads=True)
    inputs, step = plain, 1e-2
    slope = (value(step) - value(-step)) / (2 * step)
    wanted = sum((g.double() * d).sum() for g, d in zip(gradients, direction, strict=True))
    assert abs(wanted) > 1
    torch.testing.assert_close(slope, wanted, rtol=2e-3, atol=1e-2)


def test_triton_cannot_be_forced_where_it_cannot_run():
    x, y = (torch.zeros(2, 4, dtype=torch.float64) for _ in range(2))
    with pytest.raises(ValueError, match=r"swiglu cannot run in Triton: .*float64"):
        swiglu(x, y, "triton")
