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
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from files import InputError, download, read_json, read_jsonl, write_bytes
from records import ABSTAIN, EXAMPLES, SPLIT_SEED, Example, Splits, hold_out

SQUAD_HOME = "https://rajpurkar.github.io/SQuAD-explorer/dataset/"
NQ_HOME = "https://github.com/lovodkin93/unanswerability (a zip on a file-sharing page: unpack its raw_data/NQ)"
MUSIQUE_HOME = "https://github.com/StonyBrookNLP/musique (a zip on a file-sharing page: unpack its data folder)"
MULTIDOC2DIAL_HOME = "https://doc2dial.github.io/multidoc2dial/file/multidoc2dial.zip"


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


def apart(rows: list[Example]) -> list[Example]:
    """Tell the two rows of one id apart, where one has an answer and the other has none."""
    answered = {row.id for row in rows if not row.unanswerable}
    return [replace(row, id=f"{row.id}-{ABSTAIN}") if row.unanswerable and row.id in answered else row for row in rows]


# ------------------------------------------------------------------------------------------------ Slobodkin et al., 2023


def load_nq(folder: Path) -> Splits:
    """Natural Questions with unanswerable rows (Slobodkin et al., 2023), from nq/train.json, nq/dev.json and nq/test.json."""
    return tuple(read_slobodkin(need(folder / "nq" / f"{name}.json", NQ_HOME)) for name in ("train", "dev", "test"))


def read_slobodkin(path: Path) -> list[Example]:
    """Their NQ, SQuAD and MuSiQue files: a JSON list of {id, context, question, answerable: yes or no, answer}."""
    rows = read_json(path)
    if not isinstance(rows, list):
        raise InputError(f"{path}: expected a JSON list of rows")
    return apart([_slobodkin_example(row, f"{path}, row {number}") for number, row in enumerate(rows, 1)])


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


# ------------------------------------------------------------------------------------------------ SQuAD


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


# ------------------------------------------------------------------------------------------------ MuSiQue


def load_musique(folder: Path) -> Splits:
    """MuSiQue-Full (Trivedi et al., 2022): its dev set tests; the two rows of one question are never in two splits."""
    names = [f"musique_full_v1.0_{name}.jsonl" for name in ("train", "dev")]
    train, test = (read_musique(need(folder / "musique" / name, MUSIQUE_HOME)) for name in names)
    return *hold_out(train, lambda row: row.id.removesuffix(f"-{ABSTAIN}")), test


def read_musique(path: Path) -> list[Example]:
    """JSONL rows {id, paragraphs, question, answer, answer_aliases, answerable}; all paragraphs are the context."""
    rows = read_jsonl(path, ("id", "paragraphs", "question"))
    return apart([_musique_example(row, f"{path}, row {number}") for number, row in enumerate(rows, 1)])


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


# ------------------------------------------------------------------------------------------------ MultiDoc2Dial


def load_multidoc2dial(folder: Path) -> Splits:
    """MultiDoc2Dial (Feng et al., 2021): its validation set tests; validation is apart from training by dialogue."""
    folder = folder / "multidoc2dial"
    paths = [folder / f"multidoc2dial_{name}.json" for name in ("dial_train", "dial_validation", "doc")]
    if not all(path.exists() for path in paths):
        _unpack(folder, [path.name for path in paths])
    train, test = (read_multidoc2dial(path, paths[2]) for path in paths[:2])
    return *hold_out(train, lambda row: row.id.rpartition("_")[0]), test


def _unpack(folder: Path, names: list[str]) -> None:
    archive = folder / "multidoc2dial.zip"
    download(MULTIDOC2DIAL_HOME, archive)
    try:
        with zipfile.ZipFile(archive) as opened:
            for name in names:
                write_bytes(folder / name, opened.read(f"multidoc2dial/{name}"))
    except (zipfile.BadZipFile, KeyError) as error:
        raise InputError(f"{archive}: not the archive of {MULTIDOC2DIAL_HOME} ({error}): remove it and try again") from None


def read_multidoc2dial(dialogues: Path, documents: Path) -> list[Example]:
    """Agent turns that answer a user turn, one row each, named dial_id_turn_id."""
    domains = object_of(read_json(documents), "doc_data", str(documents))
    texts = {id: text_of(document, "doc_text", f"{documents}, document {id}")
             for domain in domains for id, document in object_of(domains, domain, f"{documents}, doc_data").items()}
    domains = object_of(read_json(dialogues), "dial_data", str(dialogues))
    return [row for domain in domains
            for number, dialogue in enumerate(list_of(domains, domain, f"{dialogues}, dial_data"), 1)
            for row in _agent_turns(dialogue, texts, f"{dialogues}, domain {domain}, dialogue {number}")]


def _agent_turns(dialogue: dict, texts: dict[str, str], where: str) -> Iterator[Example]:
    said, before, shown = [], "", []
    dial_id = text_of(dialogue, "dial_id", where)
    for number, turn in enumerate(list_of(dialogue, "turns", where), 1):
        id = f"{dial_id}_{text_of(turn, 'turn_id', f'{where}, turn {number}')}"
        here = f"{where}, turn {id}"
        role, utterance = text_of(turn, "role", here), " ".join(text_of(turn, "utterance", here).split())
        references = list_of(turn, "references", here) if turn.get("references") else []
        named = list(dict.fromkeys(text_of(reference, "doc_id", here) for reference in references))
        for name in named:
            if name not in texts:
                raise InputError(f"{here}: the document {name!r} is in no multidoc2dial_doc.json")
        shown = named or shown
        if role == "agent" and before == "user" and shown:
            context, question = "\n\n".join(texts[name] for name in shown), "\n".join(said)
            none = turn.get("da") == "respond_no_solution"
            yield unanswerable(id, question, context) if none else answerable(id, question, context, [utterance])
        said.append(f"{role}: {utterance}")
        before = role


# ------------------------------------------------------------------------------------------------ the embedded set


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
