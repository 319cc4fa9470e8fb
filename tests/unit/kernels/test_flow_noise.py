"""Random numbers as functions of (seed, epoch, sample, element)."""

import pytest
import torch

from flagdit.kernels import flow_noise


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # the known answers published with the Random123 library
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_answers(counter, key, words):
    got = flow_noise.philox(tuple(torch.tensor([c]) for c in counter), key[0] | key[1] << 32)
    assert tuple(int(w) for w in got) == words


def test_a_sample_has_its_noise_whatever_stands_beside_it():
    together = flow_noise.normal(7, 3, torch.tensor([5, 9, 2**40]), [10, 7, 12], "cpu")
    alone = [flow_noise.normal(7, 3, torch.tensor([i]), [n], "cpu") for i, n in ((5, 10), (9, 7), (2**40, 12))]
    assert torch.equal(together, torch.cat(alone))
    # A longer sample begins with the same numbers: element e does not depend on the length.
    assert torch.equal(flow_noise.normal(7, 3, torch.tensor([9]), [100], "cpu")[:7], alone[1])


@pytest.mark.parametrize(
    "change", [{"seed": 8}, {"seed": 7 + 2**32}, {"epoch": 4}, {"sample": 6}, {"sample": 5 + 2**33}]
)
def test_every_coordinate_changes_the_noise(change):
    def draw(seed=7, epoch=3, sample=5):
        return flow_noise.normal(seed, epoch, torch.tensor([sample]), [64], "cpu")

    assert (draw() != draw(**change)).all()


def test_noise_is_standard_normal():
    z = flow_noise.normal(0, 0, torch.arange(100), [10_000] * 100, "cpu").double()
    assert abs(z.mean()) < 4e-3 and abs(z.std() - 1) < 4e-3
    for moment, wanted, error in ((3, 0, 0.02), (4, 3, 0.05)):
        assert abs((z**moment).mean() - wanted) < error
    pairs = z.view(-1, 2)
    assert abs((pairs[:, 0] * pairs[:, 1]).mean()) < 5e-3, "the two halves of a Box–Muller pair are independent"


def test_uniforms_are_even_and_streams_independent():
    ids = torch.arange(100_000)
    first, second = (flow_noise.uniform(0, 0, ids, stream) for stream in (1, 2))
    assert first.dtype == torch.float64 and first.min() > 0 and first.max() < 1
    histogram = torch.histc(first.float(), 10, 0, 1) / len(ids)
    assert (histogram - 0.1).abs().max() < 4e-3
    assert abs(torch.corrcoef(torch.stack([first, second]))[0, 1]) < 0.01
