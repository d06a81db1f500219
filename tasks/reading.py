"""Reading comprehension: a context, a question, and an answer from the context or none. One loader a data set.

    task            files under --data                                          where they come from
    reading         none: the embedded set, written for this project            examples/reading.json
    nq              nq/{train,dev,test}.json                                    by hand (Slobodkin et al., 2023)
    squad           squad/{train,dev}-v2.0.json                                 downloaded
    squad1          squad/{train,dev}-v1.1.json                                 downloaded
    musique         musique/musique_full_v1.0_{train,dev}.jsonl                 by hand
    multidoc2dial   multidoc2dial/multidoc2dial_{dial_train,dial_validation,doc}.json   downloaded

Every row becomes one Example. Where there is no answer, the gold is the word `unanswerable`, whatever the data has there.

Decided here, the papers being silent:
1. Where the test answers are not public (SQuAD, MuSiQue, MultiDoc2Dial) the development set is the test split, and up to
   150 rows of the training set validate: whole paragraphs, question pairs and dialogues, never parts of one.
2. An id that comes twice, answerable and not (MuSiQue, and Slobodkin's files made from it): the second kind gets the
   ending `-unanswerable`.
3. MultiDoc2Dial is a dialogue over documents. The question is the dialogue so far, the answer the agent's next turn, the
   context the documents which that turn refers to (all of their text), or, where it names none, those of the turn before.
   An agent that says it has no solution (`respond_no_solution`) is the unanswerable kind. Turns that follow no user turn,
   and turns of a dialogue that names no document up to there, are left out.
4. An empty context stays: the row is what the data has.
"""

import json
import random
from dataclasses import replace
from pathlib import Path

from data import ABSTAIN, EXAMPLES, PARAPHRASE_FRAME, SPLIT_SEED, Example, Splits, Task, hold_out
from support.cli import InputError
from support.files import download, read_json, read_jsonl
from tasks.rows import answerable, list_of, need, rename_unanswerable_twins, text_of, unanswerable

READING = """\
Answer the question from the context only, in one short sentence. If the context does not hold the answer, reply with the \
single word: unanswerable.

Context:
{{context}}

Question:
{{question}}"""  # ours
SQUAD_HOME = "https://rajpurkar.github.io/SQuAD-explorer/dataset/"
NQ_HOME = "https://github.com/lovodkin93/unanswerability (a zip on a file-sharing page: unpack its raw_data/NQ)"
MUSIQUE_HOME = "https://github.com/StonyBrookNLP/musique (a zip on a file-sharing page: unpack its data folder)"


def load_nq(folder: Path) -> Splits:
    """Natural Questions with unanswerable rows (Slobodkin et al., 2023), from nq/train.json, nq/dev.json and nq/test.json."""
    return tuple(read_slobodkin(need(folder / "nq" / f"{name}.json", NQ_HOME)) for name in ("train", "dev", "test"))


def read_slobodkin(path: Path) -> list[Example]:
    """Their NQ, SQuAD and MuSiQue files: a JSON list of {id, context, question, answerable: yes or no, answer}."""
    rows = read_json(path)
    if not isinstance(rows, list):
        raise InputError(f"{path}: expected a JSON list of rows")
    return rename_unanswerable_twins([_slobodkin_example(row, f"{path}, row {number}") for number, row in enumerate(rows, 1)])


def _slobodkin_example(row: dict, where: str) -> Example:
    id, question, context, kind = (text_of(row, field, where) for field in ("id", "question", "context", "answerable"))
    if kind not in ("yes", "no"):
        raise InputError(f"{where}: 'answerable' is {kind!r}, expected yes or no")
    if kind == "no":
        return unanswerable(id, question, context)
    golds = _golds(row) or _golds(_additional(row))
    if not golds:
        raise InputError(f"{where}: answerable, but it has no 'answer' (older archives of this data lack them)")
    return answerable(id, question, context, golds)


def _golds(row: dict) -> list[str]:
    """The answers of a row: a text, a list of texts, or SQuAD's {"text": [...]}. The key's name differs by archive."""
    found = row.get("answer") or row.get("answers") or []
    found = found.get("text", []) if isinstance(found, dict) else found
    found = [found] if isinstance(found, str) else found
    return found if isinstance(found, list) and all(isinstance(gold, str) and gold for gold in found) else []


def _additional(row: dict) -> dict:
    """The field additional_data: an object, there written as a text of JSON."""
    found = row.get("additional_data")
    try:
        found = json.loads(found) if isinstance(found, str) else found
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def load_squad(folder: Path, version: str = "2.0") -> Splits:
    """SQuAD (Rajpurkar et al., 2016, 2018): its dev set tests; validation is apart from training by paragraph."""
    paths = [folder / "squad" / f"{name}-v{version}.json" for name in ("train", "dev")]
    for path in paths:
        download(SQUAD_HOME + path.name, path)
    train, test = ([row for article in read_squad(path) for row in article] for path in paths)
    return *hold_out(train, lambda row: row.context), test


def load_squad1(folder: Path) -> Splits:
    """SQuAD v1.1: every question has an answer."""
    return load_squad(folder, "1.1")


def read_squad(path: Path) -> list[list[Example]]:
    """SQuAD v1.1 / v2.0 JSON -> one list of examples an article. Further answers are aliases; v2's impossible rows abstain."""
    articles = enumerate(list_of(read_json(path), "data", f"{path}, read as SQuAD's JSON"), 1)
    return [_squad_article(article, f"{path}, article {number}") for number, article in articles]


def _squad_article(article: dict, where: str) -> list[Example]:
    rows = []
    for number, part in enumerate(list_of(article, "paragraphs", where), 1):
        here = f"{where}, paragraph {number}"
        context = text_of(part, "context", here)
        rows += [_squad_example(context, qa, f"{here}, question {i}") for i, qa in enumerate(list_of(part, "qas", here), 1)]
    return rows


def _squad_example(context: str, qa: dict, where: str) -> Example:
    """No answers means none exist, as in SQuAD's own evaluation; no field `answers` means that the labels are missing."""
    id = text_of(qa, "id", where)
    where = f"{where} (id {id})"
    question = text_of(qa, "question", where)
    if qa.get("is_impossible") or qa.get("answers") == []:
        return unanswerable(id, question, context)
    return answerable(id, question, context, [text_of(answer, "text", where) for answer in list_of(qa, "answers", where)])


def load_musique(folder: Path) -> Splits:
    """MuSiQue-Full (Trivedi et al., 2022): its dev set tests; the two rows of one question are never in two splits."""
    names = [f"musique_full_v1.0_{name}.jsonl" for name in ("train", "dev")]
    train, test = (read_musique(need(folder / "musique" / name, MUSIQUE_HOME)) for name in names)
    return *hold_out(train, lambda row: row.id.removesuffix(f"-{ABSTAIN}")), test


def read_musique(path: Path) -> list[Example]:
    """JSONL rows {id, paragraphs, question, answer, answer_aliases, answerable}; all paragraphs are the context."""
    rows = read_jsonl(path, ("id", "paragraphs", "question"))
    return rename_unanswerable_twins([_musique_example(row, f"{path}, row {number}") for number, row in enumerate(rows, 1)])


def _musique_example(row: dict, where: str) -> Example:
    id, question = text_of(row, "id", where), text_of(row, "question", where)
    fields = ("title", "paragraph_text")
    paragraphs = list_of(row, "paragraphs", where)
    context = "\n\n".join("\n".join(text_of(paragraph, field, where) for field in fields) for paragraph in paragraphs)
    if row.get("answerable") is False:  # the row keeps the answer of its answerable twin
        return unanswerable(id, question, context)
    golds = _golds({"answer": row.get("answer")})
    if not golds:
        raise InputError(f"{where}: the field 'answer' is missing (the test set has none: take the dev set)")
    return answerable(id, question, context, [*golds, *_golds({"answers": row.get("answer_aliases")})])


def load_reading(folder: Path) -> Splits:
    """The embedded set: 60 short passages written for this project, apart by passage, a quarter unanswerable."""
    articles = read_squad(EXAMPLES / "reading.json")
    cut = [articles[:36], articles[36:42], articles[42:]]
    return tuple(pair_unanswerable(part) for part in cut)


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


def read_reading_json(path: Path) -> list[Example]:
    """A person's own .json file: SQuAD's format (an object), or Slobodkin's (a list)."""
    if isinstance(read_json(path), list):
        return read_slobodkin(path)
    return [row for article in read_squad(path) for row in article]


READING_TASK = Task(load_reading, "recall", READING, READING, PARAPHRASE_FRAME % READING, max_new_tokens=64)
