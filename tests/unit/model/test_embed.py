"""Embeddings of time, text and class."""

import math

import torch

from flagdit.model.embed import LabelEmbedder, TextPooler, TimeEmbedder, sinusoid
from flagdit.model.segments import runs_of


def test_sinusoid_is_cosines_then_sines_from_fast_to_slow():
    t = torch.tensor([0.0, 0.41, 1.0])
    found = sinusoid(t)
    assert found.shape == (3, 256)
    for i in (0, 1, 64, 127):
        frequency = 10000 ** (-i / 128)
        torch.testing.assert_close(found[:, i], torch.cos(t * frequency))
        torch.testing.assert_close(found[:, 128 + i], torch.sin(t * frequency), rtol=1e-4, atol=1e-7)
    assert math.isclose(found[1, 0].item(), math.cos(0.41), rel_tol=1e-6)


def test_time_scale_multiplies_t():
    torch.manual_seed(0)
    slow, fast = TimeEmbedder(8, 1.0), TimeEmbedder(8, 1000.0)
    fast.load_state_dict(slow.state_dict())
    torch.testing.assert_close(fast(torch.tensor([0.5])), slow(torch.tensor([500.0])))
    assert slow.bfloat16()(torch.tensor([0.5])).dtype == torch.bfloat16


def test_text_is_averaged_over_each_sample_alone():
    pooler = TextPooler(6, 4)
    text = [torch.randn(n, 6) for n in (2, 2, 5, 1)]
    found = pooler(torch.cat(text), runs_of((2, 2, 5, 1)))
    wanted = pooler.proj(pooler.norm(torch.stack([x.mean(0) for x in text])))
    torch.testing.assert_close(found, wanted)


def test_the_null_class_has_a_row():
    embedder = LabelEmbedder(10, 4)
    assert embedder(torch.tensor([0, 10])).shape == (2, 4)
