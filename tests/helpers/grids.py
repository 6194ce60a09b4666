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
        (a, x, b, y)
        for a, b in itertools.combinations(range(len(names)), 2)
        for x in range(len(axes[names[a]]))
        for y in range(len(axes[names[b]]))
    }

    def pairs(case):
        return {(a, case[a], b, case[b]) for a, b in itertools.combinations(range(len(names)), 2)}

    found = []
    while left:
        tried = [tuple(order.randrange(len(values)) for values in axes.values()) for _ in range(60)]
        best = max(tried, key=lambda case: len(pairs(case) & left))
        if not pairs(best) & left:  # the last ones are looked for
            a, x, b, y = min(left)
            case = list(best)
            case[a], case[b] = x, y
            best = tuple(case)
        found.append(best)
        left -= pairs(best)
    return [tuple(values[k] for values, k in zip(axes.values(), case, strict=True)) for case in found]


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
