"""bench/litmus.py sees an exchange that is broken."""

import pytest
import torch
import triton

from bench import litmus
from fusedlstm.kernels import exchange, norms

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="`make gpu` runs it on a GPU")


@triton.jit
def never(x, y, GROUP=None):
    return 0


@triton.jit
def nobody_is_awaited(counter_ptr, target, EXCHANGE):
    pass


BROKEN = {
    "counter": (exchange, "wait", nobody_is_awaited),
    "data": (exchange, "_has_nan", never),
    "sums": (norms, "_late", never),
}


@pytest.mark.parametrize("pattern", [None, *BROKEN])
def test_violations_are_counted(monkeypatch, capsys, pattern):
    if pattern:
        monkeypatch.setattr(*BROKEN[pattern])
    assert litmus.main() == (pattern is not None)
    for line in capsys.readouterr().out.splitlines()[:-2]:
        assert line.endswith(" 0 violations") == (not line.startswith(f"{pattern} ")), line
