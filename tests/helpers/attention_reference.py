"""Attention written out sample by sample and head by head, in fp64, and the packs that every backend is tried on."""

import math

import torch

CASES = {
    "equal": ((4, 4, 4), (4, 4, 4)),
    "mixed": ((4, 4, 2, 7, 4), (4, 4, 2, 7, 4)),
    "equal queries, ragged keys": ((5, 5, 5), (1, 3, 2)),
    "all ragged": ((2, 2, 6), (3, 1, 4)),
    "one sample": ((3,), (2,)),
    "one token each": ((1, 1, 1), (1, 2, 1)),
    "no keys in the middle": ((3, 2, 4), (2, 0, 5)),
    "no queries at the ends": ((0, 3, 1, 0), (2, 3, 1, 4)),
    "neither": ((2, 0, 3), (2, 0, 1)),
    "scattered": ((2, 3, 0, 1, 4, 2), (1, 0, 2, 3, 0, 2)),
    "no keys at all": ((2, 3), (0, 0)),
    "no queries at all": ((0, 0), (2, 3)),
    "no samples": ((), ()),
}


def loop_forward(q, k, v, lens_q, lens_k):
    """(out_THD, lse_TH) of softmax(q·kᵀ/√D)·v; 0 and −inf for queries without keys."""
    q, k, v = q.double(), k.double(), v.double()
    group = q.shape[1] // k.shape[1]
    out, lse = torch.zeros_like(q), q.new_full(q.shape[:2], -torch.inf)
    for h in range(q.shape[1]):
        for rows, cols in samples(lens_q, lens_k):
            scores = q[rows, h] @ k[cols, h // group].T / math.sqrt(q.shape[2])
            out[rows, h] = torch.softmax(scores, dim=-1) @ v[cols, h // group]
            lse[rows, h] = torch.logsumexp(scores, dim=-1)
    return out, lse


def loop_backward(grad, q, k, v, out, lse, lens_q, lens_k):
    """(dq, dk, dv) with the probabilities exp(q·kᵀ/√D − lse)."""
    grad, q, k, v, out, lse = (x.double() for x in (grad, q, k, v, out, lse))
    group, scale = q.shape[1] // k.shape[1], 1 / math.sqrt(q.shape[2])
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for h in range(q.shape[1]):
        for rows, cols in samples(lens_q, lens_k):
            kh, vh = k[cols, h // group], v[cols, h // group]
            p = torch.exp(q[rows, h] @ kh.T * scale - lse[rows, h, None])
            delta = (grad[rows, h] * out[rows, h]).sum(-1, keepdim=True)
            ds = p * (grad[rows, h] @ vh.T - delta) * scale
            dq[rows, h] = ds @ kh
            dk[cols, h // group] += ds.T @ q[rows, h]
            dv[cols, h // group] += p.T @ grad[rows, h]
    return dq, dk, dv


def samples(lens_q, lens_k):
    """(rows of queries, rows of keys) of every sample that has both."""
    start_q = start_k = 0
    for n, m in zip(lens_q, lens_k, strict=True):
        if n and m:
            yield slice(start_q, start_q + n), slice(start_k, start_k + m)
        start_q, start_k = start_q + n, start_k + m


def draw(lens_q, lens_k, heads, kv_heads, dim, dtype=torch.float32, device="cpu"):
    """q, k, v, and a gradient of the output."""
    torch.manual_seed(0)
    q, grad = (torch.randn(sum(lens_q), heads, dim).to(device, dtype) for _ in range(2))
    k, v = (torch.randn(sum(lens_k), kv_heads, dim).to(device, dtype) for _ in range(2))
    return q, k, v, grad
