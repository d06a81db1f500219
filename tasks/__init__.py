"""What a model is asked: prompts and loaders, a file for each kind of task.

A new task is a file with its prompts and loader, and one entry of TASKS.
"""

from dataclasses import replace
from pathlib import Path

from data import Splits, Task
from support import ranks
from support.cli import InputError
from tasks.custom import load_custom_task
from tasks.gsm8k import GSM8K
from tasks.mbpp import MBPP
from tasks.multidoc2dial import MULTIDOC2DIAL
from tasks.reading import EMBEDDED, MUSIQUE, NQ, SQUAD, SQUAD1
from tasks.rows import check_ids
from tasks.summaries import SUMMARIES

TASKS = {
    "gsm8k": GSM8K,
    "mbpp": MBPP,
    "nq": NQ,
    "squad": SQUAD,
    "squad1": SQUAD1,
    "musique": MUSIQUE,
    "multidoc2dial": MULTIDOC2DIAL,
    "reading": EMBEDDED,
    "summaries": SUMMARIES,
}
CUSTOM_FLAGS = ("question_field", "answer_field", "prompt", "prompt_file")  # of --task custom


def load_task(name: str, folder: Path | str) -> tuple[Task, Splits]:
    """A built-in task and its (train, validation, test) rows, from the folder of the data sets.

    InputError: an unknown task, a bad or empty file, an id that comes twice.
    """
    if name not in TASKS:
        raise InputError(f"unknown task {name!r}: choose from {', '.join(TASKS)}, custom")
    task = TASKS[name]
    splits = task.load(Path(folder))
    for split, rows in zip(("train", "validation", "test"), splits, strict=True):
        check_ids(rows, f"{name}, {split}")
    return task, splits


def task_of(config: dict, folder: Path | str) -> tuple[Task, Splits]:
    """The task and the rows that a run's config.json describes, each split cut to its first `limit` rows.

    A setting that the config does not have takes its default.
    """
    with ranks.rank_0_first():  # which downloads what is missing
        if config["task"] == "custom":
            flags = {name: config.get(name) for name in CUSTOM_FLAGS}
            task, splits = load_custom_task(config["files"], config["judge"], **flags)
        else:
            task, splits = load_task(config["task"], folder)

    judge = config.get("judge") or task.judge
    max_new_tokens = config.get("max_new_tokens") or task.max_new_tokens
    task = replace(task, judge=judge, max_new_tokens=max_new_tokens)
    limit = config.get("limit")
    return task, tuple(rows[:limit] for rows in splits)
