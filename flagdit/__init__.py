"""FlagDiT: distributed pretraining of flow-based diffusion transformers of any modality (arXiv 2405.05945)."""

__version__ = "0.1.0"
