"""The child's half of the sandbox: give up every right this process has, then run one program and its tests.

sandbox.py starts this file in a fresh interpreter for each program, and says what is covered. One job comes
in by stdin, one reply goes out. Standard input, output and error of the program are /dev/null. The layers,
each tried alone:

rlimits               CPU seconds (the kernel kills), address space, open files, no byte into a file, no core
no_new_privs          no set-uid program gives rights back. It also lets an ordinary user take the last two
capabilities dropped  all of them, which matters where a researcher runs as root
Landlock              read the Python and shared libraries, nothing else: no TCP, no signal to another process
seccomp               the system calls of ALLOWED only: no process, socket, exec, kill, ptrace, new file,
                      chmod or mount
"""

import ctypes
import marshal
import os
import resource
import struct
import sys
import types
from itertools import repeat

# System calls by name, x86_64 number, aarch64 number (- where it has none).
# Any other fails as it does on a kernel without it.
ALLOWED = """
read 0 63, write 1 64, readv 19 65, writev 20 66, pread64 17 67, lseek 8 62, close 3 57, pipe2 293 59,
poll 7 -, ppoll 271 73, select 23 -, pselect6 270 72, stat 4 -, lstat 6 -, fstat 5 80, newfstatat 262 79,
statx 332 291, access 21 -, faccessat 269 48, readlink 89 -, readlinkat 267 78, getdents64 217 61,
getcwd 79 17, mmap 9 222, mprotect 10 226, munmap 11 215, mremap 25 216, brk 12 214, madvise 28 233,
rt_sigaction 13 134, rt_sigprocmask 14 135, rt_sigreturn 15 139, sigaltstack 131 132, pause 34 -,
alarm 37 -, getitimer 36 102, setitimer 38 103, restart_syscall 219 128, nanosleep 35 101,
clock_nanosleep 230 115, clock_gettime 228 113, clock_getres 229 114, gettimeofday 96 169, times 100 153,
getrusage 98 165, sysinfo 99 179, uname 63 160, getpid 39 172, getppid 110 173, gettid 186 178,
getuid 102 174, geteuid 107 175, getgid 104 176, getegid 108 177, sched_yield 24 124,
sched_getaffinity 204 123, getrandom 318 278, futex 202 98, set_robust_list 273 99, rseq 334 293,
exit 60 93, exit_group 231 94
"""

# Allowed by an argument: name, numbers, which argument, a mask, and whether a bit of the mask must be set
# (True) or none may be (False).
CONDITIONAL = (
    ("clone", 56, 220, 0, 0x10000, True),  # CLONE_THREAD: a thread, never a process
    ("openat", 257, 56, 2, os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC, False),  # to read, not to write
)
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column above, AUDIT_ARCH
libc = ctypes.CDLL(None, use_errno=True)


def check(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def limits(cpu_seconds: int, memory: int) -> None:
    """Soft = hard: a soft limit sends a signal that a program could catch, the hard one kills."""
    values = {"CPU": cpu_seconds, "FSIZE": 0, "CORE": 0, "NOFILE": 32, "NPROC": 0, "AS": memory}
    if sys.platform == "linux":
        del values["NPROC"]  # would count every thread that this user has; seccomp forbids processes
    for name, value in values.items():  # AS last: macOS refuses it
        kind = getattr(resource, "RLIMIT_" + name)
        hard = resource.getrlimit(kind)[1]
        if hard != resource.RLIM_INFINITY:
            value = min(value, hard)
        resource.setrlimit(kind, (value, value))


def no_new_privs() -> None:
    check(libc.prctl(38, 1, 0, 0, 0))  # PR_SET_NO_NEW_PRIVS
    check(libc.prctl(1, 9, 0, 0, 0))  # PR_SET_PDEATHSIG, SIGKILL: not outlive the parent


def capabilities() -> None:
    check(libc.capset(struct.pack("=Ii", 0x20080522, 0), bytes(24)))


def import_numpy(parent: str) -> list[str]:
    """Import numpy from the folder `parent`, while files can still be read -> the folders it needs later."""
    own_ctypes = sys.modules.pop("ctypes")
    sys.modules["ctypes"] = None  # numpy does without
    sys.path.append(parent)
    try:
        import numpy  # noqa: F401
    finally:
        sys.path.remove(parent)
        sys.modules["ctypes"] = own_ctypes
    return [os.path.join(parent, "numpy"), os.path.join(parent, "numpy.libs")]


def landlock(more_folders: list[str]) -> None:
    # 1. Every right that this kernel knows is denied: on files, on TCP (from version 4), on signals (from 6).
    abi = check(libc.syscall(444, None, 0, 1))
    file_rights = {1: 13, 2: 14, 3: 15, 4: 15}.get(abi, 16)
    size = 8
    if abi >= 4:
        size = 16
    if abi >= 6:
        size = 24
    attributes = struct.pack("=QQQ", (1 << file_rights) - 1, 3, 3)[:size]
    ruleset = check(libc.syscall(444, attributes, len(attributes), 0))

    # 2. Except to read the libraries.
    library = os.path.dirname(os.path.dirname(os.__file__))
    system = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache")
    for path in (library, *sys.path, *system, *more_folders):
        if os.path.exists(path):
            parent = os.open(path, os.O_PATH)
            right = 0b1100 if os.path.isdir(path) else 0b100  # read a file, list a folder
            check(libc.syscall(445, ruleset, 1, struct.pack("=Qi", right, parent), 0))
            os.close(parent)

    # 3. From here on it is in force.
    check(libc.syscall(446, ruleset, 0))
    os.close(ruleset)


def seccomp() -> None:
    column, arch = MACHINES[os.uname().machine]
    # BPF instructions: load a word; jump if it equals; jump if it has any bit of a mask; return.
    load, equal, any_bit, give = 0x20, 0x15, 0x45, 6
    allow = (give, 0, 0, 0x7FFF0000)
    kill = (give, 0, 0, 0x80000000)
    eperm = (give, 0, 0, 0x50001)
    enosys = (give, 0, 0, 0x50026)

    code = [(load, 0, 0, 4), (equal, 1, 0, arch), kill, (load, 0, 0, 0)]  # calls of another ABI kill
    for _, *number, argument, mask, wanted in CONDITIONAL:
        test = (any_bit, not wanted, wanted, mask)  # how far to jump: 0 to allow, 1 to eperm
        code += [(equal, 0, 4, number[column]), (load, 0, 0, 16 + 8 * argument), test, allow, eperm]
    for call in ALLOWED.split(","):
        number = call.split()[1 + column]
        if number != "-":
            code += [(equal, 0, 1, int(number)), allow]
    code.append(enosys)

    packed = b"".join([struct.pack("=HBBI", *line) for line in code])
    program = ctypes.create_string_buffer(packed)
    description = struct.pack("@HP", len(code), ctypes.addressof(program))
    check(libc.prctl(22, 2, description, 0, 0))  # PR_SET_SECCOMP


def lock_down(cpu_seconds: int, memory: int, more_folders: list[str]) -> list[str]:
    """Apply every layer -> the names of those that this system does not give. `more_folders` may be read."""
    layers = {
        "rlimits": lambda: limits(cpu_seconds, memory),
        "no_new_privs": no_new_privs,
        "capabilities dropped": capabilities,
        "Landlock": lambda: landlock(more_folders),
        "seccomp": seccomp,
    }
    missing = []
    for name, apply in layers.items():
        try:
            if sys.platform != "linux" and name != "rlimits":
                raise OSError
            apply()
        except (OSError, ValueError, KeyError, AttributeError):
            missing.append(name)
    return missing


def literal(value) -> str:
    """A value as the text of a Python literal that equals it. TypeError where no plain data does."""
    if value is None or value is True or value is False:
        return repr(value)
    for kind, write in WRITERS:
        if issubclass(type(value), kind):  # isinstance would believe a `__class__`
            return write(value)
    for kind in (int, float):  # Fraction, Decimal: the plain number that they equal, if any
        if kind(value) == value:
            return literal(kind(value))
    raise TypeError


def sequence(values) -> str:
    return ", ".join(map(literal, values))


def braces(values) -> str:
    items = {*values}  # of a subclass too: this does not ask its `__iter__`
    return f"{{{sequence(items)}}}" if items else "set()"


def real(text: str) -> str:
    if "nan" in text:
        raise TypeError  # equal to nothing
    return text.replace("inf", "1e999")


WRITERS = (  # subclasses too (namedtuple, Counter, IntEnum): they equal the plain value
    (int, lambda v: int.__format__(v, "#x")),  # no limit on its digits
    (float, lambda v: real(float.__repr__(v))),
    (complex, lambda v: real(complex.__repr__(v))),
    (str, str.__repr__),
    (bytes, bytes.__repr__),
    (bytearray, lambda v: bytes.__repr__(bytes(v))),
    (list, lambda v: f"[{sequence(list.__iter__(v))}]"),
    (tuple, lambda v: f"({''.join(literal(x) + ', ' for x in tuple.__iter__(v))})"),
    ((set, frozenset, type({}.keys()), type({}.items())), braces),
    (dict, lambda v: f"{{{', '.join(f'{literal(k)}: {literal(x)}' for k, x in dict.items(v))}}}"),
)


def encode(value) -> bytes:
    """One line of the reply. What is no plain data crosses as `...`, which equals nothing."""
    try:
        return literal(value).encode("ascii", "backslashreplace")
    except Exception:
        return b"..."


def forbid_introspection() -> None:
    """No look at objects without a name, no jump over a statement, no function of ctypes. The hook stays.

    That makes raw memory harder to read, not impossible: pointers of ctypes raise no event (see "not covered"
    in sandbox.py).
    """
    for name in list(sys.modules):
        if "ctypes" in name:
            vars(sys.modules.pop(name)).clear()
    banned = frozenset({"gc.get_objects", "gc.get_referrers", "gc.get_referents", "sys.settrace"})

    def end_if_banned(event, args, exit=os._exit):
        if event in banned or event[:7] == "ctypes.":
            exit(1)

    sys.addaudithook(end_if_banned)


def run(work: list, scope: dict, reply: int) -> None:
    """Evaluate all code objects in `scope`, then send the secret and their values.

    While the program runs, the secret and the code objects still to come are popped from `work` already. They
    stand on the stack of this one expression and have no name. So a program that walks its frames finds
    neither. One that reads raw memory can. Only after the last has ended is there a reply.
    """
    os.write(reply, work.pop() + b"\n".join(map(encode, map(eval, work.pop(), repeat(scope)))))


def prepare() -> tuple[list, dict, int]:
    """Read the job, lock down, compile. Of all that this knows, only what it returns is left afterwards."""
    # 1. The job, and no way to the outside except the reply.
    job = marshal.loads(sys.stdin.buffer.raw.readall())
    secret, sources, names, cpu_seconds, memory, parent, numpy_parent = job
    del job
    reply = os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    os.close(null)

    # 2. The layers.
    more_folders = import_numpy(numpy_parent) if numpy_parent else []
    missing = lock_down(cpu_seconds, memory, more_folders)
    if os.getppid() != parent:  # it died before PR_SET_PDEATHSIG
        raise SystemExit

    # 3. The program's module, which dataclasses and pickle look up. A `__main__` block does not run.
    module = types.ModuleType("solution")
    sys.modules["__main__"] = sys.modules["solution"] = module
    module.__dict__.update(names, __builtins__=__builtins__)

    # 4. All code, compiled before any of it runs.
    codes = []
    for mode, source in [("eval", repr(missing)), *sources]:
        codes.append(compile(source, "<solution>", mode, dont_inherit=True, optimize=0))
    forbid_introspection()
    return [codes, secret], module.__dict__, reply


if __name__ == "__main__":
    try:
        run(*prepare())
    finally:
        os._exit(0)  # past atexit, threads and whatever else the program left
