"""The code judge beside bigcode-evaluation-harness's rule for MBPP, on the same programs.

The rule, written anew here (theirs: bigcode_eval/tasks/mbpp.py and custom_metrics/execute.py): program,
newline and tests are one text, which `exec` runs in empty globals, in a process of its own, within 3 s by the
wall clock. Any exception is a failure, SystemExit too. (Left out: there some functions that could do harm,
os.fork for one, are None.) Where the judge answers otherwise on purpose, a case below says why.
"""

import json
import subprocess
import sys

import pytest
import torch
from tokenizers.processors import TemplateProcessing

import answers
import evaluate
import judges
import s3ft
from data import Example
from engine.chat import plain_text, response_text
from engine.model import load_model
from support import sandbox
from support.files import read_jsonl, write_jsonl
from tasks import mbpp

REFERENCE = """
import contextlib, io, os, sys
source = sys.stdin.buffer.read().decode()
passed = os.dup(1)
with contextlib.redirect_stdout(io.StringIO()):
    try:
        exec(source, {})
    except BaseException:
        os._exit(1)
os.write(passed, b"passed")
os._exit(0)
"""


def bigcode(program: str, tests: list[str], timeout: float = 3.0) -> bool:
    source = (program + "\n" + "\n".join(tests)).encode()
    try:
        command = [sys.executable, "-c", REFERENCE]
        run = subprocess.run(command, input=source, capture_output=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return False
    return run.stdout == b"passed"


ADD = "def f(a, b):\n    return a + b"
HALVES = ["assert f(1, 2) == 3", "assert f(-1, 1) == 0"]

SAME = {  # name: (program, tests, verdict)
    # right and wrong
    "right": (ADD, HALVES, True),
    "wrong": ("def f(a, b):\n    return a - b", HALVES, False),
    "only the last test fails": (ADD, [*HALVES, "assert f(2, 2) == 5"], False),
    "only the first test fails": (ADD, ["assert f(2, 2) == 5", *HALVES], False),
    "right for some": ("def f(a, b):\n    return 3 if a == 1 else 1", HALVES, False),
    "returns nothing": ("def f(a, b):\n    a + b", HALVES, False),
    "prints instead of returning": ("def f(a, b):\n    print(a + b)", HALVES, False),
    "prints and returns": ("def f(a, b):\n    print(a, b)\n    return a + b\nprint(f(1, 2))", HALVES, True),
    "a test with a message": (ADD, ["assert f(1, 2) == 3, 'three'"], True),
    "a test that negates": (ADD, ["assert not f(1, 2) == 4", "assert f(1, 2) != 4"], True),
    "a test with two claims": (ADD, ["assert f(1, 2) == 3 and f(1, 1) == 3"], False),
    "an own assert that fails": (ADD + "\nassert f(1, 1) == 3", HALVES, False),
    # what is no program
    "empty": ("", HALVES, False),
    "prose": ("Here is the function you asked for:", HALVES, False),
    "syntax error": ("def f(a, b)\n    return a + b", HALVES, False),
    "indentation error": ("def f(a, b):\nreturn a + b", HALVES, False),
    "a code fence left in": ("```python\n" + ADD + "\n```", HALVES, False),
    "tabs and blanks mixed": ("def f(a, b):\n\tx = a\n        return x + b", HALVES, False),
    "another name": (ADD.replace("f(", "add("), HALVES, False),
    "another number of arguments": ("def f(a):\n    return a", HALVES, False),
    # what stops it
    "exception at the start": ("raise ValueError('no')\n" + ADD, HALVES, False),
    "exception in the function": ("def f(a, b):\n    return a / 0", HALVES, False),
    "exception caught": ("def f(a, b):\n    try:\n        return a / 0\n    except ZeroDivisionError:\n        return a + b",
                         HALVES, True),
    "sys.exit(0) at the end": (ADD + "\nimport sys\nsys.exit(0)", HALVES, False),
    "sys.exit(0) in the function": ("import sys\ndef f(a, b):\n    sys.exit(0)", HALVES, False),
    "raise SystemExit": ("raise SystemExit", HALVES, False),
    "os._exit(0)": ("import os\nos._exit(0)", HALVES, False),
    "KeyboardInterrupt": (ADD + "\nraise KeyboardInterrupt", HALVES, False),
    "reads its input": ("n = int(input())\n" + ADD, HALVES, False),
    "infinite loop": ("def f(a, b):\n    while True:\n        pass", HALVES, False),
    "recursion without an end": ("def f(a, b):\n    return f(b, a)", HALVES, False),
    "a module that does not exist": ("import nonexistent_module\n" + ADD, HALVES, False),
    # values
    "text for a number": ("def f(a, b):\n    return str(a + b)", HALVES, False),
    "float for int": ("def f(a, b):\n    return float(a + b)", HALVES, True),
    "True for 1": ("def f(a):\n    return a > 0", ["assert f(5) == 1"], True),
    "list for tuple": ("def f(a):\n    return [a, a]", ["assert f(1) == (1, 1)"], False),
    "0.1 + 0.2 is not 0.3": (ADD, ["assert f(0.1, 0.2) == 0.3"], False),
    "the exact float": (ADD, ["assert f(0.1, 0.2) == 0.30000000000000004"], True),
    "near enough by isclose": (ADD, ["import math\nassert math.isclose(f(0.1, 0.2), 0.3, rel_tol=0.001)"], True),
    "not near enough": (ADD, ["import math\nassert math.isclose(f(0.1, 0.3), 0.3, rel_tol=0.001)"], False),
    "nan is not nan": ("def f():\n    return float('nan')", ["assert f() == float('nan')"], False),
    "a set in any order": ("def f(a):\n    return set(a)", ["assert f('cab') == {'a', 'b', 'c'}"], True),
    "nested containers": ("def f(n):\n    return {i: [(i,)] for i in range(n)}",
                          ["assert f(2) == {0: [(0,)], 1: [(1,)]}"], True),
    "a generator for a list": ("def f(n):\n    yield from range(n)", ["assert f(2) == [0, 1]"], False),
    "a generator in list()": ("def f(n):\n    yield from range(n)", ["assert list(f(2)) == [0, 1]"], True),
    # ways to write it
    "CRLF": (ADD.replace("\n", "\r\n") + "\r\n", HALVES, True),
    "CRLF and tabs": ("def f(a, b):\r\n\tc = a\r\n\treturn c + b", HALVES, True),
    "non-ASCII names and text": ("def f(a, b):\n    größe = 'é'\n    return a + b", HALVES, True),
    "recursion": ("def f(n):\n    return 1 if n < 2 else n * f(n - 1)", ["assert f(10) == 3628800"], True),
    "lambda": ("f = lambda a, b: a + b", HALVES, True),
    "decorator": ("import functools\n@functools.lru_cache\ndef f(n):\n    return n if n < 2 else f(n - 1) + f(n - 2)",
                  ["assert f(50) == 12586269025"], True),
    "global state": ("calls = []\ndef f(a):\n    calls.append(a)\n    return len(calls)",
                     ["assert f(0) == 1", "assert f(0) == 2"], True),
    "an argument changed in place": ("def f(a):\n    a.append(1)\n    return a",
    ["assert f([0]) == [0, 1]"], True),
    "class": ("class P:\n    def __init__(self, x):\n        self.x = x\ndef f(x):\n    return P(x).x",
              ["assert f(3) == 3"], True),
    "class used by the test": ("class P:\n    x = 3\n    def twice(self):\n        return 2 * self.x",
                               ["assert P().twice() == 6", "assert P().x == 3"], True),
    "import math": ("import math\ndef f(r):\n    return math.floor(math.pi * r)", ["assert f(2) == 6"], True),
    "import re": ("import re\ndef f(s):\n    return re.findall(r'\\d+', s)",
    ["assert f('a1b22') == ['1', '22']"], True),
    "import collections": ("from collections import Counter\ndef f(s):\n    return Counter(s)",
                           ["assert f('aab') == {'a': 2, 'b': 1}"], True),
    "import heapq, itertools": ("import heapq, itertools\ndef f(a):\n    return heapq.nlargest(2, itertools.chain(a, a))",
                                ["assert f([1, 3, 2]) == [3, 3]"], True),
    "import forgotten": ("def f(r):\n    return math.floor(r)", ["assert f(2.5) == 2"], False),
    "if __name__ == '__main__'": ("if __name__ == '__main__':\n    raise ValueError\n" + ADD, HALVES, True),
    "a test of several lines": (ADD, ["for i in range(3):\n    assert f(i, i) == 2 * i"], True),
    "a test that raises": (ADD, ["assert f(1, '2') == 3"], False),
    "a test that is no Python": (ADD, ["assert f(1, 2) =="], False),
}


@pytest.mark.parametrize("name", SAME)
def test_the_same_verdict(name):
    program, tests, verdict = SAME[name]
    assert bigcode(program, tests, timeout=0.7 if name == "infinite loop" else 20) is verdict
    seconds = 0.5 if name == "infinite loop" else sandbox.CPU_SECONDS
    assert judges.run_tests(program, tests, timeout=seconds) is verdict


# ------------------------------------------------------------------------------------------ the other verdict


def test_setup_code_is_run():
    """bigcode never runs a row's setup code; the gold program of task 367 needs it."""
    program, tests = "def f(node):\n    return node.value", ["assert f(root) == 1"]
    setup = "class Node:\n    value = 1\nroot = Node()"
    assert not bigcode(program, tests)
    assert judges.run_tests(program, tests, setup)


def test_time_is_the_program_s_own():
    """bigcode counts seconds on the clock (3), which a busy machine uses up. The judge counts CPU seconds (10)."""
    program, tests = "import time\ntime.sleep(0.6)\n" + ADD, HALVES
    assert not bigcode(program, tests, timeout=0.5)
    assert judges.run_tests(program, tests, timeout=0.5)
    assert sandbox.CPU_SECONDS > 3


DIFFERENT = {  # passes there, fails here: (program, tests); the key is the reason
    "an answer equal to everything is none": (
        "class Any:\n    def __eq__(self, other):\n        return True\ndef f(a, b):\n    return Any()", HALVES),
    "a patched library decides nothing": (
        "import math\nmath.isclose = lambda *args: True\n" + ADD, ["import math\nassert math.isclose(f(1, 2), 99)"]),
    "without a test nothing is shown": (ADD, []),
    "an object of the program's own does not come out": (
        "class P:\n    def __eq__(self, other):\n        return isinstance(other, P)\ndef f():\n    return P()",
        ["assert f() == P()"]),
}


FORBIDDEN = {  # the same, where the system isolates a program
    "no file is written": (f"import tempfile\ntempfile.TemporaryFile()\n{ADD}", HALVES),
    "no socket is opened": (f"import socket\nsocket.socket().close()\n{ADD}", HALVES),
    "memory ends at 1 GiB": (f"a = bytearray(5 << 28)\n{ADD}", HALVES),
}
isolated = pytest.mark.skipif(bool(sandbox.layers()[1]), reason="a layer is missing here")


@pytest.mark.parametrize("reason",
    [*DIFFERENT, *(pytest.param(reason, marks=isolated) for reason in FORBIDDEN)])
def test_another_verdict_on_purpose(reason):
    program, tests = (DIFFERENT | FORBIDDEN)[reason]
    assert bigcode(program, tests, timeout=20)
    assert not judges.run_tests(program, tests)


# --------------------------------------------------------------------------- its prompt, stop words and the row


def row(number: int) -> dict:
    tests = [f"assert f({number}) == {number}", "assert f(0) == 0", "assert f('a') == 'a'"]
    return {"task_id": number, "text": f"Write f, task {number}.", "code": "def f(a):\n    return a",
            "test_list": tests, "test_setup_code": ""}


def test_the_prompt_by_hand():
    """docs/README.md of the harness: three quotes, description, one test, three quotes, a line each."""
    assert mbpp.bigcode_prompt(mbpp.mbpp_example(row(11))) == (
        '"""\nWrite f, task 11.\nassert f(11) == 11\n"""\n')


IDENTITY = "def f(a):\n    return a"


@pytest.mark.parametrize(("continuation", "kept"), [
    (IDENTITY, IDENTITY),
    (f"{IDENTITY}\nassert f(1) == 1\nprint(f(1))", IDENTITY),
    (f"{IDENTITY}\nprint(f(1))\nassert f(1) == 1", IDENTITY),
    (f"{IDENTITY}\n\nif __name__ == '__main__':\n    f(1)", f"{IDENTITY}\n"),
    (f"{IDENTITY}\n```\nThis returns a.", IDENTITY),
    (f'{IDENTITY}\n"""\nAnother task', IDENTITY),
    ("def f(a):\n    if a:\n        print(a)\n    return a\nclass A:", "def f(a):\n    if a:\n        print(a)\n    return a"),
    ("def f(a):\n    return a\n<|/code|>", IDENTITY),
    ("if True:\n    f = str\nelse:\n    f = int", "if True:\n    f = str\nelse:\n    f = int"),  # no line before it
    ("\nclass A:", ""),
    ("", ""),
])
def test_a_continuation_is_cut_at_the_first_stop_word(continuation, kept):
    x = mbpp.mbpp_example(row(11))
    assert mbpp.bigcode_program(x, continuation) == mbpp.bigcode_prompt(x) + kept


@pytest.mark.parametrize(("continuation", "accepted", "by_the_task_s_own"), [
    (f"{IDENTITY}\nprint(g)", True, False),  # the last line is cut off here
    (f"```python\n{IDENTITY}\n```", False, True),  # a fence that opens a response is no stop word, and no Python
    (f"[[BEGIN]]\n{IDENTITY}\n[[DONE]]", False, True),
    ("    return a", False, False),
])
def test_its_judge_takes_a_program_as_it_stands(continuation, accepted, by_the_task_s_own):
    x = mbpp.mbpp_example(row(11))
    program = mbpp.bigcode_program(x, continuation)
    assert bigcode(program, list(x.tests), timeout=20) is accepted
    assert list(judges.judge_all("bigcode", [(x, program)])) == [accepted]
    assert judges.JUDGES["code"](x, continuation) is by_the_task_s_own


def test_setup_code_is_not_run_there():
    x = Example("1", "q", "", tests=("assert f(root) == 1",), setup="root = 1")
    assert judges.JUDGES["code"](x, IDENTITY)
    assert list(judges.judge_all("bigcode", [(x, mbpp.bigcode_program(x, IDENTITY))])) == [False]


def test_the_model_goes_on_with_the_text_itself(tiny, tmp_path):
    """Beside transformers' generate, on what a tokenizer that adds BOS (and one that adds EOS too) makes of the text."""
    model, tokenizer = load_model(str(tiny), "cpu")
    text = mbpp.bigcode_prompt(mbpp.mbpp_example(row(11)))
    ids = [tokenizer.bos_token_id, *tokenizer.encode(text)]
    expected = model.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False)[0, len(ids):].tolist()
    for name, frame in (("bos", "<s> $A"), ("both", "<s> $A </s>")):
        special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=frame, special_tokens=special)
        path = tmp_path / f"{name}.jsonl"
        found = answers.respond(answers.LocalModel(model, tokenizer, chat=False), {"11": text}, path, answers.Limits(6))
        assert found["11"]["tokens"] == expected
        assert found["11"]["response"] == tokenizer.decode(expected, skip_special_tokens=True)


def test_nothing_is_taken_for_thinking_where_there_is_no_chat(tiny):
    _, tokenizer = load_model(str(tiny), "cpu")
    tokens = tokenizer.encode("<think>f</think>def f(a):")
    assert response_text(tokenizer, tokens) == "def f(a):"
    assert plain_text(tokenizer, tokens) == "<think>f</think>def f(a):"


def test_a_run_of_mbpp_has_the_second_row(tiny, tmp_path, monkeypatch):
    """The base model's continuations were made elsewhere, and all but one are right. The trained model makes its own."""
    (tmp_path / "mbpp").mkdir()
    write_jsonl(tmp_path / "mbpp" / "mbpp.jsonl", [row(number) for number in range(1, 975)])
    run = tmp_path / "run"
    s3ft.main(["--task=mbpp", "--method=sft", f"--model={tiny}", f"--out={run}", f"--data={tmp_path}", "--steps=1",
               "--max-new-tokens=4", "--device=cpu", "--limit=3"])
    monkeypatch.setattr(evaluate, "GENERAL_TOKENS", 2)
    texts = {"11": f"{IDENTITY}\nprint(", "12": IDENTITY, "13": "def f(a):\n    return 13"}
    write_jsonl(run / "base" / "bigcode" / "test.jsonl", [{"id": id, "response": text} for id, text in texts.items()])
    evaluate.main([f"--out={run}", f"--data={tmp_path}", "--device=cpu"])

    models = json.loads((run / "results.json").read_text())["models"]
    assert models["base"]["bigcode"]["accuracy"] == pytest.approx(2 / 3) and models["base"]["accuracy"] == 0
    assert models["sft"]["bigcode"]["n"] == 3 and models["sft"]["bigcode"]["accuracy"] == 0
    kept = read_jsonl(run / "sft" / "bigcode" / "test.jsonl")
    assert [row["id"] for row in kept] == ["11", "12", "13"]
    report = (run / "report.md").read_text()
    assert "| base | 66.7 | 20.8 to 93.9 | 0 | 0.0 | 22.2 |" in report and "temperature 0.2" in report
