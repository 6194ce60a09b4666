"""Calls of the kernels drawn at random, the same ones every time (tests/cpu/test_fuzz.py, `make fuzz`)."""

import dataclasses

import pytest
import torch

pytest.importorskip("hypothesis")
from hypothesis import given, settings

from fuzz import bad, cases, equations, found

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="needs the interpreter: run without a GPU")


@pytest.mark.parametrize("member", [m for m in cases.MEMBERS if m not in equations.WITHOUT_KERNELS])
def test_right_calls(device, member):
    @settings(cases.SETTINGS, max_examples=8)
    @given(cases.of_engines("kernels", (member,)))
    def check(case):
        cases.check(case, device)

    check()


@pytest.mark.parametrize("case", found.RIGHT, ids=repr)
def test_right_calls_that_were_found(device, case):
    cases.check(dataclasses.replace(case, backend="triton"), device)


@interpreted
@pytest.mark.parametrize("call", found.WRONG, ids=repr)
def test_wrong_calls_that_were_found(call):
    assert bad.outcome(dataclasses.replace(call, backend="triton")) is None
