"""HellaSwag (Zellers et al., 2019): which of four endings goes on with a text."""

import re
from pathlib import Path

import numpy as np

from engine.likelihood import Option
from support.files import download, read_jsonl, write_jsonl
from tasks.benchmark import graded


def hellaswag_text(text: str) -> str:
    """Without the marks of the WikiHow half. What is stripped is the text before they go, not after."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def hellaswag_options(row: dict, shots: list[dict]) -> list[Option]:
    context = hellaswag_text(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}")
    return [Option(context, hellaswag_text(ending)) for ending in row["endings"]]


def hellaswag_metrics(row: dict, scores: np.ndarray) -> dict:
    """acc_norm divides by the characters of the ending, the blank before it not counted."""
    gold, lengths = int(row["label"]), [len(hellaswag_text(ending)) for ending in row["endings"]]
    result = graded(scores, gold)
    return result | {"metrics": result["metrics"] | {"acc_norm": float(np.argmax(scores / lengths) == gold)}}


def fetch_hellaswag(folder: Path) -> None:
    original = folder / "hellaswag_val.jsonl"
    download("https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl", original)
    write_jsonl(folder / "validation.jsonl", [row | {"label": str(row["label"])} for row in read_jsonl(original, ("label",))])
