"""Moving averages against their formula."""

import torch

from flagdit.train.ema import Emas


def test_averages_follow_the_formula_with_warmup():
    w = {"a": torch.tensor([1.0, -2.0]), "b": torch.tensor([[3.0]])}
    emas = Emas(w, [0.999, 0.15], warmup=True)
    expected = [{k: v.double() for k, v in w.items()} for _ in range(2)]
    for step in range(5):
        for v in w.values():
            v.mul_(-1.5).add_(step)  # in place, as an optimizer does
        emas.update(step)
        for decay, e in zip([0.999, 0.15], expected, strict=True):
            d = min(decay, (1 + step) / (10 + step))
            for k, v in w.items():
                e[k] = d * e[k] + (1 - d) * v.double()
    assert len(emas) == 2
    for i, e in enumerate(expected):
        for k, v in e.items():
            torch.testing.assert_close(emas[i][k].double(), v, rtol=1e-6, atol=1e-6)


def test_without_warmup_the_decay_holds_from_the_first_step():
    w = {"a": torch.zeros(2)}
    emas = Emas(w, [0.75], warmup=False)
    w["a"].fill_(8.0)
    emas.update(0)
    assert emas[0]["a"].tolist() == [2.0, 2.0]


def test_state_is_written_in_place_and_names_its_groups():
    w = {"a": torch.randn(3)}
    first, second = Emas(w, [0.9999, 0.5], True), Emas({"a": torch.zeros(3)}, [0.9999, 0.5], True)
    w["a"].add_(1)
    first.update(0)
    assert list(first.state()) == ["ema_0.9999", "ema_0.5"] == [first.group(0), first.group(1)]
    for group, average in second.state().items():  # as a checkpoint is loaded: in place
        average["a"].copy_(first.state()[group]["a"])
    assert all(torch.equal(first[i]["a"], second[i]["a"]) for i in range(2))


def test_averages_are_copies():
    w = {"a": torch.zeros(2)}
    emas = Emas(w, [0.9], True)
    w["a"].fill_(5)
    assert emas[0]["a"].count_nonzero() == 0
