"""What the parts of benchmarks/gpu.sh need and this machine lacks: `python -m benchmarks.needed PART...`, in no time.

It prints a line for each part that lacks something: the part, then the packages. Nothing is imported to find out.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec

OPTIONS = {"jsonargparse": "jsonargparse", "docstring_parser": "docstring-parser", "yaml": "pyyaml"}
MODELS = {"diffusers": "diffusers", "safetensors": "safetensors", "huggingface_hub": "huggingface-hub", "PIL": "pillow"}
KERNELS = {"torch": "torch", "numpy": "numpy", "ninja": "ninja", "tqdm": "tqdm"}
TRAINING = {"accelerate": "accelerate", "matplotlib": "matplotlib", "scipy": "scipy"}
NEEDED = {  # a module, and the package that brings it
    "tests": KERNELS | {"pytest": "pytest", "yaml": "pyyaml"},
    "tests-models": KERNELS | OPTIONS | MODELS | TRAINING | {"pytest": "pytest"},  # the second step of `tests`
    "operator": KERNELS | OPTIONS,
    "budget": KERNELS | OPTIONS | MODELS,
    "models": KERNELS | OPTIONS | MODELS | {"matplotlib": "matplotlib"},
    "classifier": KERNELS | OPTIONS | MODELS | {"timm": "timm"},
    "t2i": KERNELS | OPTIONS | MODELS | {"transformers": "transformers", "accelerate": "accelerate"},
    "profile": KERNELS | OPTIONS | MODELS,
    "sanitizer": KERNELS,
    "train": KERNELS | OPTIONS | MODELS | TRAINING | {"skimage": "scikit-image"},
}


def lacking(part: str) -> list[str]:
    """The packages that a part needs and that are not here."""
    return [package for module, package in NEEDED[part].items() if find_spec(module) is None]


if __name__ == "__main__":
    for name in sys.argv[1:]:
        if packages := lacking(name):
            print(name, *packages)
