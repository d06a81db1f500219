"""The judge against people: a sample of judged rows for a person to mark, and how well the two agree.

    python evaluate.py --audit 200 --out RUN      draws 200 rows into RUN/audit.csv
    (one or two people fill its last columns)
    python evaluate.py --audit 200 --out RUN      reads it back

The columns to fill:
    human     yes or no: is the response right? This is what the judge is compared with.
    likert    0 to 4: how good is the response? It may stay empty, or be filled alone. Then 3 and 4 mean yes.
    human2    yes or no of a second person. The report says how well the two people agree.

The paper's judges say True or False (A.5, Fig. 8), and its human study gives one accuracy for each, so yes
and no are what counts. The scale of 0 to 4 is SSR's for human relevance (arXiv 2409.04787). That 3 is the
first right mark is our decision.

The rows come from what the run has judged: predictions and paraphrases of the training set, and the test
answers of the base model and of each trained one. Accepted and rejected ones are drawn in their own
proportion (at least one of each), so agreement and rates need no weights. The CSV does not show the verdict.
RUN/audit.jsonl keeps it, with the row number as the key, so the sheet may be sorted.
"""

import csv
import io
import operator
import random
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from data import Example
from results.checks import check_fields
from results.run_files import KINDS, read_responses, read_verdicts
from support.cli import InputError
from support.files import read_jsonl, write_json, write_jsonl, write_text
from support.stats import kappa, wilson

TO_FILL = ("likert", "human2", "human")  # what must be filled stands last
COLUMNS = ("row", "question", "context", "gold", "response", *TO_FILL)
YES, NO = ("yes", "y", "true", "1"), ("no", "n", "false", "0")
YES_OR_NO = dict.fromkeys(YES, True) | dict.fromkeys(NO, False)
LIKERT = {"0": 0, "1": 1, "2": 2, "3": 3, "4": 4}
LIKERT_RIGHT = 3  # the first mark that means yes
PAPER = "the paper's human study: 96 % of 50 responses to GSM8K, 86 % of 200 to NQ judged as people do"
HOW_TO_FILL = "fill the column human with yes or no (likert, human2 if you like), then give the command again"


def audit(
    run: Path, examples: list[Example], n: int, seed: int = 0, test_examples: Sequence[Example] = ()
) -> str:
    """Draw the sample, or score it where a person has filled it in -> what to tell the user.

    `examples` are the training rows, `test_examples` the test rows. Without these no test answers are drawn.
    InputError: nothing to draw from, or a sheet that cannot be read.
    """
    if n < 1:
        raise InputError(f"--audit {n}: draw at least 1 row")
    sheet = run / "audit.csv"
    if not sheet.exists():
        chosen = draw(judged_responses(run, examples, test_examples), n, seed)
        keep_verdicts(chosen, run / "audit.jsonl")
        write_text(sheet, sheet_of(chosen))
        return f"{sheet}: {len(chosen)} rows; {HOW_TO_FILL}"

    marked, drawn = read_marks(run)
    if not marked:
        return f"{sheet}: the column human is empty; {HOW_TO_FILL}"
    result = score(marked, drawn)
    write_json(run / "audit.json", result)
    return report(result, len(drawn))


def read_marks(run: Path) -> tuple[dict[int, dict], dict[int, dict]]:
    """(the marks of the rows that people have marked, all rows that were drawn), both by row number.

    InputError: the sheet cannot be read, or has a row that was not drawn.
    """
    sheet = run / "audit.csv"
    marks = read_sheet(sheet)
    drawn = {}
    for place, row in enumerate(read_jsonl(run / "audit.jsonl"), 1):
        check_fields(row, {"row": int, "kind": str, "accepted": bool}, f"{run / 'audit.jsonl'}, row {place}")
        drawn[row["row"]] = row
    unknown = marks.keys() - drawn.keys()
    if unknown:
        raise InputError(f"{sheet}: row {min(unknown)} is not one of those that were drawn")
    marked = {number: mark for number, mark in marks.items() if mark["human"] is not None}
    return marked, drawn


def judged_responses(run: Path, examples: Sequence[Example], test_examples: Sequence[Example]) -> list[dict]:
    """Every judged response of the run. A verdict that could not be read counts as not accepted."""
    rows = []
    for kind in KINDS:
        rows += judged_rows(run / f"{kind}.jsonl", kind, examples)
    for answers in sorted(run.glob("*/test.jsonl")):
        rows += judged_rows(answers, f"{answers.parent.name}/test", test_examples)
    if not rows:
        raise InputError(
            f"{run} has no judged predictions or paraphrases and no test answers to look at; "
            "run s3ft.py --method s3ft first"
        )
    return rows


def judged_rows(path: Path, kind: str, examples: Sequence[Example]) -> list[dict]:
    """The responses in `path` with what the sheet shows of each, and its verdict from the file beside it."""
    by_id = {x.id: x for x in examples}
    responses = {row["id"]: row["response"] for row in read_responses(path)}
    rows = []
    for row in read_verdicts(path.with_suffix(".judged.jsonl")):
        x = by_id.get(row["id"])
        if x is None or x.id not in responses:
            continue
        rows.append({
            "kind": kind,
            "id": x.id,
            "accepted": row["accepted"] is True,
            "question": x.question,
            "context": x.context,
            "gold": " / ".join((x.answer, *x.aliases)),
            "response": responses[x.id],
        })
    return rows


def draw(rows: list[dict], n: int, seed: int) -> list[dict]:
    """`n` rows at random, in a random order: accepted and rejected in proportion, at least one of each."""
    rng = random.Random(seed)
    n = min(n, len(rows))
    accepted = [row for row in rows if row["accepted"]]
    rejected = [row for row in rows if not row["accepted"]]
    share = round(n * len(accepted) / len(rows))
    if accepted and rejected and n > 1:
        share = min(max(share, 1), n - 1)
    chosen = rng.sample(accepted, share) + rng.sample(rejected, n - share)
    return rng.sample(chosen, n)


def keep_verdicts(chosen: list[dict], path: Path) -> None:
    """What the sheet does not show, by row number."""
    kept = []
    for number, row in enumerate(chosen, 1):
        kept.append({"row": number, "kind": row["kind"], "id": row["id"], "accepted": row["accepted"]})
    write_jsonl(path, kept)


def sheet_of(rows: list[dict]) -> str:
    """The CSV. A text that a spreadsheet would take for a formula gets an apostrophe in front."""
    buffer = io.StringIO()
    sheet = csv.writer(buffer)
    sheet.writerow(COLUMNS)
    for number, row in enumerate(rows, 1):
        cells = [number]
        for field in ("question", "context", "gold", "response"):
            formula = row[field].startswith(("=", "+", "-", "@"))
            cells.append("'" + row[field] if formula else row[field])
        sheet.writerow(cells + [""] * len(TO_FILL))
    return buffer.getvalue()


def read_sheet(path: Path) -> dict[int, dict]:
    """Row number -> its marks {human, likert, human2}, each None where it is empty.

    A row with a Likert mark alone gets its `human` from that.
    """
    try:
        with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
            text = file.read()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    csv.field_size_limit(2**31 - 1)  # a context can be a whole document
    header = text.partition("\n")[0]
    delimiter = ";" if header.count(";") > header.count(",") else ","

    try:
        rows = list(csv.DictReader(io.StringIO(text), delimiter=delimiter))
    except csv.Error as error:
        raise InputError(
            f"{path}: not readable as CSV ({error}); save it as CSV with the line ends of Windows or Linux"
        ) from None

    marks = {}
    for line, row in enumerate(rows, 2):
        number = cell(row, "row")
        if not number.isdecimal() or int(number) in marks:
            raise InputError(
                f"{path}, entry {line}: the column row holds {number!r}, which is no number, or comes twice"
            )
        mark = {}
        for field in TO_FILL:
            allowed = LIKERT if field == "likert" else YES_OR_NO
            what = "0, 1, 2, 3 or 4" if field == "likert" else "yes or no"
            written = cell(row, field)
            if written and written not in allowed:
                raise InputError(f"{path}, row {number}: {field} is {written!r}; write {what}")
            mark[field] = allowed.get(written)
        if mark["human"] is None and mark["likert"] is not None:
            mark["human"] = mark["likert"] >= LIKERT_RIGHT
        marks[int(number)] = mark
    return marks


def cell(row: dict, field: str) -> str:
    """What a person wrote in a cell. A sheet of an older version lacks some columns."""
    return str(row.get(field) or "").strip().lower()


def score(marked: dict[int, dict], drawn: dict[int, dict]) -> dict:
    """Judge against person, over all rows and by kind, the Likert marks, and one person against the other.

    `marked`: row number -> its marks, all with `human`. `drawn`: row number -> its kind and verdict.
    """
    judge, human, kinds = [], [], {}
    likert = {"accepted": [], "rejected": []}
    first, second = [], []  # the two people, on the rows that both marked
    for number, mark in marked.items():
        accepted = drawn[number]["accepted"]
        judge.append(accepted)
        human.append(mark["human"])
        verdicts_of_kind, marks_of_kind = kinds.setdefault(drawn[number]["kind"], ([], []))
        verdicts_of_kind.append(accepted)
        marks_of_kind.append(mark["human"])
        if mark["likert"] is not None:
            likert["accepted" if accepted else "rejected"].append(mark["likert"])
        if mark["human2"] is not None:
            first.append(mark["human"])
            second.append(mark["human2"])

    result = compare(judge, human)
    result["kinds"] = {}
    for kind in sorted(kinds):
        result["kinds"][kind] = agreement(*kinds[kind])
    result["likert"] = {}
    for name, given in likert.items():
        result["likert"][name] = {"n": len(given), "mean": mean(given) if given else None}
    result["raters"] = None
    if second:
        result["raters"] = {"agreement": agreement(first, second), "kappa": kappa(first, second)}
    return result


def compare(judge: list[bool], human: list[bool]) -> dict:
    """Agreement, kappa, and both kinds of error, each with its counts and Wilson's interval.

    false_accept: of the responses that the person calls wrong, the share that the judge accepted.
    false_reject: of the right ones, the share that it rejected.
    """
    verdicts_on_wrong, verdicts_on_right = [], []
    for accepted, right in zip(judge, human, strict=True):
        (verdicts_on_right if right else verdicts_on_wrong).append(accepted)
    return {
        "n": len(judge),
        "agreement": agreement(judge, human),
        "kappa": kappa(judge, human),
        "false_accept": rate(verdicts_on_wrong.count(True), len(verdicts_on_wrong)),
        "false_reject": rate(verdicts_on_right.count(False), len(verdicts_on_right)),
    }


def agreement(a: list[bool], b: list[bool]) -> dict:
    """How often the two say the same, as a rate."""
    return rate(sum(map(operator.eq, a, b)), len(a))


def rate(count: int, n: int) -> dict:
    if n == 0:
        return {"count": count, "n": n, "rate": None, "interval": None}
    return {"count": count, "n": n, "rate": count / n, "interval": wilson(count, n)}


def report(result: dict, drawn: int) -> str:
    """What a person reads of `score`, a line each."""
    lines = [f"{result['n']} of {drawn} rows marked; Cohen's kappa {kappa_text(result['kappa'])}"]
    for name in ("agreement", "false_accept", "false_reject"):
        lines.append(f"{name.replace('_', ' ')}: {rate_text(result[name])}")
    for kind, found in result["kinds"].items():
        lines.append(f"agreement on {kind}: {rate_text(found)}")

    for name, found in result["likert"].items():
        if found["n"]:
            lines.append(f"mean mark (0 to 4) of {name} responses: {found['mean']:.2f} (n = {found['n']})")
    if result["raters"]:
        agreed = rate_text(result["raters"]["agreement"])
        lines.append(f"the two people agree: {agreed}; Cohen's kappa {kappa_text(result['raters']['kappa'])}")
    lines.append(PAPER)
    return "\n".join(lines)


def kappa_text(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.2f}"


def rate_text(found: dict) -> str:
    text = f"{found['count']} of {found['n']}"
    if found["n"]:
        low, high = found["interval"]
        text += f", {found['rate']:.1%} (95 % interval {low:.1%} to {high:.1%})"
    return text
