"""What is refused before any process group is formed."""

from dataclasses import replace

import pytest

from flagdit.config.schema import DataConfig, ModelConfig, ParallelConfig, Recipe, TrainConfig
from flagdit.errors import RecipeError
from flagdit.parallel.mesh import Launch, ParallelContext, check_mesh, mesh_of

MODEL = ModelConfig(dim=96, num_heads=12, num_kv_heads=4, ffn_dim=192, cond_dim=96)


def recipe_of(batch_size=24, accumulation=1, **parallel) -> Recipe:
    return Recipe(
        model=MODEL,
        data=DataConfig(batch_size=batch_size),
        train=TrainConfig(accumulation=accumulation),
        parallel=ParallelConfig(**parallel),
    )


@pytest.mark.parametrize(
    ("parallel", "world"),
    [({}, 1), ({}, 8), ({"tensor": 4, "context": 3}, 24), ({"tensor": 2, "context": 6}, 12),
     ({"tensor": 4, "context": 6, "ring": 2}, 24), ({"context": 5, "ring": 5}, 5)],
)  # fmt: skip
def test_meshes_that_fit(parallel, world):
    check_mesh(recipe_of(**parallel), world)


@pytest.mark.parametrize(
    ("parallel", "world", "said"),
    [
        ({"tensor": 8}, 8, r"parallel\.tensor=8 must divide model\.num_kv_heads=4; try 4"),
        ({"tensor": 5}, 5, r"parallel\.tensor=5 must divide model\.num_heads=12; try 4 or 6"),
        ({"tensor": 4, "context": 2}, 8, r"heads among 2 ranks, which must divide the 3 heads.*set parallel\.ring=2"),
        ({"context": 8}, 8, r"among 8 ranks.* 12 heads.*parallel\.ring=2"),
        ({"tensor": 2, "context": 2}, 6, r"= 4 ranks hold one pack, which must divide the 6.*try 4 or 8 ranks"),
    ],
)  # fmt: skip
def test_meshes_that_do_not_fit_name_keys_and_values(parallel, world, said):
    with pytest.raises(RecipeError, match=said):
        check_mesh(recipe_of(**parallel), world)


def test_the_batch_is_shared_out_evenly():
    check_mesh(recipe_of(batch_size=16, accumulation=2), 8)
    with pytest.raises(
        RecipeError, match=r"data\.batch_size=24 must be a multiple of 5 data ranks × train\.accum.*20 or"
    ):
        check_mesh(recipe_of(batch_size=24), 5)


def test_all_problems_are_told_at_once():
    with pytest.raises(RecipeError) as error:
        check_mesh(recipe_of(tensor=8, batch_size=25), 16)
    assert "model.num_heads=12" in str(error.value) and "data.batch_size=25" in str(error.value)


def test_torchruns_environment_decides_the_rank(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert Launch.from_environment() == Launch(rank=0, world=1, local_rank=0)
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert Launch.from_environment() == Launch(rank=5, world=8, local_rank=1)


def test_one_process_forms_no_groups(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with mesh_of(recipe_of(), "cpu") as mesh:
        assert mesh == ParallelContext() and mesh.is_first and mesh.holds_first_tokens
        assert (mesh.largest(3), mesh.from_first("a"), mesh.from_all("b")) == (3, "a", ["b"])


def test_checked_recipes_are_left_alone():
    recipe = recipe_of(tensor=2)
    before = replace(recipe)
    check_mesh(recipe, 2)
    assert recipe == before
