#!/usr/bin/env bash
# Pack what `python -m dft_lora.bench gpu` needs on a machine that has torch, transformers, peft, accelerate and scipy, but
# no package index: this package, bitsandbytes with the library for one CUDA, and small packages, under 30 MB.
#
#   scripts/gpu_bundle.sh DIR [CUDA] [PYTHON]    CUDA: 130 (default), as in torch.version.cuda; PYTHON: 3.12, say; this one's
#
# There: PYTHONPATH=DIR python -m dft_lora.bench gpu --out results
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -ge 1 ] || { echo "usage: scripts/gpu_bundle.sh DIR [CUDA] [PYTHON]" >&2; exit 2; }
[ ! -e "$1" ] || { echo "gpu_bundle: $1 exists; name a new folder" >&2; exit 2; }
python=.venv/bin/python
[ -x "$python" ] || python=python3
cuda=${2:-130}
version=${3:-$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
pip() { "$python" -m pip --disable-pip-version-check -q "$@"; }

mkdir "$work/source"  # a copy: setuptools would pack what earlier builds left in build/
cp -r dft_lora pyproject.toml README.md LICENSE "$work/source"
pip wheel --no-deps -w "$work/wheel" "$work/source"
pip install --no-deps --no-compile --target "$work/bundle" "$work"/wheel/*.whl
pip install --no-deps --no-compile --target "$work/bundle" -c constraints.txt \
    --only-binary=:all: --python-version "$version" --implementation cp \
    --platform manylinux2014_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux_2_24_x86_64 --platform manylinux_2_28_x86_64 \
    bitsandbytes pydantic pydantic-core annotated-types typing-inspection typing-extensions click pyyaml filelock \
    math-verify latex2sympy2-extended antlr4-python3-runtime pytest pluggy iniconfig
library=$work/bundle/bitsandbytes/libbitsandbytes_cuda$cuda.so
[ -e "$library" ] || {
    echo "gpu_bundle: bitsandbytes has no library for CUDA $cuda; it has:" "$(cd "$work/bundle/bitsandbytes" && echo libbitsandbytes_cuda*)" >&2
    exit 2
}
find "$work/bundle/bitsandbytes" -name 'libbitsandbytes_*.so' ! -name "libbitsandbytes_cuda$cuda.so" ! -name libbitsandbytes_cpu.so -delete
rm -rf "$work/bundle/bin"
mkdir "$work/bundle/tests"
cp tests/test_loss_kernel.py tests/loss_cases.py tests/patience.py tests/conftest.py "$work/bundle/tests"

mb=$(($(du -sk --apparent-size "$work/bundle" | cut -f1) / 1024))
[ "$mb" -lt 30 ] || echo "gpu_bundle: $mb MB, above 30: the library for CUDA $cuda alone has $(du -m "$library" | cut -f1)" >&2
mkdir -p "$(dirname "$1")"
mv "$work/bundle" "$1"
echo "$1: $mb MB, CUDA $cuda, Python $version"
