"""What is measured between generated pictures and the real ones and captions that they belong to.

Shape legend
    N, M  generated and real pictures
    D     width of the features
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from flagdit.codecs.text import EMBEDDED, build_text_encoder
from flagdit.config.schema import TextConfig
from flagdit.generate.features import ClipScores, frechet, inception, lite0, lite0_installed
from flagdit.generate.pipeline import Condition


@dataclass(frozen=True)
class Drawn:
    """Generated pictures of one split, with what they are held against.

    Attributes:
        pictures: (3, F, H, W) each.
        conditions: what was asked for.
        references: the real pictures of those conditions.
    """

    pictures: Sequence[Tensor]
    conditions: Sequence[Condition]
    references: Sequence[Tensor]


class Scores:
    """All networks that are installed or given, each loaded once.

    Args:
        fid: weights of torch-fidelity's Inception network; None: no FID.
        clip: folder of a CLIP model; None: no CLIP scores.

    Raises:
        RecipeError: a given network cannot be loaded.
    """

    def __init__(self, fid: Path | None = None, clip: Path | None = None):
        self._lite0 = lite0() if lite0_installed() else None
        self._inception = inception(fid) if fid else None
        self._clip = ClipScores(clip) if clip else None
        self._sentences = build_text_encoder(TextConfig(kind="embedded")) if find_spec(EMBEDDED) else None

    def distances(self, drawn: Drawn) -> dict[str, float]:
        """fd_lite0, and fid where its network was given: Fréchet distances to the references."""
        networks = {"fd_lite0": self._lite0, "fid": self._inception}
        return {
            name: round(frechet(features(drawn.pictures), features(drawn.references)), 3)
            for name, features in networks.items()
            if features is not None
        }

    def captions(self, drawn: Drawn, real: Sequence[Tensor], said: Sequence[Condition]) -> dict[str, float]:
        """How well pictures show what was asked for, judged by networks.

        Args:
            real: all pictures of the data set.
            said: the caption (or class) of each.

        Returns:
            lite0_top1: share whose nearest real picture, by the cosine of EfficientNet-Lite0's features, has the
            caption that was asked for. caption_score: 100 times the mean cosine between the asked caption and that
            picture's, as the packaged MiniLM embeds them; a near miss so counts nearly as much as a hit. clip_score and
            clip_top1 where CLIP was given.
        """
        found: dict[str, float] = {}
        if self._lite0 is not None:
            nearest_N = nearest_by_cosine(self._lite0(drawn.pictures), self._lite0(real))
            shown = [said[i] for i in nearest_N]
            right = sum(a == b for a, b in zip(shown, drawn.conditions, strict=True))
            found["lite0_top1"] = round(right / len(shown), 4)
            if self._sentences is not None and all(isinstance(c, str) for c in drawn.conditions):
                found["caption_score"] = round(self._agreement(shown, drawn.conditions), 2)
        if self._clip is not None:
            scores = self._clip(drawn.pictures, [str(c) for c in drawn.conditions])
            found |= {name: round(score, 4) for name, score in scores.items()}
        return found

    def _agreement(self, shown: Sequence[Condition], asked: Sequence[Condition]) -> float:
        assert self._sentences is not None
        a_ND, b_ND = (
            torch.stack([features_LD.mean(0) for features_LD in self._sentences.encode([str(c) for c in captions])])
            for captions in (shown, asked)
        )
        return float(100 * F.cosine_similarity(a_ND, b_ND).mean())


def nearest_by_cosine(a_ND: Tensor, b_MD: Tensor) -> list[int]:
    """For each row of `a` the index of the row of `b` with the largest cosine."""
    cosine_NM = F.normalize(a_ND, dim=1) @ F.normalize(b_MD, dim=1).T
    return cosine_NM.argmax(1).tolist()
