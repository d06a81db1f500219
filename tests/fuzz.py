"""Random text into everything that reads what a model or a person wrote: only our own exception may come out.

    python -m tests.fuzz [--cases 100000] [--seed 0]

Each reader gets an equal share of the cases. Besides not raising, each must keep a promise: numbers are equal
to themselves, extraction finds the program that was put between the tags, verdicts have one of three values,
a text recalls itself, what read_jsonl returns is what was written, and a row's tests are taken apart without
losing one.
"""

import argparse
import json
import tempfile
import time
import warnings
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

import judges
from data import Example
from support import sandbox
from support.cli import InputError
from support.files import read_jsonl
from support.numerals import last_number, mark_differs
from support.rouge import rouge_l

PIECES = [  # what the readers look for, to be strung together
    "[[BEGIN]]", "[[DONE]]", "```", "```python\n", "\r\n", "\n", "\t", " ", "\ufeff", "\0", "\ud800", "é",
    "def f(x):",
    "0", "18", "1,234", ".", ",", "-", "−", "$", "%", "^", "{", "}", "\\boxed{", "e9", "e999", "٣", "²", "½",
    "9" * 400,
    "true", "False", "not ", "n't ", "[True/False]", " or ", "/", "_", "**", "unanswerable", "n/a",
    "I don’t know",
    "the", "a ", "Paris", "?", ";",
    '"', "'", "{{question}}", '{"id": "1", "a": [1]}', "[1]", "null", "NaN", "[" * 300,
    ",\\!", "€", "°", "‑", "₩", "/", "8/3", "\\frac{8}{3}", "118 000", "####", "the answer is ", "“", "”",
    "4.5", "[BEGIN]", "[DONE]",
    "<think>", "</think>", "assert ", "len(", "sum(1, 2)", "f(1)", ")", " == ", "list(map(f, ",
]
text = st.one_of(st.text(st.characters(exclude_categories=())),
                 st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=3)), max_size=8).map("".join))


def numbers(response, gold):
    value = last_number(response)
    assert value is None or type(value) in (Decimal, Fraction)
    assert mark_differs(response) in (True, False)
    assert judges.numeric(response, response) is (value is not None)
    assert judges.numeric(response, gold) is judges.numeric(gold, response)


def extraction(response, program):
    assert type(judges.extract_code(response)) is str
    marks = ("[[", "]]", "```", "~~~", "</think>")
    if program.strip("\ufeff").strip() == program and not any(mark in program for mark in marks):
        before = response.replace("[[BEGIN]]", "")
        response = response.replace("</think>", "")  # what comes before it would be thoughts
        assert judges.extract_code(f"{before}[[BEGIN]]\n{program}\n[[DONE]]{response}") == program


def verdicts(reply, question):
    assert judges.parse_verdict(reply) in (True, False, None)
    judge = judges.LLMJudge(lambda prompts: [reply for _ in prompts])
    accepted = judge([(Example("1", question, reply), "x" + question)])
    verdict = judges.parse_verdict(reply)
    assert accepted == [verdict is True] and judge.unparsed == (verdict is None)


def recalls(response, gold):
    assert 0 <= judges.token_recall(response, gold) <= 1
    assert judges.token_recall(gold, gold) == (1 if gold.strip() else 0)
    judges.recall(response, gold, aliases=(response,))
    assert not judges.recall(response, "", unanswerable=True) or judges.abstains(response)


def rouges(response, gold):
    assert 0 <= rouge_l(response, gold) <= 1
    assert rouge_l(gold, gold) == (1 if any(letter.isalnum() for letter in gold.lower()) else 0)
    assert abs(rouge_l(response, gold) - rouge_l(gold, response)) < 1e-9


def jsonl(content, extra):
    path = Path(SCRATCH.name) / "rows.jsonl"
    path.write_bytes((content + "\n" + extra).encode("utf-8", "surrogatepass"))
    try:
        rows = read_jsonl(path, ("id",))
    except InputError as error:
        assert str(path) in str(error)
    else:
        assert all(type(row) is dict and "id" in row for row in rows)
    row = {"id": content, "response": extra}
    path.write_text(json.dumps(row) + "\n")
    assert read_jsonl(path, ("id",)) == [row]


def tests_of_programs(test, other):
    calls, equalities, claims = sandbox.take_apart([test, f"assert f({other!r}) == 1"])
    assert all(mode in ("eval", "exec") and type(source) is str for mode, source in calls + claims)
    assert equalities[-1] == (len(calls) - 1, 1)


READERS = (numbers, extraction, verdicts, recalls, rouges, jsonl, tests_of_programs)
SCRATCH = tempfile.TemporaryDirectory()


def fuzz(reader, cases: int, start: int) -> int:
    """Call a reader with `cases` pairs of texts -> the number of calls. A failing pair is shrunk and shown."""
    calls = []

    @seed(start)
    @settings(max_examples=cases, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(text, text)
    def call(first, second):
        calls.append(1)
        reader(first, second)

    call()
    return len(calls)


def main() -> None:
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("--cases", type=int, default=100_000, help="in all (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    args = parser.parse_args()
    warnings.simplefilter("ignore", SyntaxWarning)  # of random text that is parsed as Python
    share = -(-args.cases // len(READERS))
    for reader in READERS:
        start, count = time.monotonic(), fuzz(reader, share, args.seed)
        print(f"{reader.__name__:18} {count:6} cases, {time.monotonic() - start:5.1f} s", flush=True)


if __name__ == "__main__":
    main()
