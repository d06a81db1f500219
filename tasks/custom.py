"""A person's own files as a task: JSONL rows with question and answer, or .json as SQuAD has it."""

from pathlib import Path

from data import ABSTAIN, PARAPHRASE_FRAME, Example, Task
from support.cli import InputError
from support.files import line_numbers, read_jsonl
from tasks.mbpp import mbpp_gold
from tasks.reading import read_reading_json
from tasks.rows import text_of

PLAIN = "{{question}}"
CODE = """\
{{question}}
Your code should pass these tests:
{{tests}}
Generate only the python code encapsulated between [[BEGIN]] and [[DONE]] tags. Do not generate any explanation."""  # as Fig. 4


def load_custom(path: Path | str, judge: str) -> list[Example]:
    """A person's own file: JSONL rows with question and answer (and context, tests, setup, id), or .json as SQuAD has it.

    One answer a row, a text or a number; several golds a question are for the .json formats.
    """
    path = Path(path)
    if path.suffix == ".json":
        return read_reading_json(path)
    needed = ("question", "tests") if judge == "code" else ("question",)
    rows = read_jsonl(path, needed)
    numbered = enumerate(zip(line_numbers(path), rows, strict=True), 1)
    return [_custom_example(row, f"{path}, line {n}", str(i)) for i, (n, row) in numbered]


def _custom_example(row: dict, where: str, default_id: str) -> Example:
    unanswerable = row.get("unanswerable") is True
    tests = row.get("tests", [])
    if not isinstance(tests, list) or not all(isinstance(test, str) for test in tests):
        raise InputError(f"{where}: 'tests' must be a list of strings")
    row = {"id": default_id, "context": "", "setup": ""} | row  # what may be left out, but not be null
    texts = {field: text_of(row, field, where) for field in ("id", "question", "context", "setup")}
    answer = ABSTAIN if unanswerable else text_of(row, "answer", where)
    return Example(**texts, answer=answer, tests=tuple(tests), unanswerable=unanswerable)


CUSTOM_TASK = Task(load_custom, "", PLAIN, PLAIN, PARAPHRASE_FRAME % PLAIN, steps=1000, eval_every=100)
CODE_TASK = Task(load_custom, "code", CODE, CODE, PARAPHRASE_FRAME % CODE, mbpp_gold, stop="[[DONE]]")
