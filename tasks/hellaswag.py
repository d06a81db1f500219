"""HellaSwag (Zellers et al., 2019): which of four endings goes on with a text.

A row: {"activity_label": "Baking", "ctx_a": "A man mixes flour.", "ctx_b": "he", "label": "2",
        "endings": ["sings.", "swims away.", "adds an egg.", "is a tree."]}
"""

import re
from pathlib import Path

import numpy as np

from engine.likelihood import Option
from support.files import download, read_jsonl, write_jsonl
from tasks.multiple_choice import Benchmark, graded, need

HOME = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"


def hellaswag_text(text: str) -> str:
    """Without the marks of the WikiHow half. What is stripped is the text before they go, not after."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def hellaswag_options(row: dict, shots: list[dict]) -> list[Option]:
    context = hellaswag_text(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}")
    return [Option(context, hellaswag_text(ending)) for ending in row["endings"]]


def hellaswag_metrics(row: dict, scores: np.ndarray) -> dict:
    """acc_norm and log_p_norm divide by the characters of the ending. The blank before it is not counted."""
    gold = int(need(row["label"], str, "the label"))
    characters = np.array([len(hellaswag_text(ending)) for ending in row["endings"]])
    result = graded(scores, gold)
    by_character = graded(scores / characters, gold)
    result["metrics"]["acc_norm"] = by_character["metrics"]["acc"]
    result["metrics"]["log_p_norm"] = by_character["metrics"]["log_p"]
    return result


def fetch_hellaswag(folder: Path) -> None:
    original = folder / "hellaswag_val.jsonl"
    download(HOME, original)
    rows = read_jsonl(original, ("label",))
    for row in rows:
        row["label"] = str(row["label"])
    write_jsonl(folder / "validation.jsonl", rows)


HELLASWAG = Benchmark(
    file="hellaswag/validation.jsonl",
    counts={"hellaswag/validation.jsonl": 10042},
    fields=("activity_label", "ctx_a", "ctx_b", "endings", "label"),
    options=hellaswag_options,
    metrics=hellaswag_metrics,
    fetch=fetch_hellaswag,
)
