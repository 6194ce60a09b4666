"""Package metadata. `kernels/` sits at the top of the repository and installs as `fusedlstm.kernels`."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"', (HERE / "fusedlstm" / "__init__.py").read_text(), re.M)[1]

DEMO = ["matplotlib", "scikit-learn", "tqdm"]
BENCH = ["rich"]

setup(
    name="fusedlstm",
    version=VERSION,
    description="A faster drop-in for torch.nn.LSTM: fused Triton kernels, forward and backward",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    packages=[*find_packages(include=["fusedlstm", "fusedlstm.*"]), "fusedlstm.kernels", "fusedlstm.kernels.cells"],
    # A top-level package called `kernels` would overwrite Hugging Face's.
    package_dir={"fusedlstm.kernels": "kernels"},
    package_data={"fusedlstm": ["plan/measured.json", "plan/spills.json"]},
    install_requires=["torch>=2.11", 'triton>=3.6; platform_system == "Linux"'],
    extras_require={
        "demo": DEMO,
        "bench": BENCH,
        "dev": [*DEMO, *BENCH, "build", "expecttest", "numpy", "pytest", "pytest-xdist", "ruff", "setuptools>=64"],
    },
)
