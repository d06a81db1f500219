"""WinoGrande (Sakaguchi et al., 2021): which of two names fills the blank."""

import json
import zipfile
from pathlib import Path

import numpy as np

from engine.likelihood import Option
from support.files import download, write_jsonl
from tasks.benchmark import graded


def winogrande_options(row: dict, shots: list[dict]) -> list[Option]:
    """Partial evaluation (Trinh and Le, 2018): what follows the blank, after each of its two fillings."""
    before, after = row["sentence"].split("_", 1)
    return [Option(before + row[name], after.strip()) for name in ("option1", "option2")]


def winogrande_metrics(row: dict, scores: np.ndarray) -> dict:
    return graded(scores, int(row["answer"]) - 1)


def fetch_winogrande(folder: Path) -> None:
    archive = folder / "winogrande_1.1.zip"
    download("https://storage.googleapis.com/ai2-mosaic/public/winogrande/winogrande_1.1.zip", archive)
    with zipfile.ZipFile(archive) as files:
        member = next(name for name in files.namelist() if name.endswith("/dev.jsonl") and "__MACOSX" not in name)
        rows = [json.loads(line) for line in files.read(member).decode().splitlines()]
    keep = ("sentence", "option1", "option2", "answer")
    write_jsonl(folder / "validation.jsonl", [{name: row[name] for name in keep} for row in rows])
