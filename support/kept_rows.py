"""Does a kept row answer what is asked now? Its digest tells: it has a part for each thing that made it."""

from collections import Counter
from collections.abc import Sequence

from support.cli import InputError, note
from support.files import RowFile


def refuse_other_questions(file: RowFile, digests: dict[str, str], parts: Sequence[str]) -> None:
    """InputError: a row is no response, or answers another question.

    `digests` are those that rows should have, each of some `parts` with a dash between them.
    Rows without a digest were made elsewhere.
    """
    made_elsewhere, changed = 0, Counter()
    for number, (id, row) in enumerate(file.rows.items(), 1):
        if not isinstance(id, str) or not isinstance(row.get("response"), str):
            raise InputError(f"{file.path}, row {number}: needs the text fields 'id' and 'response'")
        if id not in digests:
            continue  # a row that this call was not asked about
        if "digest" not in row:
            made_elsewhere += 1
        elif row["digest"] != digests[id]:
            changed[what_changed(str(row["digest"]), digests[id], parts)] += 1

    if changed:
        what, n = changed.most_common(1)[0]
        raise InputError(f"{file.path}: {n} of its rows answer {what} than this run asks about: repeat the "
                         "flags that made them (such as --engine), take another --out, or remove the file to "
                         "make them anew")
    if made_elsewhere:
        note(f"{file.path}: {made_elsewhere} rows were made elsewhere (they carry no digest) and are taken "
             "as they are")


def what_changed(before: str, now: str, parts: Sequence[str]) -> str:
    """The `parts` in which two digests differ, in words."""
    found = []
    for part, old, new in zip(parts, before.split("-"), now.split("-"), strict=False):
        if old != new:
            found.append(f"another {part}")
    return " and ".join(found) or "another question"
