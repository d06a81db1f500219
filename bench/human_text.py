"""How likely are texts that people wrote, and that no method was trained on?

The golds of two other tasks, each after its question: GSM8K's solutions and MBPP's programs. What is kept is
the negative log-likelihood of each in nats a token, in RUN/human_text.json with a digest of the weights.
"""

import random
from pathlib import Path
from statistics import mean

import lora
from data import prompt
from engine.chat import training_ids
from engine.fingerprint import fingerprint
from engine.model import load_model
from engine.packed import token_log_probs
from results.run_files import trained_methods
from support.files import read_json, write_json
from tasks import TASKS

TEXTS = {"gsm8k": 100, "mbpp": 100}  # of each task's test rows


def score_human_text(run: Path, model_name: str, data: Path) -> None:
    """The base model and every trained one of a run folder. What is known of the same weights stays."""
    path = run / "human_text.json"
    found = read_json(path) if path.exists() else {}
    model, tokenizer = load_model(model_name, "cpu", "float32")
    texts = {task: human_texts(tokenizer, task, data) for task in TEXTS}

    keep(found, "base", model, texts)
    for name in trained_methods(run):
        lora.load(model, run / name)
        keep(found, name, model, texts)
        write_json(path, found)


def keep(found: dict, name: str, model, texts: dict[str, list]) -> None:
    """Add a model's losses to `found`, unless they are there."""
    weights = fingerprint(model)
    if found.get(name, {}).get("weights") == weights:
        return
    losses = {}
    for task, rows in texts.items():
        losses[task] = [round(-mean(scores), 5) for scores in token_log_probs(model, rows)]
    found[name] = {"weights": weights, "nats_a_token": losses}


def human_texts(tokenizer, name: str, data: Path) -> list:
    """A task's test golds as rows of token ids: a random sample, the same for every model."""
    task = TASKS[name]
    _, _, test = task.load(data)
    chosen = random.Random(0).sample(test, TEXTS[name])
    rows = []
    for x in chosen:
        rows.append(training_ids(tokenizer, prompt(task.train, x), task.gold(x)))
    return rows
