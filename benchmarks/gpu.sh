#!/usr/bin/env bash
# Test and measure this package on one GPU in eight minutes, on a machine with Python, torch and Triton:
#
#     benchmarks/gpu.sh gather            # with a network: download about 20 MB of wheels to build/gpu_wheels
#     benchmarks/gpu.sh [OPTION ...]      # on the GPU machine, with build/gpu_wheels beside it; --help lists options
#
# It installs nothing: the wheels, without torch, are unpacked into a temporary folder. Without a GPU it runs on the CPU.
set -euo pipefail
cd "$(dirname "$0")/.."
WHEELS=build/gpu_wheels
PYTHON=${PYTHON:-python3}

if [ "${1:-}" = gather ]; then
    # For the GPU machine's Python, in the versions of requirements/cpu.txt; the last four are for the peers.
    version_of() { grep -iE "^$1==" requirements/cpu.txt; }
    "$PYTHON" -m pip download --quiet --no-deps --only-binary=:all: --python-version "${2:-3.12}" --dest "$WHEELS" \
        $(for name in jsonargparse docstring_parser typeshed_client lightning lightning-utilities torchmetrics \
            transformers peft datasets dill multiprocess; do version_of "$name"; done) trl==1.16.0 liger_kernel==0.8.5
    du -sh "$WHEELS"
    exit
fi

SITE=$(mktemp -d)
trap 'rm -rf "$SITE"' EXIT
for wheel in "$WHEELS"/*.whl; do
    [ -e "$wheel" ] && "$PYTHON" -m zipfile -e "$wheel" "$SITE"
done
export PYTHONPATH="$PWD:$PWD/benchmarks:$SITE" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
"$PYTHON" benchmarks/gpu_stages.py "$@"
