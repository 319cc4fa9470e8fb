"""A sample's loss in a full pack is its loss alone: packing changes what a step costs, not what it learns."""

import numpy as np
import pytest
import torch

from flagdit.data_pipelines.batches import Batches
from flagdit.data_pipelines.mixture import Mixture
from flagdit.data_pipelines.packs import PackReader
from flagdit.flow.objective import FlowMatching
from flagdit.flow.path import draw_path
from flagdit.flow.timesteps import draw_timesteps
from flagdit.model.flag_dit import FlagDiT
from flagdit.model.initialize import initialize

from .synthetic import make_set, recipe_for


@pytest.mark.parametrize("keys", [{}, {"block": "next", "num_kv_heads": 2}, {"rope": "raster"}])
def test_the_loss_of_a_packed_sample_is_its_loss_alone(tmp_path, keys):
    make_set(tmp_path / "pictures", 60)
    make_set(tmp_path / "clips", 30, modality="video", shapes=((3, 3, 4, 4), (3, 2, 4, 8)), seed=1)
    sets = {str(tmp_path / "pictures"): 2.0, str(tmp_path / "clips"): 1.0}
    small = {"dim": 48, "num_layers": 2, "num_heads": 4, "ffn_dim": 64, "rope_axes": 3, **keys}
    recipe = recipe_for(sets, model=small, batch_size=4, pack_tokens=150)
    mixture = Mixture(sets)
    batches, reader = Batches(recipe, mixture), PackReader(recipe, mixture)
    model = FlagDiT(recipe.model)
    initialize(model, 0)
    with torch.no_grad():
        for parameter in model.parameters():  # the last layer starts at zero and would answer zero to all
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))

    def losses(part) -> torch.Tensor:
        (pack,) = reader[0, [part]].packs
        objective = FlowMatching(recipe.flow)
        path = draw_path(pack, draw_timesteps(pack, recipe.flow, recipe.seed), recipe.seed)
        with torch.no_grad():
            return objective.loss(model, pack, path).per_sample_S

    packs = batches.batch_of(0)
    assert np.mean([len(p) for p in packs]) > 5 and len({n for p in packs for n in p.tokens.tolist()}) > 3
    for part in packs:
        packed = losses(part)
        alone = torch.cat([losses(part[[i]]) for i in range(len(part))])
        assert packed.std() > 0.01
        torch.testing.assert_close(packed, alone, rtol=2e-6, atol=0)
