#!/bin/sh
# Measures the kernels, the attention backends and a 7B block on the GPU of this machine, in under ten minutes.
#
#     benchmarks/gpu/run.sh [--out FILE] [--only kernels,attention,block] [--dry-run]
#
# It needs torch with Triton and nothing to be installed: PYTHON=/path/to/python picks the environment. --dry-run goes
# through every step at tiny sizes, on a CPU with Triton's interpreter, and reports no times.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
case " $* " in *" --dry-run "*) export TRITON_INTERPRET="${TRITON_INTERPRET-1}" ;; esac
PYTHONPATH="$here/../..:$here/..${PYTHONPATH:+:$PYTHONPATH}" exec "${PYTHON:-python3}" -u "$here/measure.py" "$@"
