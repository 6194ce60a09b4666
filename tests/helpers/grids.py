"""Grids of cases in which every two axes have every pair of values.

With FUSEDLSTM_WHOLE_GRIDS=1 (`make test-whole`) they have every combination of all values.
"""

import itertools
import os
import random

import pytest

WHOLE = os.environ.get("FUSEDLSTM_WHOLE_GRIDS") == "1"


def pairwise(axes: dict[str, list], seed: int = 0) -> list[tuple]:
    """Few cases in which every pair of values of any two axes meets: greedily, from a seeded shuffle."""
    names, order = list(axes), random.Random(seed)
    left = {
        ((a, x), (b, y))
        for a, b in itertools.combinations(range(len(names)), 2)
        for x in range(len(axes[names[a]]))
        for y in range(len(axes[names[b]]))
    }

    found = []
    while left:
        tried = [tuple(order.randrange(len(values)) for values in axes.values()) for _ in range(60)]
        best = max(tried, key=lambda case: len(_pairs(case) & left))
        if not _pairs(best) & left:  # the last ones are looked for
            (a, x), (b, y) = min(left)
            case = list(best)
            case[a], case[b] = x, y
            best = tuple(case)
        found.append(best)
        left -= _pairs(best)
    return [tuple(values[k] for values, k in zip(axes.values(), case, strict=True)) for case in found]


def covering(cases: list[tuple]) -> list[tuple]:
    """Few of the cases, in which every pair of values that meets in one of them still meets: greedily, in their order.

    With FUSEDLSTM_WHOLE_GRIDS=1 all of them.
    """
    left, found = {pair for case in cases for pair in _pairs(case)}, []
    while left:
        best = max(cases, key=lambda case: len(_pairs(case) & left))
        found.append(best)
        left -= _pairs(best)
    return cases if WHOLE else found


def _pairs(case: tuple) -> set[tuple]:
    """The values of every two places."""
    return {*itertools.combinations(enumerate(case), 2)}


def grid(axes: dict[str, list], seed: int = 0):
    """Like `pytest.mark.parametrize` of each axis, but with fewer cases. An axis may be a tuple of names.

    A dict of values is named by its keys.
    """
    named = [
        list(values.items()) if isinstance(values, dict) else [(str(v), v) for v in values] for values in axes.values()
    ]
    cases = itertools.product(*named) if WHOLE else pairwise(dict(enumerate(named)), seed)
    flat = [name for key in axes for name in (key if isinstance(key, tuple) else (key,))]
    return pytest.mark.parametrize(flat, [_case(axes, case) for case in cases])


def _case(axes: dict, case: tuple):
    values = []
    for key, (_, value) in zip(axes, case, strict=True):
        values += value if isinstance(key, tuple) else (value,)
    return pytest.param(*values, id="-".join(name for name, _ in case))
