"""Package metadata. `kernels/` sits at the top of the repository and installs as `fusedlstm.kernels`."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"', (HERE / "fusedlstm" / "__init__.py").read_text(), re.M)[1]
KERNELS = ["fusedlstm.kernels", *(f"fusedlstm.kernels.{name}" for name in find_packages("kernels"))]

# Triton is an extra and no requirement: torch for CUDA and torch for ROCm bring their own, and PyPI's would overwrite
# the one of ROCm, which has another name. Below 3.8: `make test-triton39` shows that 3.9 computes right,
# but some loads that wait for other programs are 4 bytes wide in place of 16.
TRITON = ['triton>=3.6,<3.8; platform_system == "Linux"']
INTERPRET = [*TRITON, "numpy"]
DEMO = ["babel", "matplotlib", "scikit-learn", "statsmodels", "tqdm"]
ONNX = ["onnx", "onnxscript"]
SAFETENSORS = ["safetensors"]
BENCH = [*INTERPRET, "matplotlib", "rich"]
DOCS = ["furo", "myst-parser", "sphinx", "ziamath"]
NOTEBOOK = ["ipykernel", "nbclient", "nbformat"]  # to run examples/long_range.ipynb without a browser
TOOLS = ["build", "mypy", "ruff", "setuptools>=64", "twine", "wheel"]
FILES = [*ONNX, "onnxruntime", *SAFETENSORS]
TESTS = ["expecttest", "hypothesis", "ml_dtypes", "pytest", "pytest-xdist", *FILES, *NOTEBOOK]

setup(
    name="fusedlstm",
    version=VERSION,
    description="A drop-in for torch.nn.LSTM, GRU and RNN: fused Triton kernels, forward and backward",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    author="The fusedlstm authors",
    license="MIT",
    license_files=["LICENSE"],
    keywords=["pytorch", "triton", "lstm", "gru", "rnn", "recurrent neural network", "fused kernels"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.10",
    packages=[*find_packages(include=["fusedlstm", "fusedlstm.*"], exclude=["fusedlstm.kernels*"]), *KERNELS],
    # A top-level package called `kernels` would overwrite Hugging Face's.
    package_dir={"fusedlstm.kernels": "kernels"},
    package_data={"fusedlstm": ["py.typed"], "fusedlstm.plan": ["*.json"]},
    install_requires=["torch>=2.11"],
    extras_require={
        "triton": TRITON,
        "interpret": INTERPRET,
        "demo": DEMO,
        "bench": BENCH,
        "onnx": ONNX,
        "safetensors": SAFETENSORS,
        "docs": DOCS,
        "dev": sorted({*DEMO, *BENCH, *DOCS, *TOOLS, *TESTS}),
    },
)
