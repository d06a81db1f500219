"""The rows of a person's own file, whatever it is called and however its fields are named.

A file is a JSON array, JSON lines (under any name), or reading comprehension as SQuAD or Slobodkin et al.
write it. The usual shapes of a row are recognised by the names of its fields, or named by --question-field
and --answer-field:

    {"question": "How many?", "answer": "3", "context": "Ann has 3 apples."}      context: may be left out
    {"instruction": "Translate.", "input": "Hund", "output": "dog"}               input: shown as the context
    {"prompt": "How many?", "completion": "3"}                                    or response
    {"messages": [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "3"}]}
    {"conversations": [{"from": "human", "value": "How many?"}, {"from": "gpt", "value": "3"}]}
    {"Body": "Ann has 3 apples.", "Question": "How many?", "Answer": 3}           SVAMP, ASDiv
    {"question": "How many?", "context": "...", "answers": {"text": ["3"]}}       SQuAD's rows on the hub
    {"text": "Write f.", "code": "def f(): ...", "test_list": ["assert f()"]}     MBPP, for the code judge

An answer is a text or a number, or a list of several that are right. `aliases` lists further ones.
`unanswerable: true` marks a question that the context does not answer. `id` is the row's number where it is
left out.

Files are UTF-8, with or without a byte order mark. What is no JSON (CSV, a spreadsheet, Parquet, packed
files, UTF-16) is named for what it is. No byte of a file is changed.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from data import ABSTAIN, Example
from support.cli import InputError
from support.files import read_bytes
from tasks.reading import read_squad_rows, slobodkin_examples
from tasks.rows import field_of, label_of, list_of, shown, text_of, texts_of

Numbered = list[tuple[str, dict]]  # rows, each with its place in the file, for messages

# -------------------------------------------------------------------------------- a file's rows


@dataclass(frozen=True)
class OwnFile:
    """The rows of one file, and how they were read."""

    rows: list[Example]
    shape: str  # in words
    is_reading: bool = False  # by its format: SQuAD's or Slobodkin's


@dataclass(frozen=True)
class Fields:
    """Which fields of a row hold its parts. The text of `body` comes before the question."""

    question: str
    answer: str
    context: str = "context"
    body: str | None = None

    def __str__(self) -> str:
        question = f"{self.body!r} and {self.question!r}" if self.body else repr(self.question)
        return f"questions from {question}, answers from {self.answer!r}"


QUESTION_FIELDS = ("question", "instruction", "prompt", "problem", "query", "Question", "text", "input")
ANSWER_FIELDS = (
    "answer", "answers", "output", "completion", "response", "solution", "target", "Answer", "code")
LABELS = ("unanswerable", "is_impossible", "answerable")  # of rows that may have no answer
CHAT_FIELDS = ("messages", "conversations")
USER = ("user", "human")
ASSISTANT = ("assistant", "gpt")


def read_own_file(
    path: Path, judge: str, question_field: str | None = None, answer_field: str | None = None
) -> OwnFile:
    """The rows of one file. `question_field` and `answer_field` are names of a person's own, or None."""
    # 1. Formats that name their fields themselves.
    rows = read_rows(path)
    shape = None
    if isinstance(rows, dict):
        shape = "SQuAD's format"
    elif any(isinstance(row.get("answerable"), str) for _, row in rows):
        shape = "Slobodkin's format"
    if shape and (question_field or answer_field):
        raise InputError(f"{path} is in {shape}: --question-field and --answer-field do not go with it")
    if shape:
        examples = read_squad_rows(path) if isinstance(rows, dict) else slobodkin_examples(rows)
        return OwnFile(examples, shape, is_reading=True)

    # 2. Rows of any other names.
    names = field_names(rows)
    fields = recognise(names, question_field, answer_field)
    shape = str(fields)
    chat_field = first_of(CHAT_FIELDS, names)
    if chat_field and not (question_field or answer_field) and fields.question not in names:
        rows = [(where, plain_row(row, chat_field, where)) for where, row in rows]
        fields = Fields("question", "answer")
        shape = f"one user and one assistant turn in {chat_field!r}"
    elif rows:
        check_fields(fields, names, path)

    examples = []
    for number, (where, row) in enumerate(rows, 1):
        examples.append(example_of(row, fields, judge, str(number), where))
    return OwnFile(examples, shape)


def field_names(rows: Numbered) -> list[str]:
    """Every name of a field that occurs in a file, in its order."""
    names = {}
    for _, row in rows:
        names.update(dict.fromkeys(row))
    return list(names)


def recognise(names: list[str], question_field: str | None, answer_field: str | None) -> Fields:
    """The fields by the names that occur in a file.

    What is not recognised is taken to be `question` and `answer`.
    """
    question = question_field or first_of(QUESTION_FIELDS, names) or "question"
    answer = answer_field or first_of(ANSWER_FIELDS, names) or "answer"
    context = "context"
    body = None
    if question == "instruction" and "context" not in names:
        context = "input"  # as in Alpaca's rows
    if question in ("Question", "question"):
        body = first_of(("Body", "body"), names)  # as in SVAMP's rows
    return Fields(question, answer, context, body)


def check_fields(fields: Fields, names: list[str], path: Path) -> None:
    """InputError: no row of the file has such a question, or such an answer."""
    wanted = [("question", fields.question)]
    if not first_of(LABELS, names):  # else the rows may all be without an answer
        wanted.append(("answer", fields.answer))
    for flag, field in wanted:
        if field not in names:
            found = ", ".join(names) or "none"
            where = f"{path}, line 1"
            raise InputError(
                f"{where}: the field {field!r} is missing (found: {found}): name yours with --{flag}-field")


def first_of(candidates: tuple[str, ...], names) -> str | None:
    return next((name for name in candidates if name in names), None)


def plain_row(row: dict, field: str, where: str) -> dict:
    """A row of chat messages as one with question and answer."""
    roles = []
    texts = []
    for number, turn in enumerate(list_of(row, field, where), 1):
        here = f"{where}, {field} {number}"
        sharegpt = isinstance(turn, dict) and "from" in turn
        roles.append(text_of(turn, "from" if sharegpt else "role", here))
        texts.append(text_of(turn, "value" if sharegpt else "content", here))
    if len(roles) != 2 or roles[0] not in USER or roles[1] not in ASSISTANT:
        found = ", ".join(roles) or "none"
        raise InputError(
            f"{where}: the field {field!r} must be one user and one assistant turn, found {found}: leave "
            "other turns out, or put them into the user's")
    return row | {"question": texts[0], "answer": texts[1]}


# -------------------------------------------------------------------------------- a row


def example_of(row: dict, fields: Fields, judge: str, default_id: str, where: str) -> Example:
    """InputError: a field is missing or of another type, with its name and place."""
    question = text_of(row, fields.question, where)
    if fields.body:
        question = f"{text_of(row, fields.body, where)} {question}"
    if not question.strip():
        raise InputError(f"{where}: the field {fields.question!r} is empty: every row needs a question")

    golds = golds_of(row, fields, where)
    tests_field = first_of(("tests", "test_list"), row)
    setup_field = first_of(("setup", "test_setup_code"), row)
    id_field = first_of(("id", "ID", "task_id"), row)
    if judge == "code" and tests_field is None:
        found = ", ".join(row)
        raise InputError(f"{where}: the field 'tests' is missing (found: {found}): --judge code runs them")
    return Example(
        id=text_of(row, id_field, where) if id_field else default_id,
        question=question,
        answer=golds[0] if golds else ABSTAIN,
        context=text_of(row, fields.context, where) if fields.context in row else "",
        tests=tuple(texts_of(row, tests_field, where)) if tests_field else (),
        setup=text_of(row, setup_field, where) if setup_field else "",
        unanswerable=not golds,
        aliases=tuple(golds[1:]),
    )


def golds_of(row: dict, fields: Fields, where: str) -> list[str]:
    """The answers of a row, once each. [] where the question has none."""
    marked = label_of(row, "unanswerable", False, where) or label_of(row, "is_impossible", False, where)
    if marked or not label_of(row, "answerable", True, where):
        return []

    value = field_of(row, fields.answer, object, "", where)
    if isinstance(value, dict) and "text" in value:  # as in SQuAD's rows, where no text means no answer
        return list(dict.fromkeys(texts_of(value, "text", f"{where}, {fields.answer}")))
    if value == []:
        raise InputError(
            f"{where}: the field {fields.answer!r} is an empty list: give an answer, or mark the row "
            '"unanswerable": true')
    if isinstance(value, list):
        golds = [text_of({fields.answer: gold}, fields.answer, where) for gold in value]
    else:
        golds = [text_of(row, fields.answer, where)]

    aliases_field = first_of(("aliases", "answer_aliases"), row)
    if aliases_field and row[aliases_field] is not None:
        golds += texts_of(row, aliases_field, where)
    return list(dict.fromkeys(golds))


# -------------------------------------------------------------------------------- bytes -> rows

TO_JSON = ".to_json(G, orient='records', lines=True)"
BEGINNINGS = {  # of files that are no text
    b"\x1f\x8b": "a gzip file: unpack it",
    b"PK": "a zip file (or a spreadsheet): unpack it, or export it as JSON lines",
    b"BZh": "a bzip2 file: unpack it",
    b"\xfd7zXZ": "an xz file: unpack it",
    b"\x28\xb5\x2f\xfd": "a zstd file: unpack it",
    b"PAR1": f"a Parquet file: write it as JSON lines, for example with pandas.read_parquet(F){TO_JSON}",
    b"ARROW1": "an Arrow file: write it as JSON lines, for example with datasets' to_json",
    b"\xff\xfe": "text in UTF-16: save it as UTF-8",
    b"\xfe\xff": "text in UTF-16: save it as UTF-8",
}


def read_rows(path: Path) -> Numbered | dict:
    """The rows of a file. Where it is one object of articles (SQuAD's format), that object.

    InputError: in one line, the file, the line or row, what is wrong, and what to do.
    """
    text = read_text(path)
    try:
        value = json.loads(text)
    except RecursionError:
        raise InputError(f"{path}, line 1: not valid JSON (nested too deeply)") from None
    except ValueError as error:
        if text.lstrip().startswith("["):
            where = f"{path}, line {getattr(error, 'lineno', 1)}"
            raise InputError(f"{where}: not valid JSON ({error}): the file begins as a JSON array") from None
        return read_lines(path, text)

    if isinstance(value, dict) and isinstance(value.get("data"), list):
        if any("paragraphs" in article for article in value["data"] if isinstance(article, dict)):
            return value
        value = value["data"]
    if not isinstance(value, list):
        return check_objects([(f"{path}, line 1", value)])
    return check_objects([(f"{path}, row {number}", row) for number, row in enumerate(value, 1)])


def read_text(path: Path) -> str:
    """The text of a file in UTF-8. InputError says what the file is instead."""
    content = read_bytes(path)
    for beginning, kind in BEGINNINGS.items():
        if content.startswith(beginning):
            raise InputError(f"{path} is {kind}")
    if b"\0" in content:
        raise InputError(f"{path} is no text in UTF-8: it holds zero bytes (UTF-16 does). Save it as UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}, line {line}: no text in UTF-8 ({error.reason}): save it so") from None


def read_lines(path: Path, text: str) -> Numbered:
    """JSON lines. Blank lines are no rows."""
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        if not rows and is_table(line):
            raise InputError(
                f"{path} looks like a table (CSV): its first line is {shown(line.strip())}. Write one JSON "
                f"object a line, for example with pandas.read_csv(F){TO_JSON}")
        try:
            rows.append((where, json.loads(line)))
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}: not valid JSON ({str(error) or 'nested too deeply'})") from None
    return check_objects(rows)


def is_table(line: str) -> bool:
    begins_as_json = line.lstrip().startswith(("{", "["))
    has_columns = any(mark in line for mark in (",", "\t", ";"))
    return has_columns and not begins_as_json


def check_objects(rows: list) -> Numbered:
    for where, row in rows:
        if not isinstance(row, dict):
            raise InputError(f"{where}: expected a JSON object, found {type(row).__name__}")
    return rows
