"""Calls drawn at random: right ones beside equations that share no code with the package, and wrong ones.

| file | what it has |
|---|---|
| `equations.py` | the family in plain torch, for any dtype |
| `cases.py` | a right call as a value, its strategy, and its check |
| `bad.py` | a wrong call as a value, and what must come of it |
| `found.py` | what was found once, as cases |
| `__main__.py` | hours of both: `make fuzz MINUTES=60` |
"""
