"""A person's own files as a task: JSONL rows with question and answer, or .json as SQuAD has it."""

from pathlib import Path

from data import ABSTAIN, PARAPHRASE_FRAME, Example, Splits, Task
from support.files import read_json
from tasks.mbpp import mbpp_gold
from tasks.reading import READING_TASK, read_slobodkin, read_squad_rows
from tasks.rows import check_ids, label_of, numbered_rows, text_of, texts_of

PLAIN = "{{question}}"
# As Fig. 4, for any number of tests.
CODE = """\
{{question}}
Your code should pass these tests:
{{tests}}
Generate only the python code encapsulated between [[BEGIN]] and [[DONE]] tags. Do not generate any \
explanation."""

CUSTOM_TASK = Task(
    None, judge="", predict=PLAIN, train=PLAIN, paraphrase=PARAPHRASE_FRAME % PLAIN, steps=1000, eval_every=100)
CODE_TASK = Task(
    None,
    judge="code",
    predict=CODE,
    train=CODE,
    paraphrase=PARAPHRASE_FRAME % CODE,
    gold=mbpp_gold,
    stop="[[DONE]]",
)


def load_custom_task(files: list[str], judge: str) -> tuple[Task, Splits]:
    """The task and its (train, validation, test) rows, from the three files of a person."""
    splits = tuple(load_custom(path, judge) for path in files)
    for split, rows in zip(("train", "validation", "test"), splits, strict=True):
        check_ids(rows, f"custom, {split}")
    if judge == "code":
        return CODE_TASK, splits
    if any(row.context for row in splits[0]):
        return READING_TASK, splits
    return CUSTOM_TASK, splits


def load_custom(path: Path | str, judge: str) -> list[Example]:
    """A person's own file: JSONL rows with question and answer (and context, tests, setup, id), or .json as
    SQuAD has it.

    One answer a row, a text or a number. Several golds a question are for the .json formats.
    """
    path = Path(path)
    if path.suffix == ".json":
        if isinstance(read_json(path), list):
            return read_slobodkin(path)
        return read_squad_rows(path)
    needed = ("question", "tests") if judge == "code" else ("question",)
    numbered = numbered_rows(path, needed)
    return [_custom_example(row, where, str(number)) for number, (where, row) in enumerate(numbered, 1)]


def _custom_example(row: dict, where: str, default_id: str) -> Example:
    unanswerable = label_of(row, "unanswerable", False, where)
    row = {"id": default_id, "context": "", "setup": "", "tests": []} | row  # what may be left out, but not be null
    return Example(
        id=text_of(row, "id", where),
        question=text_of(row, "question", where),
        answer=ABSTAIN if unanswerable else text_of(row, "answer", where),
        context=text_of(row, "context", where),
        tests=tuple(texts_of(row, "tests", where)),
        setup=text_of(row, "setup", where),
        unanswerable=unanswerable,
    )
