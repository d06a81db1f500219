"""MMLU (Hendrycks et al., 2021): four options, of which the letter is scored; 57 subjects, with up to 5 solved questions."""

import csv
import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from engine.likelihood import Option
from support.files import download, write_jsonl
from tasks.benchmark import graded


def mmlu_question(row: dict) -> str:
    lines = [f"{letter}. {choice}" for letter, choice in zip("ABCD", row["choices"], strict=True)]
    return "\n".join([row["question"].strip(), *lines, "Answer:"])


def mmlu_options(row: dict, shots: list[dict]) -> list[Option]:
    description = "The following are multiple choice questions (with answers) about {}.\n\n"
    description = description.format(row["subject"].replace("_", " "))
    solved = tuple((mmlu_question(shot), "ABCD"[shot["answer"]]) for shot in shots)
    return [Option(mmlu_question(row), letter, description, solved) for letter in "ABCD"]


def mmlu_metrics(row: dict, scores: np.ndarray) -> dict:
    return graded(scores, row["answer"])


MMLU_SHOTS = "mmlu/dev.jsonl"


def fetch_mmlu(folder: Path) -> None:
    """hendrycks/test: one CSV file a subject, its rows being the question, four choices and the letter of the answer."""
    archive = folder / "data.tar"
    download("https://people.eecs.berkeley.edu/~hendrycks/data.tar", archive)
    with tarfile.open(archive) as tar:
        for split in ("test", "dev"):
            names = sorted(name for name in tar.getnames() if name.endswith(f"_{split}.csv") and f"/{split}/" in name)
            rows = [row for name in names for row in mmlu_rows(tar.extractfile(name).read().decode(), name, split)]
            write_jsonl(folder / f"{split}.jsonl", rows)


def mmlu_rows(text: str, name: str, split: str) -> Iterator[dict]:
    subject = name.rpartition("/")[2].removesuffix(f"_{split}.csv")
    for question, *choices, letter in csv.reader(io.StringIO(text, newline="")):
        yield {"question": question, "subject": subject, "choices": choices, "answer": "ABCD".index(letter)}
