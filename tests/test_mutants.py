"""The mutation check's faults: each is made where it is meant to be, and nothing else changes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.mutants.operators import marked, mutants_of

SOURCE = '''
"""A module's docstring."""

import os

__all__ = ["total"]
LIMIT: int = 3


def total(values: list[float], scale: float = 0.5) -> float:
    """Not touched."""
    if not values:
        raise ValueError(f"got {values}, expected some")
    found = [v for v in values if v <= LIMIT]
    with os.scandir():
        found.sort()
    return sum(found[1:]) * scale
'''
FAULTS = """
7: 3  ->  4
7: 3  ->  2
10: 0.5  ->  1.0
12: if not values:  ->  if not not values:
12: not values  ->  values
13: raise ValueError(f'got {values}, expected some')  ->  pass
14:  for v in values if v <= LIMIT  ->   for v in values
14: v <= LIMIT  ->  v < LIMIT
14: v <= LIMIT  ->  v > LIMIT
15: with os.scandir():  ->  found.sort()
16: found.sort()  ->  pass
16: found.sort()  ->  found
17: return sum(found[1:]) * scale  ->  return None
17: sum(found[1:]) * scale  ->  sum(found[1:]) / scale
17: sum(found[1:]) * scale  ->  sum(found[1:])
17: sum(found[1:])  ->  mean(found[1:])
17: 1:  ->  :
17: 1  ->  2
17: 1  ->  0
"""


def test_the_faults_of_a_small_module(tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text(SOURCE)
    mutants = mutants_of("module.py", tmp_path)
    assert [str(mutant) for mutant in mutants] == [f"module.py:{line}" for line in FAULTS.strip().splitlines()]
    assert {mutant.line for mutant in mutants if mutant.on_import} == {7, 10}
    assert all(mutant.reach == mutant.line for mutant in mutants if not mutant.on_import)
    whole = compile(SOURCE, str(tmp_path / "module.py"), "exec", dont_inherit=True)
    assert all(mutant.code(tmp_path) != whole for mutant in mutants)
    assert replace(mutants[0], choice=None).code(tmp_path) == whole
    names: dict[str, Any] = {}
    exec(mutants[13].code(tmp_path), names)
    assert names["total"]([9.0, 1.0, 2.0]) == 2.0 / 0.5


def test_the_marks_are_the_statements_that_ran(tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text(SOURCE)
    ran: dict[int, bool] = {}
    names: dict[str, Any] = {"ran": ran}
    exec(marked("module.py", tmp_path, "ran"), names)
    assert ran == {}
    assert names["total"]([9.0, 1.0, 2.0]) == 1.0
    assert sorted(ran) == [11, 12, 14, 15, 16, 17]
