"""lm-evaluation-harness on local rows: its own task definitions and its own scoring, without the network.

    write_tasks("hellaswag", rows, folder)
    loaded = load_tasks(folder, "hellaswag")
    evaluate(language_model(model, tokenizer), loaded)["samples"]["hellaswag"]

For tests/test_benchmarks_harness.py and bench/evaluate.py. Needs `pip install lm-eval==0.4.13 accelerate`.
"""

import json
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import lm_eval  # noqa: E402, after the two settings above, which it reads
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402


def write_tasks(name: str, rows: list[dict], folder: Path, shots: list[dict] = ()) -> None:
    """Put a group `local_NAME` into `folder`: the harness's tasks of a benchmark, told to read their rows
    there.
    """
    tasks = []
    for task, splits in rows_by_task(name, rows, shots).items():
        tasks.append(local_task(task, splits, folder))
    weighted = {"metric": "acc", "weight_by_size": True}
    group = {"group": f"local_{name}", "task": tasks, "aggregate_metric_list": [weighted]}
    (folder / f"{name}.yaml").write_text(json.dumps(group))  # JSON is YAML


def rows_by_task(name: str, rows: list[dict], shots: list[dict]) -> dict[str, dict[str, list[dict]]]:
    """The harness's tasks of a benchmark -> split -> rows. Each of MMLU's subjects is a task."""
    if name == "truthfulqa":
        return {task: {"train": rows, "validation": rows} for task in ("truthfulqa_mc1", "truthfulqa_mc2")}
    if name != "mmlu":
        return {name: {"train": rows, "validation": rows}}

    tasks = {}
    for row in rows:
        splits = tasks.setdefault(f"mmlu_{row['subject']}", {"test": [], "dev": []})
        splits["test"].append(row)
    for row in shots:
        if f"mmlu_{row['subject']}" in tasks:
            tasks[f"mmlu_{row['subject']}"]["dev"].append(row)
    return tasks


def local_task(task: str, splits: dict[str, list[dict]], folder: Path) -> dict:
    """A harness task with its rows in JSONL files of ours."""
    files = {}
    for split, rows in splits.items():
        path = folder / f"{task}.{split}.json"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        files[split] = str(path)
    return {
        "task": task,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": files},
    }


def load_tasks(folder: Path, name: str, num_fewshot: int = 0, manager: TaskManager | None = None) -> dict:
    manager = manager or TaskManager(include_path=str(folder))
    loaded = manager.load([f"local_{name}"])
    for task in loaded["tasks"].values():
        task.set_config("num_fewshot", num_fewshot)
        task.set_fewshot_seed(0)
    return loaded


def language_model(
    model, tokenizer, add_bos: bool = False, batch_size: int = 8, max_length: int | None = None
) -> HFLM:
    return HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        add_bos_token=add_bos,
        batch_size=batch_size,
        max_length=max_length,
    )


def evaluate(lm: HFLM, loaded: dict, apply_chat_template: bool = False) -> dict:
    """As its command line does it: with a chat template, shots are turns. (The library's default is one
    turn.)
    """
    return lm_eval.evaluate(
        lm,
        loaded,
        bootstrap_iters=0,
        log_samples=True,
        apply_chat_template=apply_chat_template,
        fewshot_as_multiturn=apply_chat_template,
    )


def log_likelihoods(result: dict, task: str) -> list[list[float]]:
    """`[documents][options]`, in document order."""
    samples = sorted(result["samples"][task], key=lambda sample: sample["doc_id"])
    documents = []
    for sample in samples:
        documents.append([float(response[0][0]) for response in sample["resps"]])
    return documents
