"""What each judge accepts, row by row: the tests of `numeric` are in test_numerals.py."""

import itertools
import os
import subprocess
import sys
import threading
import time
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
    parse_verdict,
    recall,
    token_recall,
)
from support import ranks
from support.cli import InputError

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
    ("[[BEGIN]] def f():\n return 1 [[DONE]]", "def f():\n return 1"),
    ("[[BEGIN]]\ndef f():\n\treturn 1\n[[DONE]]", "def f():\n\treturn 1"),
    ("\ufeff[[BEGIN]]\r\nx = 1\r\ny = 2\r\n[[DONE]]", "x = 1\r\ny = 2"),
    ("[[BEGIN]]\n\ufeffx = 1\n[[DONE]]", "x = 1"),
    ("[[BEGIN]]x = 'é\0\ud800'[[DONE]]", "x = 'é\0\ud800'"),
    ("[[begin]]x[[done]]", "[[begin]]x[[done]]"),
    ('def f():\n    """\n    ```\n    f()\n    ```\n    """',
        'def f():\n    """\n    ```\n    f()\n    ```\n    """'),
    ("", ""), ("[[BEGIN]]", ""), ("[[DONE]]", ""), ("[[BEGIN]][[DONE]]", ""), ("```\n```", ""),
    (" \n\t\r\n", ""),
    ("I cannot do that.", "I cannot do that."),
])
def test_extraction(response, program):
    assert extract_code(response) == program


DRAFT = "def f(x):\n    return x"


@pytest.mark.parametrize("response, program", [
    (f"{PROGRAM}\n```", PROGRAM), (f"{PROGRAM}```", PROGRAM), (f"{PROGRAM}\n```\n", PROGRAM),
    (f"{PROGRAM}\n```\nThis adds one.", PROGRAM),
    (f"import math\n\n{PROGRAM}\n```\nUse it so:\n```python\nf(1)\n```", f"import math\n\n{PROGRAM}"),
    (f"[BEGIN]\n{PROGRAM}\n[DONE]", PROGRAM), ("[BEGIN] x = 1 [DONE]\nmore", "x = 1"),
    (f"{PROGRAM}\n[DONE]\nYou are", PROGRAM),
    ("[[BEGIN]]\nx = [DONE]\n[[DONE]]", "x = [DONE]"),
    (f"<think>First\n```python\n{DRAFT}\n```\n</think>\n```python\n{PROGRAM}\n```", PROGRAM),
    (f"<think>[[BEGIN]]{DRAFT}[[DONE]]</think>[[BEGIN]]\n{PROGRAM}\n[[DONE]]", PROGRAM),
    (f"so</think>{PROGRAM}", PROGRAM),
    (f"```python\n{PROGRAM}\n```\n</think>", PROGRAM),
    (f"Use it so:\n```\nprint(f(1))\n```\nIt is\n```python\n{PROGRAM}\n```", PROGRAM),
    (f"```bash\npip install x\n```\n```python\n{PROGRAM}\n```\n```python\n{DRAFT}\n```", PROGRAM),
    (f"```python\nfrom solution import f\nresult = f(2)\n```\n```python\n{PROGRAM}\n```", PROGRAM),
    (f"{DRAFT}\n\nBetter:\n```python\n{PROGRAM}\n```", PROGRAM), (f"~~~py\n{PROGRAM}\n~~~\nDone.", PROGRAM),
    (f"```python\nclass f:\n    pass\n```\n```python\n{PROGRAM}\n```", "class f:\n    pass"),
    ("```python\ng = 1\n```\n```python\nf = lambda x: x + 1\n```", "f = lambda x: x + 1"),
    ("```python\na\n```\n```python\nb\n```", "a"),
])
def test_the_first_program_that_defines_the_tested_function(response, program):
    assert extract_code(response, ["assert f(1) == 2"]) == program


@pytest.mark.parametrize("tests, names", [
    (("assert f(1) == 2", "assert g(f(2)) == len([3])"), {"f", "g"}),
    (("assert math.isclose(area(1), 2)",), {"area"}),
    (("assert sum(1, 2) == 4",), {"sum"}), (("x = f(1)\nassert x == 2",), {"f"}),
    (("assert Point(1).x == 1",), {"Point"}),
    (("def check(g):\n    assert g(1) == 2\ncheck(f)",), {"f"}),
    (("import numpy as np\nassert np.all(f(1) == 1)",), {"f"}),
    (("assert f(",), set()), ((), set()),
])
def test_the_names_that_a_program_has_to_define(tests, names):
    assert judges.tested_names(tests) == names


def test_extraction_of_a_megabyte():
    program = PROGRAM + "\n# " + "x" * (1 << 20)
    assert extract_code(f"Text.\n```python\n{program}\n```\n") == program
    assert judges.code(f"[[BEGIN]]\n{program}\n[[DONE]]", ["assert f(1) == 2"])


@pytest.mark.parametrize("response, verdict", [
    (f"[[BEGIN]]\n{PROGRAM}\n[[DONE]]", True),
    (f"The code:\n```python\r\n{PROGRAM}\r\n```", True),
    (f"The code: {PROGRAM}", False),
    (f"Use it so:\n```\nprint(f(1))\n```\nIt is\n```python\n{PROGRAM}\n```", True),
    ("[[BEGIN]]def f(x): return x[[DONE]]", False),
    ("", False), ("[[BEGIN]][[DONE]]", False), ("[[BEGIN]]\0[[DONE]]", False),
    ("[[BEGIN]]\ud800[[DONE]]", False),
])
def test_code(response, verdict):
    assert judges.code(response, ["assert f(1) == 2", "assert f(2) == 3"]) is verdict


def test_every_test_must_pass_and_there_must_be_one():
    assert judges.run_tests(PROGRAM, ["assert f(1) == 2"])
    assert not judges.run_tests(PROGRAM, ["assert f(1) == 2", "assert f(1) == 3"])
    assert not judges.run_tests(PROGRAM, [])
    assert not judges.code(" \n\u200b", ["assert 1 == 1"])
    assert judges.run_tests("class A: pass", ["assert a.x == 1"], setup="a = A()\na.x = 1")
    assert not judges.run_tests("while True: pass", ["assert 1 == 1"], timeout=1)


# ------------------------------------------------------------------------------------------------ LLM


@pytest.mark.parametrize("verdict, replies", [
    (True, ["True", "TRUE", "true.", " True\n", "**True**", "_True_", "'True'", "Decision: True", "[True]",
            "True, not False", "The Provided Answer is correct: True", "[True/False] True",
            "Is it True or False? True", "It differs, but True", "True. The answer is not wrong",
            "True, nothing wrong", "<think>false?</think>\n\nTrue", "I choose True",
            "True if one allows for the spelling", "'True' or 'False': True"]),
    (False, ["False", "FALSE.", "`false`", "Decision: [True/False] False", "False (the reference says true)",
             "true/false: false", "not true", "It is not true.", "isn't true", "That is not entirely true",
             "neither true nor false", "never true", "True or False? It is False", "Is it true? It is false",
             "False. If it were true", "False. Actually, True", "<think>It is true</think>False"]),
    (None, ["", "[True/False]", "untrue", "truely", "Truefalse", "falsehood", "True or False", "True|False",
            "not false", "correct", "Yes",
            "If the Provided Answer is correct, choose only 'True', otherwise choose only 'False'.",
            "If the answer is correct, choose True, otherwise False. True",
            "It is true that the answer is wrong", "True. Actually, False",
             "It is true that the answer differs from the reference", "It's true that this isn't it",
             "True is not the right choice", "True, but the Provided Answer is incorrect.",
             "The answer is wrong. True",
             "True... no, not true",
             "It is true that the answer is not correct", "It is true that it does not match the Reference",
             "If the Provided Answer is correct, choose only 'True'", "I must decide whether it is true",
             "Is it true? No.", "'True' or 'False'", "True, False", "choose only 'True' or 'False'",
             "<think>\nOkay, it is true that", "<think>true</think>", "It would be true", "T", "истина",
             "\ud800"]),
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


def test_the_judge_sees_every_gold_once():
    seen = []
    judge = LLMJudge(lambda prompts: seen.extend(prompts) or ["True"])
    judge([(Example("1", "q", "Paris", aliases=("Lutetia", "Paris", "Paname")), "r")])
    assert "Reference Answer:\nParis or Lutetia or Paname\nDecision:" in seen[0]


def test_a_blank_response_is_never_accepted():
    row = Example("1", "q", "unanswerable", tests=("assert 1 == 1",), unanswerable=True)
    for blank in ("", " \n\t", "\u200b\ufeff", "\xa0\0"):
        assert [list(judge_all(name, [(row, blank)])) for name in JUDGES] == [[False]] * len(JUDGES)
        assert not any(judge(row, blank) for judge in JUDGES.values())
        assert LLMJudge(lambda prompts: ["True"] * len(prompts)).verdicts([(row, "x"),
        (row, blank)]) == [True, False]


def test_a_judge_of_ones_own_never_accepts_a_blank_response_either(monkeypatch):
    monkeypatch.setitem(JUDGES, "anything", lambda x, response: True)
    assert list(judge_all("anything", [(None, "a"), (None, " ")])) == [True, False]


def test_a_judge_without_a_verdict_in_its_first_20_replies_says_so_at_once():
    asked = []

    def thinking(prompts):
        asked.extend(prompts)
        return ["<think>\nOkay, so the"] * len(prompts)

    pairs = [(Example(str(i), "q", "a"), "r") for i in range(600)]
    with pytest.raises(InputError, match="none of its first 20 replies.*Okay, so.*enable_thinking"):
        list(judge_all("llm", pairs, thinking))
    assert len(asked) == 20
    assert list(judge_all("llm", pairs[:19], thinking)) == [None] * 19
    mixed = judge_all("llm", pairs, lambda prompts: ["True"] + ["?"] * (len(prompts) - 1))
    assert list(mixed).count(None) == 600 - 4  # one verdict among the first 20: no reason to stop


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


@pytest.mark.parametrize("response, gold, accepted", [
    ("The answer is “Paris”.", "Paris", True), ("„Paris“", "Paris", True), ("«Paris»…", "Paris", True),
    ("Paris", "“Paris”", True), ("It’s Schindler’s List", "Schindler's List", True),
    ("1990–1995", "1990-1995", True),
    ("「Paris」。", "Paris", True), ("“A”.", "A", True), ("दिल्ली", "दिल्ली", True), ("दिल्ला", "दिल्ली", False),
    ("45", "4.5", False), ("4.5", "45", False), ("It rose by 4.5.", "4.5", True), ("5", ".5", False),
    ("4,5", "45", False),
    ("4500", "4,500", True), ("10000000", "10,000,000", True), ("4.5%", "4.5 %", True), ("4,5", "4.5", True),
    ("4.5", "4", False), ("Version 1.2.3", "1.2.3", True), ("U.S.A.", "USA", True),
])
def test_recall_and_the_marks_of_unicode(response, gold, accepted):
    assert recall(response, gold) is accepted


@pytest.mark.parametrize("response", ["“Unanswerable”.", "„unanswerable“", "«Unknown»", "I don‘t know…",
    "“N/A”"])
def test_an_abstention_in_marks_of_unicode(response):
    assert recall(response, "unanswerable", unanswerable=True) and not recall(response, "unanswerable")
    assert not recall(f"Paris. {response}", "", unanswerable=True)
    assert not recall(f"“Paris.” {response}", "", unanswerable=True)


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


@pytest.mark.parametrize("response", ["", "Paris", "corn/apples", "It is known", "midkiff",
    "an unknown city"])
def test_no_abstention(response):
    assert not abstains(response)


@pytest.mark.parametrize("response, answer, exact, f1", [
    ("the Eiffel Tower.", "Eiffel Tower", True, True),
    ("It is the Eiffel Tower", "Eiffel Tower", False, True),  # precision 2/4, recall 1: F1 is 2/3
    ("I think it is the Eiffel Tower", "Eiffel Tower", False, False),  # 2/6 and 1: exactly a half
    ("", "Eiffel Tower", False, False),
    ("the", "a", False, False),  # nothing is left of either
    ("unanswerable", "unanswerable", False, False),  # there is an answer
    ("Lutetia", "Paris", True, True),  # the second gold
    ("unanswerable", None, True, True),
    ("Paris", None, False, False),
])
def test_exact_and_f1_as_judges(response, answer, exact, f1):
    x = Example("1", "q", answer or "unanswerable", unanswerable=answer is None, aliases=("Lutetia",) if answer else ())
    assert [list(judge_all(name, [(x, response)]))[0] for name in ("exact", "f1")] == [exact, f1]


def test_recall_where_there_is_an_answer():
    assert recall("The capital is Paris.", "Paris") and recall("It is Lutetia", "Paris", aliases=("Lutetia",))
    assert not recall("The capital is Lyon.", "Paris") and not recall("Paris", "Paris France")
    assert recall("Paris " + "x " * 49, "Paris") and not recall("Paris " + "x " * 50, "Paris")
    assert not recall("Paris. The answer is unanswerable.", "Paris") and not recall("unanswerable", "Paris")
    assert not recall("unanswerable", "unanswerable") and not recall("the", "") and not recall("Paris the",
        "the")


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
    ("The Reference Answer says 4.", True), ("Your turn: 4", True), ("Now it's your turn", True),
    ("In my response, 4", True),
    ("It is your turn to move.", False), ("The answer is 4.", False), ("", False),
])
def test_leaks(text, leak):
    assert judges.leaks(text) is leak


# ------------------------------------------------------------------------------------------------ by name


def test_judges_by_name():
    row = Example("1", "q", "#### 2", tests=("assert f(1) == r",), setup="r = 2")
    assert list(judge_all("numeric", [(row, "2"), (row, "3")])) == [True, False]
    assert list(judge_all("code", [(row, PROGRAM), (row, "def f(x): return x")])) == [True, False]
    rows = [Example("1", "q", "Paris", aliases=("Lutetia",)), Example("2", "q",
        "unanswerable", unanswerable=True)]
    pairs = [(x, y) for x in rows for y in ("Lutetia", "unanswerable")]
    assert list(judge_all("recall", pairs)) == [True, False, False, True]


@pytest.mark.parametrize("cores, world, expected", [(8, 1, 8), (8, 2, 4), (2, 4, 1), (1, 1, 1)])
def test_a_process_takes_its_share_of_the_cores_that_it_may_use(monkeypatch, cores, world, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    monkeypatch.setattr(ranks, "LOCAL_WORLD", world)
    assert judges.workers() == expected
    threads = set()
    monkeypatch.setitem(JUDGES, "code", lambda x, y: threads.add(threading.get_ident()) or time.sleep(0.01))
    list(judge_all("code", [(None, "program")] * 40))
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
