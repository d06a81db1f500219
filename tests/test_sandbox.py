"""What the code judge says of honest programs, and which layers it says are in force."""

import ctypes
import os
import struct
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from support import sandbox

ROOT = Path(__file__).parent.parent
EQUALITY, CLAIM = "assert f(1) == 2", "assert f(1) in (2, 3)"
LOOP = "for i in range(3):\n    assert f(i) == i + 1\n    assert f(i) > i"  # runs beside the program
HONEST, WRONG = "def f(x): return x + 1", "def f(x): return x - 1"
LAYER_MISSING = sys.platform != "linux" or bool(sandbox.layers()[1])
isolated = pytest.mark.skipif(LAYER_MISSING, reason="a layer is missing here")


def passes(program, *tests, **kwargs):
    return sandbox.passes(textwrap.dedent(program), tests, **kwargs)


# ------------------------------------------------------------------------------------------------ verdicts


@pytest.mark.parametrize("test", [EQUALITY, CLAIM, LOOP])
def test_verdict_of_honest_programs(test):
    assert passes(HONEST, test)
    assert not passes(WRONG, test)


@pytest.mark.parametrize("test, expected", [
    ("assert f(1) == 2, 'message'", True),
    ("assert f(1) == 2.0", True),
    ("assert f(1) == 3", False),
    ("assert f(1) != 3", True),
    ("assert not f(-1)", True),
    ("assert f(1) > 2", False),
    ("assert abs(f(1.5) - 2.4999) < 1e-3", True),
    ("assert math.isclose(f(1.5), 2.6)", False),
    ("assert f(1) == 2 and f(2) == 4", False),
    ("assert isinstance(f(1), int) and f(1) is not None", True),
    ("assert all(f(i) == i + 1 for i in range(9))", True),
    ("assert all(f(i) == i for i in range(9))", False),
    ("x = f(1)\nassert x == 2\nassert x != 2", False),
    ("assert list(map(f, [1, 2])) == [2, 3]", True),
    ("assert set(map(f, [1, 2])) != {2, 3}", False),
    ("assert (f(1) == 3) == False", True),
    ("def check(g):\n    assert g(1) == 2\ncheck(f)", True),
    ("def check(g):\n    assert g(1) == 3\ncheck(f)", False),
    ("raise ValueError", False),
    ("assert f(", False),
    ("assert f(1) == 2\0", False),
    ("assert " + "(" * 5000 + "1" + ")" * 5000, False),
    ("# nothing", False),
])
def test_tests_of_every_shape(test, expected):
    assert passes(HONEST, test) is expected


def test_no_test_is_no_pass():
    assert not sandbox.passes(HONEST, [])
    assert not passes("raise ValueError", "assert True")


def test_setup_runs_after_the_program():
    assert passes("class Node:\n    value = 1", "assert root.value == 1", setup="root = Node()")
    assert not passes("x = root", EQUALITY, setup="root = 1")


@pytest.mark.parametrize("program, test", [
    ("from fractions import Fraction\ndef f(): return Fraction(1, 2)", "assert f() == 0.5"),
    ("from fractions import Fraction\ndef f(): return [Fraction(4, 2)]", "assert f() == [2]"),
    ("from decimal import Decimal\ndef f(): return Decimal('2.50')", "assert f() == 2.5"),
    ("def f(): return bytearray(b'ab')", "assert f() == b'ab'"),
    ("def f(): return {1: 2, 3: 4}.keys()", "assert f() == {1, 3}"),
    ("def f(): return {1: 2}.items()", "assert f() == {(1, 2)}"),
    ("from collections import Counter\ndef f(): return Counter('aab')", "assert f() == {'a': 2, 'b': 1}"),
    ("from collections import namedtuple\nP = namedtuple('P', 'x y')\ndef f(): return P(1, 2)",
        "assert f() == (1, 2)"),
    ("from enum import IntEnum\nclass E(IntEnum):\n    A = 1\ndef f(): return E.A", "assert f() == 1"),
    ("def f(): return float('inf'), -1e400, 1 + 2j", "assert f() == (1e999, -1e999, 1 + 2j)"),
    ("def f(): return 10 ** 5000", "assert f() == 10 ** 5000"),
    ("def f(): return 'é\\n\\ud800'", "assert f() == 'é\\n\\ud800'"),
    ("def f(): return set(), (), {}, (1,), None, True", "assert f() == (set(), (), {}, (1,), None, True)"),
    ("from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass P:\n    x: int\n"
     "def f(): return P(3).x", "assert f() == 3"),
    ("if __name__ == '__main__':\n    raise SystemExit(input())\ndef f(): return 1", "assert f() == 1"),
    ("def f():\r\n\tx = 1\r\n\treturn x\r\n", "assert f() == 1"),
    ("import threading\ndef f():\n    r = []\n    t = threading.Thread(target=r.append, args=(1,))\n    t.start()\n"
     "    t.join()\n    return r", "assert f() == [1]"),
    ("import decimal, heapq, re, itertools, random, datetime, sqlite3, hashlib\ndef f(): return 1",
        "assert f() == 1"),
    ("# " + "x" * (1 << 20) + "\ndef f(): return 1", "assert f() == 1"),
])
def test_what_honest_programs_may_do(program, test):
    assert passes(program, test)


@pytest.mark.parametrize("program, test", [
    ("def f(): return float('nan')", "assert f() == float('nan')"),
    ("def f(): return {1: 2}.values()", "assert f() == [2]"),
    ("def f(): return range(2)", "assert f() == [0, 1]"),
    ("from decimal import Decimal\ndef f(): return Decimal('0.1')", "assert f() == 0.1"),
    ("from fractions import Fraction\ndef f(): return Fraction(1, 3)", f"assert f() == {1 / 3}"),
    ("def f(): return '1'", "assert f() == 1"),
    ("def f(): return object()", "assert f() == ..."),
    ("def f(): return object()\ndef g(): return object()", "assert f() == g()"),
    ("def f(): return object()\ndef g(): return object()", "assert f() is g()"),
    ("class L:\n    __class__ = bool\n    __repr__ = lambda s: '2'\ndef f(): return L()", "assert f() == 2"),
    ("class S(set): __iter__ = lambda s: iter([2])\ndef f(): return S({1})", "assert f() == {2}"),
    ("class S(frozenset): __bool__ = lambda s: False\ndef f(): return S({2})", "assert f() == set()"),
])
def test_what_python_does_not_call_equal_is_not_equal(program, test):
    assert not passes(program, test)


@pytest.mark.parametrize("value", ["{frozenset({1, 2})}", "{frozenset({1, 2}): 3}", "[{(1, frozenset({2}))}]",
                                   "{1: [2]}.items()"])
def test_what_cannot_cross_harms_no_other_value(value):
    program = f"def f(): return {value}\ndef g(): return 1"
    assert passes(program, "assert g() == 1", "assert f() != 3", "assert f() is not None")
    assert not passes(program, "assert f() == 3") and not passes(program, "assert f() is None")


# ------------------------------------------------------------------------------------------ what is in force


def without_system_calls(first: int, last: int) -> None:
    """A kernel without some system calls, for this process and its children."""
    code = [(0x20, 0, 0, 0), (0x35, 0, 2, first), (0x25, 1, 0, last), (6, 0, 0, 0x50026),
    (6, 0, 0, 0x7FFF0000)]
    program = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in code))
    libc = ctypes.CDLL(None)
    assert libc.prctl(38, 1, 0, 0, 0) == 0
    assert libc.prctl(22, 2, struct.pack("@HP", len(code), ctypes.addressof(program)), 0, 0) == 0


@isolated
def test_all_layers_are_named():
    in_force, missing = sandbox.layers()
    line = sandbox.describe()
    assert missing == [] and all(name in line for name in in_force) and "\n" not in line
    sandbox.require_all()


@isolated
def test_a_missing_layer_is_named_and_strict_mode_refuses():
    code = "from test_sandbox import *\nwithout_system_calls(444, 446)\nsandbox.layers.cache_clear()\n" \
           "print(sandbox.describe())\nprint(passes(HONEST, LOOP), passes(WRONG, EQUALITY))\nsandbox.require_all()"
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert "missing: Landlock" in result.stdout and "True False" in result.stdout
    assert "RuntimeError" in result.stderr and "Landlock" in result.stderr
