"""Official-layout weights of the goldens, split over model-parallel parts as the official code saves them."""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from flagdit.checkpoint.importing import import_weights

GOLDENS = Path(__file__).parents[2] / "goldens"
FAMILIES = ["flag_dit_t2i", "next_dit_t2i_gqa"]

# Spelled out as the official layers are declared, not taken from the code under test.
COLUMN = ["wq", "wk", "wv", "wk_y", "wv_y", "w1", "w3", "adaLN_modulation.1", "cap_embedder.1", "x_embedder"]
COLUMN += ["t_embedder.mlp.0", "final_layer.linear", "q_norm", "k_norm", "ky_norm"]
ROW = ["wo.weight", "w2.weight", "t_embedder.mlp.2.weight", "y_embedder.embedding_table.weight"]


@dataclass(frozen=True)
class Golden:
    """Tensors and facts of one reference file."""

    name: str
    weights: dict[str, torch.Tensor]
    tensors: dict[str, torch.Tensor]
    info: dict


def _load_golden(name: str) -> Golden:
    with safe_open(GOLDENS / f"{name}.safetensors", "pt") as file:
        tensors = {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118 (not a dict)
        info = json.loads(file.metadata()["info"])
    weights = {n.removeprefix("weights."): x for n, x in tensors.items() if n.startswith("weights.")}
    return Golden(name, weights, tensors, info)


def _official_parts(weights: dict[str, torch.Tensor], count: int) -> list[dict[str, torch.Tensor]]:
    """What each of `count` model-parallel ranks saves."""
    parts: list[dict[str, torch.Tensor]] = [{} for _ in range(count)]
    for name, tensor in weights.items():
        module = name.rsplit(".", 1)[0]
        dim = None
        if name.endswith(tuple(ROW)):
            dim = 1
        elif name.endswith("attention.gate") or module.endswith(tuple(COLUMN)):
            dim = 0
        for part, piece in zip(parts, [tensor] * count if dim is None else tensor.chunk(count, dim), strict=True):
            part[name] = piece.clone()
    return parts


def _save_official(
    folder: Path, weights: dict[str, torch.Tensor], parts: int = 1, ending: str = "pth", stem: str = "consolidated"
) -> Path:
    """An official checkpoint folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for rank, part in enumerate(_official_parts(weights, parts)):
        file = folder / f"{stem}.{rank:02d}-of-{parts:02d}.{ending}"
        if ending == "pth":
            torch.save(part, file)
        else:
            save_file(part, file)
    return folder


def _save_arguments(folder: Path, **values) -> None:
    torch.save(argparse.Namespace(**values), folder / "model_args.pth")


@pytest.fixture(scope="session")
def goldens() -> dict[str, Golden]:
    return {name: _load_golden(name) for name in FAMILIES}


@pytest.fixture(params=FAMILIES)
def golden(request, goldens) -> Golden:
    return goldens[request.param]


@pytest.fixture(scope="session")
def save_official():
    """A function: folder, weights, parts, ending, stem → the folder, as the official code leaves it."""
    return _save_official


@pytest.fixture(scope="session")
def save_arguments():
    """A function: folder and values → model_args.pth, pickled as the official code does."""
    return _save_arguments


@pytest.fixture
def imported(golden, save_official, tmp_path) -> Path:
    """A run made of the golden's weights."""
    run = tmp_path / "runs" / "imported"
    import_weights(save_official(tmp_path / "official", golden.weights), run)
    return run
