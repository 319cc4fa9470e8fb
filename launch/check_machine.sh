#!/usr/bin/env bash
# Makes sure that the machine can build the environment: Python with venv, git, a C++ compiler.
# As root on a Debian system it installs what is missing; elsewhere it says what to install.
#
#   check_machine.sh PYTHON [tests]     tests: also what tests of SLURM and of pages need; without it they are skipped
set -euo pipefail
python=${1:-python3}
missing=()
packages=()

need() { # need COMMAND-THAT-SUCCEEDS WHAT DEBIAN-PACKAGE
    if ! eval "$1" >/dev/null 2>&1; then
        missing+=("$2")
        packages+=("$3")
    fi
}

need "command -v $python" "$python" python3
need "$python -c 'import venv, ensurepip'" "Python's venv module" python3-venv
need "command -v git" git git
need "command -v c++ || command -v g++" "a C++ compiler" g++
required=${#missing[@]}
if [[ ${2:-} == tests ]]; then
    PATH=$PATH:/usr/sbin:/sbin
    need "command -v sbatch && command -v slurmctld" SLURM slurm-wlm
    need "command -v munged" munge munge
    need "command -v shellcheck" shellcheck shellcheck
    need "command -v chromium || command -v chromium-browser || command -v google-chrome" Chromium chromium
fi

if ((${#missing[@]})); then
    if [[ $(id -u) == 0 ]] && command -v apt-get >/dev/null; then
        echo "installing ${packages[*]}"
        apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "${packages[@]}"
    elif ((required == 0)); then
        echo "tests that need ${missing[*]} are skipped (Debian: apt-get install ${packages[*]})"
    else
        printf 'missing: %s\n' "${missing[@]}" >&2
        echo "install them (Debian: apt-get install ${packages[*]}) and run make again" >&2
        exit 1
    fi
fi
"$python" - <<'PY'
import sys
if sys.version_info < (3, 10):
    sys.exit(f"FlagDiT needs Python 3.10 or newer, this is {sys.version.split()[0]}; run make with PYTHON=/path/to/python3.11")
PY
