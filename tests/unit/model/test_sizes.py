"""Named sizes: the published parameter counts, and how a size completes a recipe."""

from dataclasses import asdict

import pytest
import torch

from flagdit.config.schema import ModelConfig
from flagdit.errors import RecipeError
from flagdit.model.flag_dit import FlagDiT
from flagdit.model.initialize import count_parameters
from flagdit.model.sizes import SIZES, official, resolve

# Published networks; those with text count a pad_token of `dim` numbers that packing has no use for.
PUBLISHED = {
    "600m": 609_836_576,
    "3b": 4_237_824_032,
    "5b": 5_046_643_744,
    "7b": 7_293_819_936,
    "next_2b": 1_988_524_576,
    "next_2b_gqa": 1_627_386_400,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameter_counts(name):
    cfg = official(name)
    with torch.device("meta"):
        model = FlagDiT(cfg)
    assert count_parameters(model) + (cfg.dim if cfg.text_dim else 0) == PUBLISHED[name]


def test_every_size_is_published_or_small():
    assert SIZES.keys() == {*PUBLISHED, "tiny", "small"}
    for name in ("tiny", "small"):
        with torch.device("meta"):
            assert count_parameters(FlagDiT(ModelConfig(size=name))) < 50e6


def test_a_size_sets_the_shape_and_nothing_else():
    cfg = resolve(ModelConfig(size="next_2b_gqa", text_dim=7, patch_size=4))
    assert asdict(SIZES["next_2b_gqa"]).items() <= asdict(cfg).items()
    assert (cfg.text_dim, cfg.patch_size, cfg.cond_dim) == (7, 4, 1024)
    assert resolve(cfg) == cfg


def test_nulls_are_filled_in():
    cfg = resolve(ModelConfig(dim=384, num_heads=6))
    assert (cfg.num_kv_heads, cfg.ffn_dim, cfg.cond_dim) == (6, 1024, 384)
    assert resolve(ModelConfig(ffn_dim=100, cond_dim=10, num_kv_heads=2)).ffn_dim == 100


def test_a_size_that_is_not_known_or_contradicted():
    with pytest.raises(RecipeError, match=r"model.size=8b.*600m"):
        resolve(ModelConfig(size="8b"))
    with pytest.raises(RecipeError, match=r"model.dim=640 contradicts model.size=5b.*3072"):
        resolve(ModelConfig(size="5b", dim=640))
    with pytest.raises(RecipeError, match="no published network"):
        official("tiny")
