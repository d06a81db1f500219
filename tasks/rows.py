"""Reading the fields of a row, or saying in one line what is wrong with it."""

import json
from dataclasses import replace
from pathlib import Path

from data import ABSTAIN, Example
from support.cli import InputError
from support.files import read_jsonl

# -------------------------------------------------------------------------------- files


def need(path: Path, home: str) -> Path:
    """The path of a file that has no plain download. InputError: it is not there."""
    if not path.exists():
        raise InputError(
            f"{path} is missing and has no plain download: get it from {home} and put it at {path}")
    return path


def read_counted(path: Path, count: int, fields: tuple[str, ...]) -> list[dict]:
    """The rows of a JSONL file. InputError: they are not as many as the original has."""
    rows = read_jsonl(path, fields)
    if len(rows) != count:
        raise InputError(
            f"{path} has {len(rows)} rows, the original has {count}: remove it to download it again")
    return rows


# -------------------------------------------------------------------------------- fields


def field_of(row: dict, field: str, kind: type, called: str, where: str):
    """row[field], which must be of that kind. InputError: `where` and the field."""
    if not isinstance(row, dict):
        raise InputError(f"{where}: the field {field!r} is missing: this is no JSON object: {shown(row)}")
    if field not in row:
        raise InputError(f"{where}: the field {field!r} is missing (found: {', '.join(row) or 'none'})")
    value = row[field]
    bool_as_number = isinstance(value, bool) and kind not in (bool, object)  # a bool is an int in Python
    if bool_as_number or not isinstance(value, kind):
        raise InputError(f"{where}: the field {field!r} must be {called}, found {shown(value)}")
    return value


def shown(value) -> str:
    """The beginning of a value as JSON writes it."""
    return json.dumps(value, ensure_ascii=False)[:40]


def text_of(row: dict, field: str, where: str) -> str:
    """A text. A number, as ids and answers often are, becomes one."""
    return str(field_of(row, field, str | int | float, "text", where))


def list_of(row: dict, field: str, where: str) -> list:
    return field_of(row, field, list, "a list", where)


def texts_of(row: dict, field: str, where: str) -> list[str]:
    found = field_of(row, field, object, "", where)
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise InputError(f"{where}: {field!r} must be a list of strings, found {shown(found)}")
    return found


def object_of(row: dict, field: str, where: str) -> dict:
    return field_of(row, field, dict, "an object", where)


def label_of(row: dict, field: str, default: bool, where: str) -> bool:
    """A label, which must be true or false.

    Where it is missing or null, `default`. The text "false" is refused.
    """
    if row.get(field) is None:
        return default
    return field_of(row, field, bool, "true or false", where)


# -------------------------------------------------------------------------------- examples with a context


def unanswerable(id: str, question: str, context: str) -> Example:
    return Example(id, question, ABSTAIN, context, unanswerable=True)


def answerable(id: str, question: str, context: str, golds: list[str]) -> Example:
    """The first gold is the answer, the others (once each) are its aliases."""
    answer, *aliases = dict.fromkeys(golds)
    return Example(id, question, answer, context, aliases=tuple(aliases))


def rename_unanswerable_twins(rows: list[Example]) -> list[Example]:
    """Give two ids to the two rows of one id, of which one has an answer and the other has none."""
    answered = {row.id for row in rows if not row.unanswerable}
    renamed = []
    for row in rows:
        if row.unanswerable and row.id in answered:
            row = replace(row, id=f"{row.id}-{ABSTAIN}")
        renamed.append(row)
    return renamed


def check_ids(rows: list[Example], where: str) -> None:
    """InputError: there are no rows, or an id comes twice."""
    if not rows:
        raise InputError(f"{where}: no rows")
    seen = set()
    for row in rows:
        if row.id in seen:
            raise InputError(f"{where}: the id {row.id!r} comes twice")
        seen.add(row.id)
