"""Sets of samples that see each other: to attention one long sample, to everything else what they were."""

import pytest
import torch

from flagdit.batch import Segment
from flagdit.config.schema import ModelConfig
from flagdit.errors import RecipeError
from flagdit.model.attention_backends import Pairs, joined, set_sizes
from flagdit.model.flag_dit import FlagDiT, Inference
from flagdit.model.tokens import TokenSpec, pack

CONFIG = ModelConfig(dim=16, num_layers=2, num_heads=2, ffn_dim=32, cond_dim=8, modalities={"image": 2}, text_dim=0)
SHAPES = [(2, 1, 4, 4), (2, 1, 4, 6), (2, 1, 2, 4), (2, 1, 4, 4)]


@pytest.fixture(scope="module")
def model() -> FlagDiT:
    model = FlagDiT(CONFIG).eval()
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    return model


def velocities(
    model: FlagDiT, sets: tuple[int, ...], noise: torch.Tensor, base: int | None = None
) -> tuple[torch.Tensor, ...]:
    """One tensor of patches for every sample."""
    spec = TokenSpec.from_model(CONFIG)
    batch = pack([Segment(i, "image", s) for i, s in enumerate(SHAPES)], None, spec)
    with torch.no_grad():
        v = model({"image": noise}, torch.full((4,), 0.3), batch, Inference(sets=sets, proportional_base=base))
    counts = batch.layout.patch_segment["image"].bincount().tolist()
    return v["image"].split(counts)


NOISE = torch.randn(4 + 6 + 2 + 4, 8, generator=torch.Generator().manual_seed(1))


def test_a_sample_depends_on_its_set_only(model):
    before = velocities(model, (2,), NOISE)
    changed = NOISE.clone()
    changed[4:10] += 1  # the second sample
    after = velocities(model, (2,), changed)
    moved = [bool((a - b).abs().max() > 1e-4) for a, b in zip(after, before, strict=True)]
    assert moved == [True, True, False, False]
    alone = velocities(model, (), NOISE)
    assert torch.equal(torch.cat(velocities(model, (1,), NOISE)), torch.cat(alone))
    assert all((a - b).abs().max() > 1e-4 for a, b in zip(before, alone, strict=True))


def test_attention_in_a_set_is_that_of_one_long_sample():
    seqlens = (3, 5, 2, 4)
    cu_seqlens = torch.tensor([0, 3, 8, 10, 14], dtype=torch.int32)
    pairs = Pairs.within((3, 1), seqlens, cu_seqlens)
    assert pairs.seqlens_q == pairs.seqlens_k == (10, 4) and pairs.cu_seqlens_q.tolist() == [0, 10, 14]
    # what pads a pack on several ranks is a sample beyond the sets
    padded = Pairs.within((2,), (3, 5, 6), torch.tensor([0, 3, 8, 14], dtype=torch.int32))
    assert padded.seqlens_q == (8, 6)
    plain = Pairs.within((1,) * 4, seqlens, cu_seqlens)
    assert plain.seqlens_q == seqlens and plain.cu_seqlens_q is cu_seqlens


def test_patterns_repeat_over_the_pack():
    assert set_sizes((), 3) == (1, 1, 1) and set_sizes((2, 1), 6) == (2, 1, 2, 1)
    assert joined((3, 5, 2, 4), (1, 3)) == (3, 11)
    for pattern, count in (((2,), 3), ((0,), 2), ((4,), 2)):
        with pytest.raises(RecipeError, match="sets of"):
            set_sizes(pattern, count)


def test_proportional_attention_counts_what_a_token_sees(model):
    plain = velocities(model, (4,), NOISE)
    tokens = sum((h // 2) * (w // 2 + 1) for _, _, h, w in SHAPES)
    same = velocities(model, (4,), NOISE, base=tokens)
    for a, b in zip(same, plain, strict=True):
        torch.testing.assert_close(a, b)
    assert (torch.cat(velocities(model, (4,), NOISE, base=6)) - torch.cat(plain)).abs().max() > 1e-4
