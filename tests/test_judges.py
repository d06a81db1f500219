"""What each judge accepts, row by row of the tables in judges.py and against calculations by hand."""

import itertools
import os
import subprocess
import sys
import threading
import time
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest

import judges
from data import Example
from judges import (
    JUDGES,
    LLMJudge,
    abstains,
    extract_code,
    judge_all,
    last_number,
    mark_differs,
    marked_number,
    numeric,
    parse_verdict,
    recall,
    same_number,
    token_recall,
)
from support import ranks

# ------------------------------------------------------------------------------------------------ numeric

NUMBERS = [
    ("18", "18 +18 18. 18! 18? **18** *18* _18_ `18` (18) 18; 018 018.0 18.00"),
    ("1234", "1,234 1,234. 1{,}234 1\\,234 1'234 1’234 1_234 1，234 1\u202f234 1\u00a0234 1\u20091\u2009234 1,234.00"),
    ("1234567.5", "1,234,567.5 1234567.50 1{,}234{,}567.5 1,\\!234,\\!567.5"),
    ("1450", r"1,\!450 \boxed{1,\!450} $1,\!450$"),
    ("20", "10%-20% 20€-20€ 20£-20£ $20$-$20$ $20$-20 20$-20$ 20\\$-\\$20 5°-20° 5¥-20 5₹–20 5%−$20 5\u00a0€-20\u00a0€"),
    ("-20", "€-20 £-20 $-20 \\$-20 x$-20 **-20%** (-20°)"),
    ("10", r"10^6 10^{6} 1.2x10^3 1.2×10^{-3} 10⁶ $10^6$"), ("2", "2^5 2^{10} 2⁵ 2^-1"),
    ("23", "1,23"), ("4", "3,4"), ("2345", "1,2345"), ("67", "12,345,67"), ("567", "1234,567"),
    ("0.5", ".5 0.5 $.50 +.5 0.50."), ("5", "...5"), ("3", "1.2.3"),
    ("18", "$18 £18 €18 ¥18 ₹18 US$18 USD18 Rs18 18€ 18% 18kg 18km/h 18th 18-year-old #18 18°"),
    ("18", r"\boxed{18} $\boxed{18}$. \$18 \(18\) \[18\] $18$ \text{is}18 18\% ####18 <<9+9=18>>18 \times18"),
    (None, "m^2 m^{2} m^{-2} cm² ½ ² ٪ eighteen ∞ nan inf - . , $ ① Ⅷ 十"),
    ("18", "18m^2 18cm² 18m^{2}"),
    ("-18", "-18 −18 –18 －18 -$18 −£18 -\\$18 (-18) $-18 **-18** =-18 :-18 -18.0 \\boxed{-18} -18%"),
    ("18", "5-18 day-18 10−18 1–18 --18 5)-18"), ("-18", ")\u00a0-18"),
    ("-0.5", "-.5 −0.5 -$.50"), ("-1234.5", "-1,234.5 -$1,234.50"),
    ("18", "1.8e1 1.8E+1 180e-1"), ("1000", "1E3 1e3"), ("4444", "1e4444"),
    ("4", "2x4 3:4"), ("9", "7-9"), ("2", "m2 H2"),
    ("-18", "‐18 ‑18 ‒18 –18 ﹣18 -₩18 ‑₽18 -US$18 -R$18 -₱18 \\boxed{‑18}"), ("18", "—18 20₩-18₩ 20₽‑18₽ 1‐18"),
    ("0.75", "3/4 3/4. **3/4** (3/4) $3/4$ x=3/4 \\frac{3}{4} \\boxed{3/4} $\\dfrac{3}{4}$. 3⁄4 6/8 1.5/2"),
    ("-0.75", "-3/4 −3/4 -\\frac{3}{4} \\frac{-3}{4} \\boxed{-\\frac{3}{4}}"), ("2.5", "2\\frac{1}{2}"), ("8", "16/2 1,000/125"),
    ("2020", "3/4/2020 2020-3/4/2020"), ("3", "5-8/3 m2/3 8/3kg 2*8/3 2^8/3 http://x.com/8/3 8/3/"), ("0", "8/0 0/3"),
    ("18", "60km/18 km/h18 18km/h"),
    ("3", "３ 三３"), ("18", "१८ ١٨ 𝟏𝟖"), ("-18", "−१८"),
]  # (value, texts with that value, separated by blanks)


@pytest.mark.parametrize("value, text", [(value, text) for value, texts in NUMBERS for text in texts.split(" ")])
def test_what_counts_as_a_number(value, text):
    total = f"The total is 7, and so the answer is {text} ."
    if value is None:
        assert last_number(text) is None and last_number(total) == 7
    else:
        assert same_number(last_number(text), Decimal(value)) and same_number(last_number(total), Decimal(value))


@pytest.mark.parametrize("text, value", [
    ("", None), ("no number here", None), ("- 18", 18), ("10 - 18", 18), ("18 %", 18), ("18 m^2", 18), ("18 km/h.", 18),
    ("The answer is $1,200.00 per month.", 1200), ("She has 3 + 4 = 7 apples.", 7), ("It takes 3, 4 or 5 days.", 5),
    ("Tom has 16 - 3 - 4 = <<16-3-4=9>>9 eggs.\n#### 9", 9), ("#### 1,450", 1450), ("#### -3", -3),
    ("**Answer:** \\(\\boxed{1{,}450}\\)\n", 1450), ("18\x00", 18), ("18\ud800", 18), ("\ufeff18\r\n", 18),
    ("118 000", 118000), ("It costs $118 000.50 in all", Decimal("118000.5")), ("1 200 300", 1200300), ("in 2 000", 2000),
    ("3 4", 4), ("5 12 100", 100), ("12 100 5", 5), ("0 500", 500), ("555 123 4567", 4567), ("In 2019 200 came", 200),
    ("118\n000", 0), ("118  000", 0), ("12 1000", 1000), ("118\\ 000", 118000), ("-118 000", -118000),
    ("-€ 18", -18), ("20 €-18 €", 18), ("2 2/3 cups", Fraction(8, 3)), ("-2 1/2", Decimal("-2.5")), ("7 8/3", Fraction(8, 3)),
    ("The answer is 8/3.", Fraction(8, 3)), ("\\frac{8}{3}", Fraction(8, 3)), ("1,000/3", Fraction(1000, 3)),
    ("open 24/7", Fraction(24, 7)), ("on 3/4/2020.", 2020), ("8 / 3", 3), ("60 km/h", 60), ("1/2 1/3", Fraction(1, 3)),
    ("9" * 5000 + "/3", 3),
    ("From 10%-20% of it", 20), ("20€-30€", 30), ("$20$-$30$", 30), ("5°-18°", 18), ("5 $-3$", -3), ("1.2 x 10^3", 10),
    ("9" * 5000, Decimal("9" * 5000)), ("-" + "9" * 5000 + ".5", Decimal("-" + "9" * 5000 + ".5")),
])
def test_last_number_of_a_text(text, value):
    found = last_number(text)
    assert found is None if value is None else same_number(found, Decimal(value) if type(value) is int else value)


def test_numbers_are_compared_by_exact_value():
    assert numeric("So the answer is 18.00.", "... #### 18")
    assert not numeric("18.0000000000000000000000000000000001", "#### 18")
    assert numeric("9" * 5000, "9" * 5000 + ".0") and not numeric("9" * 5000, "9" * 4999 + "8")
    assert not numeric("-18", "18") and not numeric("34", "3 4")
    assert numeric("The answer is 8/3.", "2 2/3") and numeric("3/4", "0.75") and numeric("16/2", "8")
    assert not numeric("The answer is 8/3.", "3") and not numeric("1/3", "0.3333333333333333333333333333333333")


@pytest.mark.parametrize("response, gold", [("", ""), ("none", "none"), ("no", "18"), ("18", "no"), ("nan", "nan")])
def test_two_answers_without_a_number_are_not_equal(response, gold):
    assert numeric(response, gold) is False


@pytest.mark.parametrize("text, marked, differs", [
    ("so it is \\boxed{7} dozens of eggs in 4 weeks.", 7, True), ("The answer is 18 dollars for 3 days.", 18, True),
    ("The answer is 18 - 4 = 14, in 5 days.", 14, True), ("#### 18", 18, False), ("#### 1 118 000\nDone in 3 steps.", 1118000, True),
    ("\\boxed{\\frac{8}{3}}", Fraction(8, 3), False), ("\\boxed{x = 8/3} of 3", Fraction(8, 3), True),
    ("The Answer is:\n\n**18** (see 2)", 18, True), ("The answer is 7. No: the answer is 8.", 8, False),
    ("\\boxed{7}. So the answer is above, see 3", 3, False), ("\\boxed{7} Hence the answer is clear. 3", 7, True),
    ("Eggs: 18", None, False), ("the answer is yes. 3", None, False), ("", None, False), ("\\boxed{", None, False),
    ("\\boxed{0.75} or 3/4", Decimal("0.75"), False),
])
def test_the_marked_answer_beside_the_last_number(text, marked, differs):
    found = marked_number(text)
    assert found is None if marked is None else same_number(found, Decimal(marked) if type(marked) is int else marked)
    assert mark_differs(text) is differs


@pytest.mark.parametrize("flood", ["9", "1 111 ", "111 ", "1/", "1/2 ", "\\frac{1}{", "\\boxed{", "1,111", "1,", "-", "^", "1.", ".", " ", "1e", "-$", "^{", "1\\,", "_",
                                   "1,\\!111", "5$-"])
def test_a_flood_is_read_in_linear_time(flood):
    last_number(flood * 10), marked_number(flood * 10)
    times = []
    for n in (10_000, 40_000):
        start = time.process_time()
        last_number(flood * n)
        times.append(time.process_time() - start)
    assert times[1] < 0.05 + 10 * times[0]  # 4 times as long would do; 16 times is quadratic


# ------------------------------------------------------------------------------------------------ code

PROGRAM = "def f(x):\n    return x + 1"


@pytest.mark.parametrize("response, program", [
    (f"[[BEGIN]]\n{PROGRAM}\n[[DONE]]", PROGRAM),
    (f"Sure!\n[[BEGIN]]{PROGRAM}[[DONE]] It adds one.", PROGRAM),
    (f"[[BEGIN]]\n{PROGRAM}\n", PROGRAM),
    (f"{PROGRAM}\n[[DONE]]\nmore", PROGRAM),
    (PROGRAM, PROGRAM),
    (f"[[BEGIN]]\n{PROGRAM}\n[[DONE]]\n[[BEGIN]]\nother\n[[DONE]]", PROGRAM),
    (f"[[BEGIN]]\n[[BEGIN]]\n{PROGRAM}\n[[DONE]]\n[[DONE]]", PROGRAM),
    (f"[[DONE]] [[BEGIN]]\n{PROGRAM}\n[[DONE]]", PROGRAM),
    (f"[[BEGIN]]\n```python\n{PROGRAM}\n```\n[[DONE]]", PROGRAM),
    (f"[[BEGIN]]\n```python\n{PROGRAM}```[[DONE]]", PROGRAM),
    (f"[[BEGIN]]\n{PROGRAM}\n```\n[[DONE]]", PROGRAM),
    (f"```python\n[[BEGIN]]\n{PROGRAM}\n[[DONE]]\n```", PROGRAM),
    (f"Here it is:\n```python\n{PROGRAM}\n```\nUse it so:\n```\nf(1)\n```", PROGRAM),
    (f"   ```\n{PROGRAM}\n   ```", PROGRAM),
    (f"````py title=x\n{PROGRAM}\n````", PROGRAM),
    (f"Here it is:\n```python\n{PROGRAM}", PROGRAM),
    ("[[BEGIN]]\n    def f(x):\n        return x + 1\n[[DONE]]", PROGRAM),
    ("[[BEGIN]] x = 1\ny = 2 [[DONE]]", "x = 1\ny = 2"),
    ("[[BEGIN]]\ndef f():\n\treturn 1\n[[DONE]]", "def f():\n\treturn 1"),
    ("\ufeff[[BEGIN]]\r\nx = 1\r\ny = 2\r\n[[DONE]]", "x = 1\r\ny = 2"),
    ("[[BEGIN]]\n\ufeffx = 1\n[[DONE]]", "x = 1"),
    ("[[BEGIN]]x = 'é\0\ud800'[[DONE]]", "x = 'é\0\ud800'"),
    ("[[begin]]x[[done]]", "[[begin]]x[[done]]"),
    ('def f():\n    """\n    ```\n    f()\n    ```\n    """', 'def f():\n    """\n    ```\n    f()\n    ```\n    """'),
    ("", ""), ("[[BEGIN]]", ""), ("[[DONE]]", ""), ("[[BEGIN]][[DONE]]", ""), ("```\n```", ""), (" \n\t\r\n", ""),
    ("I cannot do that.", "I cannot do that."),
])
def test_extraction(response, program):
    assert extract_code(response) == program


def test_extraction_of_a_megabyte():
    program = PROGRAM + "\n# " + "x" * (1 << 20)
    assert extract_code(f"Text.\n```python\n{program}\n```\n") == program
    assert judges.code(f"[[BEGIN]]\n{program}\n[[DONE]]", ["assert f(1) == 2"])


@pytest.mark.parametrize("response, verdict", [
    (f"[[BEGIN]]\n{PROGRAM}\n[[DONE]]", True),
    (f"The code:\n```python\r\n{PROGRAM}\r\n```", True),
    (f"The code: {PROGRAM}", False),
    ("[[BEGIN]]def f(x): return x[[DONE]]", False),
    ("", False), ("[[BEGIN]][[DONE]]", False), ("[[BEGIN]]\0[[DONE]]", False), ("[[BEGIN]]\ud800[[DONE]]", False),
])
def test_code(response, verdict):
    assert judges.code(response, ["assert f(1) == 2", "assert f(2) == 3"]) is verdict


def test_every_test_must_pass_and_there_must_be_one():
    assert judges.run_tests(PROGRAM, ["assert f(1) == 2"])
    assert not judges.run_tests(PROGRAM, ["assert f(1) == 2", "assert f(1) == 3"])
    assert not judges.run_tests(PROGRAM, [])
    assert judges.run_tests("class A: pass", ["assert a.x == 1"], setup="a = A()\na.x = 1")
    assert not judges.run_tests("while True: pass", ["assert 1 == 1"], timeout=1)


# ------------------------------------------------------------------------------------------------ LLM


@pytest.mark.parametrize("verdict, replies", [
    (True, ["True", "TRUE", "true.", " True\n", "**True**", "_True_", "'True'", "Decision: True", "[True]",
            "True, not False", "The Provided Answer is correct: True", "[True/False] True", "Is it True or False? True",
            "It differs, but True"]),
    (False, ["False", "FALSE.", "`false`", "Decision: [True/False] False", "False (the reference says true)",
             "true/false: false", "not true", "It is not true.", "isn't true", "That is not entirely true",
             "neither true nor false", "never true"]),
    (None, ["", "[True/False]", "untrue", "truely", "Truefalse", "falsehood", "True or False", "True|False",
            "not false", "correct", "Yes", "T", "истина", "\ud800"]),
])
def test_verdict_parsing(verdict, replies):
    assert {reply: parse_verdict(reply) for reply in replies} == dict.fromkeys(replies, verdict)


def test_the_prompt_of_figure_8():
    seen = []
    judge = LLMJudge(lambda prompts: seen.extend(prompts) or ["True"])
    assert judge([(Example("1", "Who {{gold_response}}?", "Ann"), "{{question}} {x}")]) == [True]
    assert seen == [
        "You are a helpful assistant acting as an impartial judge. You will be given a Question, a Reference Answer, "
        "and a Provided Answer. Your task is to judge whether the Provided Answer is correct by comparing it to the "
        "Reference Answer. If the Provided Answer is correct, choose only 'True', otherwise choose only 'False'. "
        "Question: Who {{gold_response}}?\nProvided Answer:\n{{question}} {x}\nReference Answer:\nAnn\n"
        "Decision: [True/False]"
    ]


def test_replies_without_a_verdict_are_not_accepted_and_are_counted():
    replies = ["True", "maybe", "False", "[True/False]"]
    judge = LLMJudge(lambda prompts: replies[: len(prompts)])
    pairs = [(Example(str(i), "q", "a"), "r") for i in range(4)]
    assert judge(pairs) == [True, False, False, False] and judge.unparsed == 2
    assert judge(pairs[:2]) == [True, False] and judge.unparsed == 3


# ------------------------------------------------------------------------------------------------ recall


@pytest.mark.parametrize("response, gold, expected", [
    ("It was Paris, in France.", "the Paris", 1.0),
    ("Paris", "Paris France", 1 / 2),
    ("New York", "New New York", 2 / 3),
    ("new new york", "New York", 1.0),
    ("U.S.A.", "USA", 1.0),
    ("20-year old", "20year", 1.0),
    ("An apple a day", "apple the day an", 1.0),
    ("theatre", "the", 0.0),
    ("The cat", "the", 0.0),
    ("The", " the ", 1.0),
    ("A", "A", 1.0),
    ("anything", "!", 0.0),
    ("anything", "", 0.0),
    ("", "", 0.0),
    ("", "Paris", 0.0),
])
def test_token_recall(response, gold, expected):
    assert token_recall(response, gold) == pytest.approx(expected)


@pytest.mark.parametrize("phrase", [
    "unanswerable", "N/A", "idk", "I don't know", "I don’t know", "not known", "answer not in context",
    "The answer is unknown",
])
def test_abstention_by_a_phrase_anywhere(phrase):
    assert abstains(phrase) and abstains(f"Sorry, {phrase}, she said.") and abstains(f"**{phrase.upper()}**")
    assert not abstains(f"x{phrase}") and not abstains(f"{phrase}x")


@pytest.mark.parametrize("phrase", ["NaN", "unknown", "No answer", "None of the above"])
def test_abstention_by_the_whole_reply(phrase):
    assert abstains(phrase) and abstains(f" **{phrase}.**\n") and abstains(phrase.upper())
    assert not abstains(f"The {phrase} soldier") and not abstains(f"{phrase}. The text is silent.")
    assert not abstains(f"Paris\n{phrase}")


@pytest.mark.parametrize("response", ["", "Paris", "corn/apples", "It is known", "midkiff", "an unknown city"])
def test_no_abstention(response):
    assert not abstains(response)


def test_recall_where_there_is_an_answer():
    assert recall("The capital is Paris.", "Paris") and recall("It is Lutetia", "Paris", aliases=("Lutetia",))
    assert not recall("The capital is Lyon.", "Paris") and not recall("Paris", "Paris France")
    assert recall("Paris " + "x " * 49, "Paris") and not recall("Paris " + "x " * 50, "Paris")
    assert not recall("Paris. The answer is unanswerable.", "Paris") and not recall("unanswerable", "Paris")
    assert not recall("unanswerable", "unanswerable") and not recall("the", "") and not recall("Paris the", "the")


@pytest.mark.parametrize("response, verdict", [
    ("unanswerable", True), ("Unanswerable.", True), ("The question is unanswerable.", True),
    ("I don't know. Sorry!", True), ("Unknown.", True), ("n/a", True),
    ("Unknown. The text names no one.", False), ("Paris", False), ("", False), ("...", False),
    ("Paris. The answer is unanswerable.", False), ("Paris / The answer is unanswerable", False),
    ("Paris\nunanswerable", False), ("Paris; unanswerable", False), ("unanswerable " + "x " * 50, False),
])
def test_recall_where_there_is_none(response, verdict):
    assert recall(response, "unanswerable", unanswerable=True) is verdict


# ------------------------------------------------------------------------------------------------ leaks


@pytest.mark.parametrize("text, leak", [
    ("The Reference Answer says 4.", True), ("Your turn: 4", True), ("Now it's your turn", True), ("In my response, 4", True),
    ("It is your turn to move.", False), ("The answer is 4.", False), ("", False),
])
def test_leaks(text, leak):
    assert judges.leaks(text) is leak


# ------------------------------------------------------------------------------------------------ by name


def test_judges_by_name():
    row = Example("1", "q", "#### 2", tests=("assert f(1) == r",), setup="r = 2")
    assert list(judge_all("numeric", [(row, "2"), (row, "3")])) == [True, False]
    assert list(judge_all("code", [(row, PROGRAM), (row, "def f(x): return x")])) == [True, False]
    rows = [Example("1", "q", "Paris", aliases=("Lutetia",)), Example("2", "q", "unanswerable", unanswerable=True)]
    pairs = [(x, y) for x in rows for y in ("Lutetia", "unanswerable")]
    assert list(judge_all("recall", pairs)) == [True, False, False, True]


@pytest.mark.parametrize("cores, world, expected", [(8, 1, 8), (8, 2, 4), (2, 4, 1), (1, 1, 1)])
def test_a_process_takes_its_share_of_the_cores_that_it_may_use(monkeypatch, cores, world, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    monkeypatch.setattr(ranks, "LOCAL_WORLD", world)
    assert judges.workers() == expected
    threads = set()
    monkeypatch.setitem(JUDGES, "code", lambda x, y: threads.add(threading.get_ident()) or time.sleep(0.01))
    list(judge_all("code", [(None, "")] * 40))
    assert len(threads) == expected


def test_programs_run_in_parallel_and_keep_their_order(monkeypatch):
    monkeypatch.setattr(judges, "workers", lambda: 4)

    def row(i):
        seconds = 1 if i % 4 == 0 else 0
        return Example(str(i), "q", "", tests=(f"assert f() == {i}",)), \
            f"import time\ndef f():\n    time.sleep({seconds})\n    return {i if i % 3 else -1}"

    start = time.monotonic()
    assert list(judge_all("code", [row(i) for i in range(16)])) == [i % 3 != 0 for i in range(16)]
    assert time.monotonic() - start < 3.5  # one after the other they would sleep for 4 s


def test_verdicts_come_as_they_are_made(monkeypatch):
    judged = []
    monkeypatch.setattr(judges, "workers", lambda: 2)
    monkeypatch.setitem(JUDGES, "code", lambda x, y: time.sleep(0.01) or not judged.append(y))
    verdicts = judge_all("code", [(None, str(i)) for i in range(1000)])
    assert list(itertools.islice(verdicts, 3)) == [True] * 3
    verdicts.close()
    assert len(judged) < 100  # and what nobody waits for is not judged


def test_the_llm_judge_asks_in_batches_and_tells_no_verdict_from_false():
    sizes = []

    def generate(prompts):
        sizes.append(len(prompts))
        return ["True" if "yes" in prompt else "False" if "Answer:\nno" in prompt else "?" for prompt in prompts]

    pairs = [(Example(str(i), "q", "gold"), ("yes", "no", "maybe")[i % 3]) for i in range(600)]
    assert list(judge_all("llm", pairs, generate)) == [True, False, None] * 200
    assert sum(sizes) == 600 and len(sizes) < 10


def test_judges_need_no_torch():
    code = "import sys, judges; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(judges.__file__).parent).returncode == 0
