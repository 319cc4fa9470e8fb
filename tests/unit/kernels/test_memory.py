"""The strict memory of these tests sees what it claims to see: kernels with one fault each, in the interpreter."""

import pytest
import torch

from flagdit.kernels import language
from flagdit.kernels.language import jit, launch, tl

pytest.importorskip("triton", reason="Triton exists on Linux only")
pytestmark = pytest.mark.skipif(not language.interpreted(), reason="addresses are checked in Triton's interpreter only")


@jit
def _copy_kernel(x, y, size, x_stride, BLOCK: tl.constexpr, READ: tl.constexpr, WRITE: tl.constexpr):
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + places * x_stride, mask=places < size + READ, other=0.0)
    tl.store(y + places, value, mask=places < size + WRITE)


@jit
def _everyone_writes_first_kernel(x, y):
    tl.store(y, tl.load(x + tl.program_id(0)))


def copy(x, read=0, write=0):
    y = language.empty(x.shape, x.dtype, x.device)
    args = {"x": x, "y": y, "size": len(x), "x_stride": x.stride(0), "BLOCK": 16, "READ": read, "WRITE": write}
    launch(_copy_kernel, -(-len(x) // 16), args)
    return y


@pytest.fixture
def column():
    """40 elements, three apart."""
    return torch.arange(150.0).view(50, 3)[:40, 1]


def test_a_copy_that_stays_inside_is_accepted(column):
    assert torch.equal(copy(column), column)


def test_reads_beyond_a_view_are_seen(column):
    with pytest.raises(Exception, match="1 reads outside"):
        copy(column, read=1)


def test_writes_beyond_an_output_are_seen(column):
    with pytest.raises(Exception, match="1 writes outside"):
        copy(column, read=0, write=1)


def test_what_is_not_written_is_nan(column):
    assert copy(column, write=-1)[-1].isnan()


def test_writing_over_an_input_is_seen():
    x, y = torch.zeros(4), torch.zeros(4)
    with pytest.raises(Exception, match="writes outside"):
        launch(_everyone_writes_first_kernel, 1, {"x": x, "y": y})


def test_two_programs_that_write_one_element_are_seen():
    y = language.empty((1,), torch.float32, "cpu")
    with pytest.raises(Exception, match="written twice"):
        launch(_everyone_writes_first_kernel, 2, {"x": torch.zeros(4), "y": y})


def test_a_guard_that_changed_is_seen(memory):
    y = language.empty((4,), torch.float32, "cpu")
    torch.as_strided(y, (1,), (1,), y.storage_offset() + 4).fill_(0.0)
    with pytest.raises(AssertionError, match="outside an output"):
        memory.check_guards()
    memory.buffers.clear()


@pytest.mark.parametrize("scale", [1.0, 1e-40, 1e38, float("nan"), float("inf")])
def test_the_interpreter_rounds_to_bf16_as_torch_does(scale):
    x = torch.randn(1024, generator=torch.Generator().manual_seed(0)) * scale
    y = language.empty((1024,), torch.bfloat16, "cpu")
    args = {"x": x, "y": y, "size": 1024, "x_stride": 1, "BLOCK": 1024, "READ": 0, "WRITE": 0}
    launch(_copy_kernel, 1, args)
    torch.testing.assert_close(y, x.bfloat16(), rtol=0, atol=0, equal_nan=True)
