"""Checks the hashes of this folder and reads its tensors. Needs torch and safetensors only.

python example.py
"""

import hashlib
import json
from pathlib import Path

from safetensors import safe_open

FOLDER = Path(__file__).resolve().parent
CHUNK = 1 << 22


def sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as f:
        while chunk := f.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def main() -> None:
    manifest = json.loads((FOLDER / "manifest.json").read_text())
    for name, entry in manifest["files"].items():
        assert sha256(FOLDER / name) == entry["sha256"], f"{name} has changed"
    for file in sorted(FOLDER.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            names = list(tensors.keys())
            count = sum(tensors.get_tensor(name).numel() for name in names)
            print(f"{file.name}: {len(names)} tensors, {count:,} numbers, first {names[0]}")
    print("all hashes are right")


if __name__ == "__main__":
    main()
