"""What the general benchmarks have in common."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from engine.likelihood import Option


def graded(scores: np.ndarray, gold: int) -> dict:
    if not 0 <= gold < len(scores):
        raise ValueError(f"the gold {gold} is none of its {len(scores)} options")
    chosen = int(np.argmax(scores))  # of equals, the first
    return {"chosen": chosen, "gold": gold, "metrics": {"acc": float(chosen == gold)}}


@dataclass(frozen=True)
class Benchmark:
    """All that sets one benchmark apart. `headline` is the metric of Table 4."""

    file: str
    fields: tuple[str, ...]
    options: Callable[[dict, list[dict]], list[Option]]
    metrics: Callable[[dict, np.ndarray], dict]
    headline: str = "acc"
