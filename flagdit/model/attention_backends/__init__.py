"""Attention between the tokens of the same sample, behind one seam.

A backend is an object that says what it cannot do (`refusal`) and does the rest. To add one: a class (for a kernel that
takes packed tokens a subclass of `packed.PackedBackend`), a place in `choose.BACKENDS`, its name among the choices of
model.attention, and a stand-in for its package in the tests, which compare every backend with a loop over samples.

    base.py    the contract, and what holds for all backends: samples without queries or without keys
    pairs.py   which queries see which keys
    sdpa.py    torch's scaled_dot_product_attention: the reference, runs everywhere
    packed.py  kernels that take cu_seqlens, as one torch operator
    flash.py   those kernels: torch's own, flash-attn 2, FlashAttention-3, flash-attn 4
    choose.py  which backend a run uses
"""

from flagdit.model.attention_backends.base import AttentionBackend
from flagdit.model.attention_backends.choose import BACKENDS, choose_backend, resolve_backend, uncompiled
from flagdit.model.attention_backends.pairs import Pairs, joined, set_sizes
from flagdit.model.attention_backends.sdpa import Sdpa

__all__ = [
    "BACKENDS",
    "AttentionBackend",
    "Pairs",
    "Sdpa",
    "choose_backend",
    "joined",
    "resolve_backend",
    "set_sizes",
    "uncompiled",
]
