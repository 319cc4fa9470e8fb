"""The kernels as operators of torch: registration, torch.compile, fake tensors, activation checkpointing.

Shape legend: T rows, S samples, D channels, H heads.
"""

from functools import partial

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from flagdit.kernels import flow_noise
from flagdit.kernels.dispatch import use_triton
from flagdit.kernels.gated_residual_norm import gated_residual, gated_residual_norm
from flagdit.kernels.layer_norm_rope import layer_norm_rope
from flagdit.kernels.qk_norm_rope import qk_norm_rope
from flagdit.kernels.rms_norm_modulate import rms_norm_modulate, rms_norm_modulate_residual
from flagdit.kernels.rope import Angles, frequencies, rope
from flagdit.kernels.segments import Segments
from flagdit.kernels.swiglu import swiglu

pytest.importorskip("triton", reason="Triton exists on Linux only")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SEQLENS = (5, 1, 0, 3)
ROWS, SAMPLES, WIDTH, HEADS, EPS = sum(SEQLENS), len(SEQLENS), 32, 2, 1e-5
OPS = torch.ops.flagdit


def tensors(*shapes, grad=True):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=generator).to(DEVICE).requires_grad_(grad) for s in shapes]


def operators():
    """Name → arguments of every registered operator."""
    segments = Segments.build(SEQLENS, DEVICE)
    chunks, offsets = segments.chunks_C3, segments.offsets_S
    x, f, weight, f_weight = tensors((ROWS, WIDTH), (ROWS, WIDTH), (WIDTH,), (WIDTH,))
    shift, scale, gate = tensors(*3 * [(SAMPLES, WIDTH)])
    q, k, head_weight = tensors((ROWS, HEADS, 16), (ROWS, 1, 16), (16,))
    position = torch.arange(ROWS, device=DEVICE)[:, None]
    frequency = frequencies(16, 1, 1e4, DEVICE)
    cos, sin = Angles(position_TA=position, frequency_R=frequency).table()
    rstd, statistics = tensors((ROWS,), (ROWS, 2), grad=False)
    table, unit = flow_noise.spans(1, 2, torch.arange(3), [8, 4, 12], [0, 0, 4])
    table = table.to(DEVICE)
    data, t = tensors((24,), (3,))
    plain = [y.detach() for y in (x, f, weight, scale, gate, q, k, head_weight, data, t)]
    dx, df, dweight, dscale, dgate, dq, dk, dhead, ddata, dt = plain
    computed = (None, None, position, frequency)
    looked_up = (cos, sin, None, None)
    return {
        "rms_norm_modulate": (x, weight, shift, scale, chunks, offsets, EPS),
        "rms_norm_modulate_backward": (df, dx, dx, dweight, dscale, rstd, chunks, offsets, True),
        "gated_residual_norm": (x, f, gate, f_weight, True, weight, shift, scale, chunks, offsets, EPS),
        "gated_residual_norm_backward": (
            dx, df, dx, df, dgate, dweight, dweight, dscale, rstd, rstd, chunks, offsets, True,
        ),
        "qk_norm_rope": (q, k, head_weight, head_weight, *looked_up, EPS),
        "qk_norm_rope_backward": (dq, dk, dq, dk, dhead, dhead, *computed, EPS),
        "rope": (q, *computed, 1),
        "rope_": (dq.clone(), *looked_up),
        "layer_norm_rope": (x, weight, f_weight, *looked_up, 16, EPS),
        "layer_norm_rope_backward": (dx, df, dweight, *looked_up, statistics, 16),
        "swiglu": (x, f),
        "swiglu_backward": (dx, df, df),
        "normal": (table, unit, 24),
        "flow_noise": (data, dt, table, unit),
        "flow_noise_backward": (ddata, ddata, ddata, dt, table, unit),
    }  # fmt: skip


def test_the_choice_is_marked_as_torch_marks_constants():
    assert vars(use_triton) == vars(torch.compiler.assume_constant_result(lambda: None))


def test_every_operator_is_tested():
    registered = {
        name.split("::")[1].split(".")[0] for name in torch._C._dispatch_get_all_op_names() if "flagdit::" in name
    }
    # Attention's own operators, there when another test has loaded them, are tested with the backends.
    assert registered - {"packed_attention", "packed_attention_backward"} == set(operators())


@pytest.mark.parametrize("name", operators())
def test_opcheck(name, memory, monkeypatch):
    """Schema, autograd registration, fake tensors and tracing, as torch checks them."""
    monkeypatch.undo()  # torch's check makes copies and asks where outputs begin: it wants plain memory
    torch.library.opcheck(getattr(OPS, name).default, operators()[name])


def block(x, f, gate, weight, shift, scale, f_weight, head_weight, segments, angles, backend):
    """Every public operation once, in the order of a transformer block."""
    x, y = rms_norm_modulate_residual(x, weight, shift, scale, segments, EPS, backend)
    q, k = qk_norm_rope(*y.unflatten(1, (-1, 16)).chunk(2, dim=1), head_weight, head_weight, angles, EPS, backend)
    v = rope(q, angles, backend=backend) + layer_norm_rope(
        f[:, :16], head_weight, head_weight, angles, 16, EPS, backend
    )
    y = torch.cat([q + v, k], dim=1).flatten(1)
    x, y = gated_residual_norm(
        x, y, gate, weight, None, scale, segments, EPS, f_weight_D=f_weight, tanh=True, backend=backend
    )
    y = swiglu(y, rms_norm_modulate(f, None, shift, None, segments, EPS, backend), backend)
    return gated_residual(x, y, gate, segments, EPS, backend=backend)


@pytest.fixture
def inputs():
    rows, vectors, vector = (ROWS, WIDTH), (SAMPLES, WIDTH), (WIDTH,)
    angles = Angles(position_TA=torch.arange(ROWS, device=DEVICE)[:, None], frequency_R=frequencies(16, 1, 1e4, DEVICE))
    tables = Segments.build(SEQLENS, DEVICE), angles
    return tensors(rows, rows, vectors, vector, vectors, vectors, vector, (16,)), tables


def outcome(function, leaves, *rest):
    y = function(*leaves, *rest)
    return [y, *torch.autograd.grad(y.square().sum(), leaves)]


def assert_same(got, want):
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-4)


def test_compile_without_graph_breaks(inputs):
    leaves, tables = inputs
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    assert_same(outcome(compiled, leaves, *tables, "triton"), outcome(block, leaves, *tables, "reference"))


def test_compile_of_packs_that_change_in_size():
    """Rows and chunks are symbols in the graph: packs of any size after the first share one graph."""
    torch._dynamo.reset()
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    @partial(torch.compile, fullgraph=True, backend=count)
    def norm(x, scale, segments):
        return rms_norm_modulate(x, None, None, scale, segments, EPS, "triton")

    for rows in (5, 21, 40, 70):
        segments = Segments.build((rows, 3), DEVICE)
        x, scale = tensors((rows + 3, WIDTH), (2, WIDTH), grad=False)
        assert_same([norm(x, scale, segments)], [rms_norm_modulate(x, None, None, scale, segments, EPS, "reference")])
    assert len(graphs) == 2


def test_fake_tensors_have_the_shapes_and_types_of_real_ones(inputs):
    leaves, (segments, angles) = inputs
    real = outcome(block, leaves, segments, angles, "triton")
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake_leaves = [torch.empty(x.shape, device=DEVICE, requires_grad=True) for x in leaves]
        fake = outcome(block, fake_leaves, segments, angles, "triton")
    assert [(x.shape, x.dtype, x.device) for x in fake] == [(x.shape, x.dtype, x.device) for x in real]


def test_activation_checkpointing(inputs):
    leaves, tables = inputs
    want = outcome(block, leaves, *tables, "triton")
    whole = partial(checkpoint, block, use_reentrant=False)
    assert_same(outcome(whole, leaves, *tables, "triton"), want)
    kept = [OPS.qk_norm_rope.default, OPS.swiglu.default]
    selective = partial(whole, context_fn=partial(create_selective_checkpoint_contexts, kept))
    assert_same(outcome(selective, leaves, *tables, "triton"), want)
