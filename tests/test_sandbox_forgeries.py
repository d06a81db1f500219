"""Programs that try to be judged right without being right: none may pass, whatever the shape of the test."""

import textwrap

import pytest
from test_sandbox import CLAIM, EQUALITY, LOOP, WRONG, passes

FORGERIES = {
    "exit at once": "import sys; sys.exit(0)",
    "exit in the call": "import sys\ndef f(x): sys.exit(0)",
    "os._exit": "import os\ndef f(x): os._exit(0)",
    "atexit": "import atexit, os\natexit.register(os._exit, 0)",
    "excepthook": "import sys, os\nsys.excepthook = sys.unraisablehook = lambda *a: os._exit(0)",
    "abort": "import os\ndef f(x): os.abort()",
    "signal to itself": "import signal\ndef f(x): signal.raise_signal(9)",
    "segmentation fault": "x = ()\nfor _ in range(10 ** 6): x = (x,)\ndef f(y): return hash(x)",
    "deep recursion": "def f(x): return f(x)",
    "closed descriptors": "import os\nos.closerange(0, 64)",
    "redirected descriptors": "import os\nfor i in range(1, 32):\n    try: os.dup2(0, i)\n    except OSError: pass",
    "success on every descriptor": """
        import os
        for i in range(32):
            try: os.write(i, b"[]\\nNone\\nNone\\n0x2")
            except OSError: pass
        os._exit(0)
        """,
    "a flood on every descriptor": """
        import os
        for i in range(32):
            try: os.write(i, b"x" * (1 << 24))
            except OSError: pass
        """,
    "printed success": "print('0x2\\nTrue\\npassed')\ndef f(x): print('True')",
    "patched builtins": """
        import builtins
        for name in ("AssertionError", "bool", "isinstance", "repr", "map", "eval", "all", "compile", "type"):
            setattr(builtins, name, lambda *a: True)
        """,
    "assert made to a no-op": "import builtins\nclass Quiet(BaseException): pass\nbuiltins.AssertionError = Quiet\n"
                              "def f(x): return None",
    "last line swallows": "def f(x): return 0\nif 0: \\",
    "open string": "def f(x): return 0\n'''",
    "open bracket": "def f(x): return 0\n(",
    "return": "return",
    "async": "async def f(x): return x + 1",
    "raise of anything": "def f(x): raise BaseException",
    "NUL": "def f(x): return x + 1\n\0",
    "lone surrogate": "def f(x): return x + 1\nx = '\ud800'",
    "deep nesting": "x = " + "(" * 100_000,
    "generator": "def f(x): yield x + 1",
    "skipped lines by a tracer": """
        import sys
        def tracer(frame, event, arg):
            if event == "line" and frame.f_code.co_name == "<module>" and frame.f_lineno == 2: frame.f_lineno = 3
            return tracer
        def f(x): return x + 1.5
        sys.settrace(tracer)
        """,
    "patched runner": """
        import sys
        def always(*a): return b"None"
        frame = sys._getframe()
        while frame:
            for value in list(frame.f_globals.values()):
                if hasattr(value, "__code__"): value.__code__ = always.__code__
            frame = frame.f_back
        def f(x): return 0
        """,
    "tests replaced on the heap": """
        import gc, types
        for found in gc.get_objects():
            if type(found) is list and found and all(type(code) is types.CodeType for code in found):
                found[:] = [compile("None", "", "eval")] * len(found)
        """,
    "raw memory by a function of ctypes": """
        import ctypes, os, re
        def f(x):
            parts = [part for part in vars(os).values() if type(part) is type(f)] + list(map(os.urandom, range(9, 500)))
            for base in {id(part) & -1 << 20 for part in parts}:
                arena = ctypes.cast(base, ctypes.POINTER(ctypes.c_char))[:1 << 20]
                for secret in re.findall(rb"(?s)\\x20\\0{7}.{8}([0-9a-f]{32})\\0", arena):
                    for fd in range(32):
                        try: os.write(fd, secret + b"[]\\nNone\\nNone\\nNone")
                        except OSError: pass
            os._exit(0)
        """,
    "raw memory by a method of ctypes": """
        import os, re
        def below(kind):
            for sub in type.__subclasses__(kind):
                yield sub
                yield from below(sub)
        c_char = next(sub for sub in below(object) if sub.__name__ == "c_char")
        def f(x):
            parts = [part for part in vars(os).values() if type(part) is type(f)] + list(map(os.urandom, range(9, 500)))
            for base in {id(part) & -1 << 20 for part in parts}:
                arena = (c_char * (1 << 20)).from_address(base).raw
                for secret in re.findall(rb"(?s)\\x20\\0{7}.{8}([0-9a-f]{32})\\0", arena):
                    for fd in range(32):
                        try: os.write(fd, secret + b"[]\\nNone\\nNone\\nNone")
                        except OSError: pass
            os._exit(0)
        """,
}


@pytest.mark.parametrize("name", FORGERIES)
@pytest.mark.parametrize("test", [EQUALITY, CLAIM, LOOP], ids=["equality", "claim", "loop"])
def test_forgery_never_passes(name, test):
    program = textwrap.dedent(FORGERIES[name])
    assert not passes(program if "def f" in program else WRONG + "\n" + program, test, cpu_seconds=3)


TAKEN = {  # a builtin's name taken by the program, and the test that it would pass; f gives None
    "isinstance": "def isinstance(*a): return True\n", "len": "def len(x): return 3\n", 
    "math": "class math: isclose = lambda *a: True\n",
    "sorted": "def sorted(x): return [1, 2]\n", "list": "list = lambda x: [1, 2]\n", "abs": "def abs(x): return None\n",
    "float": "import builtins\nbuiltins.float = lambda x: 2\n", "max": "def max(*a): return 3\n",
}


@pytest.mark.parametrize("name, test", [
    ("isinstance", "assert isinstance(f(1), int) == True"), ("isinstance", "assert isinstance(f(1), int)"),
    ("len", "assert len(f(1)) == 3"), ("len", "assert 3 == len(f(1))"), ("len", "assert len(f(1)) + 1 == 4"),
    ("math", "assert math.isclose(f(1), 2.6) == True"), ("math", "assert math.isclose(f(1), 2.6)"),
    ("sorted", "assert sorted(f(1)) == [1, 2]"), ("list", "assert list(f(1)) == [1, 2]"),
    ("abs", "assert f(1) == abs(-2)"), ("float", "assert float(f(1)) == 2"), ("max", "assert max(f(1), 2) == 3"),
])
def test_a_builtin_that_the_program_patched_decides_nothing(name, test):
    assert not passes(TAKEN[name] + "def f(x): return None", test)


@pytest.mark.parametrize("name, test, expected", [
    ("sum", "assert sum(1, 2) != 4", True), ("sum", "assert sum(2, 2) != 4", False), ("sum", "assert sum(2, 4) == 8", True),
    ("sum", "assert sum(2, 4) == 6", False), ("sum", "assert abs(sum(-2, 4)) == 8", True),
    ("pow", "assert math.isclose(pow(2, 4), 8)", True),
])
def test_a_program_may_have_a_builtins_name(name, test, expected):
    assert passes(f"def {name}(a, b): return a * b", test) is expected


@pytest.mark.parametrize("test", [
    "assert list(f(2)) == [0, 1]", "assert sorted(f(2), reverse=True) == [1, 0]", "assert sum(f(3)) == 3",
    "assert max(f(3)) == 2", "assert tuple(f(1)) == (0,)", "assert any(f(1)) == False", "assert len(list(f(4))) == 4",
    "assert [len(list(f(i))) for i in (1, 2)] == [1, 2]",
])
def test_what_a_generator_yields_is_compared(test):
    assert passes("def f(n): yield from range(n)", test) and not passes("def f(n): yield 7", test)


@pytest.mark.parametrize("returned", ["Liar()", "[Liar()]", "{1: Liar()}", "LyingInt(-7)"])
@pytest.mark.parametrize("test", [
    EQUALITY, CLAIM, "assert f(1) == [2]", "assert f(1) == {1: 2}", "assert [2] == f(1)", "assert f(1) > 1",
    "assert (f(1) == 2) == True", "assert (not f(1)) == True", "assert abs(f(1) - 2) < 0.1", "assert len(f(1)) == 1000",
    "assert f(1) == 2 and f(1) == 2",
])
def test_an_object_equal_to_everything_never_passes(returned, test):
    if returned == "{1: Liar()}" and "len" in test:
        pytest.skip("a dictionary has a length of its own")
    assert not passes(f"""
        class Lies:
            def __eq__(self, other): return True
            __ne__ = __lt__ = __gt__ = __le__ = __ge__ = __contains__ = __eq__
            def __bool__(self): return False
            def __hash__(self): return 2
            def __sub__(self, other): return self
            def __abs__(self): return self
            def __len__(self): return 1
            def __repr__(self): return "2"
            def __iter__(self): return iter([Liar()])
        class Liar(Lies):
            __class__ = property(lambda self: int)
        class LyingInt(Lies, int):
            pass
        def f(x): return {returned}
        """, test)


LOOT = """
    import os, sys, threading, types

    def look(value, seen, found, depth=0):
        if id(value) in seen or depth > 12: return
        seen.add(id(value))
        if type(value) in (bytes, bytearray, str) and len(value) < 200:
            found.add(value if type(value) is bytes else bytes(str(value), "utf8"))
        parts = []
        if isinstance(value, dict): parts = [*value.keys(), *value.values()]
        elif isinstance(value, (list, tuple, set, frozenset)): parts = list(value)
        elif isinstance(value, types.FunctionType):
            parts = [value.__defaults__, value.__code__.co_consts, value.__globals__,
                     *(cell.cell_contents for cell in value.__closure__ or ())]
        elif isinstance(value, types.FrameType):
            parts = [dict(value.f_locals), value.f_globals, value.f_builtins, value.f_code.co_consts, value.f_back]
        elif hasattr(value, "__dict__"): parts = [dict(vars(value))]
        for part in parts:
            try: look(part, seen, found, depth + 1)
            except Exception: pass

    def f(x):
        found = set()
        look(list(sys._current_frames().values()), set(), found)
        look(sys._getframe(), set(), found)
        look(sys.modules, set(), found)
        try: raise ValueError
        except ValueError as error: look(error.__traceback__.tb_frame, set(), found)
        COLLECT
        for fd in (0, 3, 4, 5):
            try: found.add(os.read(fd, 4096)) if fd == 0 else None
            except OSError: pass
        secrets = [text for text in found if len(text) == 32 and all(c in b"0123456789abcdef" for c in text)]
        ENDING
        for secret in secrets:
            for fd in range(32):
                try: os.write(fd, secret + b"[]\\nNone\\nNone\\nNone")
                except OSError: pass
        os._exit(0)
    """


@pytest.mark.parametrize("collect", ["pass", "import gc; look(gc.get_objects(), set(), found)",
                                     "import gc; look(gc.get_referents(sys._getframe().f_back.f_back), set(), found)"])
def test_no_name_leads_to_the_secret(collect):
    assert not passes(LOOT.replace("COLLECT", collect).replace("ENDING", "pass"), LOOP)


def test_memory_can_be_read_as_the_contract_says():
    """By a pointer of ctypes, which raises no event: should this fail, the contract may promise more."""
    program = """
        def below(kind):
            for sub in type.__subclasses__(kind):
                yield sub
                yield from below(sub)
        found = {sub.__name__: sub for sub in below(object)}
        class Pointer(found["_Pointer"]): _type_ = found["c_char"]
        def f(x): return len(Pointer(found["c_char"](b"x"))[-64:64])
        """
    assert passes(program, "assert f(1) == 128")


def test_the_search_for_the_secret_would_find_one():
    program = LOOT.replace("COLLECT", "pass").replace("ENDING", "return secrets")
    caller = "\n    def g(x):\n        planted = b'0123456789abcdef' * 2\n        return f(x)\n"
    assert passes(program + caller, f"assert g(1) == [{b'0123456789abcdef' * 2!r}]")
