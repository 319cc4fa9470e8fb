"""Every recipe key: its type, default, meaning and unit.

The dataclasses below are the YAML: `model.dim` in a recipe is `Recipe.model.dim` here, and nothing else is a key.
A test proves that the program reads every key. To add one: a line here, a rule in `validate.py` if it can clash with
others, and the place that reads it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from flagdit.config.fields import block, key
from flagdit.config.schema_checkpoint import CheckpointConfig
from flagdit.config.schema_cluster import ClusterConfig
from flagdit.config.schema_guard import GuardConfig

Texts = list[str]
Numbers = list[float]


@dataclass(frozen=True)
class ModelConfig:
    """The Flag-DiT: its size and its variants (arXiv 2405.05945, section 2; Next-DiT: arXiv 2406.18583)."""

    size: Optional[str] = key(
        None, "Named size of model/sizes.py (5b, next_2b, …) that sets the shape; null: as given here."
    )
    block: str = key(
        "flag", "flag: adaLN shift/scale/gate; next: sandwich norms and tanh gates.", choices=("flag", "next")
    )
    dim: int = key(512, "Width of the residual stream, in channels.", at_least=1)
    num_layers: int = key(8, "Transformer blocks.", at_least=1)
    num_heads: int = key(8, "Query heads.", at_least=1)
    num_kv_heads: Optional[int] = key(
        None, "Key/value heads (grouped-query attention); null: as many as query heads.", at_least=1
    )
    ffn_dim: Optional[int] = key(None, "Hidden width of the SwiGLU; null: 8/3 of dim, rounded up to 256.", at_least=1)
    cond_dim: Optional[int] = key(
        None, "Width of the conditioning vector; null: min(dim, 1024) as the official code.", at_least=1
    )
    modalities: dict[str, int] = key({"image": 3}, "Modality → latent channels; each gets its own stem and head.")
    patch_size: int = key(2, "Rows and columns of latent per token.", at_least=1)
    text_dim: int = key(384, "Width of the text features; 0: no text.", at_least=0)
    num_classes: int = key(0, "Classes of a class-conditional model; 0: none. Excludes text.", at_least=0)
    qk_norm: str = key(
        "rms",
        "Norm of queries and keys: rms per head; layer over all heads together (official checkpoints); none.",
        choices=("rms", "layer", "none"),
    )
    norm_eps: float = key(1e-5, "Epsilon of every norm but the final one.", at_least=0)
    rope: str = key(
        "axial", "raster: 1D over the sequence (Flag-DiT); axial: pairs shared among axes.", choices=("raster", "axial")
    )
    rope_axes: int = key(2, "Axes of axial RoPE: 2 (row, column) or 3 (frame, row, column).", at_least=1)
    rope_theta: float = key(10000.0, "Base of the RoPE frequencies.", at_least=1)
    nextline: bool = key(True, "Append a learned [nextline] token to every row.")
    nextframe: bool = key(
        True, "Append a learned [nextframe] token to every frame of modalities that have frames or views."
    )
    time_scale: float = key(
        1000.0, "Factor on t in [0, 1] before the sinusoid; 1 for official checkpoints.", at_least=0
    )
    final_shift: Optional[bool] = key(
        None, "Shift beside the scale in the final adaLN; null: as the block, flag has it and next has not."
    )
    learn_sigma: bool = key(False, "Double the output and drop the second half (official checkpoints only).")
    attention: str = key(
        "auto",
        "Attention backend: auto; sdpa; varlen (torch's flash kernels); flash2, flash3, flash4 (packages). See "
        "docs/attention.md. A run sampled elsewhere takes another where this one cannot serve.",
        choices=("auto", "sdpa", "varlen", "flash2", "flash3", "flash4"),
    )
    kernels: str = key(
        "auto",
        "Norms, gates, RoPE and SwiGLU of the blocks: auto: fused Triton kernels on GPUs, plain torch elsewhere; "
        "triton; reference (plain torch). See docs/kernels.md.",
        choices=("auto", "triton", "reference"),
    )
    checkpointing: str = key(
        "none",
        "Activation checkpointing: none; block: recompute whole blocks; selective: keep matmul and attention outputs.",
        choices=("none", "block", "selective"),
    )
    checkpoint_every: int = key(1, "Checkpoint one block in this many.", at_least=1)


@dataclass(frozen=True)
class FlowConfig:
    """Flow matching: the linear path, its timesteps and the loss weights."""

    timesteps: str = key("logit_normal", "Law of t: uniform or logit_normal.", choices=("uniform", "logit_normal"))
    logit_mean: float = key(0.0, "Mean of logit(t); t = 1 is data, so a negative mean trains more on noise.")
    logit_std: float = key(1.0, "Standard deviation of logit(t).", at_least=0)
    shift: float = key(
        1.0, "Shift s of t ← t/(t+s−s·t) at `shift_tokens` tokens; more than 1 moves towards noise.", at_least=0
    )
    shift_tokens: int = key(
        0, "Tokens at which `shift` holds; it grows with √tokens. 0: the same for every size.", at_least=0
    )
    weighting: str = key(
        "none", "Per-sample weight of the loss: none, or snr: 1/(1−t) clipped to 5.", choices=("none", "snr")
    )
    token_weighting: str = key(
        "sample", "sample: every sample counts alike; token: every token counts alike.", choices=("sample", "token")
    )
    caption_dropout: float = key(
        0.1, "Share of samples trained without their caption or class (for guidance).", at_least=0
    )


@dataclass(frozen=True)
class CodecConfig:
    """Pixels to latents and back."""

    kind: str = key(
        "pixels",
        "pixels; haar or dct: invertible transforms; diffusers: an autoencoder folder.",
        choices=("pixels", "haar", "dct", "diffusers"),
    )
    path: Optional[str] = key(None, "Local folder of the diffusers autoencoder.")
    factor: int = key(2, "Downscaling of the haar and dct codecs: 2, 4 or 8 pixels per latent.", at_least=1)


@dataclass(frozen=True)
class AudioConfig:
    """Sound to latents and back: log-mel spectrograms, and an autoencoder over them if there is one."""

    path: Optional[str] = key(
        None, "Local folder of a diffusers autoencoder of one-channel pictures; null: mels alone."
    )
    sample_rate: int = key(16000, "Samples per second; other rates are resampled.", at_least=1000)
    mels: int = key(32, "Mel bands: the rows of a latent.", at_least=1)
    hop: int = key(256, "Samples per column of the spectrogram.", at_least=1)
    window: int = key(1024, "Samples of the analysis window.", at_least=2)
    min_hz: float = key(40.0, "Lower edge of the lowest band, in hertz.", at_least=0)
    griffin_lim: int = key(60, "Iterations in which Griffin-Lim finds the phases of a sampled spectrogram.", at_least=1)


@dataclass(frozen=True)
class TextConfig:
    """The text encoder."""

    kind: str = key(
        "embedded",
        "embedded: the small encoder of an installed package; transformers: a local folder.",
        choices=("embedded", "transformers"),
    )
    path: Optional[str] = key(None, "Local folder of the transformers model and tokenizer.")
    max_length: int = key(64, "Longest caption, in tokens; longer ones are cut.", at_least=1)
    prompt_template: str = key("{}", "Text around every caption and prompt; {} is the caption.")
    layer: int = key(-1, "Hidden layer whose states are the features; -1: the last, after its norm.")


@dataclass(frozen=True)
class DataConfig:
    """What the run trains on."""

    path: str = key("data/train", "Folder, or address, of an encoded data set (made by `flagdit data encode`).")
    sets: dict[str, float] = key(
        {}, "Several data sets: folder → weight, its share of the samples drawn. Empty: data.path alone."
    )
    split: str = key("train", "Split of the data sets to train on.")
    batch_size: int = key(
        64, "Samples of one optimizer step, over all ranks; with pack_tokens, packs of one step.", at_least=1
    )
    pack_tokens: int = key(
        0,
        "Token budget of a pack, filled with samples of any size; 0: packs hold equal numbers of samples.",
        at_least=0,
    )
    shuffle_shards: int = key(
        64, "Shards that are shuffled together, and read at a time; shuffled as groups among each other.", at_least=1
    )
    cache: str = key("~/.cache/flagdit", "Folder for copies of shards whose data set is given by an address (s3://…).")
    cache_gib: float = key(50.0, "Room for those copies; the least recently used make way. In 2³⁰ bytes.", at_least=0)
    workers: int = key(0, "Loader processes per rank; 0: load in the training process.", at_least=0)
    prefetch: int = key(2, "Batches that each loader process prepares ahead.", at_least=1)
    max_bad_samples: float = key(0.01, "Share of unreadable samples above which the run stops.", at_least=0)


@dataclass(frozen=True)
class LimitsConfig:
    """What one sample may be; whatever is more is left out with its reason, before it is decoded."""

    max_pixels: int = key(1 << 26, "Pixels of a picture, frame or view.", at_least=1)
    max_frames: int = key(10_000, "Frames of a video that are decoded.", at_least=1)
    max_seconds: float = key(600.0, "Seconds of sound that are decoded.", at_least=0)
    max_sample_bytes: int = key(1 << 30, "Bytes of one sample's files together.", at_least=1)
    max_caption: int = key(10_000, "Letters of a caption.", at_least=1)
    sample_seconds: float = key(60.0, "Seconds that reading and decoding one sample may take.", at_least=0)
    stall_seconds: float = key(600.0, "Seconds without any data after which training stops with an error.", at_least=1)


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its schedule."""

    lr: float = key(1e-4, "Peak learning rate.", at_least=0)
    betas: Numbers = key([0.9, 0.95], "AdamW's two decay rates.")
    eps: float = key(1e-8, "AdamW's epsilon.", at_least=0)
    weight_decay: float = key(0.0, "Decoupled weight decay of matrices; vectors have none.", at_least=0)
    schedule: str = key(
        "constant",
        "After warm-up: constant, cosine, or wsd (constant, then linear decay).",
        choices=("constant", "cosine", "wsd"),
    )
    warmup_steps: int = key(100, "Steps of linear warm-up.", at_least=0)
    decay_steps: int = key(0, "Last steps in which wsd decays.", at_least=0)
    final_lr: float = key(0.0, "Share of the peak at the end of cosine and wsd.", at_least=0)
    grad_clip: float = key(1.0, "Largest gradient norm; larger ones are scaled down. 0: off.", at_least=0)


@dataclass(frozen=True)
class TrainConfig:
    """The training loop."""

    steps: int = key(1000, "Optimizer steps of the run.", at_least=1)
    accumulation: int = key(1, "Micro-batches per optimizer step; divides data.batch_size.", at_least=1)
    precision: str = key(
        "fp32", "Parameters and activations: fp32, or bf16 with fp32 master weights.", choices=("fp32", "bf16")
    )
    device: str = key("auto", "auto: cuda where there is one; cpu or cuda.", choices=("auto", "cpu", "cuda"))
    compile: bool = key(False, "Compile the blocks with torch.compile.")
    deterministic: bool = key(False, "Ask torch for deterministic algorithms (slower on GPU).")
    ema_decays: Numbers = key([0.9999], "Decay of each exponential moving average of the weights, per step.")
    ema_warmup: bool = key(True, "Limit the decay to (1+step)/(10+step), so that early averages forget the start.")
    log_every: int = key(10, "Steps between two log lines.", at_least=1)
    init_from: Optional[str] = key(
        None, "Run folder whose weights training starts from, trained here or imported; null: from the seed."
    )
    init_ema: Optional[int] = key(
        None, "Which of that run's averages; -1: its raw weights; null: as its own sample.ema says.", at_least=-1
    )


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters: what trains when the weights themselves stay as they are."""

    rank: int = key(0, "Rank of the adapters; 0: none, all weights train.", at_least=0)
    alpha: float = key(16.0, "Strength: the adapters' product counts alpha/rank times.", at_least=0)
    targets: Texts = key(
        ["wq", "wk", "wv", "wo", "wk_y", "wv_y"],
        "Linear layers of the blocks that get adapters: wq, wk, wv, wo, wk_y, wv_y, w1, w2, w3.",
    )


@dataclass(frozen=True)
class ParallelConfig:
    """The mesh: tensor × context ranks hold one pack together; what is left of the world is the data axis."""

    tensor: int = key(1, "Ranks that split every block's heads and hidden channels (tensor parallelism).", at_least=1)
    sequence: bool = key(
        True, "Split the residual stream's tokens over the tensor axis too (sequence parallelism); no effect alone."
    )
    context: int = key(1, "Ranks that split the tokens of a pack (context parallelism).", at_least=1)
    ring: int = key(
        1,
        "Of the context ranks, how many pass keys and values around; the others exchange heads. 1: heads only "
        "(Ulysses); as many as context: ring only.",
        at_least=1,
    )
    zero: int = key(
        1, "Shards over data and context ranks: 1 optimizer state, 2 and gradients, 3 and weights (ZeRO).", at_least=0
    )
    offload: bool = key(False, "Keep masters and moments in host memory and update them there (ZeRO 1 and 2).")
    timeout: int = key(600, "Seconds without an answer after which a collective counts as hanging.", at_least=1)


@dataclass(frozen=True)
class ValidationConfig:
    """The held-out loss, with the same noise and timesteps each time."""

    every: int = key(0, "Steps between validations; 0: none.", at_least=0)
    path: Optional[str] = key(None, "Folder of the validation data set; null: data.path.")
    split: str = key("heldout", "Split of the data set to validate on.")
    samples: int = key(64, "Most samples to validate on.", at_least=1)
    timesteps: Numbers = key([0.1, 0.3, 0.5, 0.7, 0.9], "Values of t at which the loss is measured.")


@dataclass(frozen=True)
class SampleConfig:
    """Sampling: the defaults of `flagdit sample` and the picture grids made in training."""

    every: int = key(0, "Steps between sample grids in training; 0: none.", at_least=0)
    prompts: Texts = key([], "Prompts of the grids.")
    modality: str = key("image", "Modality to sample.")
    size: str = key("256x256", "WIDTHxHEIGHT in pixels.")
    frames: int = key(1, "Frames or views.", at_least=1)
    seconds: float = key(1.0, "Seconds of sound.", at_least=0)
    solver: str = key(
        "euler",
        "euler, midpoint, heun, rk4, or dopri5 (adaptive).",
        choices=("euler", "midpoint", "heun", "rk4", "dopri5"),
    )
    steps: int = key(60, "Solver steps (intervals); ignored by dopri5.", at_least=1)
    schedule: str = key(
        "linear",
        "Time grid: linear, or sigmoid (small steps near noise and near data, for few steps).",
        choices=("linear", "sigmoid"),
    )
    shift: float = key(1.0, "Shift of the time grid towards noise.", at_least=0)
    shift_tokens: int = key(
        0, "Tokens at which `shift` holds; it grows with √tokens. 0: the same for every size.", at_least=0
    )
    guidance: float = key(4.0, "Classifier-free guidance scale; 1: off.", at_least=0)
    guidance_interval: Numbers = key([0.0, 1.0], "Times from which to which there is guidance; t = 1 is data.")
    guidance_rescale: float = key(
        0.0, "Share by which guided velocities take the deviation of unguided ones, against overexposure.", at_least=0
    )
    guidance_reuse: int = key(
        1, "The unconditional half runs once in so many evaluations and is used again between.", at_least=1
    )
    guidance_channels: int = key(0, "Latent channels that are guided; 0: all, 3: as the official code.", at_least=0)
    seed: int = key(0, "Seed of the sampling noise.", at_least=0)
    ema: int = key(0, "Which of train.ema_decays to sample from; -1: the raw weights.", at_least=-1)
    train_size: Optional[str] = key(
        None, "WIDTHxHEIGHT of the largest training samples: larger ones are read by `scaling`; null: never."
    )
    train_frames: int = key(1, "With train_size: the most frames or views in training.", at_least=1)
    scaling: str = key(
        "time_aware",
        "Positions beyond train_size: none, linear, ntk, time_aware (linear to ntk), time_switch (official).",
        choices=("none", "linear", "ntk", "time_aware", "time_switch"),
    )
    watershed: float = key(0.3, "Time at which time_switch goes from linear to ntk.", at_least=0)
    proportional: bool = key(True, "With train_size: keep attention over more tokens as sharp as in training.")
    rtol: float = key(1e-5, "Relative tolerance of dopri5.", at_least=0)
    atol: float = key(1e-5, "Absolute tolerance of dopri5.", at_least=0)


@dataclass(frozen=True)
class LogConfig:
    """What people watch."""

    wandb_project: Optional[str] = key(None, "Weights & Biases project; null: no wandb.")
    wandb_mode: str = key(
        "offline", "offline: kept in the run folder for `wandb sync`; online.", choices=("offline", "online")
    )
    peak_tflops: float = key(
        0.0, "Peak TFLOP/s of one device, for MFU; 0: known GPUs by name, else no MFU.", at_least=0
    )


@dataclass(frozen=True)
class Recipe:
    """One run."""

    name: str = key("run", "Name of the run; its folder is run_dir/name.")
    run_dir: str = key("runs", "Folder that holds all runs.")
    seed: int = key(0, "Seed of initialization, data order, noise, timesteps and dropout.", at_least=0)
    model: ModelConfig = block(ModelConfig)
    flow: FlowConfig = block(FlowConfig)
    codec: CodecConfig = block(CodecConfig)
    audio: AudioConfig = block(AudioConfig)
    text: TextConfig = block(TextConfig)
    data: DataConfig = block(DataConfig)
    limits: LimitsConfig = block(LimitsConfig)
    optimizer: OptimizerConfig = block(OptimizerConfig)
    guard: GuardConfig = block(GuardConfig)
    train: TrainConfig = block(TrainConfig)
    lora: LoraConfig = block(LoraConfig)
    parallel: ParallelConfig = block(ParallelConfig)
    validation: ValidationConfig = block(ValidationConfig)
    sample: SampleConfig = block(SampleConfig)
    checkpoint: CheckpointConfig = block(CheckpointConfig)
    log: LogConfig = block(LogConfig)
    cluster: ClusterConfig = block(ClusterConfig)
