"""A pack that is shared out and put together again."""

from dataclasses import replace
from itertools import product

import pytest
import torch

from flagdit.batch import PackedText, Segment
from flagdit.config.schema import ModelConfig
from flagdit.flow.noise import draw_noise
from flagdit.model.tokens import TokenSpec, pack
from flagdit.parallel.context import restrict, share
from flagdit.parallel.mesh import Axis, ParallelContext
from flagdit.parallel.ring import Schedule, merge

CFG = ModelConfig(patch_size=2, modalities={"image": 3, "video": 2, "audio": 1})
DIMS = {"image": 12, "video": 8, "audio": 4}
SHAPES = [("image", (3, 1, 4, 6)), ("video", (2, 3, 4, 2)), ("image", (3, 1, 2, 2)), ("video", (2, 1, 6, 6))]


@pytest.fixture(scope="module")
def batch():
    segments = [Segment(40 + i, modality, shape, epoch=2) for i, (modality, shape) in enumerate(SHAPES)]
    latents = [torch.randn(shape) for _, shape in SHAPES]
    text = PackedText.pack([torch.randn(n, 5) for n in (3, 1, 2, 4)])
    return pack(segments, latents, TokenSpec.from_model(CFG), text=text)


def place(context: int, tensor: int, c: int, t: int, sequence: bool) -> ParallelContext:
    return ParallelContext(context=Axis(context, c), tensor=Axis(tensor, t), sequence=sequence)


def shares(batch, context: int, tensor: int, sequence: bool):
    return [
        share(batch, place(context, tensor, c, t, sequence), DIMS) for c, t in product(range(context), range(tensor))
    ]


@pytest.mark.parametrize(("context", "tensor"), [(1, 1), (2, 1), (3, 2), (1, 4), (5, 3)])
def test_the_shares_together_are_the_pack(batch, context, tensor):
    parts = shares(batch, context, tensor, sequence=True)
    count = batch.layout.num_tokens
    for name in ("segment_ids", "raster_T", "axes_TA"):
        joined = torch.cat([getattr(p.layout, name) for p in parts])
        assert torch.equal(joined[:count], getattr(batch.layout, name))
        assert (joined[count:] == (len(SHAPES) - 1 if name == "segment_ids" else 0)).all(), "padding"
    size = parts[0].layout.num_tokens
    assert all(p.layout.num_tokens == len(p.layout.segment_ids) == size for p in parts)
    assert size * len(parts) - count < context * tensor
    for modality in ("image", "video"):
        assert torch.equal(torch.cat([p.patches[modality] for p in parts]), batch.patches[modality])
        places = [p.layout.patch_index[modality] + i * size for i, p in enumerate(parts)]
        assert torch.equal(torch.cat(places), batch.layout.patch_index[modality])
        owners = torch.cat([p.layout.patch_segment[modality] for p in parts])
        assert torch.equal(owners, batch.layout.patch_segment[modality])
    for name in ("nextline_index", "nextframe_index"):
        places = [getattr(p.layout, name) + i * size for i, p in enumerate(parts)]
        assert torch.equal(torch.cat(places), getattr(batch.layout, name))
    for p in parts:
        lengths = torch.bincount(p.layout.segment_ids, minlength=len(SHAPES)).tolist()
        assert list(p.layout.seqlens) == lengths and p.layout.cu_seqlens.tolist()[-1] == size
        assert sum(p.share.seqlens) == size * len(parts) and p.share.seqlens[: len(SHAPES)] == batch.layout.seqlens


def test_every_rank_draws_its_part_of_the_noise(batch):
    whole = draw_noise(batch, seed=3)
    parts = [draw_noise(p, seed=3) for p in shares(batch, 3, 2, sequence=True)]
    for modality in ("image", "video"):
        assert torch.equal(torch.cat([p[modality] for p in parts]), whole[modality])


def test_all_modalities_are_there_with_no_rows_where_there_is_none(batch):
    for p in shares(batch, 5, 3, sequence=True):
        assert set(p.patches) == set(p.layout.patch_index) == set(DIMS)
        assert p.patches["audio"].shape == (0, 4)
        assert draw_noise(p, seed=0)["audio"].shape == (0, 4)


def test_queries_come_from_the_whole_range_of_a_context_rank(batch):
    parts = shares(batch, 2, 3, sequence=True)
    for c in range(2):
        own = parts[3 * c : 3 * c + 3]
        for p in own:
            assert torch.equal(p.attended.segment_ids, torch.cat([q.layout.segment_ids for q in own]))
            assert torch.equal(p.attended.axes_TA, torch.cat([q.layout.axes_TA for q in own]))
    # Without sequence parallelism the tensor ranks hold the same tokens.
    plain = shares(batch, 2, 3, sequence=False)
    assert torch.equal(plain[0].layout.segment_ids, plain[2].layout.segment_ids)
    assert torch.equal(plain[0].layout.segment_ids, plain[0].attended.segment_ids)


def test_sampling_shares_a_pack_without_patches(batch):
    p = share(replace(batch, patches={}), place(2, 1, 0, 0, False), DIMS)
    assert p.patches == {} and set(p.layout.patch_index) == set(DIMS)


def test_a_range_may_lie_in_the_padding_alone(batch):
    count = batch.layout.num_tokens
    layout = restrict(batch.layout, count + 1, count + 4, {})
    assert layout.seqlens == (0, 0, 0, 3) and layout.raster_T.tolist() == [0, 0, 0]


class FakePairs:
    def __init__(self, seqlens):
        self.seqlens_q = self.seqlens_k = seqlens


def test_keys_are_sent_only_where_a_sample_is_shared():
    # Samples of 4, 8 and 4 tokens on four ranks of 4.
    schedule = Schedule.of(FakePairs((4, 8, 4)), Axis(4, 0))
    needed = [[schedule.needs(q, k) for k in range(4)] for q in range(4)]
    assert needed == [[q == k or {q, k} == {1, 2} for k in range(4)] for q in range(4)]


def test_merged_parts_are_the_softmax_over_all_keys():
    q, k, v = (torch.randn(5, 2, 4, dtype=torch.float64) for _ in range(3))

    def attend(keys):
        logits = torch.einsum("thd,uhd->thu", q, k[keys]) / 2
        return torch.einsum("thu,uhd->thd", logits.softmax(-1), v[keys]), logits.logsumexp(-1)

    out, lse = merge(*attend(slice(0, 2)), *attend(slice(2, 5)))
    expected, expected_lse = attend(slice(0, 5))
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse, expected_lse)
    # A query without keys in one part, or in both.
    none = (torch.zeros(5, 2, 4), torch.full((5, 2), -torch.inf))
    torch.testing.assert_close(merge(*none, expected, expected_lse)[0].double(), expected, rtol=1e-5, atol=1e-6)
    assert not merge(*none, *none)[0].any() and merge(*none, *none)[1].isneginf().all()
