"""The Python in the documents runs as it stands."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
BLOCKS = {
    f"{name} {k}": code
    for name in ("README.md", "docs/lstm.md", "docs/family.md", "docs/on_a_gpu.md")
    for k, code in enumerate(re.findall(r"```python\n(import.*?)```", (ROOT / name).read_text(), re.S))
}


@pytest.mark.parametrize("block", BLOCKS)
def test_blocks_run(block):
    torch.manual_seed(0)
    exec(BLOCKS[block], {})


def test_the_text_of_every_mutant_is_there():
    """A fault that cannot be put in proves nothing (`make mutants`)."""
    spec = importlib.util.spec_from_file_location("mutants", ROOT / "tests" / "mutants.py")
    mutants = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mutants)
    for name, (file, text, *_) in mutants.MUTANTS.items():
        assert text in (ROOT / file).read_text(), name


def test_there_are_blocks():
    assert len(BLOCKS) >= 3
