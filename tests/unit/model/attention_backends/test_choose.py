"""Which backend a run gets, and what it hears when it asks for one that cannot serve."""

import sys
from importlib.metadata import version
from types import ModuleType

import pytest
import torch

from flagdit.config.keys import all_keys
from flagdit.config.schema import ModelConfig
from flagdit.errors import RecipeError
from flagdit.model.attention_backends import BACKENDS, choose, choose_backend, flash, resolve_backend

CPU, CUDA, BF16 = torch.device("cpu"), torch.device("cuda"), torch.bfloat16
A100, RTX4090, H100, B200, RTX5090 = (8, 0), (8, 9), (9, 0), (10, 0), (12, 0)


@pytest.fixture
def gpu(monkeypatch):
    """A machine with a GPU of this compute capability and these backends' packages."""

    def machine(capability, *names):
        modules = {b.module for b in BACKENDS if b.name in names and hasattr(b, "module")}
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(flash, "installed", lambda module: module in modules)
        monkeypatch.setattr(flash, "_release", lambda package: (2, 8))
        monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: "varlen" in names)

    return machine


def config(attention="auto", head_dim=64, **changes):
    return ModelConfig(dim=4 * head_dim, num_heads=4, attention=attention, **changes)


def test_the_recipe_names_every_backend():
    assert set(all_keys()["model.attention"].choices) == {"auto", *(b.name for b in BACKENDS)}


@pytest.mark.parametrize(
    ("capability", "names", "longest", "chosen"),
    [
        (H100, ("flash2", "flash3", "flash4", "varlen"), 0, "flash3"),
        (H100, ("flash2", "flash4", "varlen"), 0, "flash4"),
        (H100, ("flash2", "varlen"), 0, "flash2"),
        (H100, ("flash2", "varlen"), 4096, "flash2"),
        (H100, ("flash2", "varlen"), 131072, "sdpa"),  # cuDNN, ahead of kernels written for Ampere
        (H100, ("flash2", "flash3", "varlen"), 131072, "flash3"),
        (A100, ("flash2", "flash3", "flash4", "varlen"), 131072, "flash2"),
        (A100, ("varlen",), 0, "varlen"),
        (B200, ("flash2", "flash3", "flash4", "varlen"), 0, "flash4"),
        (H100, (), 0, "sdpa"),
        ((7, 5), ("flash2", "varlen"), 0, "sdpa"),
    ],
)
def test_auto(gpu, capability, names, longest, chosen):
    gpu(capability, *names)
    assert resolve_backend(config(), CUDA, BF16, longest=longest).name == chosen


def test_auto_takes_what_suits_dtype_and_heads(gpu):
    gpu(H100, "flash2", "flash3", "varlen")
    assert resolve_backend(config(), CUDA, torch.float32).name == "sdpa"
    assert resolve_backend(config(head_dim=60), CUDA, BF16).name == "sdpa"
    assert resolve_backend(config(), CPU, BF16).name == "sdpa"
    assert resolve_backend(config(), CUDA, BF16, lse=True).name == "flash3"


def test_auto_takes_a_deterministic_one_where_that_is_asked(gpu):
    gpu(H100, "flash2", "flash3")
    grouped = config(num_kv_heads=2)
    assert resolve_backend(grouped, CUDA, BF16).name == "flash3"
    assert resolve_backend(grouped, CUDA, BF16, deterministic=True).name == "flash2"
    assert resolve_backend(config(), CUDA, BF16, deterministic=True).name == "flash3"


@pytest.mark.parametrize(
    ("name", "capability", "head_dim", "dtype", "text"),
    [
        ("varlen", H100, 60, BF16, "it needs heads of a multiple of 8 channels, not 60"),
        ("varlen", RTX4090, 256, BF16, "it takes heads of up to 192 channels here, not 256"),
        ("varlen", (7, 5), 64, BF16, r"it needs compute capability 8.0 \(Ampere\) or later, this GPU has 7.5"),
        ("flash2", H100, 264, BF16, "it takes heads of up to 256 channels here, not 264"),
        ("flash2", H100, 64, torch.float32, "it computes in bf16 and fp16, not in float32"),
        ("flash3", A100, 64, BF16, r"it needs compute capability 9.0 \(Hopper\), this GPU has 8.0"),
        ("flash3", B200, 64, BF16, r"it needs compute capability 9.0 \(Hopper\), this GPU has 10.0"),
        ("flash4", A100, 64, BF16, r"it needs compute capability 9.0 \(Hopper\) or later"),
        ("flash4", B200, 160, BF16, "it takes heads of up to 128 channels here, not 160"),
    ],
)
def test_a_named_backend_that_cannot_serve_is_refused(gpu, name, capability, head_dim, dtype, text):
    gpu(capability, name)
    with pytest.raises(RecipeError, match=f"model.attention={name} cannot serve this run: {text}") as error:
        resolve_backend(config(name, head_dim), CUDA, dtype)
    assert error.value.fix == "Use model.attention=auto, which takes sdpa here."


def test_wide_heads_where_they_are_served(gpu):
    gpu(B200, "flash4")
    assert resolve_backend(config("flash4", 256), CUDA, BF16).name == "flash4"
    gpu(H100, "flash4")
    assert resolve_backend(config("flash4", 192), CUDA, BF16).name == "flash4"


@pytest.mark.parametrize("name", ["varlen", "flash2", "flash3", "flash4"])
def test_gpu_kernels_are_refused_on_a_cpu_and_where_they_are_not_installed(gpu, name):
    with pytest.raises(RecipeError, match=rf"attention={name} .*: it runs on CUDA devices, not on cpu"):
        resolve_backend(config(name), CPU, BF16)
    gpu(H100)
    with pytest.raises(RecipeError, match=r"is not installed \(no module|this torch was built without it"):
        resolve_backend(config(name), CUDA, BF16)


def test_an_old_flash_attn_is_refused(gpu, monkeypatch):
    gpu(H100, "flash2")
    monkeypatch.setattr(flash, "_release", lambda package: (2, 6))
    with pytest.raises(RecipeError, match=r"it needs flash-attn 2.7 or later, not 2.6"):
        resolve_backend(config("flash2"), CUDA, BF16)


def test_a_backend_without_deterministic_backward_is_refused(gpu):
    gpu(RTX5090, "flash4")
    assert resolve_backend(config("flash4"), CUDA, BF16).name == "flash4"
    with pytest.raises(RecipeError, match=r"train.deterministic=true, but with model.attention=flash4 it has no") as e:
        resolve_backend(config("flash4"), CUDA, BF16, deterministic=True)
    assert "set train.deterministic=false" in e.value.fix
    gpu(H100, "flash3")
    with pytest.raises(RecipeError, match="fewer key than query heads"):
        resolve_backend(config("flash3", num_kv_heads=2), CUDA, BF16, deterministic=True)


def test_a_wished_backend_comes_first_and_gives_way(gpu):
    """How a run is sampled elsewhere."""
    gpu(A100, "flash2", "varlen")
    assert choose_backend(CUDA, BF16, 64, first="varlen").name == "varlen"
    assert choose_backend(CUDA, BF16, 64, first="flash3").name == "flash2"
    assert choose_backend(CPU, BF16, 64, first="flash3").name == "sdpa"


def test_nothing_serves_integers():
    with pytest.raises(AssertionError, match=r"'sdpa': 'torch.int8 is not a floating-point type'"):
        choose_backend(CPU, torch.int8, 16)


def test_packages_are_looked_for_without_importing_them():
    assert flash.installed("torch.nn") and not flash.installed("flash_attn_of_nobody.interface")
    assert flash._release("torch") == tuple(int(x) for x in version("torch").split(".")[:2])
    assert flash._release("flash-attn-of-nobody") == ()
    assert not any(isinstance(m, ModuleType) and name.startswith("flash_attn") for name, m in sys.modules.items())


def test_sdpa_stands_outside_of_graphs_and_operators_stay_inside():
    names = {b.name: choose.uncompiled(b) for b in BACKENDS}
    assert [name for name, b in names.items() if b in BACKENDS] == ["flash3", "flash4", "flash2", "varlen"]
    assert names["sdpa"].name == "sdpa" and names["sdpa"].refusal(CPU, BF16, 8) is None
