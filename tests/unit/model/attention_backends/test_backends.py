"""Every method of every backend against a loop over samples in fp64."""

import contextlib

import flash_stand_ins
import pytest
import torch
from attention_reference import CASES, draw, loop_backward, loop_forward
from torch._subclasses.fake_tensor import FakeTensorMode

from flagdit.model.attention_backends import Pairs, Sdpa, sdpa

EXACT = {"rtol": 1e-5, "atol": 2e-6}


def close(found, wanted, **tolerance):
    torch.testing.assert_close(found.double(), wanted.double(), **(tolerance or EXACT))


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("case", CASES)
def test_backend_equals_the_loop(backend, case, kv_heads):
    lens_q, lens_k = CASES[case]
    q, k, v, grad = draw(lens_q, lens_k, 4, kv_heads, 8)
    pairs = Pairs.of(lens_q, lens_k, "cpu")
    wanted_out, wanted_lse = loop_forward(q, k, v, lens_q, lens_k)
    wanted = loop_backward(grad, q, k, v, wanted_out, wanted_lse, lens_q, lens_k)

    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = backend(*leaves, pairs)
    close(out, wanted_out)
    for found, want in zip(torch.autograd.grad(out, leaves, grad), wanted, strict=True):
        close(found, want)

    out, lse = backend.forward(*leaves, pairs)
    assert not out.requires_grad and not lse.requires_grad
    assert lse.dtype == torch.float32 and lse.shape == q.shape[:2]
    close(out, wanted_out)
    close(lse, wanted_lse)
    for found, want in zip(backend.backward(grad, q, k, v, out, lse, pairs), wanted, strict=True):
        close(found, want)


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("case", ["mixed", "all ragged", "no keys in the middle", "scattered"])
def test_chunks_of_keys_add_up_to_the_whole(backend, case, kv_heads):
    """What a ring does: each sample's keys in three parts, some of them empty, forward merged by log-sum-exp."""
    lens_q, lens_k = CASES[case]
    q, k, v, grad = draw(lens_q, lens_k, 4, kv_heads, 8)
    wanted_out, wanted_lse = loop_forward(q, k, v, lens_q, lens_k)
    wanted = loop_backward(grad, q, k, v, wanted_out, wanted_lse, lens_q, lens_k)
    chunks = chunks_of(lens_k, 3)

    parts = [backend.forward(q, k[i], v[i], Pairs.of(lens_q, lens, "cpu")) for lens, i in chunks]
    lse = torch.stack([lse for _, lse in parts]).logsumexp(0)
    weights = [torch.exp(part - lse).nan_to_num(0.0)[..., None] for _, part in parts]
    out = sum(weight * part for weight, (part, _) in zip(weights, parts, strict=True))
    close(out, wanted_out)
    close(lse, wanted_lse)

    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for lens, i in chunks:
        part_q, dk[i], dv[i] = backend.backward(grad, q, k[i], v[i], out, lse, Pairs.of(lens_q, lens, "cpu"))
        dq += part_q
    for found, want in zip((dq, dk, dv), wanted, strict=True):
        close(found, want)


def chunks_of(lens_k, count):
    """(keys of each sample, their places) of each chunk: every sample's keys cut into `count` runs."""
    places = torch.arange(sum(lens_k)).split(list(lens_k))
    cuts = [sample.tensor_split(count) for sample in places]
    return [([len(cut[i]) for cut in cuts], torch.cat([cut[i] for cut in cuts])) for i in range(count)]


def test_strided_inputs(backend):
    """q, k and v as slices of one projection, and a gradient and a log-sum-exp with other strides."""
    lens = (3, 5, 3)
    fused = torch.randn(sum(lens), 3, 4, 8, generator=torch.Generator().manual_seed(0))
    q, k, v = fused.unbind(1)
    assert not q.is_contiguous()
    grad = torch.randn(4, 8, sum(lens)).permute(2, 0, 1)
    pairs = Pairs.of(lens, lens, "cpu")
    wanted_out, wanted_lse = loop_forward(q, k, v, lens, lens)
    wanted = loop_backward(grad, q, k, v, wanted_out, wanted_lse, lens, lens)
    out, lse = backend.forward(q, k, v, pairs)
    close(out, wanted_out)
    lse = lse.T.contiguous().T
    for found, want in zip(backend.backward(grad, q, k, v, out, lse, pairs), wanted, strict=True):
        close(found, want)
    leaf = fused.clone().requires_grad_()
    (found,) = torch.autograd.grad(backend(*leaf.unbind(1), pairs), leaf, grad)
    close(found, torch.stack(wanted, dim=1))


def test_bf16(backend):
    lens_q, lens_k = CASES["mixed"]
    q, k, v, grad = draw(lens_q, lens_k, 4, 2, 16, torch.bfloat16)
    pairs = Pairs.of(lens_q, lens_k, "cpu")
    wanted_out, wanted_lse = loop_forward(q, k, v, lens_q, lens_k)
    out, lse = backend.forward(q, k, v, pairs)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    close(out, wanted_out, rtol=2e-2, atol=2e-2)
    close(lse, wanted_lse, rtol=1e-2, atol=1e-2)
    wanted = loop_backward(grad, q, k, v, out, lse, lens_q, lens_k)
    for found, want in zip(backend.backward(grad, q, k, v, out, lse, pairs), wanted, strict=True):
        assert found.dtype == torch.bfloat16
        close(found, want, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("case", ["mixed", "scattered", "equal queries, ragged keys"])
def test_sdpa_in_fp64_passes_gradcheck(case):
    lens_q, lens_k = CASES[case]
    q, k, v, _ = (x.requires_grad_() for x in draw(lens_q, lens_k, 2, 1, 4, torch.float64))
    pairs = Pairs.of(lens_q, lens_k, "cpu")
    assert torch.autograd.gradcheck(lambda *args: Sdpa()(*args, pairs), (q, k, v))
    assert Sdpa().forward(q, k, v, pairs)[1].dtype == torch.float64


@pytest.mark.parametrize("rows", [2, 1024])
def test_the_written_out_formula_equals_the_kernel(monkeypatch, rows):
    """What serves where torch has no kernel with a log-sum-exp, in blocks of queries."""
    monkeypatch.setattr(sdpa, "MATH_QUERIES", rows)
    monkeypatch.setattr(sdpa, "_kernel_of", lambda q, k, v: "math")
    lens_q, lens_k = CASES["scattered"]
    q, k, v, grad = draw(lens_q, lens_k, 4, 2, 8)
    pairs = Pairs.of(lens_q, lens_k, "cpu")
    wanted_out, wanted_lse = loop_forward(q, k, v, lens_q, lens_k)
    out, lse = Sdpa().forward(q, k, v, pairs)
    close(out, wanted_out)
    close(lse, wanted_lse)
    wanted = loop_backward(grad, q, k, v, wanted_out, wanted_lse, lens_q, lens_k)
    for found, want in zip(Sdpa().backward(grad, q, k, v, out, lse, pairs), wanted, strict=True):
        close(found, want)


def test_left_out_tensors_have_gradients_of_zeros_not_none(backend):
    """A rank that holds none of a pack's queries still takes part in the reduction of its key weights."""
    pairs = Pairs.of((0, 0), (2, 1), "cpu")
    q, k, v, _ = (x.requires_grad_() for x in draw((0, 0), (2, 1), 4, 4, 8))
    backend(q, k, v, pairs).sum().backward()
    assert k.grad is not None and v.grad is not None and not k.grad.any() and not v.grad.any()


def test_deterministic_algorithms_reach_the_kernel(backend):
    lens = (2, 3)
    q, k, v, grad = draw(lens, lens, 4, 4, 8)
    torch.use_deterministic_algorithms(True)
    try:  # the stand-ins compare their argument with torch's setting
        leaves = [x.requires_grad_() for x in (q, k, v)]
        torch.autograd.grad(backend(*leaves, Pairs.of(lens, lens, "cpu")), leaves, grad)
    finally:
        torch.use_deterministic_algorithms(False)
    if backend.name != "sdpa":
        assert flash_stand_ins.calls == [f"{backend.name} forward", f"{backend.name} backward"]


@pytest.mark.parametrize("backend", ["flash2", "varlen"], indirect=True)
def test_the_operator_passes_opcheck(backend):
    lens = (2, 3)
    q, k, v, _ = (x.requires_grad_() for x in draw(lens, lens, 4, 2, 8))
    cu = Pairs.of(lens, lens, "cpu").cu_seqlens_q
    torch.library.opcheck(torch.ops.flagdit.packed_attention.default, (q, k, v, cu, cu, 3, 3, backend.name))


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_shapes_can_be_traced(backend, device):
    """On meta and fake tensors, as memory is planned: no kernel runs."""
    mode = FakeTensorMode() if device == "cpu" else contextlib.nullcontext()
    with mode:
        q, grad = (torch.empty(9, 4, 64, dtype=torch.bfloat16, device=device) for _ in range(2))
        k = torch.empty(7, 2, 64, dtype=torch.bfloat16, device=device)
        pairs = Pairs.of((4, 5), (4, 3), device)
        out, lse = backend.forward(q, k, k, pairs)
        assert out.shape == q.shape and lse.shape == (9, 4) and lse.dtype == torch.float32
        dq, dk, dv = backend.backward(grad, q, k, k, out, lse, pairs)
        assert dq.shape == q.shape and dk.shape == dv.shape == k.shape
    assert not flash_stand_ins.calls
