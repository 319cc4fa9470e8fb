"""Low-rank adapters (LoRA, arXiv 2106.09685): a frozen linear layer plus alpha/rank·B·A, of which only A and B train.

A and B are linear layers of their own beside the weight, so that they split as the layer they belong to. Where its
outputs are split (wq, wk, wv, w1, w3), A is on every rank and B is split by outputs; where its inputs are split (wo,
w2), A is split by inputs, its short result is summed, and B is on every rank.

Shape legend: O, I outputs and inputs of a linear layer, R rank.
"""

from __future__ import annotations

from torch import Tensor, nn

from flagdit.config.schema import LoraConfig

A, B = "lora_a", "lora_b"


class LoraLinear(nn.Linear):
    """A linear layer that keeps its weight, under its name, and learns a low-rank change of it.

    Args:
        base: whose parameters are taken over, frozen.
        cfg: rank and alpha.
    """

    def __init__(self, base: nn.Linear, cfg: LoraConfig):
        super().__init__(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.scale = cfg.alpha / cfg.rank
        kind = {"device": base.weight.device, "dtype": base.weight.dtype}
        self.lora_a = nn.Linear(base.in_features, cfg.rank, bias=False, **kind)
        self.lora_b = nn.Linear(cfg.rank, base.out_features, bias=False, **kind)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.scale * self.lora_b(self.lora_a(x))


def add_adapters(model: nn.Module, cfg: LoraConfig) -> None:
    """Freezes a model and puts adapters on the linear layers of its blocks that `targets` names.

    The adapters' values are left as allocated: `model/initialize.py` has rules for them, by which the model first
    computes what it did without.
    """
    model.requires_grad_(False)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if name in cfg.targets and type(child) is nn.Linear:
                setattr(parent, name, LoraLinear(child, cfg))


def is_adapter(name: str) -> bool:
    """Whether that is the name of an adapter's parameter."""
    return name.endswith((f".{A}.weight", f".{B}.weight"))


def merged(weight_OI: Tensor, a_RI: Tensor, b_OR: Tensor, cfg: LoraConfig) -> Tensor:
    """The weight that acts as layer and adapter together, fp32."""
    return weight_OI.float() + (cfg.alpha / cfg.rank) * (b_OR.float() @ a_RI.float())
