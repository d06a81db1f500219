"""What the files of a run folder say: its methods, answers and verdicts, what was not used, what it cost."""

import math
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from judges import leaks
from results.checks import NUMBER, RESPONSE, VERDICT, check_fields, check_results, check_training, read_rows
from support import ranks
from support.cli import InputError
from support.files import read_bytes, read_json, read_jsonl
from support.numerals import mark_differs
from support.stats import mcnemar, wilson

KINDS = ("predictions", "paraphrases")
BRANCHES = ("prediction", "paraphrase", "gold")  # of Algorithm 1, in the order of Fig. 1

# ------------------------------------------------------------------------------ methods


def trained_methods(run: Path) -> list[str]:
    """Names of the run's trained models, sft first."""
    found = [path.parent.name for path in run.glob("*/training.json")]
    return sorted(found, key=lambda name: (name != "sft", name))


def read_training(folder: Path) -> dict:
    """A method's training.json. What an older one does not say is None. InputError names a bad field."""
    path = folder / "training.json"
    found = check_training(read_json(path), f"{path} (remove it, and s3ft.py makes it again)")
    unsaid = ("steps", "step", "validation", "minutes", "tokens", "tokens_per_second", "peak_memory_gib")
    return {"method": folder.name, "sources": {}} | dict.fromkeys(unsaid) | found


def read_notes(run: Path, names: list[str]) -> dict[str, str]:
    """What a method wrote about itself, in its note.md."""
    notes = {}
    for name in names:
        path = run / name / "note.md"
        if path.exists():
            notes[name] = read_bytes(path).decode("utf-8", "replace").strip()
    return notes


# ------------------------------------------------------------------------------ answers


@dataclass(frozen=True)
class KeptAnswer:
    """A response of the base model to a training row, and what became of it."""

    text: str
    verdict: bool | None  # of the judge; None: it could not be read, or was not asked
    finished: bool  # the length limit did not cut it off
    usable: bool  # a method may train on it
    tokens: list[int] | None = None  # what the model generated, where that is known


def read_responses(path: Path) -> list[dict]:
    """The rows of a file of responses, [] if there is none. InputError names a bad row and its field."""
    return read_rows(path, RESPONSE, may_lack={"finished": bool, "tokens": list | None})


def read_verdicts(path: Path) -> list[dict]:
    """The rows of a file of verdicts, [] if there is none. InputError names a bad row and its field."""
    return read_rows(path, VERDICT)


def read_answers(run: Path, kind: str, keep_unfinished: bool = False) -> dict[str, KeptAnswer]:
    """id -> answer, of predictions or paraphrases.

    Usable is what the judge accepts, is not cut off, and (of a paraphrase) does not leak its prompt.
    """
    verdicts = {row["id"]: row["accepted"] for row in read_verdicts(run / f"{kind}.judged.jsonl")}
    answers = {}
    for row in read_responses(run / f"{kind}.jsonl"):
        text = row["response"]
        verdict = verdicts.get(row["id"])
        finished = row.get("finished", True)
        usable = verdict is True and (finished or keep_unfinished)
        if kind == "paraphrases" and leaks(text):
            usable = False
        answers[row["id"]] = KeptAnswer(text, verdict, finished, usable, row.get("tokens"))
    return answers


def branch_of(y_hat: KeptAnswer | None, y_tilde: KeptAnswer | None) -> str:
    """Where Algorithm 1 takes the target from. A run of SDFT alone has no prediction to take."""
    if y_hat and y_hat.usable:
        return "prediction"
    if y_tilde and y_tilde.usable:
        return "paraphrase"
    return "gold"


def selection_faults(run: Path) -> dict[str, dict[str, int]]:
    """What was cut off, or had no readable verdict, among the responses to the training rows."""
    found = {}
    for kind in KINDS:
        rows = read_responses(run / f"{kind}.jsonl")
        if rows:
            verdicts = read_verdicts(run / f"{kind}.judged.jsonl")
            found[kind] = {
                "n": len(rows),
                "length_limit_hit": sum(not row.get("finished", True) for row in rows),
                "unreadable_verdicts": sum(row["accepted"] is None for row in verdicts),
            }
    return found


def unused_answers(run: Path, keep_unfinished: bool, numeric: bool) -> dict[str, dict[str, int]]:
    """Responses that one thing alone keeps from being used.

    cut_off: the judge accepts it, and the length limit cut it off. marks_another_number (numeric judge): it
    marks its answer, as with \\boxed, and ends with another number, which the judge reads.
    """
    found = {}
    for kind in KINDS:
        answers = read_answers(run, kind, keep_unfinished).values()
        if answers:
            cut_off = [y for y in answers if y.verdict is True and not y.finished and not y.usable]
            found[kind] = {"cut_off": len(cut_off)}
            if numeric:
                found[kind]["marks_another_number"] = sum(mark_differs(y.text) for y in answers)
    return found


# ------------------------------------------------------------------------------ test answers


def accuracy_of(verdicts: dict[str, bool | None], rows: dict[str, dict]) -> dict:
    """The share of accepted responses with its interval, and how many the length limit cut off."""
    correct = sum(map(bool, verdicts.values()))
    return {
        "accuracy": correct / len(verdicts),
        "interval": wilson(correct, len(verdicts)),
        "n": len(verdicts),
        "length_limit_hit": sum(not row.get("finished", True) for row in rows.values()),
    }


def compare(models: dict[str, dict], folders: dict[str, Path], ids: list[str]) -> None:
    """Add each model's paired comparisons over the test rows `ids`, against SFT and against base."""
    verdicts = {}
    for name, folder in folders.items():
        rows = read_jsonl(folder / "test.judged.jsonl", ("id", "accepted"))
        accepted = {row["id"]: bool(row["accepted"]) for row in rows}
        verdicts[name] = [accepted[id] for id in ids]

    for other in ("sft", "base"):
        for name in folders:
            if other in folders and name != other:
                models[name][f"against_{other}"] = mcnemar(verdicts[name], verdicts[other])


# ------------------------------------------------------------------------------ costs


COST = {"folder": str, "calls": int, "tokens": int, "seconds": NUMBER, "rank": int}  # a row of a costs.jsonl
STAGES = {"predictions": "predict", "paraphrases": "paraphrase", "samples": "sample"}  # words of the report
BENCHMARKS, DRIFT, TEST = "general benchmarks", "drift", "evaluate"


def read_costs(run: Path, training: dict[str, dict]) -> list[dict]:
    """What D', training and evaluation cost: {"stage", "model", "calls", "tokens", "seconds"} of each stage.

    From costs.jsonl, beside the answers, and from `training` (name -> training.json). Calls and tokens are
    summed over every call of a stage, None where they are not counted. With torchrun its processes work side
    by side, so the seconds are those of the process that took longest. What was made elsewhere, or before
    costs were kept, is not in it.
    """
    making, evaluating = {}, {}
    for folder, row in _cost_rows(run):
        stage, model = stage_of(folder, row["stage"])
        of_evaluation = stage in (BENCHMARKS, DRIFT, TEST)
        (evaluating if of_evaluation else making).setdefault((stage, model), []).append(row)

    rows = []
    for (stage, model), made in making.items():
        rows.append({"stage": stage, "model": model, **_sums(made)})
    for name, found in training.items():
        rows += _training_costs(name, found)
    for (stage, model), made in sorted(evaluating.items()):
        rows.append({"stage": stage, "model": model, **_sums(made)})
    return rows


def stage_of(folder: str, stage: str) -> tuple[str, str]:
    """(stage, model) in the words of the report, of a row of the costs.jsonl in a run's folder.

    What stands beside the run's own files was made for D' by the base model.
    """
    name, _, part = folder.partition("/")
    if part == "benchmarks":
        return BENCHMARKS, name
    if stage in ("drift", "general"):
        return DRIFT, name
    if stage in ("test", "test.judged"):
        return TEST, folder
    model = "base" if folder == "." else folder
    judged = stage.removeprefix("judge:").removesuffix(".judged")
    if judged != stage:
        return f"judge {judged.replace('_', ' ')}", model
    return STAGES.get(stage, stage.replace("_", " ")), model


def _training_costs(name: str, found: dict) -> list[dict]:
    """The stages of a training.json. An older one does not say what loading and validation took."""
    uncounted = {"calls": None, "tokens": None}
    steps = {"calls": found["steps"] or 0, "tokens": found["tokens"] or 0}
    stages = (
        ("load", "loading_minutes", uncounted),
        ("train", "minutes", steps),
        ("validate", "validation_minutes", uncounted),
    )
    rows = []
    for stage, field, counts in stages:
        if found.get(field) is not None:
            seconds = round(60 * found[field], 1)
            rows.append({"stage": stage, "model": name, **counts, "seconds": seconds})
    return rows


def _cost_rows(run: Path) -> Iterator[tuple[str, dict]]:
    """(folder in the run, row) of every costs.jsonl. A row names its folder, or is of its file's.

    What `--compare-judge` leaves in judges/ is no part of the run.

    A file that cannot be read is named and left out: what something cost is no reason to measure nothing.
    """
    paths = {run / "costs.jsonl", *run.glob("*/costs.jsonl"), *run.glob("*/*/costs.jsonl")}
    for path in sorted(paths - {run / "judges" / "costs.jsonl"}):
        try:
            rows = read_rows(path, {"stage": str}, may_lack=COST)
        except InputError as error:
            if ranks.RANK == 0:
                print(f"{error}: what this file says is not among the costs", file=sys.stderr)
            continue
        own_folder = path.parent.relative_to(run).as_posix()
        for row in rows:
            yield row.get("folder", own_folder), row


def _sums(rows: list[dict]) -> dict:
    """Calls and tokens of all processes, and the seconds of the one that took longest."""
    seconds = Counter()
    for row in rows:
        seconds[row.get("rank", 0)] += row.get("seconds", 0)
    return {
        "calls": sum(row.get("calls", 0) for row in rows),
        "tokens": sum(row.get("tokens", 0) for row in rows),
        "seconds": round(max(seconds.values()), 1),
    }


# ------------------------------------------------------------------------------ results


def read_results(folder: Path) -> dict:
    """results.json of an earlier call, {} where there is none. InputError names a bad field."""
    path = folder / "results.json"
    if not path.exists():
        return {}
    return check_results(read_json(path), f"{path} (remove it, and evaluate.py makes it again)")


def read_drift(path: Path, kinds: Iterable[str], made_of: str) -> dict[str, float] | None:
    """Drift of each kind that an earlier call kept. None: there is none, or it is of something else.

    InputError names a bad field.
    """
    if not path.exists():
        return None
    where = f"{path} (remove it, and evaluate.py makes it again)"
    kept = check_fields(read_json(path), {}, where)
    if kept.get("digest") != made_of:
        return None
    check_fields(kept, dict.fromkeys(kinds, NUMBER), where)
    return {kind: kept[kind] for kind in kinds}


def read_elsewhere(run: Path) -> dict[str, dict]:
    """Other tasks that the run's models were measured on -> {model: {accuracy, n, against_base}} of each."""
    found = {}
    for path in sorted(run.glob("on_*/results.json")):
        results = read_results(path.parent)
        kept = {}
        for name, model in results.get("models", {}).items():
            kept[name] = {key: model[key] for key in ("accuracy", "n", "against_base") if key in model}
        found[path.parent.name.removeprefix("on_")] = kept
    return found


def finite(value):
    """The same with None for every number that JSON does not have: infinities and NaN."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return value
