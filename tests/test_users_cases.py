"""What users brought to the judges, and what is right. Each case once gave something else."""

import pytest

import judges
from data import Example
from judges import JUDGES
from support.numerals import last_number, mark_differs, marked_number, same_number

# ------------------------------------------------------------------------------------------------ numeric


def test_a_boxed_answer_in_a_sentence_is_counted_for_the_report():
    """The verdict stays the paper's: the last number. 277 of 5,256 boxed answers are right and go on."""
    response = "So she eats \\boxed{7} dozens of eggs in 4 weeks."
    assert marked_number(response) == 7 and mark_differs(response)
    assert last_number(response) == 4


@pytest.mark.parametrize("response, gold, accepted", [
    ("The house cost 118 000 dollars.", "#### 118000", True),
    ("118 000", "#### 0", False),
    ("The answer is ‑18.", "#### -18", True),
    ("The answer is ‐18.", "#### -18", True),
    ("The answer is ﹣18.", "#### -18", True),
    ("The answer is ‑18.", "#### 18", False),
    ("The answer is -₩18.", "#### -18", True),
    ("The answer is 8/3.", "#### 3", False),
    ("The answer is 8/3.", "#### 8/3", True),
])
def test_numbers(response, gold, accepted):
    assert JUDGES["numeric"](Example("1", "q", gold), response) is accepted


def test_a_number_is_the_same_in_every_way_to_write_it():
    for text in ("118000", "118,000", "118 000", "118\u00a0000", "118'000", "118{,}000", "118\\,000",
        "1.18e5", "236000/2"):
        assert same_number(last_number(text), last_number("118000")), text


# ------------------------------------------------------------------------------------------------ code

PROGRAM = "def add_one(x):\n    return x + 1"
DRAFT = "def add_one(x):\n    return x"
ROW = Example("1", "Add one.", PROGRAM, tests=("assert add_one(1) == 2", "assert add_one(-1) == 0"))


@pytest.mark.parametrize("response", [
    PROGRAM + "\n```",
    PROGRAM + "\n```\nThis adds one.",
    f"[BEGIN]\n{PROGRAM}\n[DONE]",
    f"[BEGIN] {PROGRAM}\n[DONE]\nIt adds one.",
    f"<think>Perhaps\n```python\n{DRAFT}\n```\nNo.</think>\n```python\n{PROGRAM}\n```",
    f"Use it like this:\n```python\nprint(add_one(1))\n```\nThe program:\n```python\n{PROGRAM}\n```",
], ids=["closing fence", "text after it", "MBPP's tags", "text after MBPP's tags", "draft in thoughts",
    "usage first"])
def test_programs_that_are_right(response):
    assert JUDGES["code"](ROW, response) is True
    assert judges.extract_code(response, ROW.tests) == PROGRAM


@pytest.mark.parametrize("response", [
    DRAFT + "\n```",
    f"<think>```python\n{PROGRAM}\n```</think>\n```python\n{DRAFT}\n```",
    f"```python\n{DRAFT}\n```\nor better\n```python\n{PROGRAM}\n```",  # the first counts
    f"It is not\n{PROGRAM}",
])
def test_programs_that_are_not(response):
    assert JUDGES["code"](ROW, response) is False


# ------------------------------------------------------------------------------------------------ recall

GOLDS = ["308", "Broncos", "Tesla's patents", "the 1950s", "Saint-Étienne", "four-fifths", "$22.8 billion",
    "AC/DC", "4.5", "A"]


@pytest.mark.parametrize("marks", ["“{}”", "„{}“", "«{}»", "‘{}’", "「{}」", "“{}.”", "–{}…"])
def test_a_short_answer_in_curly_quotes(marks):
    for gold in GOLDS:
        row = Example("1", "q", gold)
        assert JUDGES["recall"](row, f'"{gold}".') is True
        assert JUDGES["recall"](row, f"{marks.format(gold)}.") is True, gold
        if gold != "A":  # an article alone has to be the whole response
            assert JUDGES["recall"](row, f"The answer is {marks.format(gold)}.") is True, gold


def test_a_decimal_is_no_integer():
    assert JUDGES["recall"](Example("1", "q", "4.5"), "45") is False
    assert JUDGES["recall"](Example("1", "q", "45"), "It is 4.5.") is False
    assert JUDGES["recall"](Example("1", "q", "4.5"), "It is 4.5.") is True
