"""Stand-ins for the flash attention packages on a CPU: their signatures and demands, computed with the reference.

Each takes its arguments exactly as the package it stands for, in order and by name, and checks what the package would
check or silently rely on, so that a wrong order, dtype or layout fails here and not on a cluster. Gradients that a
package writes into given tensors are written there.
"""

import math
from types import ModuleType, SimpleNamespace

import torch
from attention_reference import loop_backward, loop_forward

calls: list[str] = []
"""Names of the kernels that ran; tests clear it."""


def _lens(cu_q, cu_k, max_q, max_k, q, k):
    for cu, longest, tokens in ((cu_q, max_q, len(q)), (cu_k, max_k, len(k))):
        assert cu.dtype == torch.int32 and cu.is_contiguous() and cu.shape == cu_q.shape and type(longest) is int
        lens = cu.diff().tolist()
        assert min(lens) > 0, "a sample without queries or keys reached a kernel"
        assert max(lens) <= longest <= max(max(lens), 2) and cu[-1] == tokens and cu[0] == 0
    # flash-attn 2 lays the log-sum-exp of such calls out in another way
    assert max_q > 1
    return cu_q.diff().tolist(), cu_k.diff().tolist()


def _inputs(*tensors, scale):
    assert len({x.dtype for x in tensors}) == 1 and all(x.stride(-1) == 1 and x.dim() == 3 for x in tensors)
    assert math.isclose(scale, 1 / math.sqrt(tensors[0].shape[-1]), rel_tol=1e-6)


def forward(name, q, k, v, cu_q, cu_k, max_q, max_k, scale):
    calls.append(f"{name} forward")
    _inputs(q, k, v, scale=scale)
    out, lse = loop_forward(q, k, v, *_lens(cu_q, cu_k, max_q, max_k, q, k))
    return out.to(q.dtype), lse.float().T.contiguous()


def backward(name, grad, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, scale):
    calls.append(f"{name} backward")
    _inputs(q, k, v, out, grad, scale=scale)
    assert lse.dtype == torch.float32 and lse.shape == (q.shape[1], len(q)) and lse.is_contiguous()
    assert not lse.isinf().any()
    grads = loop_backward(grad, q, k, v, out, lse.T, *_lens(cu_q, cu_k, max_q, max_k, q, k))
    return tuple(g.to(q.dtype) for g in grads)


def aten(real=torch.ops.aten):
    """torch's flash operators. The real ones run on meta tensors beside it: they check the order of the arguments."""

    def meta(op, *args, **kwargs):
        return op(*(x.to("meta") if isinstance(x, torch.Tensor) else x for x in args), **kwargs)

    def _flash_attention_forward(q, k, v, cu_q, cu_k, max_q, max_k, dropout, causal, debug, *, scale):
        args = (q, k, v, cu_q, cu_k, max_q, max_k, dropout, causal, debug)
        _, meta_lse, *_ = meta(real._flash_attention_forward, *args, scale=scale)
        assert (dropout, causal, debug) == (0.0, False, False)
        out, lse = forward("varlen", *args[:7], scale)
        assert lse.shape == meta_lse.shape and lse.dtype == meta_lse.dtype
        return out, lse, None, None, None

    def _flash_attention_backward(*args, scale):
        meta(real._flash_attention_backward, *args, scale=scale)
        *tensors, dropout, causal, rng_state, unused = args
        assert (dropout, causal, rng_state.shape, unused.numel()) == (0.0, False, (2,), 0)
        return backward("varlen", *tensors, scale)

    return SimpleNamespace(**{f.__name__: f for f in (_flash_attention_forward, _flash_attention_backward)})


def flash2():
    """flash_attn.flash_attn_interface of flash-attn 2.8.3."""

    def _flash_attn_varlen_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False,
        block_table=None, leftpad_k=None, seqused_k=None, zero_tensors=False,
    ):  # fmt: skip
        assert (dropout_p, causal, window_size_left, window_size_right, softcap) == (0.0, False, -1, -1, 0.0)
        lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        return *forward("flash2", q, k, v, *lengths, softmax_scale), q.new_empty(0), None

    def _flash_attn_varlen_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic,
        rng_state=None, zero_tensors=False,
    ):  # fmt: skip
        assert (dropout_p, causal, window_size_left, window_size_right, softcap) == (0.0, False, -1, -1, 0.0)
        assert alibi_slopes is None and deterministic is torch.are_deterministic_algorithms_enabled()
        lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        grads = backward("flash2", dout, q, k, v, out, softmax_lse, *lengths, softmax_scale)
        _write((dq, dk, dv), grads)
        return torch.empty(0)

    return _module("flash_attn.flash_attn_interface", _flash_attn_varlen_forward, _flash_attn_varlen_backward)


FLASH3_SCHEMAS = (
    "fwd(Tensor q, Tensor k, Tensor v, Tensor(k_new!)? k_new=None, Tensor(v_new!)? v_new=None, Tensor? q_v=None, "
    "Tensor(out!)? out=None, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, Tensor? cu_seqlens_k_new=None, "
    "Tensor? seqused_q=None, Tensor? seqused_k=None, int? max_seqlen_q=None, int? max_seqlen_k=None, "
    "Tensor? page_table=None, Tensor? kv_batch_idx=None, Tensor? leftpad_k=None, Tensor? rotary_cos=None, "
    "Tensor? rotary_sin=None, Tensor? seqlens_rotary=None, Tensor? q_descale=None, Tensor? k_descale=None, "
    "Tensor? v_descale=None, float? softmax_scale=None, bool is_causal=False, int window_size_left=-1, "
    "int window_size_right=-1, int attention_chunk=0, float softcap=0.0, bool is_rotary_interleaved=False, "
    "Tensor? scheduler_metadata=None, int num_splits=0, bool? pack_gqa=None, int sm_margin=0) "
    "-> (Tensor(out!), Tensor, Tensor, Tensor)",
    "bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, Tensor(dq!)? dq=None, "
    "Tensor(dk!)? dk=None, Tensor(dv!)? dv=None, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, "
    "Tensor? seqused_q=None, Tensor? seqused_k=None, int? max_seqlen_q=None, int? max_seqlen_k=None, "
    "float? softmax_scale=None, bool is_causal=False, int window_size_left=-1, int window_size_right=-1, "
    "float softcap=0.0, bool deterministic=False, int sm_margin=0) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)


def flash3():
    """The operators that flash_attn_interface of FlashAttention-3 registers; lives as long as what is returned."""
    library = torch.library.Library("flash_attn_3", "DEF")
    for schema in FLASH3_SCHEMAS:
        library.define(schema)

    def fwd(q, k, v, *rest):
        a = _arguments(torch.ops.flash_attn_3.fwd, rest, 3)
        given = {"cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "softmax_scale"}
        _defaults(a, given, is_rotary_interleaved=True, num_splits=1)
        lengths = (a.cu_seqlens_q, a.cu_seqlens_k, a.max_seqlen_q, a.max_seqlen_k)
        out, lse = forward("flash3", q, k, v, *lengths, a.softmax_scale)
        return out, lse, torch.empty(0), torch.empty(0)

    def bwd(dout, q, k, v, out, lse, dq, dk, dv, *rest):
        a = _arguments(torch.ops.flash_attn_3.bwd, rest, 9)
        given = {"cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "softmax_scale", "deterministic"}
        _defaults(a, given)
        assert a.deterministic is torch.are_deterministic_algorithms_enabled()
        lengths = (a.cu_seqlens_q, a.cu_seqlens_k, a.max_seqlen_q, a.max_seqlen_k)
        _write((dq, dk, dv), backward("flash3", dout, q, k, v, out, lse, *lengths, a.softmax_scale))
        return tuple(torch.empty(0) for _ in range(5))

    library.impl("fwd", fwd, "CPU")
    library.impl("bwd", bwd, "CPU")
    return _module("flash_attn_interface"), library


def flash4():
    """flash_attn.cute.interface of flash-attn 4.0.0b36, without the arguments that its defaults serve."""

    def _flash_attn_fwd(
        q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None, max_seqlen_q=None,
        max_seqlen_k=None, min_seqlen_k=None, page_table=None, softmax_scale=None, causal=False, softcap=None,
        *, return_lse=False,
    ):  # fmt: skip
        assert return_lse and not causal
        lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        return *forward("flash4", q, k, v, *lengths, softmax_scale), None, None, None

    def _flash_attn_bwd(
        q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, *,
        cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, deterministic=False,
    ):  # fmt: skip
        assert not causal and deterministic is torch.are_deterministic_algorithms_enabled()
        lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        return backward("flash4", dout, q, k, v, out, lse, *lengths, softmax_scale)

    return _module("flash_attn.cute.interface", _flash_attn_fwd, _flash_attn_bwd)


def _arguments(op, rest, skip):
    """What a kernel got, by the names of its schema; torch leaves defaults at the end of the list away."""
    schema = op.default._schema.arguments[skip:]
    named = {a.name: a.default_value for a in schema} | {a.name: x for a, x in zip(schema, rest, strict=False)}
    return SimpleNamespace(**named)


def _defaults(arguments, given, **changed):
    expected = {
        "is_causal": False, "window_size_left": -1, "window_size_right": -1, "attention_chunk": 0, "softcap": 0.0,
        "sm_margin": 0,
    } | changed  # fmt: skip
    for name, value in vars(arguments).items():
        assert name in given or value == expected.get(name), f"{name}={value}"


def _write(targets, grads):
    for target, grad in zip(targets, grads, strict=True):
        assert target.shape == grad.shape and target.dtype == grad.dtype and target.stride(-1) == 1
        target.copy_(grad)


def _module(name, *functions):
    module = ModuleType(name)
    vars(module).update({f.__name__: f for f in functions})
    return module
