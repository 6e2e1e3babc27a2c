"""The packages; all else about them is in pyproject.toml."""

from setuptools import find_packages, setup

# `kernels` itself is no package: the name belongs to a Hugging Face library that diffusers imports.
setup(
    packages=[*find_packages(include=["dgpo_fast", "dgpo_fast.*"]), *find_packages("kernels")],
    package_dir={"dgpo_kernels": "kernels/dgpo_kernels"},
)
