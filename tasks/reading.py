"""Reading comprehension: a context, a question, and an answer from the context or none.

One loader a data set.

    task            files under --data                                      where they come from
    reading         none: the embedded set, written for this project        examples/reading.json
    nq              nq/{train,dev,test}.json                                by hand (Slobodkin et al., 2023)
    squad           squad/{train,dev}-v2.0.json                             downloaded
    squad1          squad/{train,dev}-v1.1.json                             downloaded
    musique         musique/musique_full_v1.0_{train,dev}.jsonl             by hand

MultiDoc2Dial, which has the same prompt, is in a file of its own. Every row becomes one Example. Where there
is no answer, the gold is the word `unanswerable`, whatever the data has there.

Decided here, the papers being silent:
1. Where the test answers are not public (SQuAD, MuSiQue, MultiDoc2Dial) the development set is the test
   split, and up to 150 rows of the training set validate: whole paragraphs, question pairs and dialogues,
   never parts of one.
2. An id that comes twice, answerable and not (MuSiQue, and Slobodkin's files made from it): the second kind
   gets the ending `-unanswerable`.
3. An empty context stays: the row is what the data has.
"""

import json
import random
from dataclasses import replace
from pathlib import Path

from data import ABSTAIN, EXAMPLES, PARAPHRASE_FRAME, SPLIT_SEED, Example, Splits, Task, hold_out
from support.cli import InputError
from support.files import download, read_json, read_jsonl
from tasks.rows import answerable, label_of, list_of, need, rename_unanswerable_twins, text_of, unanswerable

READING = """\
Answer the question from the context only, in one short sentence. If the context does not hold the answer, \
reply with the single word: unanswerable.

Context:
{{context}}

Question:
{{question}}"""  # ours

SQUAD_HOME = "https://rajpurkar.github.io/SQuAD-explorer/dataset/"
BY_HAND = "(a zip on a file-sharing page: unpack its {})"
NQ_HOME = "https://github.com/lovodkin93/unanswerability " + BY_HAND.format("raw_data/NQ")
MUSIQUE_HOME = "https://github.com/StonyBrookNLP/musique " + BY_HAND.format("data folder")


# -------------------------------------------------------------------------------- Slobodkin et al.


def load_nq(folder: Path) -> Splits:
    """Natural Questions with unanswerable rows (Slobodkin et al., 2023): nq/train.json, dev.json, test.json.
    """
    train, validation, test = (
        read_slobodkin(need(folder / "nq" / f"{name}.json", NQ_HOME)) for name in ("train", "dev", "test"))
    return train, validation, test


def read_slobodkin(path: Path) -> list[Example]:
    """Their NQ, SQuAD and MuSiQue files: a JSON list of rows.

    A row: {"id": "1", "context": "Ann is 7.", "question": "How old is Ann?", "answerable": "yes", "answer":
    "7"}
    """
    rows = read_json(path)
    if not isinstance(rows, list):
        raise InputError(f"{path}: expected a JSON list of rows")
    return slobodkin_examples([(f"{path}, row {number}", row) for number, row in enumerate(rows, 1)])


def slobodkin_examples(numbered: list[tuple[str, dict]]) -> list[Example]:
    """The examples of rows that come each with its place in a file, for messages."""
    return rename_unanswerable_twins([_slobodkin_example(row, where) for where, row in numbered])


def _slobodkin_example(row: dict, where: str) -> Example:
    id = text_of(row, "id", where)
    question = text_of(row, "question", where)
    context = text_of(row, "context", where)
    kind = text_of(row, "answerable", where)
    if kind not in ("yes", "no"):
        raise InputError(f"{where}: 'answerable' is {kind!r}, expected yes or no")
    if kind == "no":
        return unanswerable(id, question, context)

    golds = _golds_of(row) or _golds_of(_additional_data(row))
    if not golds:
        raise InputError(
            f"{where}: answerable, but it has no 'answer' (older archives of this data lack them)")
    return answerable(id, question, context, golds)


def _golds_of(row: dict) -> list[str]:
    """The field `answer`, or `answers`: the key's name differs by archive."""
    return golds_in(row.get("answer") or row.get("answers"))


def golds_in(value) -> list[str]:
    """The texts of a text, a list of texts, or SQuAD's {"text": [...]}. [] where it is none of these."""
    if isinstance(value, dict):
        value = value.get("text")
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list):
        return []
    for text in value:
        if not isinstance(text, str) or not text:
            return []
    return value


def _additional_data(row: dict) -> dict:
    """The field additional_data: an object, there written as a text of JSON."""
    found = row.get("additional_data")
    if isinstance(found, str):
        try:
            found = json.loads(found)
        except ValueError:
            return {}
    return found if isinstance(found, dict) else {}


# -------------------------------------------------------------------------------- SQuAD


def load_squad(folder: Path, version: str = "2.0") -> Splits:
    """SQuAD (Rajpurkar et al., 2016, 2018): its dev set tests. Validation and training share no paragraph."""
    train_path = folder / "squad" / f"train-v{version}.json"
    test_path = folder / "squad" / f"dev-v{version}.json"
    for path in (train_path, test_path):
        download(SQUAD_HOME + path.name, path)

    train, validation = hold_out(read_squad_rows(train_path), lambda row: row.context)
    return train, validation, read_squad_rows(test_path)


def load_squad1(folder: Path) -> Splits:
    """SQuAD v1.1: every question has an answer."""
    return load_squad(folder, "1.1")


def read_squad_rows(path: Path) -> list[Example]:
    """SQuAD's JSON as one list of examples."""
    return [row for article in read_squad(path) for row in article]


def read_squad(path: Path) -> list[list[Example]]:
    """SQuAD v1.1 or v2.0 JSON -> one list of examples an article. Further answers are aliases.

    An article: {"title": "T", "paragraphs": [{"context": "Ann is 7.", "qas": [
                    {"id": "1", "question": "How old is Ann?", "is_impossible": false,
                     "answers": [{"text": "7", "answer_start": 7}]}]}]}
    """
    articles = list_of(read_json(path), "data", f"{path}, read as SQuAD's JSON")
    found = []
    for number, article in enumerate(articles, 1):
        found.append(_squad_article(article, f"{path}, article {number}"))
    return found


def _squad_article(article: dict, where: str) -> list[Example]:
    rows = []
    for number, paragraph in enumerate(list_of(article, "paragraphs", where), 1):
        here = f"{where}, paragraph {number}"
        context = text_of(paragraph, "context", here)
        for place, qa in enumerate(list_of(paragraph, "qas", here), 1):
            rows.append(_squad_example(context, qa, f"{here}, question {place}"))
    return rows


def _squad_example(context: str, qa: dict, where: str) -> Example:
    """No answers means that none exist, as in SQuAD's own evaluation.

    No field `answers` means that the labels are missing.
    """
    id = text_of(qa, "id", where)
    where = f"{where} (id {id})"
    question = text_of(qa, "question", where)
    if label_of(qa, "is_impossible", False, where) or qa.get("answers") == []:
        return unanswerable(id, question, context)
    golds = [text_of(answer, "text", where) for answer in list_of(qa, "answers", where)]
    return answerable(id, question, context, golds)


# -------------------------------------------------------------------------------- MuSiQue


def load_musique(folder: Path) -> Splits:
    """MuSiQue-Full (Trivedi et al., 2022): its dev set tests.

    The two rows of one question are never in two splits.
    """
    train_path = need(folder / "musique" / "musique_full_v1.0_train.jsonl", MUSIQUE_HOME)
    test_path = need(folder / "musique" / "musique_full_v1.0_dev.jsonl", MUSIQUE_HOME)
    train, validation = hold_out(read_musique(train_path), lambda row: row.id.removesuffix(f"-{ABSTAIN}"))
    return train, validation, read_musique(test_path)


def read_musique(path: Path) -> list[Example]:
    """JSONL rows, of which all paragraphs are the context.

    A row: {"id": "2hop__1", "paragraphs": [{"title": "Ann", "paragraph_text": "Ann is 7."}],
            "question": "How old is Ann?", "answer": "7", "answer_aliases": ["seven"], "answerable": true}
    """
    examples = []
    for number, row in enumerate(read_jsonl(path, ("id", "paragraphs", "question")), 1):
        examples.append(_musique_example(row, f"{path}, row {number}"))
    return rename_unanswerable_twins(examples)


def _musique_example(row: dict, where: str) -> Example:
    id = text_of(row, "id", where)
    question = text_of(row, "question", where)
    paragraphs = []
    for paragraph in list_of(row, "paragraphs", where):
        title = text_of(paragraph, "title", where)
        text = text_of(paragraph, "paragraph_text", where)
        paragraphs.append(f"{title}\n{text}")
    context = "\n\n".join(paragraphs)

    if not label_of(row, "answerable", True, where):  # the row keeps the answer of its answerable twin
        return unanswerable(id, question, context)
    golds = golds_in(row.get("answer"))
    if not golds:
        raise InputError(f"{where}: the field 'answer' is missing (the test set has none: take the dev set)")
    return answerable(id, question, context, golds + golds_in(row.get("answer_aliases")))


# -------------------------------------------------------------------------------- the embedded set


PARTS = (slice(36), slice(36, 42), slice(42, None))  # the passages that train, validate and test


def load_reading(folder: Path) -> Splits:
    """60 short passages written for this project, split by passage. A quarter of the rows is unanswerable."""
    articles = read_squad(EXAMPLES / "reading.json")
    train, validation, test = [pair_unanswerable(articles[part]) for part in PARTS]
    return train, validation, test


def pair_unanswerable(articles: list[list[Example]]) -> list[Example]:
    """Make every fourth question unanswerable by showing it beside a context of another article."""
    rng = random.Random(SPLIT_SEED)
    rows = []
    for article in articles:
        others = [row.context for other in articles if other is not article for row in other]
        for row in article:
            if len(rows) % 4 == 3 and others:
                row = replace(row, context=rng.choice(others), answer=ABSTAIN, aliases=(), unanswerable=True)
            rows.append(row)
    return rows


# -------------------------------------------------------------------------------- tasks

READING_TASK = Task(
    load_reading,
    judge="recall",
    predict=READING,
    train=READING,
    paraphrase=PARAPHRASE_FRAME % READING,
    max_new_tokens=64,
)
EMBEDDED = replace(READING_TASK, steps=12, eval_every=12)
NQ = replace(READING_TASK, load=load_nq, judge="llm")
SQUAD = replace(READING_TASK, load=load_squad)
SQUAD1 = replace(READING_TASK, load=load_squad1)
MUSIQUE = replace(READING_TASK, load=load_musique)
