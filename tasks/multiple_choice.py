"""What a benchmark of multiple-choice questions is: rows with options, and metrics of their likelihoods."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine.likelihood import Option


@dataclass(frozen=True)
class Benchmark:
    """All that sets one benchmark apart.

    `options` makes the options of a row, given the solved rows that are shown before it. `metrics` takes the
    row and the log-likelihoods of its options `[options]`, and returns what a sample keeps: the option
    chosen, the gold, the metrics. Both raise where a row is faulty.
    """

    file: str  # of the rows, under --data
    counts: dict[str, int]  # each file that `fetch` writes, and how many rows it has
    fields: tuple[str, ...]  # that every row has
    options: Callable[[dict, list[dict]], list[Option]]
    metrics: Callable[[dict, np.ndarray], dict]
    fetch: Callable[[Path], None]  # from the public home into the folder of `file`
    headline: str = "acc"  # the metric of Table 4


def graded(scores: np.ndarray, gold: int) -> dict:
    """What a sample keeps, from the scores of its options `[options]`.

    acc: has the right option the highest score? log_p: log p of the right option among the options.
    ValueError: the gold is not one of the options.
    """
    if not 0 <= gold < len(scores):
        raise ValueError(f"the gold {gold} is none of its {len(scores)} options")
    chosen = int(np.argmax(scores))  # of equals, the first
    metrics = {"acc": float(chosen == gold), "log_p": log_p(scores, gold)}
    return {"chosen": chosen, "gold": gold, "metrics": metrics}


def log_p(scores: np.ndarray, gold: int) -> float:
    """log of the softmax over the options' log-likelihoods `[options]`, at the right one, in nats.

    Accuracy only sees which option comes first. This moves with every change of the model, so fewer documents
    tell two models apart.
    """
    shifted = scores - scores.max()
    return float(shifted[gold] - np.log(np.exp(shifted).sum()))


def need(value, kind: type, called: str):
    """The value. ValueError: it is of another type. True is not taken for 1."""
    if type(value) is not kind:
        raise ValueError(f"{called} must be {kind.__name__}, found {value!r}")
    return value
