"""What a model is asked: one data set a file. A new task is a loader and one entry of TASKS."""

from dataclasses import replace
from pathlib import Path

from data import Example, Splits, Task
from support import ranks
from support.cli import InputError
from tasks.custom import CODE_TASK, CUSTOM_TASK, load_custom
from tasks.gsm8k import GSM8K_PARAPHRASE, GSM8K_PREDICT, GSM8K_TRAIN, gsm8k_gold, load_gsm8k
from tasks.mbpp import MBPP_PARAPHRASE, MBPP_PREDICT, load_mbpp, mbpp_gold
from tasks.multidoc2dial import load_multidoc2dial
from tasks.reading import READING_TASK, load_musique, load_nq, load_squad, load_squad1

TASKS = {
    "gsm8k": Task(load_gsm8k, "numeric", GSM8K_PREDICT, GSM8K_TRAIN, GSM8K_PARAPHRASE, gsm8k_gold),
    "mbpp": Task(load_mbpp, "code", MBPP_PREDICT, MBPP_PREDICT, MBPP_PARAPHRASE, mbpp_gold, stop="[[DONE]]",
                 steps=1000, eval_every=100),
    "nq": replace(READING_TASK, load=load_nq, judge="llm"),
    "squad": replace(READING_TASK, load=load_squad),
    "squad1": replace(READING_TASK, load=load_squad1),
    "musique": replace(READING_TASK, load=load_musique),
    "multidoc2dial": replace(READING_TASK, load=load_multidoc2dial, judge="llm", max_new_tokens=128),
    "reading": replace(READING_TASK, steps=12, eval_every=12),
}


def load_task(name: str, folder: Path | str, files: list[str] | None = None, judge: str | None = None,
              limit: int | None = None, max_new_tokens: int | None = None) -> tuple[Task, Splits]:
    """The task and its (train, validation, test) rows, each cut to the first `limit`.

    `files` are a custom task's three files. InputError: an unknown task, a bad or empty file, an id that comes twice.
    """
    if name == "custom":
        splits = tuple(load_custom(path, judge) for path in files)
        reading = any(row.context for row in splits[0])
        task = CODE_TASK if judge == "code" else READING_TASK if reading else CUSTOM_TASK
    elif name in TASKS:
        task = TASKS[name]
        splits = task.load(Path(folder))
    else:
        raise InputError(f"unknown task {name!r}: choose from {', '.join(TASKS)}, custom")
    for split, rows in zip(("train", "validation", "test"), splits, strict=True):
        _check(rows, f"{name}, {split}")
    task = replace(task, judge=judge or task.judge, max_new_tokens=max_new_tokens or task.max_new_tokens)
    return task, tuple(rows[:limit] for rows in splits)


def _check(rows: list[Example], where: str) -> None:
    if not rows:
        raise InputError(f"{where}: no rows")
    seen = set()
    for row in rows:
        if row.id in seen:
            raise InputError(f"{where}: the id {row.id!r} comes twice")
        seen.add(row.id)


def task_of(config: dict, data: str):
    """The (task, splits) that a run's config.json describes."""
    wanted = ("files", "judge", "limit", "max_new_tokens")
    with ranks.rank_0_first():  # which downloads what is missing
        return load_task(config["task"], data, **{name: config[name] for name in wanted})
