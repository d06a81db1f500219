"""MBPP (Austin et al., 2021): short Python programs, each judged by its three tests. Prompts: Figs. 4 and 6.

A row: {"task_id": 601, "text": "Write a function to ...", "code": "def f(...): ...", "test_setup_code": "",
        "test_list": ["assert f(1) == 2", "assert f(2) == 3", "assert f(3) == 4"]}

Decided here: the gold is the code between [[BEGIN]] and [[DONE]], as the prompt asks. The training split has
374 rows (ids 601 to 974, the data's own split). The paper says 372.
"""

from pathlib import Path

from data import PARAPHRASE_FRAME, Example, Splits, Task
from support.files import download
from tasks.rows import read_counted, text_of, texts_of

MBPP_PREDICT = """\
You are an expert Python programmer, and here is your task: {{task}}. Your code should pass these tests:
{{testcase_1}}
{{testcase_2}}
{{testcase_3}}
Generate only the python code encapsulated between [[BEGIN]] and [[DONE]] tags. Do not generate any \
explanation."""  # Fig. 4
MBPP_PARAPHRASE = PARAPHRASE_FRAME % """\
You are an expert Python programmer, and here is your task: {{task}}. Your code should pass these tests.

{{testcase_1}}
{{testcase_2}}
{{testcase_3}}

Generate only the python code encapsulated between [[BEGIN]] and [[DONE]] tags. Do not generate any \
explanation."""  # Fig. 6

HOME = "https://raw.githubusercontent.com/google-research/google-research/master/mbpp/mbpp.jsonl"
SHA256 = "ccf64ceae9c5403bf50a044cb6d505bfd2a2963ee58338ba268fd65beab92a9f"
COUNT = 974
SPLITS = (range(601, 975), range(511, 601), range(11, 511))  # ids of train, validation, test


def load_mbpp(folder: Path) -> Splits:
    """Ids 601-974 train, 511-600 validate, 11-510 test: the data's own split, as the paper uses it (A.2)."""
    path = folder / "mbpp" / "mbpp.jsonl"
    download(HOME, path, SHA256)
    examples = {}
    for row in read_counted(path, COUNT, ("task_id", "text", "code", "test_list", "test_setup_code")):
        examples[row["task_id"]] = mbpp_example(row, str(path))
    return tuple([examples[id] for id in ids] for ids in SPLITS)


def mbpp_example(row: dict, where: str = "MBPP") -> Example:
    """One row of the data as it is published."""
    id = text_of(row, "task_id", where)
    where = f"{where}, task_id {id}"
    return Example(
        id,
        text_of(row, "text", where),
        text_of(row, "code", where).replace("\r\n", "\n"),
        tests=tuple(texts_of(row, "test_list", where)),
        setup=text_of(row, "test_setup_code", where),
    )


def mbpp_gold(example: Example) -> str:
    return f"[[BEGIN]]\n{example.answer.strip()}\n[[DONE]]"


MBPP = Task(
    load_mbpp,
    judge="code",
    predict=MBPP_PREDICT,
    train=MBPP_PREDICT,
    paraphrase=MBPP_PARAPHRASE,
    gold=mbpp_gold,
    stop="[[DONE]]",
    steps=1000,
    eval_every=100,
)
