"""How likely are texts that people wrote, and that no method was trained on?

The golds of another task: GSM8K's, each after its question. What is kept is the negative log-likelihood of
each in nats a token, in RUN/human_text.json with a digest of the weights.
"""

import random
from pathlib import Path

import lora
from data import prompt
from engine.chat import training_ids
from engine.fingerprint import fingerprint
from engine.model import load_model
from engine.packed import token_log_probs
from results.run_files import trained_methods
from support.files import read_json, write_json
from tasks import TASKS

TEXTS = 100


def score_human_text(run: Path, model_name: str, data: Path) -> None:
    """The base model and every trained one of a run folder. What is known of the same weights stays."""
    path = run / "human_text.json"
    found = read_json(path) if path.exists() else {}
    model, tokenizer = load_model(model_name, "cpu", "float32")
    rows = human_texts(tokenizer, data)

    keep(found, "base", model, rows)
    for name in trained_methods(run):
        lora.load(model, run / name)
        keep(found, name, model, rows)
        write_json(path, found)


def keep(found: dict, name: str, model, rows: list) -> None:
    weights = fingerprint(model)
    if found.get(name, {}).get("weights") == weights:
        return
    losses = []
    for scores in token_log_probs(model, rows):
        losses.append(round(-sum(scores) / len(scores), 5))
    found[name] = {"weights": weights, "nats_a_token": losses}


def human_texts(tokenizer, data: Path) -> list:
    """GSM8K's test golds as rows of token ids: a random sample, the same for every model."""
    task = TASKS["gsm8k"]
    _, _, test = task.load(data)
    chosen = random.Random(0).sample(test, min(TEXTS, len(test)))
    rows = []
    for x in chosen:
        rows.append(training_ids(tokenizer, prompt(task.train, x), task.gold(x)))
    return rows
