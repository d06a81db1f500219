"""Are the values in a run's files of the kinds that their readers expect?

A person may have mended a file by hand, or another version written it. What is wrong is said in one line, an
InputError with the file and the field.
"""

from pathlib import Path
from typing import get_args

from judges import JUDGES
from support.cli import InputError
from support.files import resume_jsonl
from tasks.rows import shown

NUMBER = int | float
TEXT_OR_NONE = str | None
NUMBER_OR_NONE = int | float | None
CALLED = {
    str: "text",
    int: "a whole number",
    bool: "true or false",
    list: "a list",
    dict: "an object",
    NUMBER: "a number",
    TEXT_OR_NONE: "text or null",
    NUMBER_OR_NONE: "a number or null",
    int | None: "a whole number or null",
    bool | None: "true, false or null",
    list | None: "a list or null",
    dict | None: "an object or null",
}

RESPONSE = {"id": str, "response": str}  # a row of responses
VERDICT = {"id": str, "accepted": bool | None}  # a row of verdicts
CONFIG = {  # config.json of a run
    "task": str,
    "model": str,
    "dtype": str,
    "judge": TEXT_OR_NONE,
    "limit": int | None,
    "max_new_tokens": int | None,
    "files": list | None,
    "contents": list | None,
    "question_field": TEXT_OR_NONE,
    "answer_field": TEXT_OR_NONE,
    "prompt": TEXT_OR_NONE,
    "prompt_file": TEXT_OR_NONE,
    "keep_unfinished": bool,
    "chat_template_kwargs": dict | None,
    "date": TEXT_OR_NONE,
    "weights": TEXT_OR_NONE,
    "engine": TEXT_OR_NONE,
    "judge_model": TEXT_OR_NONE,
    "judge_weights": TEXT_OR_NONE,
}
TRAINING = {  # training.json of a method; an older one says less
    "method": str,
    "sources": dict,
    "steps": int | None,
    "step": int | None,
    "validation": NUMBER_OR_NONE,
    "minutes": NUMBER_OR_NONE,
    "validation_minutes": NUMBER_OR_NONE,
    "loading_minutes": NUMBER_OR_NONE,
    "tokens": int | None,
    "tokens_per_second": NUMBER_OR_NONE,
    "peak_memory_gib": NUMBER_OR_NONE,
}
SETTINGS = {  # how a benchmark was asked
    "num_fewshot": int,
    "apply_chat_template": bool,
    "add_bos": bool,
    "limit": int | None,
    "sampled": bool,
}


def check_fields(found, kinds: dict[str, type], where: str, may_lack: bool = False) -> dict:
    """`found`, a JSON object with fields of these kinds. With `may_lack` a field may be missing.

    InputError: it is no object, or a field is of another kind.
    """
    if not isinstance(found, dict):
        raise InputError(f"{where}: expected a JSON object, found {shown(found)}")
    for field, kind in kinds.items():
        if field not in found and not may_lack:
            raise InputError(f"{where}: the field {field!r} is missing (found: {', '.join(found) or 'none'})")
        if field in found and not is_of(found[field], kind):
            raise InputError(
                f"{where}: the field {field!r} must be {CALLED[kind]}, found {shown(found[field])}")
    return found


def is_of(value, kind: type) -> bool:
    """Is a value of JSON of this kind? True is not taken for 1."""
    return type(value) in (get_args(kind) or (kind,))


def read_rows(path: Path, kinds: dict[str, type], may_lack: dict[str, type] | None = None) -> list[dict]:
    """The rows of a JSONL file to which a run appended. InputError: a field is of another kind."""
    rows = resume_jsonl(path)
    for number, row in enumerate(rows, 1):
        where = f"{path}, row {number}"
        check_fields(row, kinds, where)
        check_fields(row, may_lack or {}, where, may_lack=True)
    return rows


def check_config(found, where: str) -> None:
    """The settings of a run, and the files of a custom task."""
    check_fields(found, CONFIG, where, may_lack=True)
    for field in ("files", "contents"):
        for value in found.get(field) or ():
            if not isinstance(value, str):
                raise InputError(f"{where}: the field {field!r} must be a list of texts, not {shown(value)}")
    for field in ("limit", "max_new_tokens"):
        value = found.get(field)
        if value is not None and value < 1:
            raise InputError(f"{where}: the field {field!r} must be at least 1 or null, not {value}")
    if found.get("dtype", "float32") not in ("float32", "bfloat16"):
        raise InputError(
            f"{where}: the field 'dtype' must be float32 or bfloat16, not {shown(found['dtype'])}")
    custom = found.get("task") == "custom"
    if custom and len(found.get("files") or ()) != 3:
        raise InputError(f"{where}: the field 'files' must name the custom task's three files: train, "
                         "validation, test")
    judge = found.get("judge")
    if judge not in (*JUDGES, "llm") and (custom or judge is not None):
        raise InputError(f"{where}: the field 'judge' must be one of {', '.join(JUDGES)}, llm, "
                         f"not {shown(judge)}")


def check_training(found, where: str) -> dict:
    """What a method says of its training."""
    check_fields(found, TRAINING, where, may_lack=True)
    sources = found.get("sources", {})
    check_fields(sources, dict.fromkeys(sources, int), f"{where}, sources")
    return found


# ------------------------------------------------------------------------------ results.json


def check_results(found, where: str) -> dict:
    """What an earlier call measured: of a run's models, or of a model on its own."""
    check_fields(found, {"models": dict, "benchmarks": dict}, where, may_lack=True)
    check_fields(found, {"weights": TEXT_OR_NONE}, where, may_lack=True)
    for name, model in found.get("models", {}).items():
        check_model(model, f"{where}, model {name}")
    for column, score in found.get("benchmarks", {}).items():
        check_score(column, score, f"{where}, {column}")
    return found


def check_model(model, where: str) -> None:
    """A model's accuracy, and what was measured of it on the general benchmarks."""
    kinds = {"weights": TEXT_OR_NONE, "accuracy": NUMBER, "n": int, "interval": list, "against_base": dict}
    check_fields(model, kinds | {"training": dict, "benchmarks": dict}, where, may_lack=True)
    if "interval" in model:
        check_interval(model, NUMBER, where)
    if "against_base" in model:
        check_fields(model["against_base"], {"difference": NUMBER}, f"{where}, against_base")
        check_interval(model["against_base"], NUMBER, f"{where}, against_base")
    if "training" in model:
        check_fields(model["training"], {"sources": dict}, f"{where}, training")
        check_training(model["training"], f"{where}, training")

    if "benchmarks" not in model:
        return
    measured = check_fields(model["benchmarks"], {"scores": dict}, f"{where}, benchmarks")
    check_fields(measured, {"drop": dict, "drop_log_p": dict}, f"{where}, benchmarks", may_lack=True)
    for column, score in measured["scores"].items():
        check_score(column, score, f"{where}, {column}")
    for kind in ("drop", "drop_log_p"):
        for column, drop in measured.get(kind, {}).items():
            check_fields(drop, {"drop": NUMBER}, f"{where}, {kind} of {column}")
            check_interval(drop, NUMBER_OR_NONE, f"{where}, {kind} of {column}")


def check_score(column: str, score, where: str) -> None:
    """A benchmark's metrics. The headline metric of Table 4 must be among them."""
    check_fields(score, {"n": int}, where)
    check_fields(score, {"settings": dict}, where, may_lack=True)
    if "settings" in score:
        check_fields(score["settings"], SETTINGS, f"{where}, settings")
        check_fields(score["settings"], {"max_new_tokens": int}, f"{where}, settings", may_lack=True)
    metrics = metrics_of(score)
    if not metrics:
        raise InputError(f"{where}: it has no metric")
    kinds = dict.fromkeys(metrics, NUMBER)
    if column.partition(",")[0] == "truthfulqa":
        kinds |= dict.fromkeys(("mean", "mc1", "mc2"), NUMBER)
    for field in score:
        if field.endswith("_stderr"):
            kinds[field] = NUMBER_OR_NONE
    check_fields(score, kinds, where)


def metrics_of(score: dict) -> list[str]:
    """The names of a score's metrics: what is no count, no error and no setting."""
    aside = ("n", "instructions", "subjects", "settings")
    return [key for key in score if key not in aside and not key.endswith("_stderr")]


def check_interval(found: dict, kind: type, where: str) -> None:
    """The field `interval`: its lower and its upper end."""
    ends = check_fields(found, {"interval": list}, where)["interval"]
    if len(ends) != 2 or not all(is_of(end, kind) for end in ends):
        raise InputError(f"{where}: the field 'interval' must be two numbers, found {shown(ends)}")
