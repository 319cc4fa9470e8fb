"""Low-rank adapters of linears that tensor parallelism splits: y = W·x + scale·B·A·x.

Where the outputs of W are split, A is whole and B is split by outputs; where its inputs are split, A is split by inputs
and B is whole. What travels between ranks has the width of A's few outputs.

Shape legend: E inputs, O outputs of a linear, R rank of the adapter; of a split linear, this rank's part of them.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from flagdit.parallel.megatron import Layers


def split_adapter(split: Any, whole: Any, kind: str, projected: bool, layers: Layers) -> None:
    """Gives a split linear its part of an adapter, under the names `lora_a` and `lora_b`.

    Args:
        split: this rank's part of the linear.
        whole: the linear with `lora_a`, `lora_b` and `scale`.
        kind: column or row, see the plan.
        projected: whether `Projection` applies the linear, and so its `adapter`; otherwise calling it does.
        layers: ways between the ranks.
    """
    out_features, in_features = split.weight.shape
    where = {"bias": False, "device": whole.weight.device, "dtype": whole.weight.dtype}
    split.lora_a = nn.Linear(in_features, whole.lora_a.out_features, **where)
    split.lora_b = nn.Linear(whole.lora_b.in_features, out_features, **where)

    def adapter(x: Tensor) -> Tensor:
        short = split.lora_a(x)
        if kind == "row":
            short = layers.leave(short)
        elif projected:  # other columns read inputs that are whole on every rank, and leave their gradients parts
            short = layers.enter(short)
        return whole.scale * split.lora_b(short)

    if projected:
        split.adapter = adapter
    else:
        split.register_forward_hook(lambda module, inputs, output: output + adapter(*inputs))
