"""One hostile program for each limit and each layer of isolation that sandbox.py promises."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from test_sandbox import EQUALITY, HONEST, LOOP, ROOT, WRONG, isolated, passes

from support import sandbox


def attempt(action: str) -> str:
    """What a program meets that tries something: "done", or the name of the exception."""
    program = f"def f():\n    import os\n    try:\n        {action}\n        return 'done'\n" \
              "    except BaseException as error:\n        return type(error).__name__\n"
    values = sandbox.evaluate([("exec", program), ("eval", "f()")], {}, 2)
    return values[1] if values else "killed"


# ------------------------------------------------------------------------------------------------ limits


def seconds(program: str, test: str = EQUALITY, **kwargs) -> float:
    """Wall seconds until a program is refused."""
    start = time.monotonic()
    assert not passes(program, test, **kwargs)
    return time.monotonic() - start


def test_cpu_time_is_limited():
    assert seconds("while True: pass", cpu_seconds=1) < 10
    ignoring = "import signal\nfor s in range(1, 32):\n    try: signal.signal(s, signal.SIG_IGN)\n" \
               "    except (OSError, ValueError): pass\nwhile True: pass"
    assert seconds(ignoring, cpu_seconds=1) < 10


def test_a_sleeping_program_is_ended_by_the_wall_clock(monkeypatch):
    monkeypatch.setattr(sandbox, "SLEEP_SECONDS", 1.0)
    assert seconds("import time\ntime.sleep(3600)", cpu_seconds=0.1) < 10


@isolated
@pytest.mark.parametrize("program", [
    "import time\ntime.sleep(3600)",
    "import time\nwhile time.process_time() < 0.3: pass\nwhile True: time.sleep(0.01)",  # in small pieces
    "import threading\nlock = threading.Lock()\nlock.acquire()\nlock.acquire()",
    "import signal\nwhile True: signal.pause()",
])
def test_a_sleeping_program_is_ended_whatever_its_cpu_limit(monkeypatch, program):
    assert sandbox.SLEEP_SECONDS == 10
    monkeypatch.setattr(sandbox, "SLEEP_SECONDS", 1.0)
    assert seconds(program, cpu_seconds=100) < 10


@isolated
def test_a_program_that_computes_does_not_sleep(monkeypatch):
    monkeypatch.setattr(sandbox, "SLEEP_SECONDS", 0.8)
    busy = "import time\ndef f(x):\n    while time.process_time() < 1.5: pass\n    return x + 1"
    thread = "import threading, time\ndef f(x):\n    def work():\n        while time.process_time() < 1.5: pass\n" \
             "    t = threading.Thread(target=work)\n    t.start()\n    t.join()\n    return x + 1"
    assert passes(busy, EQUALITY) and passes(thread, EQUALITY)


def peak_of_judging(program: str) -> int:
    """The most memory (kB) that a judge of its own process ever held while it refused a program."""
    judge = "import re; from support import sandbox\n" \
            f"assert not sandbox.passes({program!r}, [{EQUALITY!r}], cpu_seconds=2)\n" \
            "print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])"
    command = [sys.executable, "-c", judge]
    return int(subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout)


@isolated
def test_memory_is_limited():
    assert not passes("x = bytearray(2 << 30)\n" + HONEST, EQUALITY)
    assert not passes("x = []\nwhile True: x.append(bytearray(1 << 20))\n" + HONEST, EQUALITY)
    assert passes("x = bytearray(1 << 29)\n" + HONEST, EQUALITY)


@isolated
@pytest.mark.parametrize("program", ["while True: print('x' * (1 << 20))",
    "def f(x): return 'x' * (1 << 27)"])
def test_the_judge_holds_no_flood_of_output(program):
    assert peak_of_judging(program) < 60_000  # 20_000 without any output


def test_the_verdict_does_not_depend_on_the_load(monkeypatch):
    """Neither by its CPU time nor, on Linux, by its sleep: 1.5 s of it are allowed, and 0.7 s of CPU take longer."""
    monkeypatch.setattr(sandbox, "SLEEP_SECONDS", 1.5 if sys.platform == "linux" else 60)
    busy = [subprocess.Popen([sys.executable, "-c",
        "while True: pass"], start_new_session=True)  # of the child's own weight
            for _ in range(3 * os.cpu_count())]
    try:
        program = "import time\ndef f(x):\n    while time.process_time() < 0.7: pass\n    return x + 1"
        assert passes(program, EQUALITY, cpu_seconds=1)
    finally:
        for process in busy:
            process.kill()
            process.wait()


def test_open_files_are_limited():
    assert attempt("x = [open(os.__file__) for _ in range(100)]") == "OSError"


# ------------------------------------------------------------------------------------------------ isolation


@isolated
@pytest.mark.parametrize("action", [
    "os.fork()",
    "os.forkpty()",
    "import posix; posix.fork()",
    "os.posix_spawn('/bin/true', ['true'], {})",
    "os.execv('/bin/true', ['true'])",
    "import subprocess; subprocess.run(['true'])",
    "assert os.system('true') == 0",
    "os.kill(os.getppid(), 0)",
    "os.killpg(0, 15)",
    "import fcntl; fcntl.fcntl(os.open(os.__file__, 0), 8, os.getppid())",  # F_SETOWN
    "import resource; resource.setrlimit(resource.RLIMIT_CPU, (1, 1))",
    "import resource; resource.prlimit(os.getppid(), resource.RLIMIT_CPU, (1, 1))",
    "import socket; socket.socket()",
    "import socket; socket.socketpair()",
    "import socket; socket.create_connection(('127.0.0.1', 9))",
    "open('/etc/passwd')",
    "open('/proc/self/mem', 'rb')",
    "open(f'/proc/{os.getppid()}/environ')",
    "open(f'/proc/{os.getppid()}/mem', 'rb')",
    "os.listdir('/')",
    "os.listdir(f'/proc/{os.getppid()}/fd')",
    "open('new', 'w')",
    "open(os.__file__, 'a')",
    "os.mkdir('new')",
    "os.symlink('a', 'b')",
    "os.link(os.__file__, 'b')",
    "os.rename(os.__file__, 'b')",
    "os.remove(os.__file__)",
    "os.truncate(os.__file__, 0)",
    "os.utime(os.__file__)",
    "os.chmod('.', 0o777)",
    "os.chown('.', os.getuid(), os.getgid())",  # this and the next change nothing, so that anyone may do them
    "os.setuid(os.getuid())",
    "os.setxattr('.', 'user.a', b'a')",
    "os.mkfifo('a')",
    "os.memfd_create('a')",
    "os.nice(1)",
    "import tempfile; tempfile.mkdtemp()",
])
def test_forbidden(action):
    """Each is something that an ordinary user's process may do."""
    assert attempt(action) in ("PermissionError", "OSError", "AssertionError", "FileNotFoundError")


@isolated
def test_numpy_only_where_it_is_allowed_and_only_to_read(monkeypatch):
    monkeypatch.setattr(sandbox, "numpy_parent", "")
    program = "import numpy as np\ndef f(x): return np.int64(x) + np.int64(1)"
    matrices = "def g():\n    a = np.linalg.inv(np.eye(300) * 2)\n" \
               "    return a[0, 0], np.random.default_rng(0).normal(size=9).sum() < 9"
    comparison = "import numpy as np\nassert np.allclose(np.fft.fft([1, 0]), [f(0), 1])"
    assert not passes(program, EQUALITY)

    sandbox.allow_numpy()
    assert passes(f"{program}\n{matrices}", EQUALITY, "assert g() == (0.5, True)", comparison)
    assert not passes(program, "assert f(1) == 3", EQUALITY) and not passes(WRONG + "\n# numpy", EQUALITY)
    numpy = str(Path(sandbox.numpy_parent) / "numpy" / "__init__.py")
    other = str(Path(pytest.__file__))
    read = f"import numpy; open({numpy!r}).read(); assert os.environ['OMP_NUM_THREADS'] == '1'"
    assert attempt(read) == "done"
    for action in (f"import numpy; open({other!r})", f"import numpy; open({numpy!r}, 'a')",
        "import numpy; os.fork()",
                   f"import numpy; os.listdir({sandbox.numpy_parent!r})", "import numpy; open('/etc/passwd')",
                   "import numpy, socket; socket.socket()", "import numpy; numpy.zeros(1 << 40)",
                   "import numpy; numpy.zeros(3).tofile('a')"):
        refused = ("PermissionError", "OSError", "FileNotFoundError", "_ArrayMemoryError", "MemoryError")
        assert attempt(action) in refused
    assert attempt("import numpy, ctypes") == "killed"


def test_numpy_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(sandbox.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="numpy is not installed"):
        sandbox.allow_numpy()


def test_there_is_no_input():
    assert attempt("import sys; assert sys.stdin.read() == '' and os.read(0, 1) == b''") == "done"


def test_nothing_of_the_parent_comes_along(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    program = "import os, sys\ndef f():\n" \
              "    return [dict(os.environ), os.getcwd(), sys.argv, [p for p in sys.path if 'site-' in p]]"
    environment, folder, arguments, packages = sandbox.evaluate([("exec", program),
    ("eval", "f()")], {}, 2)[1]
    assert set(environment) <= {"PYTHONHASHSEED", "LC_CTYPE", "__CF_USER_TEXT_ENCODING"}
    assert "s3ft-" in folder and not Path(folder).exists()
    assert len(arguments) == 1 and not packages


def test_inherited_descriptors_are_closed():
    with open(__file__) as file:
        os.set_inheritable(file.fileno(), True)
        program = "import os\ndef f():\n    n = 0\n    for i in range(64):\n        try: os.fstat(i); n += 1\n" \
                  "        except OSError: pass\n    return n"
        assert passes(program, "assert f() == 4")  # /dev/null three times, and the reply


@pytest.mark.parametrize("name, value", [("PYTHONOPTIMIZE", "2"), ("PYTHONPATH", "."),
("PYTHONWARNINGS", "error"),
                                         ("PYTHONSTARTUP", "x.py"), ("PYTHONINSPECT", "1"), ("LC_ALL", "C")])
def test_the_environment_changes_no_verdict(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    assert passes(HONEST + "\nx = 'é\\d'", EQUALITY, LOOP) and not passes(WRONG, LOOP)


def test_a_verdict_is_the_same_every_time():
    program = "def f(): return list({'a', 'b', 'c', 'd', 'e'})"
    orders = {tuple(sandbox.evaluate([("exec", program), ("eval", "f()")], {}, 2)[1]) for _ in range(4)}
    assert len(orders) == 1


def running_in(folder: Path) -> list[str]:
    """Processes whose working folder lies, or lay, in `folder`."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            found += [process.name] if os.readlink(process / "cwd").startswith(str(folder)) else []
        except OSError:
            pass
    return found


SURVIVOR = """
    import os, signal, sys, threading, time
    for number in range(1, 32):
        try: signal.signal(number, signal.SIG_IGN)
        except (OSError, ValueError): pass
    def stay():
        try: open("left", "w").close()
        except OSError: pass
        time.sleep(60)
    threading.Thread(target=stay, daemon=True).start()
    try:
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0: stay()
            os._exit(0)
    except OSError: pass
    def f(x): return x + 1
    """


@isolated
def test_no_process_and_no_file_is_left(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert passes(SURVIVOR, EQUALITY)
    assert not passes(SURVIVOR + "    raise SystemExit", EQUALITY)
    assert running_in(tmp_path) == [] and list(tmp_path.iterdir()) == []


@isolated
def test_a_child_dies_with_its_parent(tmp_path):
    code = f"import tempfile; from support import sandbox; tempfile.tempdir = {str(tmp_path)!r}\n" \
           "sandbox.passes('import time; time.sleep(60)', ['assert 1'])"
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    wait_until(lambda: running_in(tmp_path))
    time.sleep(0.5)  # by now it sleeps
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    wait_until(lambda: not running_in(tmp_path))


def wait_until(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
