"""Does a program that a model wrote pass its tests? It runs in a process of its own, which gives up every right it can.

A test is `assert E`. The calls of the program in E are evaluated beside the program, in a locked-down child
(sandbox_child.py) that sends back plain values. E itself is decided where the program is not: `value == literal`, which
is nearly all of MBPP, in this process; any other E in a second child, which never sees the program. A builtin around a
call of the program (`len(f(1))`, `math.isclose(f(1), 2)`) belongs to E. So no builtin that the program patched or took
the name of, no lying `__eq__`, exit code or printed text can decide; what is left of that stands below.

Covered, on Linux with all layers in force (`describe` names them; tests/test_sandbox.py holds an attack on each):
- True only if every test of the row ran to its end. Exits, dead interpreters and closed descriptors never pass.
- Limits: CPU time (10 s), memory (1 GiB), open files, output. No new process, hence no survivor. No file written, none
  read but the Python and shared libraries. An empty environment and folder, no input, no network, no signal to another
  process and no view of one.
- The verdict does not depend on the load: CPU time decides. The wall clock only ends a program that sleeps: the time for
  which it was ready and waited for a core (/proc/PID/task/*/schedstat; not known on macOS) does not count.

Not covered:
- A test that is no assert, or one over a name or a loop of its own, runs beside the program. A secret that no name leads
  to proves that it ended; but a program that reads the interpreter's memory (in pure Python: by ctypes' types, which stay
  reachable, or by crafted bytecode) can find the secret, and a lying `__eq__` or a patched builtin passes without it.
  MBPP has no such test. In all others the secret is worth nothing without the values that it must come with.
- Of E, these run beside the program too, so that it can patch them: a method of what it returned (`f(1).isdigit()`),
  builtins among the arguments of its call (`f(range(3))`), beside a lambda or a comprehension, or handed a name of the
  program (`map(f, x)`, `isinstance(f(1), Point)`).
- A builtin around a call sees what plain data the call returned, so `len(f(1))` of a deque fails (an iterator's items
  cross for ITERATING). A set in a set or in a key crosses as no plain data. A test with builtin names alone
  (`sum(10, 15) == 6`) means the program's function of that name; beside other functions of the program, the builtin.
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
WALL_SECONDS = 10.0  # the guard against a program that sleeps: this, five times the CPU limit, and the wait for a core
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


VALUE = "_value_"
NOT_PLAIN = ...  # what an object of the program's own crosses as: it is equal to nothing
CLEAN = {*dir(builtins), "math", "cmath", "sys"}  # names that mean the same without the program
ITERATING = {"list", "tuple", "set", "frozenset", "sorted", "sum", "min", "max", "any", "all"}  # iterators do not cross
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
                equality = split_equality(statement)
                claim = None if equality and equality[2] else split_claim(statement, len(calls))
                if equality and not claim:
                    equalities.append((len(calls), equality[1]))
                    calls.append(("eval", equality[0]))
                elif claim:
                    calls.extend(("eval", call) for call in claim[0])
                    claims.append(("eval", claim[1]))
                else:
                    calls.append(("exec", ast.unparse(statement)))
        except UNREADABLE:
            calls.append(("exec", test))  # to fail there
    return calls, equalities, claims


def split_equality(statement: ast.stmt) -> tuple[str, object, bool] | None:
    """`assert CALL == LITERAL` as (call, literal, is the call free of builtins around calls of the program?)."""
    match statement:
        case ast.Assert(test=ast.Compare(left=call, ops=[ast.Eq()], comparators=[literal])):
            if any(isinstance(node, (ast.Compare, ast.BoolOp, ast.Not)) for node in ast.walk(call)):
                return None  # a truth value is easy to forge: let split_claim look further down
            with contextlib.suppress(*UNREADABLE):
                expected = ast.literal_eval(literal)
                rest = _LiftCalls(0, call).visit(copy.deepcopy(call))
                pure = not any(isinstance(node, ast.Call) for node in ast.walk(rest))
                return None if expected is NOT_PLAIN else (ast.unparse(call), expected, pure)
    return None


def split_claim(statement: ast.stmt, start: int) -> tuple[list[str], str] | None:
    """`assert E` as (calls of the program in E, E over their values), if that leaves nothing of the program in E."""
    if not isinstance(statement, ast.Assert):
        return None
    lift = _LiftCalls(start, statement.test)
    claim = lift.visit(copy.deepcopy(statement.test))
    if foreign(claim) or any(isinstance(node, SCOPES) for node in ast.walk(claim)):
        return None
    return lift.calls, f"bool({ast.unparse(claim)})"


def foreign(node: ast.AST) -> bool:
    """Does an expression use a name that may be the program's?"""
    names = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
    return any(name not in CLEAN and not name.startswith(VALUE) for name in names)


class _LiftCalls(ast.NodeTransformer):
    """Puts a name in the place of each call of the program in a test, and keeps the calls."""

    def __init__(self, start: int, test: ast.expr):
        self.start, self.calls, self.all_clean = start, [], not foreign(test)

    def visit_Call(self, node: ast.Call) -> ast.expr:
        if self.of_program(node):
            return self.lift(node)
        match node:
            case ast.Call(ast.Name(name), [ast.Call() as items]) if name in ITERATING:
                if self.of_program(items) or any(isinstance(x, ast.Name) and foreign(x) for x in items.args):  # map(f, x)
                    node.args = [self.lift(ast.List([ast.Starred(items)]))]
        return self.generic_visit(node)

    def of_program(self, node: ast.Call) -> bool:
        """Where a test has no name of the program, its innermost builtins are: MBPP 126 asks for a function `sum`."""
        inner = any(isinstance(part, ast.Call) for part in ast.walk(node) if part is not node)
        return foreign(node.func) or self.all_clean and isinstance(node.func, ast.Name) and not inner

    def lift(self, node: ast.expr) -> ast.Name:
        self.calls.append(ast.unparse(node))
        return ast.Name(f"{VALUE}{self.start + len(self.calls) - 1}", ast.Load())


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
                reply = read(child, WALL_SECONDS + 5 * cpu_seconds)
            finally:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(child.pid, signal.SIGKILL)  # before it is waited for: its number is still its own
    if not reply.startswith(secret):
        return None
    return [plain(line) for line in reply.removeprefix(secret).split(b"\n")]


def plain(line: bytes) -> object:
    """The value of a literal; NOT_PLAIN where the text is none, as of a set in a set."""
    with contextlib.suppress(*UNREADABLE):
        return ast.literal_eval(line.decode("ascii"))
    return NOT_PLAIN


def read(child: subprocess.Popen, seconds: float) -> bytes:
    """Everything that a child writes up to its end; nothing if that is too much or comes too late."""
    poll, reply, deadline = select.poll(), b"", time.monotonic() + seconds
    poll.register(child.stdout, select.POLLIN)
    while len(reply) <= MAX_REPLY:
        left = deadline - time.monotonic()
        if left <= 0 and (left := left + starved(child.pid)) <= 0:
            return b""
        if poll.poll(left * 1000):
            chunk = os.read(child.stdout.fileno(), 1 << 16)
            if not chunk:
                return reply
            reply += chunk
    return b""


def starved(pid: int) -> float:
    """The seconds for which the threads of a process were ready to run and had no core; 0 where that is not known."""
    tasks = Path(f"/proc/{pid}/task").glob("*/schedstat")  # CPU time, waiting time (both in ns), turns
    total = 0
    for task in tasks:
        with contextlib.suppress(OSError, ValueError, IndexError):  # a thread that just ended
            total += int(task.read_text().split()[1])
    return total / 1e9


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
