"""Bytes that the kernels move: the count from launch arguments is what they touch, and near the floor."""

import pytest
import torch

from flagdit.kernels import language
from flagdit.kernels.gated_residual_norm import gated_residual, gated_residual_norm
from flagdit.kernels.language import record_launches
from flagdit.kernels.layer_norm_rope import layer_norm_rope
from flagdit.kernels.qk_norm_rope import qk_norm_rope
from flagdit.kernels.rms_norm_modulate import rms_norm_modulate, rms_norm_modulate_residual
from flagdit.kernels.rope import Angles, frequencies, rope
from flagdit.kernels.segments import Segments
from flagdit.kernels.shipped import SHAPES
from flagdit.kernels.swiglu import swiglu
from flagdit.kernels.traffic import FLOORS, bytes_of, rows

pytest.importorskip("triton", reason="Triton exists on Linux only")
ROWS, WIDTH, EPS = 40, 32, 1e-5
POSITIONS = Angles(position_TA=torch.arange(ROWS)[:, None].repeat(1, 2), frequency_R=frequencies(16, 2, 1e4, "cpu"))


def heads(x):
    return x.unflatten(1, (-1, 16))


def rotate_all(x, f, w, v, u, s, angles):
    y = qk_norm_rope(heads(x), heads(f)[:, :1], w[:16], v[:16], angles, EPS, "triton")
    return (*y, rope(heads(x), angles, backend="triton"), layer_norm_rope(x, w, v, angles, 16, EPS, "triton"))


OPERATIONS = {
    "norm": lambda x, f, w, v, u, s: rms_norm_modulate(x, w, u, u, s, EPS, "triton"),
    "norm without shift": lambda x, f, w, v, u, s: rms_norm_modulate_residual(x, None, None, u, s, EPS, "triton"),
    "sum and norm": lambda x, f, w, v, u, s: gated_residual_norm(x, f, u, w, u, u, s, EPS, backend="triton"),
    "sandwich": lambda x, f, w, v, u, s: gated_residual_norm(
        x, f, u, w, None, u, s, EPS, f_weight_D=v, tanh=True, backend="triton"
    ),
    "sum": lambda x, f, w, v, u, s: gated_residual(x, f, u, s, EPS, backend="triton"),
    "angles from a table": lambda *a: rotate_all(*a, Angles(*POSITIONS.table())),
    "angles from positions": lambda *a: rotate_all(*a, POSITIONS),
    "swiglu": lambda x, f, w, v, u, s: swiglu(x, f, "triton"),
    "swiglu of halves": lambda x, f, w, v, u, s: swiglu(*x.chunk(2, dim=1), "triton"),
}


@pytest.mark.skipif(not language.interpreted(), reason="bytes are counted in Triton's interpreter only")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_the_count_is_what_loads_and_stores_touch(name, dtype, memory):
    segments = Segments.build((17, 0, 23), "cpu")
    shapes = [(ROWS, WIDTH), (ROWS, WIDTH), (WIDTH,), (WIDTH,), (3, WIDTH)]
    leaves = [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]

    def run():
        outputs = OPERATIONS[name](*leaves, segments)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        torch.autograd.grad(outputs, leaves, [torch.ones_like(y) for y in outputs], allow_unused=True)

    with record_launches() as launches:
        run()
    assert memory.bytes == 0
    run()
    assert memory.bytes == sum(map(bytes_of, launches))


@pytest.mark.parametrize("size", ["600m", "5b", "7b"])
def test_every_operation_is_within_five_percent_of_its_floor(size):
    found = list(rows(SHAPES[size], tokens=131072))
    assert {(row.operation, row.direction) for row in found} == set(FLOORS)
    assert not [(row.operation, row.direction, row.ratio) for row in found if not 1 <= row.ratio <= 1.05]
