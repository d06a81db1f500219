"""MMLU (Hendrycks et al., 2021): four options, of which the letter is scored.

57 subjects, with up to 5 solved questions.

A row: {"question": "What is 2 + 2?", "subject": "elementary_mathematics", "choices": ["1", "2", "3", "4"],
"answer": 3}
"""

import csv
import io
import tarfile
from pathlib import Path

import numpy as np

from engine.likelihood import Option
from support.files import download, write_jsonl
from tasks.multiple_choice import Benchmark, graded, need

LETTERS = "ABCD"
DESCRIPTION = "The following are multiple choice questions (with answers) about {subject}.\n\n"
MMLU_SHOTS = "mmlu/dev.jsonl"
HOME = "https://people.eecs.berkeley.edu/~hendrycks/data.tar"


def mmlu_question(row: dict) -> str:
    lines = [row["question"].strip()]
    for letter, choice in zip(LETTERS, row["choices"], strict=True):
        lines.append(f"{letter}. {choice}")
    lines.append("Answer:")
    return "\n".join(lines)


def mmlu_options(row: dict, shots: list[dict]) -> list[Option]:
    """The four letters after the question. `shots` are solved rows of the same subject."""
    description = DESCRIPTION.format(subject=row["subject"].replace("_", " "))
    solved = tuple((mmlu_question(shot), LETTERS[shot["answer"]]) for shot in shots)
    question = mmlu_question(row)
    return [Option(question, letter, description, solved) for letter in LETTERS]


def mmlu_metrics(row: dict, scores: np.ndarray) -> dict:
    return graded(scores, need(row["answer"], int, "the answer"))


def fetch_mmlu(folder: Path) -> None:
    """hendrycks/test: one CSV file a subject. A row is the question, four choices and the right letter."""
    archive = folder / "data.tar"
    download(HOME, archive)
    with tarfile.open(archive) as tar:
        for split in ("test", "dev"):
            rows = []
            for name in sorted(tar.getnames()):
                if f"/{split}/" in name and name.endswith(f"_{split}.csv"):
                    subject = Path(name).name.removesuffix(f"_{split}.csv")
                    rows += _rows_of_csv(tar.extractfile(name).read().decode(), subject)
            write_jsonl(folder / f"{split}.jsonl", rows)


def _rows_of_csv(text: str, subject: str) -> list[dict]:
    rows = []
    for question, *choices, letter in csv.reader(io.StringIO(text, newline="")):
        answer = LETTERS.index(letter)
        rows.append({"question": question, "subject": subject, "choices": choices, "answer": answer})
    return rows


MMLU = Benchmark(
    file="mmlu/test.jsonl",
    counts={"mmlu/test.jsonl": 14042, MMLU_SHOTS: 285},
    fields=("question", "subject", "choices", "answer"),
    options=mmlu_options,
    metrics=mmlu_metrics,
    fetch=fetch_mmlu,
)
