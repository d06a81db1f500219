"""MBPP (Austin et al., 2021): short Python programs, each judged by its three tests. Prompts: Figs. 4 and 6.

A row: {"task_id": 601, "text": "Write a function to ...", "code": "def f(...): ...", "test_setup_code": "",
        "test_list": ["assert f(1) == 2", "assert f(2) == 3", "assert f(3) == 4"]}

Decided here: the gold is the code between [[BEGIN]] and [[DONE]], as the prompt asks. The training split has
374 rows (ids 601 to 974, the data's own split). The paper says 372.

The paper scores its models with bigcode-evaluation-harness. So that published numbers have something beside
them, evaluate.py asks the test rows in that harness's way too: a docstring with the task and the first of its
tests, which the model goes on with, no chat template. Ours is greedy, as the paper decodes. The harness draws
at temperature 0.2 (0.1 in its own example for MBPP), and its 512 tokens hold the prompt too.
"""

from pathlib import Path

from data import PARAPHRASE_FRAME, Example, Splits, Task
from support.cli import InputError
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
        x = mbpp_example(row, str(path))
        examples[x.id] = x
    missing = [id for ids in SPLITS for id in ids if str(id) not in examples]
    if missing:
        raise InputError(f"{path}: has no row with task_id {missing[0]}: remove it, and it is fetched again")
    return tuple([examples[str(id)] for id in ids] for ids in SPLITS)


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


# ------------------------------------------------------------------------ as bigcode-evaluation-harness asks

BIGCODE_STOPS = ("\nclass", "\nassert", '\n"""', "\nprint", "\nif", "\n<|/", "\n```")


def bigcode_prompt(example: Example) -> str:
    """The text that a model goes on with. The first test shows the name of the function."""
    return f'"""\n{example.question}\n{example.tests[0]}\n"""\n'


def bigcode_program(example: Example, continuation: str) -> str:
    """What is run with all tests of the row: the prompt, and its continuation up to the first stop string."""
    end = len(continuation)
    for stop in BIGCODE_STOPS:
        if stop in continuation:
            end = min(end, continuation.index(stop))
    return bigcode_prompt(example) + continuation[:end]


# --------------------------------------------------------------------------------------------------- the task


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
