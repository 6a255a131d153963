"""Packaging of g3dswap; everything about the distribution is in this file."""

from __future__ import annotations

from pathlib import Path

from setuptools import find_packages, setup

TEST_REQUIREMENTS = [
    "expecttest",
    "hypothesis",
    "mypy",
    "pytest",
    "pytest-timeout",
    "pytest-xdist",
    "ruff",
    # Networks that somebody else wrote, for the tests that convert real models.
    "monai",
    "pyyaml",  # in which MONAI bundles may be written
    "pytorchvideo",
    "uniformer-pytorch",
    # Runs the printed Triton kernels on the CPU. Later interpreters reject masks made of scalar booleans,
    # and Linux is the only system that Triton has wheels for.
    "triton==3.6.0; platform_system == 'Linux'",
]

setup(
    name="g3dswap",
    version="0.1.0",
    description="Swaps slow grouped and depthwise 3D convolutions of PyTorch models for tuned kernels",
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="g3dswap contributors",
    license="BSD-3-Clause",
    license_files=["LICENSE"],
    classifiers=[
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    python_requires=">=3.10",
    # The options that were tuned elsewhere stand beside the package in the repository, where people look for
    # them, and inside it once installed. An editable install sees only the former.
    packages=[*find_packages(include=["g3dswap", "g3dswap.*"]), "g3dswap.caches"],
    package_dir={"g3dswap.caches": "caches"},
    package_data={
        "g3dswap": ["py.typed", "page.html", "direct.cpp"],
        "g3dswap.bench": ["layers.json"],
        "g3dswap.caches": ["*.jsonl", "README.md"],
    },
    install_requires=[
        # The tests pass on both ends of this range; what torch registers and traces changes between releases.
        "torch>=2.11,<2.14",
        "click",
        "filelock",
        "jinja2",
        "markupsafe",
        "matplotlib",
        "numpy",
        "platformdirs",
        "rich",
        "safetensors",
        "tqdm",
    ],
    extras_require={"test": TEST_REQUIREMENTS},
    entry_points={"console_scripts": ["g3dswap = g3dswap.cli:main"]},
)
