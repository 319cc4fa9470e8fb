#!/bin/sh
# The ahead-of-time gate on another version of Triton than the pinned one, such as that of a GPU machine.
#
#     benchmarks/kernels_on_triton.sh [VERSION [arguments of flagdit.kernels.aot]]      (default: 3.6.0)
#
# Installs that version of Triton alone, into a folder of its own, and puts it before the environment's. PYTHON picks the
# environment, which must have torch.
set -eu
version=${1-3.6.0}
[ $# -eq 0 ] || shift
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
folder=${XDG_CACHE_HOME:-$HOME/.cache}/flagdit/triton-$version
[ -d "$folder/triton" ] || "$python" -m pip install --quiet --no-deps --target "$folder" "triton==$version"
cd "$root"
TRITON_INTERPRET=0 PYTHONPATH="$folder${PYTHONPATH:+:$PYTHONPATH}" exec "$python" -m flagdit.kernels.aot "$@"
