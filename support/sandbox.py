"""Does a program that a model wrote pass its tests? It runs in a process that gives up every right it can.

A test is `assert E`. We take E apart. Its calls of the program run beside the program, in a locked-down child
(sandbox_child.py) that can send back plain values only. Its comparison runs where the program never was: in
this process for `call == literal`, which is nearly all of MBPP, and in a second child for the rest. That
child never sees the program. A builtin around a call of the program (`len(f(1))`, `math.isclose(f(1), 2)`)
belongs to the comparison. So a program gains nothing by patching a builtin, taking its name, lying in
`__eq__`, exiting with 0 or printing "passed". What remains of that is listed under "not covered".

Covered on Linux, with all layers in force. `describe` names the layers, and tests/test_sandbox*.py
hold an attack on each.
- Verdict: True only if every test of the row ran to its end. Exits, dead interpreters and closed descriptors
  never pass.
- CPU time (10 s), memory (1 GiB), open files (32) and output (256 KiB) are limited.
- Processes: the program can start none. So none survives it.
- Files: the program can write none. It can read only the Python and shared libraries.
- Surroundings: its environment and working folder are empty. It has no input and no network. It can send no
  signal to another process, and can see none.
- Load: a busy machine changes no verdict. CPU time decides.
- Sleep: a program is ended when it has slept for 10 s in all. The time in which it computed, or was ready and
  waited for a core, does not count (/proc/PID/stat and /proc/PID/task/*/schedstat).

Not covered:
- Tests beside the program. A test that is no assert, or one over a name or a loop of its own, runs beside the
  program. The child proves that such a test ended by sending a secret to which no name leads. A program that
  reads the interpreter's memory can find that secret. Pure Python can read it by the types of ctypes, which
  stay reachable, and by crafted bytecode. A lying `__eq__` or a patched builtin passes such a test without
  the secret. MBPP has no such test. In all other tests the secret is worth nothing without the values that it
  must come with.
- Parts of E beside the program. The program can patch these: a method of what it returned (`f(1).isdigit()`),
  and builtins that stand among the arguments of its call (`f(range(3))`), beside a lambda or a comprehension,
  or that are handed a name of the program (`map(f, x)`, `isinstance(f(1), Point)`).
- Values that are no plain data. A builtin around a call sees the plain data that the call returned. So
  `len(f(1))` of a deque fails. An iterator's items do cross. A set in a set, or in a key, crosses as no plain
  data.
- Names of builtins. A test with builtin names alone (`sum(10, 15) == 6`) means the program's function of that
  name. Beside other functions of the program the name means the builtin.
- Memorised answers. A program may return the literal that it saw in its prompt. No sandbox can tell it from a
  solution.
- Bugs of the kernel and of the interpreter, measuring of time, and whether a file exists.
- A missing layer: what it would cover is not covered.
- macOS has neither Landlock nor seccomp. There, files and the network are open to the program, and memory is
  not limited. It does not tell how long a program waited for a core: one is ended after 10 s and five times
  its CPU limit, by the clock. CPU time, open files and how verdicts are made are as above.

A program that needs a file, a socket (asyncio too), a child process, standard input, ctypes or a tracer
fails. One that needs numpy fails too, except after `allow_numpy`. Then the child imports numpy before it
locks itself down, and its program can read numpy's files as well. numpy gives a program one more way to read
and write the interpreter's memory. All else that is covered stays covered.
"""

import ast
import builtins
import contextlib
import copy
import functools
import importlib.util
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

from support.cli import InputError

CPU_SECONDS = 10.0  # MBPP task 123 needs 3.7
SLEEP_SECONDS = 10.0  # neither computing nor waiting for a core
MEMORY = 1 << 30
MAX_REPLY = 1 << 18
CHILD_FILE = Path(__file__).with_name("sandbox_child.py")
CHILD = [sys.executable, "-s", "-S", "-P", "-B", "-X", "utf8", str(CHILD_FILE)]
LAYERS = ("rlimits", "no_new_privs", "capabilities dropped", "Landlock", "seccomp")  # of sandbox_child.py
ENVIRONMENT = {"PYTHONHASHSEED": "0"}  # the order of a set is the same in every run
ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
numpy_parent = ""  # the folder that holds numpy, where programs may use it; see allow_numpy


def passes(program: str, tests: Sequence[str], setup: str = "", cpu_seconds: float = CPU_SECONDS) -> bool:
    """Does every test hold after the program and then `setup` have run? False where there is no test.

    `cpu_seconds` is the limit of each of the two children.
    """
    calls, equalities, claims = take_apart(tests)
    if not calls and not claims:
        return False

    # 1. Beside the program: the values of its calls.
    values = evaluate([("exec", program), ("exec", setup), *calls], {}, cpu_seconds)
    if values is None:
        return False
    values = values[2:]

    # 2. In this process: `call == literal`.
    for i, expected in equalities:
        if values[i] != expected:
            return False
    if not claims:
        return True

    # 3. In a second child, without the program: every other claim about the values.
    names = {f"{VALUE}{i}": value for i, value in enumerate(values)}
    preparation = "import cmath, math, sys"
    for name, value in names.items():
        if value is NOT_PLAIN:
            preparation += f"\n{name} = object()"
    held = evaluate([("exec", preparation), *claims], names, cpu_seconds)
    return held is not None and all(held[1:])


VALUE = "_value_"
NOT_PLAIN = ...  # what an object of the program's own crosses as: it is equal to nothing
CLEAN = {*dir(builtins), "math", "cmath", "sys"}  # names that mean the same without the program
# Builtins that take all items of an iterator, which does not cross itself.
ITERATING = {"list", "tuple", "set", "frozenset", "sorted", "sum", "min", "max", "any", "all"}
SCOPES = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.Lambda, ast.NamedExpr)
# What parsing of text from outside raises.
UNREADABLE = (SyntaxError, ValueError, TypeError, RecursionError, MemoryError)


def take_apart(tests: Sequence[str]) -> tuple[list, list, list]:
    """(calls, equalities, claims): what to evaluate beside the program, and what must hold of the values.

    calls: (mode, source). equalities: (index of a call, the literal it must equal).
    claims: (mode, expression over _value_0, _value_1, ...).
    """
    calls, equalities, claims = [], [], []

    def add(statement: ast.stmt) -> None:
        equality = split_equality(statement)
        pure = equality is not None and equality[2]
        claim = None if pure else split_claim(statement, len(calls))
        if claim:
            lifted, expression = claim
            calls.extend([("eval", call) for call in lifted])
            claims.append(("eval", expression))
        elif equality:
            call, literal, _ = equality
            equalities.append((len(calls), literal))
            calls.append(("eval", call))
        else:
            calls.append(("exec", ast.unparse(statement)))

    for test in tests:
        try:
            for statement in ast.parse(test).body:
                add(statement)
        except UNREADABLE:
            calls.append(("exec", test))  # to fail there
    return calls, equalities, claims


def split_equality(statement: ast.stmt) -> tuple[str, object, bool] | None:
    """`assert CALL == LITERAL` as (call, literal, pure). Not pure: a builtin is around a program's call."""
    match statement:
        case ast.Assert(test=ast.Compare(left=call, ops=[ast.Eq()], comparators=[literal])):
            pass
        case _:
            return None
    if contains(call, (ast.Compare, ast.BoolOp, ast.Not)):
        return None  # a truth value is easy to forge: let split_claim look further down
    try:
        expected = ast.literal_eval(literal)
        without_program = _LiftCalls(0, call).visit(copy.deepcopy(call))
        source = ast.unparse(call)
    except UNREADABLE:
        return None
    if expected is NOT_PLAIN:
        return None
    return source, expected, not contains(without_program, ast.Call)


def split_claim(statement: ast.stmt, start: int) -> tuple[list[str], str] | None:
    """`assert E` as (calls of the program in E, E over their values). None: E holds more of the program."""
    if not isinstance(statement, ast.Assert):
        return None
    lift = _LiftCalls(start, statement.test)
    claim = lift.visit(copy.deepcopy(statement.test))
    if foreign(claim) or contains(claim, SCOPES):
        return None
    return lift.calls, f"bool({ast.unparse(claim)})"


def contains(node: ast.AST, kinds: type | tuple[type, ...]) -> bool:
    """Is the node, or a part of it, of one of these kinds?"""
    return any(isinstance(part, kinds) for part in ast.walk(node))


def foreign(node: ast.AST) -> bool:
    """Does an expression use a name that may be the program's?"""
    for part in ast.walk(node):
        if isinstance(part, ast.Name) and part.id not in CLEAN and not part.id.startswith(VALUE):
            return True
    return False


class _LiftCalls(ast.NodeTransformer):
    """Puts a name in the place of each call of the program in a test, and keeps the calls."""

    def __init__(self, start: int, test: ast.expr):
        self.start = start  # of the numbers in the names
        self.calls: list[str] = []
        self.all_clean = not foreign(test)

    def visit_Call(self, node: ast.Call) -> ast.expr:
        if self.of_program(node):
            return self.lift(node)
        match node:
            case ast.Call(ast.Name(name), [ast.Call() as items]) if name in ITERATING:
                handed = [argument for argument in items.args if isinstance(argument, ast.Name)]
                if self.of_program(items) or any(map(foreign, handed)):  # list(f(1)), list(map(f, x))
                    node.args = [self.lift(ast.List([ast.Starred(items)]))]
        return self.generic_visit(node)

    def of_program(self, node: ast.Call) -> bool:
        """Is it a call of the program? In a test without a name of the program, the innermost builtins are.

        MBPP 126 asks for a function `sum`.
        """
        if foreign(node.func):
            return True
        innermost = not any(contains(part, ast.Call) for part in ast.iter_child_nodes(node))
        return self.all_clean and isinstance(node.func, ast.Name) and innermost

    def lift(self, node: ast.expr) -> ast.Name:
        self.calls.append(ast.unparse(node))
        return ast.Name(f"{VALUE}{self.start + len(self.calls) - 1}", ast.Load())


def allow_numpy() -> None:
    """Let the programs of this process import numpy, with one thread. RuntimeError where it is not installed.

    Of the folder where it is installed they can read numpy's own parts only, and write nothing.
    """
    global numpy_parent
    found = importlib.util.find_spec("numpy")
    if found is None:
        raise RuntimeError("code sandbox: numpy is not installed here, so programs cannot use it")
    numpy_parent = str(Path(found.origin).parent.parent)


def evaluate(sources: list[tuple[str, str]], names: dict, cpu_seconds: float) -> list | None:
    """The values of Python sources, run in turn in one sandboxed child. "exec" has the value None.

    `sources` are (mode, source), `names` what they find defined. The result is None if one of them failed.
    """
    reply = converse(sources, names, cpu_seconds)
    if reply is None or len(reply) != len(sources) + 1:
        return None
    return reply[1:]


def converse(sources: list[tuple[str, str]], names: dict, cpu_seconds: float) -> list | None:
    """Run a child: [the layers it lacks, value, value, ...], or None where it did not come to its end."""
    secret = secrets.token_hex(16).encode()
    wants_numpy = any("numpy" in source for _, source in sources)  # to import it takes 0.1 s
    numpy = numpy_parent if wants_numpy else ""
    environment = ENVIRONMENT | ONE_THREAD if numpy else ENVIRONMENT
    job = marshal.dumps((secret, sources, names, math.ceil(cpu_seconds), MEMORY, os.getpid(), numpy))
    with tempfile.TemporaryDirectory(prefix="s3ft-", ignore_cleanup_errors=True) as folder:
        child = subprocess.Popen(
            CHILD,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            cwd=folder,
            env=environment,
            start_new_session=True,
        )
        with child:
            try:
                with contextlib.suppress(BrokenPipeError):
                    child.stdin.write(job)
                    child.stdin.close()
                reply = read(child, cpu_seconds)
            finally:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    # Before it is waited for, its number is still its own.
                    os.killpg(child.pid, signal.SIGKILL)
    if not reply.startswith(secret):
        return None
    return [plain(line) for line in reply.removeprefix(secret).split(b"\n")]


def plain(line: bytes) -> object:
    """The value of a literal, or NOT_PLAIN where the text is none, as of a set in a set."""
    with contextlib.suppress(*UNREADABLE):
        return ast.literal_eval(line.decode("ascii"))
    return NOT_PLAIN


def read(child: subprocess.Popen, cpu_seconds: float) -> bytes:
    """Everything that a child writes up to its end. Nothing, if it is too much or the child slept long."""
    start = time.monotonic()
    check_at = start + SLEEP_SECONDS
    poll = select.poll()
    poll.register(child.stdout, select.POLLIN)
    reply = b""
    while len(reply) <= MAX_REPLY:
        left = check_at - time.monotonic()
        if left <= 0:  # it may have slept all the time, or some of it
            asleep = time.monotonic() - start - busy_seconds(child.pid, cpu_seconds)
            left = SLEEP_SECONDS - asleep
            if left <= 0:
                return b""
            check_at = time.monotonic() + left
        if poll.poll(left * 1000):
            chunk = os.read(child.stdout.fileno(), 1 << 16)
            if not chunk:
                return reply
            reply += chunk
    return b""


def busy_seconds(pid: int, cpu_seconds: float) -> float:
    """Seconds for which a process computed, or was ready to run and had no core.

    Where the system does not tell (macOS), a process is taken to be busy for five times its CPU limit.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 5 * cpu_seconds
    ticks = int(fields[11]) + int(fields[12])  # user and system time, of threads that have ended too
    computed = ticks / os.sysconf("SC_CLK_TCK")

    waited = 0
    for thread in Path(f"/proc/{pid}/task").glob("*/schedstat"):  # CPU time, waiting time (both in ns), turns
        with contextlib.suppress(OSError, ValueError, IndexError):  # a thread that just ended
            waited += int(thread.read_text().split()[1])
    return computed + waited / 1e9


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
    there = ", ".join(in_force) or "nothing"
    lacking = ", ".join(missing) or "nothing"
    return f"code sandbox: {there} in force; missing: {lacking}"


def require_all() -> None:
    """RuntimeError where a layer is missing, for a run that must not go below full isolation."""
    missing = layers()[1]
    if missing:
        names = ", ".join(missing)
        raise RuntimeError(f"code sandbox: this system does not give {names}, which strict mode asks for")


def announce(mode: str, numpy: bool = False) -> None:
    """Say where programs will be run, and let them import numpy where that is asked for.

    InputError: a layer is missing, and the mode is "strict". Or numpy is not installed.
    """
    try:
        if numpy:
            allow_numpy()
    except RuntimeError as error:
        raise InputError(str(error)) from None
    print(describe(), file=sys.stderr, flush=True)
    if mode == "strict":
        try:
            require_all()
        except RuntimeError as error:
            raise InputError(str(error)) from None
