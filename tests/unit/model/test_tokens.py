"""Patches, special tokens and positions."""

import pytest
import torch

from flagdit.batch import PackedText, Segment, concat
from flagdit.config.schema import ModelConfig
from flagdit.errors import DataError
from flagdit.model import tokens
from flagdit.model.modality import MODALITIES
from flagdit.model.tokens import TokenSpec, build_layout, num_tokens, pack, patchify, patchify_all, unpack, unpatchify

SPEC = TokenSpec(patch_size=2, nextline=True, nextframe=True)
SHAPES = [
    ("image", (4, 1, 4, 6)),
    ("video", (3, 3, 2, 4)),
    ("image", (4, 1, 2, 2)),
    ("audio", (8, 1, 6, 10)),
    ("multiview", (4, 2, 2, 2)),
]


def make_segments() -> list[Segment]:
    return [Segment(i, modality, shape) for i, (modality, shape) in enumerate(SHAPES)]


def test_spec_comes_from_the_model_recipe():
    assert TokenSpec.from_model(ModelConfig(patch_size=4, nextline=False)) == TokenSpec(4, False, True)


@pytest.mark.parametrize("patch", [(1, 1, 1), (1, 2, 2), (2, 3, 1)])
def test_patchify_and_back_is_exact(patch):
    latent = torch.randn(5, 4, 6, 12)
    x_NP = patchify(latent, patch)
    assert x_NP.shape == (latent[0].numel() // (patch[0] * patch[1] * patch[2]), 5 * patch[0] * patch[1] * patch[2])
    assert torch.equal(unpatchify(x_NP, tuple(latent.shape), patch), latent)


def test_patch_features_are_channel_first_and_patches_in_raster_order():
    latent = torch.arange(2 * 1 * 4 * 4.0).reshape(2, 1, 4, 4)
    x_NP = patchify(latent, (1, 2, 2))
    assert x_NP[0].tolist() == [0, 1, 4, 5, 16, 17, 20, 21]
    assert x_NP[1].tolist() == [2, 3, 6, 7, 18, 19, 22, 23]


@pytest.mark.parametrize("patch", [(1, 2, 2), (1, 1, 4), (1, 2, 1), (2, 2, 2)])
@pytest.mark.parametrize("ordered", [1 << 17, 0])
def test_many_latents_are_cut_as_each_alone(patch, ordered, monkeypatch):
    monkeypatch.setattr(tokens, "ORDERED_AT_ONCE", ordered)
    latents = [torch.randn(3, 2, 4, w) for w in (8, 4, 12)] + [torch.randn(2, 4, 8, 3).permute(3, 0, 1, 2)]
    alone = torch.cat([patchify(x, patch) for x in latents])
    assert torch.equal(patchify_all(latents, patch), alone)
    assert torch.equal(patchify_all([x.bfloat16() for x in latents], patch), alone.bfloat16())
    with pytest.raises(DataError, match="cannot be cut"):
        patchify_all([torch.zeros(1, 2, 3, 4)], (1, 2, 2))


def test_patchify_refuses_a_remainder():
    with pytest.raises(DataError, match="patches of"):
        patchify(torch.zeros(1, 1, 3, 4), (1, 2, 2))


def test_positions_and_special_tokens_of_a_video():
    layout = build_layout([Segment(0, "video", (4, 2, 4, 4))], SPEC)
    # 2 frames of 2 lines of 2 patches: p p | p p | F per frame, where | is [nextline]
    assert layout.seqlens == (14,) and layout.num_tokens == 14
    assert layout.patch_index["video"].tolist() == [0, 1, 3, 4, 7, 8, 10, 11]
    assert layout.nextline_index.tolist() == [2, 5, 9, 12]
    assert layout.nextframe_index.tolist() == [6, 13]
    assert layout.raster_T.tolist() == list(range(14))
    assert layout.axes_TA[:7].tolist() == [[0, 0, 0], [0, 0, 1], [0, 0, 2], [0, 1, 0], [0, 1, 1], [0, 1, 2], [0, 2, 2]]
    assert layout.axes_TA[7:, 0].tolist() == [1] * 7


@pytest.mark.parametrize("nextline", [True, False])
@pytest.mark.parametrize("nextframe", [True, False])
def test_layout_covers_every_token_once(nextline, nextframe):
    spec = TokenSpec(2, nextline, nextframe)
    segments = make_segments()
    layout = build_layout(segments, spec)
    places = torch.cat([*layout.patch_index.values(), layout.nextline_index, layout.nextframe_index])
    assert places.sort().values.tolist() == list(range(layout.num_tokens))
    assert layout.seqlens == tuple(num_tokens(s.shape, s.modality, spec) for s in segments)
    assert layout.cu_seqlens.tolist() == [0, *torch.tensor(layout.seqlens).cumsum(0).tolist()]
    assert layout.cu_seqlens.dtype == torch.int32
    for modality, index in layout.patch_index.items():
        assert torch.equal(layout.segment_ids[index], layout.patch_segment[modality])
    for i in range(len(segments)):
        axes = layout.axes_TA[layout.segment_ids == i].tolist()
        assert len({tuple(a) for a in axes}) == len(axes), "two tokens of a sample share a position"


def test_images_and_audio_have_no_nextframe_token():
    assert [m for m, row in MODALITIES.items() if row.has_frames] == ["video", "multiview"]
    assert len(build_layout([Segment(0, "image", (4, 1, 4, 4))], SPEC).nextframe_index) == 0


def test_pack_and_unpack_are_inverse():
    segments = make_segments()
    latents = [torch.randn(s.shape) for s in segments]
    text = PackedText.pack([torch.randn(i + 1, 3) for i in range(len(segments))])
    batch = pack(segments, latents, SPEC, text=text, labels=[3, 1, 2, 0, 5])
    assert batch.labels_S.tolist() == [3, 1, 2, 0, 5]
    assert {m: len(x) for m, x in batch.patches.items()} == {m: len(i) for m, i in batch.layout.patch_index.items()}
    for restored, latent in zip(unpack(batch.patches, segments, SPEC), latents, strict=True):
        assert torch.equal(restored, latent)


def test_pack_without_latents_samples_from_noise():
    batch = pack(make_segments(), None, SPEC)
    assert batch.patches == {} and batch.layout.num_tokens > 0


def test_concat_equals_packing_together():
    segments = make_segments()
    latents = [torch.randn(s.shape) for s in segments]
    texts = [torch.randn(i + 1, 3) for i in range(len(segments))]

    def packed(a: int, b: int):
        return pack(segments[a:b], latents[a:b], SPEC, text=PackedText.pack(texts[a:b]), labels=list(range(a, b)))

    joined, whole = concat([packed(0, 2), packed(2, 3), packed(3, 5)]), packed(0, 5)
    assert joined.segments == whole.segments and joined.layout.seqlens == whole.layout.seqlens
    for name in ("cu_seqlens", "segment_ids", "raster_T", "axes_TA", "nextline_index", "nextframe_index"):
        a, b = getattr(joined.layout, name), getattr(whole.layout, name)
        assert a.dtype == b.dtype and torch.equal(a, b), name
    for name in ("patch_index", "patch_segment"):
        a, b = getattr(joined.layout, name), getattr(whole.layout, name)
        assert list(a) == list(b) and all(torch.equal(a[m], b[m]) for m in a), name
    assert all(torch.equal(joined.patches[m], whole.patches[m]) for m in whole.patches)
    assert joined.text.seqlens == whole.text.seqlens
    assert torch.equal(joined.text.features_MY, whole.text.features_MY)
    assert torch.equal(joined.labels_S, whole.labels_S)


@pytest.mark.parametrize(
    ("segment", "words"),
    [
        (Segment(0, "image", (4, 1, 5, 4)), "4 or 6 rows"),
        (Segment(0, "image", (4, 1, 4, 1)), "Use 2 columns"),
        (Segment(0, "smell", (4, 1, 4, 4)), "image, video"),
    ],
)
def test_bad_segments_say_what_would_work(segment, words):
    with pytest.raises(DataError, match=words):
        build_layout([segment], SPEC)
    with pytest.raises(DataError, match=words):
        num_tokens(segment.shape, segment.modality, SPEC)


def test_pack_refuses_what_does_not_fit_together():
    segment = Segment(7, "image", (4, 1, 4, 4), key="shard-0/dog")
    with pytest.raises(DataError, match="shard-0/dog"):
        pack([segment], [torch.zeros(4, 1, 4, 6)], SPEC)
    with pytest.raises(DataError, match="2 labels for 1 samples"):
        pack([segment], None, SPEC, labels=[1, 2])
    with pytest.raises(DataError, match="at least one sample"):
        pack([], [], SPEC)
