"""MultiDoc2Dial (Feng et al., 2021): a dialogue over documents.

The question is the dialogue so far, the answer is the agent's next turn, and the context is the whole text of the documents
that this turn refers to. Where it names none, the context is that of the turn before. An agent that says it has no solution
(`respond_no_solution`) is the unanswerable kind. Turns that follow no user turn are left out, and so are turns of a dialogue
that has named no document up to there.
"""

import zipfile
from collections.abc import Iterator
from pathlib import Path

from data import Example, Splits, hold_out
from support.cli import InputError
from support.files import download, read_json, write_bytes
from tasks.rows import answerable, list_of, object_of, text_of, unanswerable

MULTIDOC2DIAL_HOME = "https://doc2dial.github.io/multidoc2dial/file/multidoc2dial.zip"


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
