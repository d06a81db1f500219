"""MultiDoc2Dial (Feng et al., 2021): a dialogue over documents.

A dialogue: {"dial_id": "x", "turns": [
                {"turn_id": 1, "role": "user", "utterance": "Can I renew?", "references": []},
                {"turn_id": 2, "role": "agent", "utterance": "Yes, by mail.", "da": "respond_solution",
                 "references": [{"doc_id": "d1"}]}]}

The question is the dialogue so far, the answer is the agent's next turn, and the context is the whole text of
the documents that this turn refers to. Where it names none, the context is that of the turn before. An agent
that says it has no solution (`respond_no_solution`) is the unanswerable kind. Turns that follow no user turn
are left out, and so are turns of a dialogue that has named no document up to there.
"""

import zipfile
from dataclasses import replace
from pathlib import Path

from data import Example, Splits, hold_out
from support.cli import InputError
from support.files import download, read_json, write_bytes
from tasks.reading import READING_TASK
from tasks.rows import answerable, list_of, object_of, text_of, unanswerable

HOME = "https://doc2dial.github.io/multidoc2dial/file/multidoc2dial.zip"


def load_multidoc2dial(folder: Path) -> Splits:
    """The data's validation set tests. Our validation rows and the training rows share no dialogue."""
    folder = folder / "multidoc2dial"
    names = ("multidoc2dial_dial_train.json", "multidoc2dial_dial_validation.json", "multidoc2dial_doc.json")
    train_path, test_path, documents = (folder / name for name in names)
    if not (train_path.exists() and test_path.exists() and documents.exists()):
        _unpack(folder, names)

    rows = read_multidoc2dial(train_path, documents)
    train, validation = hold_out(rows, lambda row: row.id.rpartition("_")[0])
    return train, validation, read_multidoc2dial(test_path, documents)


def _unpack(folder: Path, names: tuple[str, ...]) -> None:
    archive = folder / "multidoc2dial.zip"
    download(HOME, archive)
    try:
        with zipfile.ZipFile(archive) as opened:
            for name in names:
                write_bytes(folder / name, opened.read(f"multidoc2dial/{name}"))
    except (zipfile.BadZipFile, KeyError) as error:
        raise InputError(f"{archive}: not the archive of {HOME} ({error}): remove it and try again") from None


def read_multidoc2dial(dialogues: Path, documents: Path) -> list[Example]:
    """Agent turns that answer a user turn, one row each, named dial_id_turn_id."""
    texts = _read_documents(documents)
    domains = object_of(read_json(dialogues), "dial_data", str(dialogues))
    rows = []
    for domain in domains:
        for number, dialogue in enumerate(list_of(domains, domain, f"{dialogues}, dial_data"), 1):
            rows += _agent_turns(dialogue, texts, f"{dialogues}, domain {domain}, dialogue {number}")
    return rows


def _read_documents(path: Path) -> dict[str, str]:
    """document id -> its whole text"""
    domains = object_of(read_json(path), "doc_data", str(path))
    texts = {}
    for domain in domains:
        for id, document in object_of(domains, domain, f"{path}, doc_data").items():
            texts[id] = text_of(document, "doc_text", f"{path}, document {id}")
    return texts


def _agent_turns(dialogue: dict, texts: dict[str, str], where: str) -> list[Example]:
    """The rows of one dialogue. A turn becomes a row by what was said, and shown, up to it."""
    rows = []
    dialogue_so_far = []
    role_before = None
    documents_shown = []
    dialogue_id = text_of(dialogue, "dial_id", where)

    for number, turn in enumerate(list_of(dialogue, "turns", where), 1):
        # 1. Read the turn.
        id = f"{dialogue_id}_{text_of(turn, 'turn_id', f'{where}, turn {number}')}"
        here = f"{where}, turn {id}"
        role = text_of(turn, "role", here)
        if role not in ("user", "agent"):
            raise InputError(f"{here}: 'role' is {role!r}, expected user or agent")
        utterance = " ".join(text_of(turn, "utterance", here).split())
        documents_shown = _documents_named(turn, texts, here) or documents_shown

        # 2. An agent's answer to a user is a row.
        if role == "agent" and role_before == "user" and documents_shown:
            question = "\n".join(dialogue_so_far)
            context = "\n\n".join(texts[name] for name in documents_shown)
            act = text_of(turn, "da", here)
            if act == "respond_no_solution":
                rows.append(unanswerable(id, question, context))
            else:
                rows.append(answerable(id, question, context, [utterance]))

        # 3. The next turn sees it.
        dialogue_so_far.append(f"{role}: {utterance}")
        role_before = role
    return rows


def _documents_named(turn: dict, texts: dict[str, str], where: str) -> list[str]:
    """The documents that a turn refers to, once each, in its order."""
    if turn.get("references") is None:
        return []
    named = []
    for reference in list_of(turn, "references", where):
        name = text_of(reference, "doc_id", where)
        if name not in texts:
            raise InputError(f"{where}: the document {name!r} is in no multidoc2dial_doc.json")
        if name not in named:
            named.append(name)
    return named


MULTIDOC2DIAL = replace(READING_TASK, load=load_multidoc2dial, judge="llm", max_new_tokens=128)
