"""The memory formulas against live bytes of the real model, traced without computing."""

from dataclasses import replace

import pytest
import torch

from flagdit.config.load import load_recipe
from flagdit.config.schema import ModelConfig
from flagdit.model.sizes import resolve
from flagdit.model.tokens import TokenSpec, num_tokens
from flagdit.plan.memory import Slice, activation_bytes, memory_of
from flagdit.plan.parameters import count_parameters
from flagdit.plan.trace import traced_activations
from flagdit.plan.workload import workload_of

BASE = ModelConfig(dim=512, num_layers=4, num_heads=8, ffn_dim=1536, text_dim=256, modalities={"image": 4})
EQUAL = [("image", (4, 1, 64, 64))] * 4
MIXED = [("image", (4, 1, 64, 64)), ("image", (4, 1, 32, 64)), ("image", (4, 1, 64, 96))]
FRAMES = [("video", (4, 6, 32, 32))] * 2
BF16, FP32 = torch.bfloat16, torch.float32

CASES = {
    "flag": ({}, EQUAL, BF16),
    "flag-fp32": ({}, EQUAL, FP32),
    "no-text": ({"text_dim": 0}, EQUAL, BF16),
    "classes-fp32": ({"text_dim": 0, "num_classes": 10}, EQUAL, FP32),
    "next": ({"block": "next"}, EQUAL, BF16),
    "next-gqa": ({"block": "next", "num_kv_heads": 2}, EQUAL, BF16),
    "flag-gqa": ({"num_kv_heads": 4}, EQUAL, BF16),
    "layer-norm": ({"qk_norm": "layer"}, EQUAL, BF16),
    "no-qk-norm": ({"qk_norm": "none"}, EQUAL, BF16),
    "mixed": ({}, MIXED, BF16),
    "mixed-no-text": ({"text_dim": 0}, MIXED, BF16),
    "video": ({"modalities": {"video": 4}, "rope_axes": 3}, FRAMES, BF16),
    "deep": ({"num_layers": 10, "dim": 256, "ffn_dim": 768}, EQUAL[:1], BF16),
    "wide-ffn": ({"ffn_dim": 4096}, EQUAL, BF16),
    "narrow-ffn": ({"ffn_dim": 512}, EQUAL, BF16),
    "block": ({"checkpointing": "block"}, EQUAL, BF16),
    "block-fp32": ({"checkpointing": "block"}, EQUAL, FP32),
    "block-next": ({"checkpointing": "block", "block": "next"}, EQUAL, BF16),
    "block-mixed": ({"checkpointing": "block"}, MIXED, BF16),
    "every-second": ({"checkpointing": "block", "checkpoint_every": 2}, EQUAL, BF16),
    "every-third": ({"checkpointing": "block", "checkpoint_every": 3}, EQUAL, BF16),
    "selective": ({"checkpointing": "selective"}, EQUAL, BF16),
    "selective-next": ({"checkpointing": "selective", "block": "next"}, EQUAL, BF16),
}


@pytest.mark.parametrize("name", CASES)
def test_activations_are_within_5_percent_of_the_traced_peak(name):
    changes, samples, dtype = CASES[name]
    cfg = resolve(replace(BASE, **changes))
    text = [32] * len(samples) if cfg.text_dim else []
    seqlens = [num_tokens(shape, modality, TokenSpec.from_model(cfg)) for modality, shape in samples]
    predicted = activation_bytes(cfg, Slice.whole(seqlens, text, dtype.itemsize))
    assert predicted == pytest.approx(traced_activations(cfg, samples, text, dtype), rel=0.05)


SMALL = ["data.batch_size=64", "model.num_kv_heads=4", "train.precision=bf16"]


def memory(gpus: int, *overrides: str):
    recipe = load_recipe("quickstart", [*SMALL, *overrides])
    return memory_of(workload_of(recipe, gpus, 4096), count_parameters(recipe.model))


def test_zero_stages_shard_what_they_say():
    count = count_parameters(load_recipe("quickstart").model).total
    alone = memory(1)
    assert (alone.weights, alone.gradients, alone.optimizer) == (2 * count, 4 * count, 12 * count)
    one, two, three = (memory(4, f"parallel.zero={stage}") for stage in (1, 2, 3))
    assert one.optimizer == two.optimizer == three.optimizer == 3 * count
    assert (one.gradients, two.gradients, three.gradients) == (4 * count, count, count)
    assert (one.weights, two.weights, three.weights) == (2 * count, 2 * count, count / 2)
    assert one.ema == alone.ema / 4 == 2 * count
    moved = memory(4, "parallel.zero=2", "parallel.offload=true")
    assert (moved.optimizer, moved.host) == (0, 3 * count)


def test_context_and_tensor_ranks_share_the_activations():
    alone = memory(1).activations
    assert memory(2, "parallel.context=2").activations == pytest.approx(alone / 2, rel=0.05)
    split = memory(2, "parallel.tensor=2").activations
    assert 0.5 * alone < split < 0.62 * alone
    assert split < memory(2, "parallel.tensor=2", "parallel.sequence=false").activations < alone


def test_tensor_ranks_hold_their_part_of_what_is_split_and_all_of_the_rest():
    parameters = count_parameters(BASE)
    E, F, C, Y = 512, 1536, 512, 256
    linears = 4 * E * E + 2 * Y * E + 3 * E * F
    modulation = 6 * E * (C + 1)
    split = 4 * (linears + modulation + 8) + 2 * E * (C + 1)
    assert parameters.per_rank(4) == parameters.total - split + split // 4
    assert parameters.largest_block(1) == linears + modulation + 8 + 3 * (E // 8) + 2 * E + Y
    layered = count_parameters(replace(BASE, qk_norm="layer"))
    assert layered.total - layered.per_rank(2) - (parameters.total - parameters.per_rank(2)) == 4 * 3 * 2 * E // 2
