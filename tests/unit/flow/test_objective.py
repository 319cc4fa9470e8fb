"""The path, its times and the loss."""

from dataclasses import replace

import pytest
import torch

from flagdit.batch import PackedText, Segment, concat
from flagdit.config.schema import FlowConfig
from flagdit.flow.noise import draw_noise
from flagdit.flow.objective import FlowMatching, drop_conditions
from flagdit.flow.path import between, draw_path
from flagdit.flow.timesteps import draw_timesteps, shift_of, shift_time, time_grid
from flagdit.model.tokens import TokenSpec, pack

SPEC = TokenSpec(2, True, True)
SHAPES = [("image", (4, 1, 4, 6)), ("audio", (2, 1, 4, 8)), ("image", (4, 1, 8, 8)), ("video", (3, 2, 4, 4))]


def make_batch(which=range(4), epoch=0, first_id=0):
    generator = torch.Generator().manual_seed(0)
    latents = [torch.randn(shape, generator=generator) for _, shape in SHAPES]
    text = [torch.randn(3 + i, 5, generator=generator) for i in range(len(SHAPES))]
    segments = [Segment(first_id + i, *SHAPES[i], epoch=epoch) for i in which]
    return pack(segments, [latents[i] for i in which], SPEC, text=PackedText.pack([text[i] for i in which]))


def zero_model(x, t_S, batch):
    return {m: torch.zeros_like(p) for m, p in x.items()}


def test_path_ends_at_noise_and_data_with_constant_velocity():
    batch = make_batch()
    noise = draw_noise(batch, seed=1)
    zeros = torch.zeros(4)
    first, late, later, last = (between(batch, noise, zeros + t) for t in (0, 0.4, 0.6, 1))
    for m, x1 in batch.patches.items():
        assert torch.equal(first.x_t[m], noise[m])
        assert torch.equal(last.x_t[m], x1)
        torch.testing.assert_close(later.x_t[m] - late.x_t[m], 0.2 * first.velocity[m])


def test_the_fused_path_has_the_bits_of_the_path_from_given_noise():
    batch, t_S = (
        concat([make_batch([0, 1, 2]), make_batch([3], epoch=2, first_id=70)]),
        torch.tensor([0.1, 0.9, 0.3, 1]),
    )
    fused, plain = draw_path(batch, t_S, 5), between(batch, draw_noise(batch, 5), t_S)
    assert list(fused.x_t) == ["image", "audio", "video"]
    for m in batch.patches:
        assert torch.equal(fused.x_t[m], plain.x_t[m]) and torch.equal(fused.velocity[m], plain.velocity[m])


def test_noise_and_times_do_not_depend_on_the_pack():
    whole, cfg = make_batch(), FlowConfig()
    t_S, noise = draw_timesteps(whole, cfg, seed=5), draw_noise(whole, seed=5)
    parts = [make_batch([i]) for i in range(4)]
    assert torch.equal(torch.cat([draw_timesteps(p, cfg, seed=5) for p in parts]), t_S)
    for m in noise:
        assert torch.equal(torch.cat([draw_noise(p, seed=5)[m] for p in parts if m in p.patches]), noise[m])
    later = make_batch(epoch=1)
    assert not torch.equal(draw_timesteps(later, cfg, seed=5), t_S)
    # Samples of several epochs in one pack: each as in a pack of its own epoch.
    segments = [later.segments[0], *whole.segments[1:3], later.segments[3]]
    mixed = pack(segments, None, SPEC)
    want = torch.stack([draw_timesteps(b, cfg, seed=5)[i] for i, b in enumerate((later, whole, whole, later))])
    assert torch.equal(draw_timesteps(mixed, cfg, seed=5), want)
    split = whole.layout.patch_segment["image"] == 0
    images = draw_noise(mixed, seed=5)["image"]
    assert torch.equal(images[split], draw_noise(later, seed=5)["image"][split])
    assert torch.equal(images[~split], noise["image"][~split])
    assert not torch.equal(draw_timesteps(whole, cfg, seed=6), t_S)


def many(count, shape=(4, 1, 2, 2)):
    return pack([Segment(i, "image", shape) for i in range(count)], None, SPEC)


def test_laws_of_t():
    uniform = draw_timesteps(many(20_000), FlowConfig(timesteps="uniform"), seed=0)
    assert (torch.histc(uniform, 10, 0, 1) / 20_000 - 0.1).abs().max() < 0.01
    logits = torch.logit(draw_timesteps(many(20_000), FlowConfig(logit_mean=-0.5, logit_std=0.8), seed=0).double())
    assert abs(logits.mean() + 0.5) < 0.02
    assert abs(logits.std() - 0.8) < 0.02


def test_larger_samples_train_nearer_to_noise():
    cfg = FlowConfig(shift=2.0, shift_tokens=64)
    assert shift_of(64, cfg) == 2.0
    assert shift_of(256, cfg) == 4.0
    small, large = (draw_timesteps(many(500, (4, 1, n, n)), cfg, seed=0).mean() for n in (8, 32))
    assert large < small
    assert shift_of(256, FlowConfig(shift=3.0)) == 3.0


def test_shift_keeps_the_ends_and_moves_towards_noise():
    t = torch.linspace(0, 1, 11)
    torch.testing.assert_close(shift_time(t, 1.0), t)
    shifted = shift_time(t, 4.0)
    assert shifted[0] == 0
    assert shifted[-1] == 1
    assert (shifted[1:-1] < t[1:-1]).all()
    assert time_grid(4, 1.0) == [0, 0.25, 0.5, 0.75, 1]


@pytest.mark.parametrize("token_weighting", ["sample", "token"])
def test_loss_does_not_depend_on_the_split_into_packs(token_weighting):
    objective = FlowMatching(FlowConfig(token_weighting=token_weighting, weighting="snr"))
    whole = make_batch()
    parts = [make_batch([0, 1]), make_batch([2]), make_batch([3])]
    count = objective.count(whole)
    assert count == sum(objective.count(p) for p in parts)

    def loss(batch):
        return objective.loss(
            zero_model, batch, draw_path(batch, draw_timesteps(batch, objective.cfg, 0), 0), denominator=count
        )

    torch.testing.assert_close(loss(whole).total, sum(loss(p).total for p in parts))
    torch.testing.assert_close(loss(whole).per_sample_S, torch.cat([loss(p).per_sample_S for p in parts]))


def test_loss_is_the_mean_squared_error_to_the_velocity():
    batch = make_batch([0, 2])
    path = draw_path(batch, torch.tensor([0.3, 0.9]), 0)
    wanted = path.velocity["image"].square().mean(1).split([6, 16])
    loss = FlowMatching(FlowConfig()).loss(zero_model, batch, path)
    torch.testing.assert_close(loss.per_sample_S, torch.stack([w.mean() for w in wanted]))
    torch.testing.assert_close(loss.total, loss.per_sample_S.mean())
    by_token = FlowMatching(FlowConfig(token_weighting="token")).loss(zero_model, batch, path)
    torch.testing.assert_close(by_token.total, torch.cat(wanted).mean())
    weighted = FlowMatching(FlowConfig(weighting="snr")).loss(zero_model, batch, path)
    torch.testing.assert_close(weighted.total, (loss.per_sample_S * torch.tensor([1 / 0.7, 5.0])).mean())


def test_caption_dropout_belongs_to_the_sample():
    null = torch.zeros(1, 5)
    cfg = FlowConfig(caption_dropout=0.5)
    dropped = {}
    for first in range(0, 400, 4):
        batch = make_batch(first_id=first)
        after = drop_conditions(batch, cfg, 3, null_text_LY=null, null_label=0)
        for i, (f, g) in enumerate(zip(batch.text.unpack(), after.text.unpack(), strict=True)):
            dropped[first + i] = len(g) == 1
            assert torch.equal(g, null) if dropped[first + i] else torch.equal(g, f)
    assert 0.4 < sum(dropped.values()) / len(dropped) < 0.6
    alone = drop_conditions(make_batch([1], first_id=8), cfg, 3, null_text_LY=null, null_label=0)
    assert (alone.text.seqlens[0] == 1) == dropped[9]


def test_class_dropout_uses_the_null_label():
    batch = replace(make_batch(), text=None, labels_S=torch.arange(4))
    after = drop_conditions(batch, FlowConfig(caption_dropout=1.0), 0, null_text_LY=None, null_label=10)
    assert after.labels_S.tolist() == [10] * 4
    assert drop_conditions(batch, FlowConfig(caption_dropout=0.0), 0, null_text_LY=None, null_label=10) is batch


def test_joined_packs_have_the_noise_of_their_samples():
    one, two = make_batch([0, 3]), make_batch([2])
    noise = draw_noise(concat([one, two]), 0)
    assert torch.equal(noise["image"], torch.cat([draw_noise(one, 0)["image"], draw_noise(two, 0)["image"]]))
