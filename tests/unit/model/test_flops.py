"""The FLOP count against torch's own counter."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from flagdit.batch import PackedText, Segment
from flagdit.config.schema import ModelConfig
from flagdit.model.flag_dit import FlagDiT
from flagdit.model.flops import forward_flops, training_flops
from flagdit.model.initialize import initialize
from flagdit.model.tokens import TokenSpec, pack

BASE = {"dim": 64, "num_layers": 2, "num_heads": 4}
CONFIGS = {
    "flag": ModelConfig(**BASE, text_dim=16, modalities={"image": 4, "video": 3}),
    "next": ModelConfig(**BASE, block="next", num_kv_heads=2, text_dim=16, modalities={"image": 4, "video": 3}),
    "classes": ModelConfig(**BASE, text_dim=0, num_classes=3, modalities={"image": 4, "video": 3}, learn_sigma=True),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_count_equals_the_counter(name):
    cfg = CONFIGS[name]
    segments = [Segment(0, "image", (4, 1, 8, 8)), Segment(1, "video", (3, 2, 4, 8)), Segment(2, "image", (4, 1, 8, 8))]
    text = PackedText.pack([torch.randn(n, 16) for n in (3, 5, 3)]) if cfg.text_dim else None
    latents = [torch.randn(s.shape) for s in segments]
    batch = pack(segments, latents, TokenSpec.from_model(cfg), text=text, labels=[0, 1, 2])
    model = FlagDiT(cfg)
    initialize(model, 0)
    x = {m: p.clone().requires_grad_() for m, p in batch.patches.items()}
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:  # the counter does not know torch's attention kernel for CPUs
        velocity = model(x, torch.rand(3), batch)
    forward = counter.get_total_flops()
    text_seqlens = text.seqlens if text else ()
    patches = {m: len(p) for m, p in batch.patches.items()}
    assert forward == forward_flops(cfg, batch.layout.seqlens, text_seqlens, patches)
    with counter:
        sum(v.sum() for v in velocity.values()).backward()
    # Backward skips the gradient of what needs none (sinusoid, text features).
    assert training_flops(cfg, batch) == pytest.approx(forward + counter.get_total_flops(), rel=0.05)


def test_attention_grows_with_the_square_of_a_sample_not_of_the_pack():
    cfg = CONFIGS["classes"]
    linear = 2 * forward_flops(cfg, [100])
    assert forward_flops(cfg, [100, 100]) == linear
    assert forward_flops(cfg, [200]) > linear
