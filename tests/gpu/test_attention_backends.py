"""Every attention backend that serves here, on a GPU in bf16, against the loop in fp64."""

import pytest
import torch
from attention_reference import CASES, draw, loop_backward, loop_forward

from flagdit.model.attention_backends import BACKENDS, Pairs, Sdpa

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CASES = CASES | {
    "images": ((300, 300, 77), (300, 300, 77)),
    "captions": ((257, 257, 130), (12, 40, 1)),
}
HEADS = [(4, 4), (4, 2), (4, 1)]


@pytest.fixture(params=[b.name for b in BACKENDS])
def backend(request):
    (found,) = (b for b in BACKENDS if b.name == request.param)
    return found


def serve_or_skip(backend, head_dim, dtype=torch.bfloat16):
    if reason := backend.refusal(torch.device("cuda"), dtype, head_dim, lse=True):
        pytest.skip(f"{backend.name}: {reason}")


def close(found, wanted, tolerance=2e-2):
    """Within a share of the largest value, which is how errors of bf16 scale."""
    wanted = wanted.double().cpu()
    if wanted.numel():
        found = found.double().cpu()
        finite = wanted.isfinite()
        assert torch.equal(found[~finite], wanted[~finite])
        assert (found[finite] - wanted[finite]).abs().max() <= tolerance * max(1.0, wanted[finite].abs().max().item())


@pytest.mark.parametrize("head_dim", [48, 64, 96, 128])
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_backend_equals_the_loop(backend, case, heads, head_dim):
    serve_or_skip(backend, head_dim)
    lens_q, lens_k = CASES[case]
    q, k, v, grad = draw(lens_q, lens_k, *heads, head_dim, torch.bfloat16)
    wanted_out, wanted_lse = loop_forward(q, k, v, lens_q, lens_k)
    wanted = loop_backward(grad, q, k, v, wanted_out, wanted_lse, lens_q, lens_k)
    q, k, v, grad = (x.cuda() for x in (q, k, v, grad))
    pairs = Pairs.of(lens_q, lens_k, "cuda")

    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = backend(*leaves, pairs)
    close(out.detach(), wanted_out)
    for found, want in zip(torch.autograd.grad(out, leaves, grad), wanted, strict=True):
        close(found, want)
    out, lse = backend.forward(q, k, v, pairs)
    assert lse.dtype == torch.float32 and lse.shape == q.shape[:2]
    close(out, wanted_out)
    close(lse, wanted_lse, 1e-3)
    for found, want in zip(backend.backward(grad, q, k, v, out, lse, pairs), wanted, strict=True):
        close(found, want)


@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_chunks_of_keys_add_up_to_the_whole(backend, heads):
    serve_or_skip(backend, 64)
    lens = (300, 1, 129)
    q, k, v, grad = (x.cuda() for x in draw(lens, lens, *heads, 64, torch.bfloat16))
    whole = Pairs.of(lens, lens, "cuda")
    wanted_out, wanted_lse = backend.forward(q, k, v, whole)
    wanted = backend.backward(grad, q, k, v, wanted_out, wanted_lse, whole)
    # The first chunk ends inside the first sample, so two samples have no keys in it and one has none in the last.
    cuts = [((200, 0, 0), slice(0, 200)), ((100, 1, 29), slice(200, 330)), ((0, 0, 100), slice(330, 430))]
    parts = [backend.forward(q, k[i], v[i], Pairs.of(lens, part, "cuda")) for part, i in cuts]
    lse = torch.stack([lse for _, lse in parts]).logsumexp(0)
    out = sum(torch.exp(part_lse - lse)[..., None] * part.float() for part, part_lse in parts).bfloat16()
    close(out, wanted_out)
    close(lse, wanted_lse, 1e-3)
    dq = torch.zeros_like(q, dtype=torch.float32)
    for part, i in cuts:
        part_q, dk, dv = backend.backward(grad, q, k[i], v[i], out, lse, Pairs.of(lens, part, "cuda"))
        dq += part_q
        close(dk, wanted[1][i])
        close(dv, wanted[2][i])
    close(dq, wanted[0])


def test_strided_inputs(backend):
    serve_or_skip(backend, 64)
    lens = (130, 70)
    torch.manual_seed(0)
    fused = torch.randn(sum(lens), 3, 4, 64, device="cuda", dtype=torch.bfloat16)
    q, k, v = fused.unbind(1)
    out, _ = backend.forward(q, k, v, Pairs.of(lens, lens, "cuda"))
    close(out, loop_forward(q.cpu(), k.cpu(), v.cpu(), lens, lens)[0])


def test_deterministic_backward_repeats_itself(backend):
    serve_or_skip(backend, 64)
    lens = (700, 3, 1100)
    if reason := backend.nondeterminism(torch.device("cuda"), gqa=False):
        pytest.skip(f"{backend.name}: {reason}")
    q, k, v, grad = (x.cuda() for x in draw(lens, lens, 4, 4, 64, torch.bfloat16))
    pairs = Pairs.of(lens, lens, "cuda")
    torch.use_deterministic_algorithms(True)
    try:
        leaves = [x.requires_grad_() for x in (q, k, v)]
        first, second = (torch.autograd.grad(backend(*leaves, pairs), leaves, grad) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_sdpa_in_fp32_with_a_log_sum_exp():
    """No fused kernel of torch serves it: the written-out formula does."""
    lens_q, lens_k = CASES["captions"]
    q, k, v, grad = draw(lens_q, lens_k, 4, 2, 64)
    wanted_out, wanted_lse = loop_forward(q, k, v, lens_q, lens_k)
    wanted = loop_backward(grad, q, k, v, wanted_out, wanted_lse, lens_q, lens_k)
    q, k, v, grad = (x.cuda() for x in (q, k, v, grad))
    pairs = Pairs.of(lens_q, lens_k, "cuda")
    out, lse = Sdpa().forward(q, k, v, pairs)
    close(out, wanted_out, 1e-5)
    close(lse, wanted_lse, 1e-5)
    for found, want in zip(Sdpa().backward(grad, q, k, v, out, lse, pairs), wanted, strict=True):
        close(found, want, 1e-5)


def test_compiled(backend):
    """In one graph, with two layouts."""
    serve_or_skip(backend, 64)
    if backend.name == "sdpa":
        pytest.skip("sdpa stands outside of compiled graphs")
    compiled = torch.compile(lambda q, k, v, pairs: backend(q * 2, k, v, pairs) + 1, fullgraph=True)
    for lens in ((130, 70), (40, 300, 5)):
        q, k, v, _ = (x.cuda() for x in draw(lens, lens, 4, 2, 64, torch.bfloat16))
        close(compiled(q, k, v, Pairs.of(lens, lens, "cuda")), backend(q * 2, k, v, Pairs.of(lens, lens, "cuda")) + 1)
