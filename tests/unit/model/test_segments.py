"""Per-sample scale and shift, and rows taken out."""

import pytest
import torch

from flagdit.model.segments import Run, Samples, modulate, runs_of, scale_tokens, take_rows

LENGTHS = [(3, 3, 3), (4, 1, 1, 5), (6,)]


def make(seqlens):
    torch.manual_seed(0)
    ids = torch.repeat_interleave(torch.arange(len(seqlens)), torch.tensor(seqlens))
    tensors = [torch.randn(n, 4, dtype=torch.float64, requires_grad=True) for n in (sum(seqlens), *2 * [len(seqlens)])]
    return *tensors, Samples(runs_of(seqlens), ids)


def test_runs_join_neighbours_only():
    assert runs_of((2, 2, 5, 2)) == (Run(2, 2), Run(1, 5), Run(1, 2))
    assert [run.num_tokens for run in runs_of((2, 2, 5, 2))] == [4, 5, 2]


@pytest.mark.parametrize("seqlens", LENGTHS)
def test_values_and_gradients_are_those_of_a_look_up(seqlens):
    x, scale, shift, samples = make(seqlens)
    ids = samples.ids_T
    pairs = [
        (scale_tokens(x, scale, samples), x * scale[ids]),
        (modulate(x, None, scale, samples), x * (1 + scale[ids])),
        (modulate(x, shift, scale, samples), x * (1 + scale[ids]) + shift[ids]),
    ]
    for found, wanted in pairs:
        torch.testing.assert_close(found, wanted)
        weights = torch.randn_like(wanted)
        inputs = [v for v in (x, scale, shift) if v is not shift or found is pairs[2][0]]
        for a, b in zip(
            torch.autograd.grad(found, inputs, weights), torch.autograd.grad(wanted, inputs, weights), strict=True
        ):
            torch.testing.assert_close(a, b)


def test_a_broken_sample_stays_alone():
    x, scale, shift, samples = make((4, 1, 1, 5))
    scale = scale.detach()
    scale[1] = torch.nan
    assert modulate(x, shift, scale, samples).isfinite().all(dim=1).tolist() == [True] * 4 + [False] + [True] * 6


def test_rows_are_taken_and_their_gradient_put_back():
    x = torch.randn(5, 3, requires_grad=True)
    index = torch.tensor([0, 2, 3])
    taken = take_rows(x, index)
    assert torch.equal(taken, x[index])
    taken.backward(torch.ones(3, 3) * torch.tensor([1.0, 2.0, 3.0])[:, None])
    assert x.grad[:, 0].tolist() == [1, 0, 2, 3, 0]
    assert take_rows(x, torch.arange(5)) is x
