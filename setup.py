"""What pyproject.toml can't say: csrc/ stands beside the package in a checkout and inside it where it is installed;
kernels may be compiled ahead of time."""

import os
import sys
from pathlib import Path

from setuptools import Distribution, find_packages, setup
from setuptools.command.build_py import build_py

# Kernels to compile ahead of time: GSPN_DIT_BUILD=cpu,cuda pip install --no-build-isolation .
AHEAD = [name for name in os.environ.get("GSPN_DIT_BUILD", "").split(",") if name]
PROJECT = Path(__file__).parent


class BuildPy(build_py):
    """Compiles the kernels that were asked for into the package before it is copied."""

    def run(self) -> None:
        if AHEAD:
            sys.path.insert(0, str(PROJECT))
            from gspn_dit.ops.build import ahead_of_time, build

            for name in AHEAD:
                build(name, ahead_of_time(name))
        super().run()


class WithKernels(Distribution):
    """A wheel with a compiled kernel is for one platform."""

    def has_ext_modules(self) -> bool:
        return bool(AHEAD)


setup(
    packages=[*find_packages(include=["gspn_dit*"]), "gspn_dit.csrc"],
    package_dir={"gspn_dit.csrc": "csrc"},
    package_data={
        "gspn_dit": ["py.typed", "demo/weights/**/*", "demo/pictures/*", "_*.so"],
        "gspn_dit.csrc": [f"**/*.{kind}" for kind in ("h", "cpp", "cu")],
    },
    cmdclass={"build_py": BuildPy},
    distclass=WithKernels,
)
