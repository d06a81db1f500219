"""Reading the fields of a row, or saying in one line what is wrong with it."""

import json
from dataclasses import replace
from pathlib import Path

from data import ABSTAIN, Example
from support.cli import InputError
from support.files import read_jsonl


def need(path: Path, home: str) -> Path:
    """The path of a file that has no plain download. InputError: it is not there."""
    if not path.exists():
        raise InputError(f"{path} is missing and has no plain download: get it from {home} and put it at {path}")
    return path


def field_of(row: dict, field: str, kind: type, called: str, where: str):
    """row[field], which must be of that kind. InputError: `where` and the field."""
    if not isinstance(row, dict) or field not in row:
        raise InputError(f"{where}: the field {field!r} is missing")
    if not isinstance(row[field], kind) or isinstance(row[field], bool):  # a bool is an int in Python
        raise InputError(f"{where}: the field {field!r} must be {called}, found {json.dumps(row[field])[:40]}")
    return row[field]


def text_of(row: dict, field: str, where: str) -> str:
    """A text; a number, as ids and answers often are, becomes one."""
    return str(field_of(row, field, str | int | float, "text", where))


def list_of(row: dict, field: str, where: str) -> list:
    return field_of(row, field, list, "a list", where)


def object_of(row: dict, field: str, where: str) -> dict:
    return field_of(row, field, dict, "an object", where)


def unanswerable(id: str, question: str, context: str) -> Example:
    return Example(id, question, ABSTAIN, context, unanswerable=True)


def answerable(id: str, question: str, context: str, golds) -> Example:
    """The first gold is the answer, the others (once each) its aliases."""
    answer, *aliases = dict.fromkeys(golds)
    return Example(id, question, answer, context, aliases=tuple(aliases))


def rename_unanswerable_twins(rows: list[Example]) -> list[Example]:
    """Tell the two rows of one id apart, where one has an answer and the other has none."""
    answered = {row.id for row in rows if not row.unanswerable}
    return [replace(row, id=f"{row.id}-{ABSTAIN}") if row.unanswerable and row.id in answered else row for row in rows]


def read_counted(path: Path, count: int, fields: tuple[str, ...]) -> list[dict]:
    rows = read_jsonl(path, fields)
    if len(rows) != count:
        raise InputError(f"{path} has {len(rows)} rows, the original has {count}: remove it to download it again")
    return rows
