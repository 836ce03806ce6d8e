"""What pyproject.toml can't say: csrc/ stands beside the package in a checkout and inside it where it is installed."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["gspn_dit*"]), "gspn_dit.csrc"],
    package_dir={"gspn_dit.csrc": "csrc"},
    package_data={"gspn_dit": ["weights/**/*"], "gspn_dit.csrc": ["*.h", "*.cpp"]},
)
