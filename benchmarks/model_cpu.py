"""Forward and backward of Next-DiT: packed tokens against diffusers' padded batches, on the CPU.

    python benchmarks/model_cpu.py [--rounds 7] [--threads 2] [--out FILE]

Both networks have the same weights and run in turn in one process, so that whatever else the machine does falls on
both. `uniform`: pictures of one size. `mixed`: pictures of about equal area and different aspect ratio, as bucketed
data has them; the peer, having no other way, takes them padded to the largest height and width. Tokens are those of
pictures, not of padding. Outputs are compared first: the uniform batch as it is, the mixed pack with the peer run on
each picture alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from _conditions import write_result
from torch import Tensor, nn

from flagdit.batch import PackedBatch, PackedText, Segment
from flagdit.config.schema import ModelConfig
from flagdit.model.flag_dit import FlagDiT
from flagdit.model.initialize import initialize
from flagdit.model.tokens import TokenSpec, pack, unpack

# The Next-DiT of the paper with fewer and narrower blocks: two threads finish in a minute or two.
CONFIG = ModelConfig(
    block="next",
    dim=512,
    num_layers=4,
    num_heads=8,
    num_kv_heads=4,
    ffn_dim=1536,
    modalities={"image": 4},
    patch_size=2,
    text_dim=256,
    qk_norm="layer",
    rope="axial",
    nextline=False,
    nextframe=False,
    time_scale=1.0,
    learn_sigma=True,
)
UNIFORM = [(32, 32)] * 6
MIXED = [(32, 32), (26, 40), (40, 26), (22, 46), (46, 22), (28, 36)]
UNIFORM_TEXT = [24] * 6
MIXED_TEXT = [24, 9, 31, 14, 5, 20]


@dataclass
class Work:
    """One batch, as both networks want it."""

    latents: list[Tensor]
    text: list[Tensor]
    t_S: Tensor
    packed: PackedBatch

    @property
    def num_tokens(self) -> int:
        return self.packed.layout.num_tokens


def make_work(sizes: list[tuple[int, int]], text_lengths: list[int]) -> Work:
    generator = torch.Generator().manual_seed(0)
    latents = [torch.randn(4, h, w, generator=generator) for h, w in sizes]
    text = [torch.randn(n, CONFIG.text_dim, generator=generator) for n in text_lengths]
    segments = [Segment(i, "image", (4, 1, *size)) for i, size in enumerate(sizes)]
    spec = TokenSpec.from_model(CONFIG)
    packed = pack(segments, [x[:, None] for x in latents], spec, text=PackedText.pack(text))
    return Work(latents, text, torch.rand(len(sizes), generator=generator), packed)


class Peer(nn.Module):
    """diffusers' network behind the same calls as ours."""

    def __init__(self):
        from diffusers import LuminaNextDiT2DModel
        from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

        super().__init__()
        self.net = LuminaNextDiT2DModel(
            sample_size=32,
            patch_size=CONFIG.patch_size,
            in_channels=4,
            hidden_size=CONFIG.dim,
            num_layers=CONFIG.num_layers,
            num_attention_heads=CONFIG.num_heads,
            num_kv_heads=CONFIG.num_kv_heads,
            cross_attention_dim=CONFIG.text_dim,
            learn_sigma=True,
        )
        self.rotary = get_2d_rotary_pos_embed_lumina(CONFIG.dim // CONFIG.num_heads, 64, 64)

    def forward(self, latents: list[Tensor], text: list[Tensor], t_S: Tensor) -> list[Tensor]:
        height, width = (max(x.shape[axis] for x in latents) for axis in (1, 2))
        x = torch.stack([F.pad(x, (0, width - x.shape[2], 0, height - x.shape[1])) for x in latents])
        features = nn.utils.rnn.pad_sequence(text, batch_first=True)
        mask = torch.arange(features.shape[1]) < torch.tensor([len(f) for f in text])[:, None]
        out = self.net(x, t_S, features, mask, self.rotary, cross_attention_kwargs={}).sample
        return [y[:4, : x.shape[1], : x.shape[2]] for y, x in zip(out, latents, strict=True)]


def forward_ours(model: FlagDiT, work: Work) -> list[Tensor]:
    velocity = model(work.packed.patches, work.t_S, work.packed)
    return [x[:, 0] for x in unpack(velocity, work.packed.segments, TokenSpec.from_model(CONFIG))]


def peer_weights(model: FlagDiT) -> dict[str, Tensor]:
    """Our weights under the peer's names. It projects the queries twice, once for each attention: both get ours."""
    ours = dict(model.named_parameters())
    theirs = {"pad_token": torch.zeros(CONFIG.dim)}
    pairs = {
        "stems.image": ["patch_embedder.proj"],
        "t_embedder.mlp.0": ["time_caption_embed.timestep_embedder.linear_1"],
        "t_embedder.mlp.2": ["time_caption_embed.timestep_embedder.linear_2"],
        "text_pooler.norm": ["time_caption_embed.caption_embedder.0"],
        "text_pooler.proj": ["time_caption_embed.caption_embedder.1"],
        "final_adaLN_modulation.1": ["norm_out.linear_1"],
        "attention.wq": ["attn1.to_q", "attn2.to_q"],
        "attention.wk": ["attn1.to_k"],
        "attention.wv": ["attn1.to_v"],
        "attention.wk_y": ["attn2.to_k"],
        "attention.wv_y": ["attn2.to_v"],
        "attention.wo": ["attn2.to_out.0"],
        "attention.q_norm": ["attn1.norm_q", "attn2.norm_q"],
        "attention.k_norm": ["attn1.norm_k"],
        "attention.ky_norm": ["attn2.norm_k"],
        "attention.gate": ["gate"],
        "attention_norm1": ["norm1.norm"],
        "attention_norm2": ["norm2"],
        "attention_y_norm": ["norm1_context"],
        "adaLN_modulation.1": ["norm1.linear"],
        "feed_forward.w1": ["feed_forward.linear_1"],
        "feed_forward.w2": ["feed_forward.linear_2"],
        "feed_forward.w3": ["feed_forward.linear_3"],
        "ffn_norm1": ["ffn_norm1"],
        "ffn_norm2": ["ffn_norm2"],
    }
    for name, value in ours.items():
        if name.startswith("heads."):
            # Ours emits (2C, p, p), theirs (p, p, 2C).
            rows = value.reshape(8, 4, *value.shape[1:]).transpose(0, 1).reshape(value.shape)
            theirs["norm_out.linear_2." + name.rsplit(".", 1)[1]] = rows
            continue
        prefix, rest = "", name
        if name.startswith("blocks."):
            _, number, rest = name.split(".", 2)
            prefix = f"layers.{number}."
        module, leaf = (rest, "") if rest in pairs else rest.rsplit(".", 1)
        for target in pairs[module]:
            theirs[".".join(filter(None, (prefix + target, leaf)))] = value
    return {name: value.detach().clone() for name, value in theirs.items()}


def build() -> tuple[FlagDiT, Peer]:
    """Both networks with the same weights, none of them zero."""
    model, peer = FlagDiT(CONFIG), Peer()
    initialize(model, seed=0)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    peer.net.load_state_dict(peer_weights(model))
    return model, peer


@torch.no_grad()
def largest_difference(model: FlagDiT, peer: Peer, uniform: Work, mixed: Work) -> float:
    pairs = list(zip(forward_ours(model, uniform), peer(uniform.latents, uniform.text, uniform.t_S), strict=True))
    alone = [peer([x], [f], t[None])[0] for x, f, t in zip(mixed.latents, mixed.text, mixed.t_S, strict=True)]
    pairs += list(zip(forward_ours(model, mixed), alone, strict=True))
    return max(float((a - b).abs().max()) for a, b in pairs)


def seconds(network: nn.Module, forward: Callable[[], list[Tensor]]) -> float:
    """Time of one forward and backward."""
    network.zero_grad()
    start = time.perf_counter()
    sum(y.square().mean() for y in forward()).backward()
    return time.perf_counter() - start


def measure(rounds: int) -> tuple[list[tuple[str, float, float, float]], float]:
    """(batch, our tokens/s, the peer's, median of the rounds' ratios) for each batch, and the largest difference."""
    model, peer = build()
    work = {"uniform": make_work(UNIFORM, UNIFORM_TEXT), "mixed": make_work(MIXED, MIXED_TEXT)}
    difference = largest_difference(model, peer, **work)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in work}
    for turn in range(rounds + 1):
        for name, w in work.items():
            ours = seconds(model, lambda w=w: forward_ours(model, w))
            theirs = seconds(peer, lambda w=w: peer(w.latents, w.text, w.t_S))
            if turn:  # the first round warms up
                times[name].append((ours, theirs))
    rows = []
    for name, pairs in times.items():
        tokens = work[name].num_tokens
        ours, theirs = (tokens / statistics.median(column) for column in zip(*pairs, strict=True))
        rows.append((name, ours, theirs, statistics.median(b / a for a, b in pairs)))
    return rows, difference


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds (default: 7)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    parser.add_argument("--out", type=Path, help="also write figures and conditions to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows, difference = measure(args.rounds)
    print(f"{'batch':<10}{'packed tokens/s':>18}{'padded tokens/s':>18}{'ratio':>8}")
    for name, ours, theirs, ratio in rows:
        print(f"{name:<10}{ours:>18,.0f}{theirs:>18,.0f}{ratio:>8.2f}")
    figures = {f"{name}_ratio": round(ratio, 3) for name, _, _, ratio in rows}
    figures["max_difference"] = difference
    if args.out:
        write_result(args.out, figures, ("torch", "diffusers"), threads=args.threads, rounds=args.rounds)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
