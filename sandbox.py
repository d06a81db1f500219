"""Does a program that a model wrote pass its tests? It runs in a process of its own, which gives up every right it can.

A test is `assert E`. The calls of the program in E are evaluated beside the program, in a locked-down child
(sandbox_child.py) that sends back plain values. E itself is decided where the program is not: `value == literal`, which
is nearly all of MBPP, in this process; any other E in a second child, which never sees the program. So no patched
builtin, lying `__eq__`, exit code or printed text can decide.

Covered, on Linux with all layers in force (`describe` names them; tests/test_sandbox.py holds an attack on each):
- True only if every test of the row ran to its end. Exits, dead interpreters and closed descriptors never pass.
- Limits: CPU time (10 s), memory (1 GiB), open files, output. No new process, hence no survivor. No file written, none
  read but the Python and shared libraries. An empty environment and folder, no input, no network, no signal to another
  process and no view of one.
- The verdict does not depend on the load: CPU time decides, and the wall clock only ends a program that sleeps.

Not covered:
- A test that is no assert, or one over a name or a loop of its own, runs beside the program. A secret that the program
  cannot reach proves that it ended; but there a lying `__eq__` or a patched builtin still passes, and native code that
  reads the interpreter's memory could find the secret. MBPP has no such test.
- A program that returns the literal it saw in its prompt: no sandbox can tell it from a solution.
- Bugs of the kernel and the interpreter, timing, whether a file exists. Where a layer is missing, what it would cover.
- macOS has neither Landlock nor seccomp: files and the network are open to the program, memory is not limited; CPU
  time, open files and how verdicts are made are as above.

Programs that need a file, a socket (asyncio), a child process, standard input, numpy, ctypes or a tracer fail here.
"""

import ast
import builtins
import contextlib
import copy
import functools
import marshal
import math
import os
import secrets
import select
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

CPU_SECONDS = 10.0  # MBPP task 123 needs 3.7
WALL_SECONDS = 10.0  # the guard against a program that sleeps: this and five times the CPU limit
MEMORY = 1 << 30
MAX_REPLY = 1 << 18
CHILD = [sys.executable, "-s", "-S", "-P", "-B", "-X", "utf8", str(Path(__file__).with_name("sandbox_child.py"))]
LAYERS = ("rlimits", "no_new_privs", "capabilities dropped", "Landlock", "seccomp")  # of sandbox_child.py
ENVIRONMENT = {"PYTHONHASHSEED": "0"}  # the order of a set is the same in every run


def passes(program: str, tests: Sequence[str], setup: str = "", cpu_seconds: float = CPU_SECONDS) -> bool:
    """Does every test hold after the program and then `setup` have run? False where there is nothing to test."""
    calls, equalities, claims = take_apart(tests)
    if not calls and not claims:
        return False
    values = evaluate([("exec", program), ("exec", setup), *calls], {}, cpu_seconds)
    if values is None or not all(values[2 + i] == expected for i, expected in equalities):
        return False
    names = {f"{VALUE}{i}": value for i, value in enumerate(values[2:])}
    objects = "".join(f"\n{name} = object()" for name, value in names.items() if value is NOT_PLAIN)
    held = evaluate([("exec", "import cmath, math, sys" + objects), *claims], names, cpu_seconds) if claims else []
    return held is not None and all(held[1:])


# ------------------------------------------------------------------------------------------------ taking tests apart

VALUE = "_value_"
NOT_PLAIN = ...  # what an object of the program's own crosses as: it is equal to nothing
CLEAN = {*dir(builtins), "math", "cmath", "sys"}  # names that mean the same without the program
COLLECTING = {"list", "tuple", "set", "frozenset", "sorted", "dict"}  # beside the program: iterators do not cross
SCOPES = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.Lambda, ast.NamedExpr)
UNREADABLE = (SyntaxError, ValueError, TypeError, RecursionError, MemoryError)  # raised by parsing text from outside


def take_apart(tests: Sequence[str]) -> tuple[list, list, list]:
    """(calls, equalities, claims): what to evaluate beside the program, and what must hold of the values.

    calls: (mode, source). equalities: (index of a call, the literal it must equal). claims: (mode, expression over
    _value_0, _value_1, ...).
    """
    calls, equalities, claims = [], [], []
    for test in tests:
        try:
            for statement in ast.parse(test).body:
                if equality := split_equality(statement):
                    equalities.append((len(calls), equality[1]))
                    calls.append(("eval", equality[0]))
                elif claim := split_claim(statement, len(calls)):
                    calls.extend(("eval", call) for call in claim[0])
                    claims.append(("eval", claim[1]))
                else:
                    calls.append(("exec", ast.unparse(statement)))
        except UNREADABLE:
            calls.append(("exec", test))  # to fail there
    return calls, equalities, claims


def split_equality(statement: ast.stmt) -> tuple[str, object] | None:
    """`assert CALL == LITERAL` as (call, literal)."""
    match statement:
        case ast.Assert(test=ast.Compare(left=call, ops=[ast.Eq()], comparators=[literal])):
            if any(isinstance(node, (ast.Compare, ast.BoolOp, ast.Not)) for node in ast.walk(call)):
                return None  # a truth value is easy to forge: let split_claim look further down
            with contextlib.suppress(*UNREADABLE):
                expected = ast.literal_eval(literal)
                return None if expected is NOT_PLAIN else (ast.unparse(call), expected)
    return None


def split_claim(statement: ast.stmt, start: int) -> tuple[list[str], str] | None:
    """`assert E` as (calls of the program in E, E over their values), if that leaves nothing of the program in E."""
    if not isinstance(statement, ast.Assert):
        return None
    lift = _LiftCalls(start)
    claim = lift.visit(copy.deepcopy(statement.test))
    if foreign(claim) or any(isinstance(node, SCOPES) for node in ast.walk(claim)):
        return None
    return lift.calls, f"bool({ast.unparse(claim)})"


def foreign(node: ast.AST) -> bool:
    """Does an expression use a name that may be the program's?"""
    names = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
    return any(name not in CLEAN and not name.startswith(VALUE) for name in names)


class _LiftCalls(ast.NodeTransformer):
    """Puts a name in the place of each call of the program, and keeps the calls."""

    def __init__(self, start: int):
        self.start, self.calls = start, []

    def visit_Call(self, node: ast.Call) -> ast.expr:
        collects = isinstance(node.func, ast.Name) and node.func.id in COLLECTING
        if not foreign(node if collects else node.func):
            return self.generic_visit(node)
        self.calls.append(ast.unparse(node))
        return ast.Name(f"{VALUE}{self.start + len(self.calls) - 1}", ast.Load())


# ------------------------------------------------------------------------------------------------ one child


def evaluate(sources: list[tuple[str, str]], names: dict, cpu_seconds: float) -> list | None:
    """The values of Python sources ("exec" gives None) run in turn in one sandboxed child; None if one failed."""
    reply = converse(sources, names, cpu_seconds)
    return None if reply is None or len(reply) != len(sources) + 1 else reply[1:]


def converse(sources: list[tuple[str, str]], names: dict, cpu_seconds: float) -> list | None:
    """Run a child: [the layers it lacks, value, value, ...], or None where it did not come to its end."""
    secret = secrets.token_hex(16).encode()
    job = marshal.dumps((secret, sources, names, math.ceil(cpu_seconds), MEMORY, os.getpid()))
    with tempfile.TemporaryDirectory(prefix="s3ft-", ignore_cleanup_errors=True) as folder:
        child = subprocess.Popen(CHILD, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                                 bufsize=0, cwd=folder, env=ENVIRONMENT, start_new_session=True)
        with child:
            try:
                with contextlib.suppress(BrokenPipeError):
                    child.stdin.write(job)
                    child.stdin.close()
                reply = read(child.stdout.fileno(), time.monotonic() + WALL_SECONDS + 5 * cpu_seconds)
            finally:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(child.pid, signal.SIGKILL)  # before it is waited for: its number is still its own
    if not reply.startswith(secret):
        return None
    with contextlib.suppress(*UNREADABLE):
        return [ast.literal_eval(line) for line in reply.removeprefix(secret).decode("ascii").split("\n")]
    return None


def read(descriptor: int, deadline: float) -> bytes:
    """Everything up to the end of a pipe; nothing if that is too much or comes too late."""
    poll, reply = select.poll(), b""
    poll.register(descriptor, select.POLLIN)
    while len(reply) <= MAX_REPLY and poll.poll(max(0, deadline - time.monotonic()) * 1000):
        chunk = os.read(descriptor, 1 << 16)
        if not chunk:
            return reply
        reply += chunk
    return b""


# ------------------------------------------------------------------------------------------------ what is in force


@functools.cache
def layers() -> tuple[list[str], list[str]]:
    """(in force, missing): the layers of isolation that this system gives a child, found by starting one."""
    reply = converse([], {}, CPU_SECONDS)
    if reply is None:
        raise RuntimeError(f"the code judge cannot start its child: try {shlex.join(CHILD)} </dev/null")
    missing = reply[0]
    return [name for name in LAYERS if name not in missing], [name for name in LAYERS if name in missing]


def describe() -> str:
    """One line for the start of a run that judges code."""
    in_force, missing = layers()
    return f"code sandbox: {', '.join(in_force) or 'nothing'} in force; missing: {', '.join(missing) or 'nothing'}"


def require_all() -> None:
    """RuntimeError where a layer is missing, for a run that must not go below full isolation."""
    missing = layers()[1]
    if missing:
        raise RuntimeError(f"code sandbox: this system does not give {', '.join(missing)}, which strict mode asks for")
