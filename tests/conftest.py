"""Settings of the whole test run."""

import os

# Triton decides when a kernel is defined whether it runs in the interpreter, so this stands before all imports of ours.
# On a machine with a GPU, kernels are tested on it instead.
if not os.path.exists("/dev/nvidiactl"):
    os.environ.setdefault("TRITON_INTERPRET", "1")
