#!/usr/bin/env bash
# Make the virtual environment that `make demo` and `make test` use: a Python of 3.11 to 3.13, the build of
# torch that fits this machine, this package in place. Safe to run again.
set -euo pipefail
venv=${1:-.venv}
fits='import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))'

if [ ! -x "$venv/bin/python" ]; then
    for python in python3 python3.13 python3.12 python3.11; do
        if "$python" -c "$fits" 2>/dev/null; then found=$python; break; fi
    done
    [ -n "${found:-}" ] || { echo "setup: needs Python 3.11, 3.12 or 3.13 on PATH" >&2; exit 2; }
    "$found" -m venv "$venv"
fi
pip() { "$venv/bin/python" -m pip --disable-pip-version-check -q "$@"; }

if ! "$venv/bin/python" -c 'import torch' 2>/dev/null; then
    if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
        pip install torch -c constraints.txt
    else
        # No GPU: PyTorch's own CPU index saves gigabytes of CUDA packages; the pinned version where it is out of reach.
        pip install torch -c constraints.txt --index-url https://download.pytorch.org/whl/cpu \
            --retries 0 --timeout 5 2>/dev/null || pip install torch -c constraints.txt
    fi
fi
pip install -e '.[dev]' -c constraints.txt
