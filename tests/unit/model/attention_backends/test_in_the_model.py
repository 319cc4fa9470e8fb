"""Backends inside the network: checkpointing keeps their outputs, compiled blocks serve every pack."""

from dataclasses import replace

import flash_stand_ins
import pytest
import torch

from flagdit.batch import Segment
from flagdit.config.schema import ModelConfig
from flagdit.model.attention_backends import Sdpa, uncompiled
from flagdit.model.flag_dit import FlagDiT
from flagdit.model.tokens import TokenSpec, pack

CFG = ModelConfig(
    dim=16, num_heads=2, num_layers=2, ffn_dim=32, text_dim=0, modalities={"image": 1}, patch_size=1, nextline=False
)
PACKS = (
    [(2, 3), (4, 2)],
    [(2, 3), (2, 3), (5, 1)],
    [(3, 3), (4, 2)],
    [(1, 3), (4, 2), (3, 2), (2, 2)],
    [(5, 5), (4, 2), (1, 1)],
    [(4, 4), (1, 2)],
    [(2, 3), (6, 2), (2, 3), (4, 1), (4, 1)],
)


def make(backend, **changes):
    torch.manual_seed(0)
    model = FlagDiT(replace(CFG, **changes))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.attention_backend = backend
    return model


def run(model, sizes):
    """The velocity and the gradients of every parameter."""
    segments = [Segment(i, "image", (1, 1, *size)) for i, size in enumerate(sizes)]
    batch = pack(segments, None, TokenSpec.from_model(CFG))
    noise = torch.Generator().manual_seed(1)
    x = {"image": torch.randn(batch.layout.num_tokens, 1, generator=noise)}
    out = model(x, torch.linspace(0, 1, len(sizes)), batch)["image"]
    return [out, *torch.autograd.grad(out.square().sum(), list(model.parameters()))]


def test_every_backend_computes_the_same_network(backend):
    for found, wanted in zip(run(make(backend), PACKS[1]), run(make(Sdpa()), PACKS[1]), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["flash2", "flash3", "flash4", "varlen"], indirect=True)
def test_selective_checkpointing_does_not_attend_twice(backend):
    plain = run(make(backend), PACKS[0])
    flash_stand_ins.calls.clear()
    kept = run(make(backend, checkpointing="selective"), PACKS[0])
    assert all(torch.equal(a, b) for a, b in zip(plain, kept, strict=True))
    assert flash_stand_ins.calls.count(f"{backend.name} forward") == CFG.num_layers
    flash_stand_ins.calls.clear()
    run(make(backend, checkpointing="block"), PACKS[0])
    assert flash_stand_ins.calls.count(f"{backend.name} forward") == 2 * CFG.num_layers


@pytest.mark.parametrize("backend", ["sdpa", "varlen"], indirect=True)
def test_compiled_blocks_serve_every_pack(backend):
    """The first pack compiles for its sizes, the second for any: no later one compiles again."""
    torch.compiler.reset()
    graphs = []

    def record(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model, plain = make(uncompiled(backend), num_layers=1), make(backend, num_layers=1)
    model.blocks[0].compile(backend=record)
    counts = []
    for sizes in PACKS:
        for found, wanted in zip(run(model, sizes), run(plain, sizes), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        counts.append(len(graphs))
    assert counts[2:] == counts[2:3] * (len(PACKS) - 2), counts
    assert counts[-1] <= (2 if backend.name == "varlen" else 10), counts
