"""The quickstart: real pictures to a trained model, samples and a report, through the commands that a user would type.

    make quickstart          (or: flagdit bench quickstart)

Prints each command before it runs. The last line is one JSON object: retrieval_top1 and heldout_top1 (share of
generated pictures whose nearest neighbour, by L2 in pixels among all pictures of the data set, is the picture that the
prompt names; for trained prompts and for held-out pairs of subject and drawing style) and seconds.
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

from _conditions import write_result

FLAGDIT = Path(sys.executable).with_name("flagdit")
PICTURES = Path("data/quickstart/pictures")
ENCODED = Path("data/quickstart/encoded")
RUN = Path("runs/quickstart")


def flagdit(arguments: str) -> float:
    """Runs one `flagdit` command in the open and returns its seconds; ends the quickstart when it fails."""
    print(f"\n$ flagdit {arguments}", flush=True)
    start = time.perf_counter()
    done = subprocess.run([FLAGDIT, *shlex.split(arguments)])
    if done.returncode:
        sys.exit(done.returncode)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="also write figures and conditions to this file")
    args = parser.parse_args()
    start = time.perf_counter()
    flagdit(f"data build emoji {PICTURES} --size 24 --limit 80 --styles twemoji,openmoji --holdout 0.1")
    flagdit(f"data encode {PICTURES} {ENCODED} --recipe quickstart")
    training = flagdit("train quickstart")
    flagdit(
        f"sample {RUN} --out {RUN}/subjects_and_styles.png"
        ' --prompt "a Twemoji emoji of trophy" --prompt "an OpenMoji emoji of trophy"'
        ' --prompt "a Twemoji emoji of dog face" --prompt "an OpenMoji emoji of dog face"'
    )
    flagdit(f"evaluate {RUN}")
    flagdit(f"report {RUN}")
    figures = json.loads((RUN / "figures.json").read_text())
    print(f"\nOpen {RUN}/report.html and the pictures in {RUN}/.")
    seconds = time.perf_counter() - start
    figures |= {"training_seconds": round(training, 1), "seconds": round(seconds, 1)}
    if args.out:
        write_result(args.out, figures, ("torch",))
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
