"""One tiny model on pictures, clips, views and sounds at once, through the commands that a user would type.

    flagdit bench joint [--steps 400]

Builds and encodes the data, trains recipes/joint/quickstart.yaml and samples each modality: a picture grid, a clip, a
view sheet and a sound. The last line is one JSON object: first and last loss, held-out loss, seconds.
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

from _conditions import write_result

RUN = Path("runs/joint")
BUILDS = (
    "emoji data/joint/image --size 24 --limit 40 --styles twemoji,openmoji --holdout 0.1",
    "motion data/joint/video --size 24 --frames 8 --limit 12 --holdout 0.1",
    "objects data/joint/multiview --size 24 --count 4 --limit 12 --holdout 0.1",
    "instruments data/joint/audio --seconds 1 --limit 24 --holdout 0.1",
)
SAMPLES = (
    '--modality image --prompt "a Twemoji emoji of trophy" --prompt "an OpenMoji emoji of dog face" --out {}/grid.png',
    '--modality video --frames 8 --prompt "a red apple moves left to right" --out {}/clip.mp4',
    '--modality video --frames 8 --prompt "a dog face grows from small to large" --out {}/clip.gif',
    '--modality multiview --frames 4 --prompt "a cube with a picture of dog face, seen from 4 sides"'
    " --out {}/views.png",
    '--modality audio --seconds 2 --prompt "violin playing C4" --out {}/sound.wav',
)


def flagdit(arguments: str) -> None:
    """Runs one `flagdit` command in the open; ends when it fails."""
    print(f"\n$ flagdit {arguments}", flush=True)
    command = "import sys; from flagdit.cli import main; sys.argv[0] = 'flagdit'; main()"
    done = subprocess.run([sys.executable, "-c", command, *shlex.split(arguments)])
    if done.returncode:
        sys.exit(done.returncode)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400, help="train.steps")
    parser.add_argument("--out", type=Path, help="also write figures and conditions to this file")
    args = parser.parse_args()
    start = time.perf_counter()
    for build in BUILDS:
        flagdit(f"data build {build}")
        raw = build.split()[1]
        flagdit(f"data encode {raw} {raw.replace('joint/', 'joint/encoded/')} --recipe joint/quickstart")
    before = time.perf_counter()
    decay = max(args.steps * 2 // 5, 1)
    flagdit(f"train joint/quickstart train.steps={args.steps} optimizer.decay_steps={decay}")
    training = time.perf_counter() - before
    for sample in SAMPLES:
        flagdit(f"sample {RUN} {sample.format(RUN)}")
    flagdit(f"report {RUN}")
    lines = [json.loads(line) for line in (RUN / "metrics.jsonl").read_text().splitlines()]
    held_out = [line["val_loss"] for line in lines if "val_loss" in line]
    losses = [line["loss"] for line in lines if "loss" in line]
    figures = {
        "first_loss": round(losses[0], 4),
        "last_loss": round(losses[-1], 4),
        "heldout_loss": round(held_out[-1], 4),
        "training_seconds": round(training, 1),
        "seconds": round(time.perf_counter() - start, 1),
    }
    if args.out:
        write_result(args.out, figures, ("torch",), steps=args.steps)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
