"""The Python in the documents runs as it stands."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
BLOCKS = {
    f"{name} {k}": code
    for name in ("README.md", "docs/lstm.md")
    for k, code in enumerate(re.findall(r"```python\n(import.*?)```", (ROOT / name).read_text(), re.S))
}


@pytest.mark.parametrize("block", BLOCKS)
def test_blocks_run(block):
    torch.manual_seed(0)
    exec(BLOCKS[block], {})


def test_there_are_blocks():
    assert len(BLOCKS) >= 3
