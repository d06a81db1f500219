"""MBPP (Austin et al., 2021): short Python programs, each judged by its three tests. Prompts: Figs. 4 and 6.

A row: {"task_id": 601, "text": "Write a function to ...", "code": "def f(...): ...", "test_list": ["assert f(1) == 2", ...]}

Decided here: the gold is the code between [[BEGIN]] and [[DONE]], as the prompt asks. The training split has 374 rows (ids 601
to 974, the data's own split). The paper says 372.
"""

from pathlib import Path

from data import PARAPHRASE_FRAME, Example, Splits
from support.files import download
from tasks.rows import read_counted

MBPP_PREDICT = """\
You are an expert Python programmer, and here is your task: {{task}}. Your code should pass these tests:
{{testcase_1}}
{{testcase_2}}
{{testcase_3}}
Generate only the python code encapsulated between [[BEGIN]] and [[DONE]] tags. Do not generate any explanation."""  # Fig. 4
MBPP_PARAPHRASE = PARAPHRASE_FRAME % """\
You are an expert Python programmer, and here is your task: {{task}}. Your code should pass these tests.

{{testcase_1}}
{{testcase_2}}
{{testcase_3}}

Generate only the python code encapsulated between [[BEGIN]] and [[DONE]] tags. Do not generate any explanation."""  # Fig. 6
MBPP_HOME = "https://raw.githubusercontent.com/google-research/google-research/master/mbpp/mbpp.jsonl"
MBPP_SHA256 = "ccf64ceae9c5403bf50a044cb6d505bfd2a2963ee58338ba268fd65beab92a9f"


def load_mbpp(folder: Path) -> Splits:
    """Ids 601-974 train, 511-600 validate, 11-510 test: the data's own split, as the paper uses it (A.2)."""
    path = folder / "mbpp" / "mbpp.jsonl"
    download(MBPP_HOME, path, MBPP_SHA256)
    rows = read_counted(path, 974, ("task_id", "text", "code", "test_list", "test_setup_code"))
    made = {row["task_id"]: mbpp_example(row) for row in rows}
    return tuple([made[i] for i in ids] for ids in (range(601, 975), range(511, 601), range(11, 511)))


def mbpp_example(row: dict) -> Example:
    tests, setup = tuple(row["test_list"]), row["test_setup_code"]
    return Example(str(row["task_id"]), row["text"], row["code"].replace("\r\n", "\n"), tests=tests, setup=setup)


def mbpp_gold(example: Example) -> str:
    return f"[[BEGIN]]\n{example.answer.strip()}\n[[DONE]]"
