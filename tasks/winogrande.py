"""WinoGrande (Sakaguchi et al., 2021): which of two names fills the blank.

A row: {"sentence": "Ann met Eve, so _ smiled.", "option1": "Ann", "option2": "Eve", "answer": "2"}
"""

import json
import zipfile
from pathlib import Path

import numpy as np

from engine.likelihood import Option
from support.files import download, write_jsonl
from tasks.multiple_choice import Benchmark, graded, need

HOME = "https://storage.googleapis.com/ai2-mosaic/public/winogrande/winogrande_1.1.zip"
FIELDS = ("sentence", "option1", "option2", "answer")


def winogrande_options(row: dict, shots: list[dict]) -> list[Option]:
    """Partial evaluation (Trinh and Le, 2018): what follows the blank, after each of its two fillings."""
    before, after = row["sentence"].split("_", 1)
    after = after.strip()
    return [Option(before + row["option1"], after), Option(before + row["option2"], after)]


def winogrande_metrics(row: dict, scores: np.ndarray) -> dict:
    answer = need(row["answer"], str, "the answer")  # "1" or "2"
    return graded(scores, int(answer) - 1)


def fetch_winogrande(folder: Path) -> None:
    archive = folder / "winogrande_1.1.zip"
    download(HOME, archive)
    lines = []
    with zipfile.ZipFile(archive) as files:
        for name in files.namelist():
            if name.endswith("/dev.jsonl") and "__MACOSX" not in name:
                lines = files.read(name).decode().splitlines()

    rows = []
    for line in lines:
        row = json.loads(line)
        rows.append({field: row[field] for field in FIELDS})
    write_jsonl(folder / "validation.jsonl", rows)


WINOGRANDE = Benchmark(
    file="winogrande/validation.jsonl",
    counts={"winogrande/validation.jsonl": 1267},
    fields=FIELDS,
    options=winogrande_options,
    metrics=winogrande_metrics,
    fetch=fetch_winogrande,
)
