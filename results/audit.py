"""The judge against people (the paper's A.5): a sample of judged rows for a person to mark, and how well the two agree.

    python evaluate.py --audit 200 --out RUN      draws 200 rows into RUN/audit.csv
    (a person fills the column `human` with yes or no: is the response right?)
    python evaluate.py --audit 200 --out RUN      reads it back

The rows come from the responses of the training set that the run has judged, predictions and paraphrases. Accepted and
rejected ones are drawn in their own proportion (at least one of each), so agreement and rates need no weights. The CSV does
not show the verdict; RUN/audit.jsonl keeps it, with the row number as the key, so the sheet may be sorted.
"""

import csv
import io
import random
from pathlib import Path

from data import Example
from support.cli import InputError
from support.files import read_jsonl, resume_jsonl, write_json, write_jsonl, write_text
from support.stats import kappa, wilson

COLUMNS = ("row", "question", "context", "gold", "response", "human")
ANSWERS = {"yes": True, "y": True, "true": True, "1": True, "no": False, "n": False, "false": False, "0": False}


def audit(run: Path, examples: list[Example], n: int, seed: int = 0) -> str:
    """Draw the sample, or score it where a person has filled it in -> what to tell the user. `examples`: the training rows."""
    if n < 1:
        raise InputError(f"--audit {n}: draw at least 1 row")
    sheet = run / "audit.csv"
    if not sheet.exists():
        chosen = draw(judged_responses(run, examples), n, seed)
        write_jsonl(run / "audit.jsonl", [{"row": i, **{key: row[key] for key in ("kind", "id", "accepted")}}
                                          for i, row in enumerate(chosen, 1)])
        write_text(sheet, sheet_of(chosen))
        return f"{sheet}: {len(chosen)} rows; fill the column human with yes or no, then give the same command again"
    humans = read_sheet(sheet)
    verdicts = {row["row"]: row["accepted"] for row in read_jsonl(run / "audit.jsonl", ("row", "accepted"))}
    if humans.keys() - verdicts.keys():
        raise InputError(f"{sheet}: row {min(humans.keys() - verdicts.keys())} is not one of those that were drawn")
    marked = [row for row, human in humans.items() if human is not None]
    if not marked:
        return f"{sheet}: the column human is empty; fill it with yes or no, then give the same command again"
    result = compare([verdicts[row] for row in marked], [humans[row] for row in marked])
    write_json(run / "audit.json", result)
    return report(result, len(verdicts))


def judged_responses(run: Path, examples: list[Example]) -> list[dict]:
    """Every judged prediction and paraphrase of the run; a verdict that could not be read counts as not accepted."""
    by_id, rows = {x.id: x for x in examples}, []
    for kind in ("predictions", "paraphrases"):
        responses = {row["id"]: row["response"] for row in resume_jsonl(run / f"{kind}.jsonl")}
        for row in resume_jsonl(run / f"{kind}.judged.jsonl"):
            if row["id"] in by_id and row["id"] in responses:
                x = by_id[row["id"]]
                rows.append({"kind": kind, "id": x.id, "accepted": row["accepted"] is True, "question": x.question,
                             "context": x.context, "gold": x.answer, "response": responses[x.id]})
    if not rows:
        raise InputError(f"--audit: {run} has no judged predictions or paraphrases; run s3ft.py --method s3ft first")
    return rows


def draw(rows: list[dict], n: int, seed: int) -> list[dict]:
    """`n` rows at random, accepted and rejected in their proportion, at least one of each, in a random order."""
    rng, n = random.Random(seed), min(n, len(rows))
    strata = [[row for row in rows if row["accepted"] is verdict] for verdict in (True, False)]
    share = round(n * len(strata[0]) / len(rows))
    if all(strata) and n > 1:
        share = min(max(share, 1), n - 1)
    chosen = rng.sample(strata[0], share) + rng.sample(strata[1], n - share)
    return rng.sample(chosen, n)


def sheet_of(rows: list[dict]) -> str:
    """The CSV. A text that a spreadsheet would take for a formula gets an apostrophe in front."""
    buffer = io.StringIO()
    sheet = csv.writer(buffer)
    sheet.writerow(COLUMNS)
    for i, row in enumerate(rows, 1):
        texts = [row[field] for field in COLUMNS[1:-1]]
        sheet.writerow([i, *("'" + text if text.startswith(("=", "+", "-", "@")) else text for text in texts), ""])
    return buffer.getvalue()


def read_sheet(path: Path) -> dict[int, bool | None]:
    """Row number -> the person's mark, None where there is none yet."""
    try:
        with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
            text = file.read()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    csv.field_size_limit(2**31 - 1)  # a context can be a whole document
    delimiter = ";" if text.partition("\n")[0].count(";") > text.partition("\n")[0].count(",") else ","
    marks = {}
    for line, row in enumerate(csv.DictReader(io.StringIO(text), delimiter=delimiter), 2):
        number, mark = (str(row.get(field) or "").strip().lower() for field in ("row", "human"))
        if not number.isdecimal() or int(number) in marks:
            raise InputError(f"{path}, entry {line}: the column row holds {number!r}, which is no number, or comes twice")
        if mark and mark not in ANSWERS:
            raise InputError(f"{path}, row {number}: human is {mark!r}; write yes or no")
        marks[int(number)] = ANSWERS.get(mark)
    return marks


def compare(judge: list[bool], human: list[bool]) -> dict:
    """Agreement, kappa, and both kinds of error, each with its counts and Wilson's interval.

    false_accept: of the responses that the person calls wrong, the share the judge accepted; false_reject: of the right ones,
    the share it rejected.
    """
    pairs = list(zip(judge, human, strict=True))
    wrong, right = (([j for j, h in pairs if h is mark]) for mark in (False, True))
    return {"n": len(pairs), "agreement": rate(sum(j == h for j, h in pairs), len(pairs)), "kappa": kappa(judge, human),
            "false_accept": rate(sum(wrong), len(wrong)), "false_reject": rate(len(right) - sum(right), len(right))}


def rate(count: int, n: int) -> dict:
    return {"count": count, "n": n, "rate": count / n if n else None, "interval": wilson(count, n) if n else None}


def report(result: dict, drawn: int) -> str:
    agreement = "undefined" if result["kappa"] is None else f"{result['kappa']:.2f}"
    lines = [f"{result['n']} of {drawn} rows marked; Cohen's kappa {agreement}"]
    for name in ("agreement", "false_accept", "false_reject"):
        found = result[name]
        text = f"{name.replace('_', ' ')}: {found['count']} of {found['n']}"
        if found["n"]:
            low, high = found["interval"]
            text += f", {found['rate']:.1%} (95 % interval {low:.1%} to {high:.1%})"
        lines.append(text)
    return "\n".join(lines)
