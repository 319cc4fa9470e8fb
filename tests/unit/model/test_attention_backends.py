"""Every attention backend against a loop over samples, forward and backward."""

import math

import pytest
import torch

from flagdit.model import attention_backends
from flagdit.model.attention_backends import BACKENDS, Pairs, choose_backend

CASES = {
    "equal": ((4, 4, 4), (4, 4, 4)),
    "mixed": ((4, 4, 2, 7, 4), (4, 4, 2, 7, 4)),
    "equal queries, ragged keys": ((5, 5, 5), (1, 3, 2)),
    "all ragged": ((2, 2, 6), (3, 1, 4)),
    "one": ((3,), (2,)),
}


def offsets(seqlens):
    return torch.tensor([0, *torch.tensor(seqlens).cumsum(0)], dtype=torch.int32)


def loop(q, k, v, seqlens_q, seqlens_k):
    """softmax(q·kᵀ/√D)·v written out, sample by sample and head by head."""
    out = []
    groups = q.shape[1] // k.shape[1]
    for qs, ks, vs in zip(q.split(list(seqlens_q)), k.split(list(seqlens_k)), v.split(list(seqlens_k)), strict=True):
        heads = [
            torch.softmax(qs[:, h] @ ks[:, h // groups].T / math.sqrt(q.shape[2]), dim=-1) @ vs[:, h // groups]
            for h in range(q.shape[1])
        ]
        out.append(torch.stack(heads, dim=1))
    return torch.cat(out)


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("case", CASES)
def test_backend_equals_the_loop(backend, case, kv_heads):
    if backend.refusal(torch.device("cpu"), torch.float32, 8) is not None:
        pytest.skip("this backend does not run here")
    torch.manual_seed(0)
    lens_q, lens_k = CASES[case]
    q = torch.randn(sum(lens_q), 4, 8, requires_grad=True)
    k, v = (torch.randn(sum(lens_k), kv_heads, 8, requires_grad=True) for _ in range(2))
    found = backend(q, k, v, Pairs(lens_q, lens_k, offsets(lens_q), offsets(lens_k)))
    wanted = loop(q, k, v, lens_q, lens_k)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    weights = torch.randn_like(wanted)
    for a, b in zip(
        torch.autograd.grad(found, (q, k, v), weights), torch.autograd.grad(wanted, (q, k, v), weights), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


class Refusing:
    name = "refusing"

    def refusal(self, device, dtype, head_dim):
        return "head size 8 only" if head_dim != 8 else None

    def __call__(self, q_THD, k_UKD, v_UKD, pairs):
        return q_THD


def test_the_first_backend_that_does_not_refuse_is_taken(monkeypatch):
    monkeypatch.setattr(attention_backends, "BACKENDS", (Refusing(), *BACKENDS))
    cpu = torch.device("cpu")
    assert choose_backend(cpu, torch.float32, 8).name == "refusing"
    assert choose_backend(cpu, torch.float32, 16).name == "sdpa"
    with pytest.raises(AssertionError, match="refusing': 'head size 8 only"):
        choose_backend(cpu, torch.int8, 16)
