"""Does the claim hold on a small open model? Five methods, three seeds, on XQuAD reading comprehension.

    python -m bench.study --xquad data/xquad/xquad.en.json --out runs/study    the runs, then the report
    python -m bench.study --report-only                                        the report alone

Rows: the first 36 of XQuAD's English articles. Train, validation and test are apart by article, and a quarter
of the questions is made unanswerable by a context of another article. Judge: every word of the gold in at
most 50 words, or abstention.

All runs share one run folder. What an earlier call finished is not made again. The report is docs/study.md.
It is made from docs/study/results.json and nothing else (bench/study_report.py).
"""

import argparse
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from bench.study_report import ARTICLES, METHODS, draw_curves, draw_trade_off, report, seeds_of
from data import Example
from support.cli import exit_cleanly
from support.files import download, read_json, read_jsonl, write_json, write_jsonl, write_text
from tasks.benchmarks import BENCHMARKS, Scoring
from tasks.benchmarks import documents as documents_of
from tasks.reading import pair_unanswerable, read_squad

ROOT = Path(__file__).resolve().parent.parent

XQUAD = "https://raw.githubusercontent.com/google-deepmind/xquad/master/xquad.en.json"
SHARES = {"train": 0.5, "val": 0.125, "test": 0.375}  # of the articles


@dataclass(frozen=True)
class Study:
    """The sizes of a study, and where it is."""

    out: Path  # the run folder
    data: Path  # where the general benchmarks are
    model: str
    rows: dict[str, int]  # of every split
    seeds: int
    steps: int
    eval_every: int
    lr: float
    documents: int  # of TruthfulQA and of HellaSwag
    choices: bool  # S3FT with other settings, too

    @property
    def choices_folder(self) -> Path:
        """A run folder of its own, which begins with the base model's responses of the first."""
        return self.out.with_name(f"{self.out.name}-choices")

    @property
    def benchmark_limits(self) -> dict[str, int]:
        """How many documents of each benchmark. Of MMLU, of each of its 57 subjects."""
        n = self.documents
        return {"mmlu": max(1, n // 100), "truthfulqa,hellaswag": n, "winogrande": 2 * n}

    @property
    def choice_flags(self) -> dict[str, list[str]]:
        """What the paper is silent on, and its learning rate: S3FT with seed 0 and one change."""
        twice = [f"--steps={2 * self.steps}", f"--eval-every={2 * self.eval_every}"]
        return {
            "batch 4, twice the steps": ["--batch-size=4", *twice],
            "all linear layers adapted": ["--target-modules=all-linear"],
            "peak rate 1e-4": ["--lr=1e-4"],
        }


# --------------------------------------------------------------------------------------- the rows


def make_rows(source: Path, out: Path, sizes: dict[str, int]) -> None:
    """The files of a custom task, each a random sample of its articles' rows."""
    download(XQUAD, source)
    articles = read_squad(source)[:ARTICLES]
    start = 0
    for split, share in SHARES.items():
        part = articles[start : start + round(share * len(articles))]
        start += len(part)
        rows = pair_unanswerable(part)
        size = min(sizes[split], len(rows))
        chosen = sorted(random.Random(0).sample(range(len(rows)), size))
        write_jsonl(out / f"{split}.jsonl", [to_row(rows[i]) for i in chosen])


def to_row(x: Example) -> dict:
    return {
        "id": x.id,
        "question": x.question,
        "context": x.context,
        "unanswerable": x.unanswerable,
        "answer": x.answer,
    }


# --------------------------------------------------------------------------------------- the runs


def run_all(study: Study) -> None:
    for seed in range(study.seeds):
        for method in METHODS:
            train(study, study.out, method, f"{method}-{seed}", [f"--seed={seed}"])
    for names, limit in study.benchmark_limits.items():
        run(
            "evaluate.py",
            f"--out={study.out}",
            f"--data={study.data}",
            f"--benchmarks={names}",
            f"--limit={limit}",
            "--sampled",
        )
    if study.choices:
        run_choices(study)


def run_choices(study: Study) -> None:
    folder = study.choices_folder
    for file in ("predictions.jsonl", "paraphrases.jsonl"):
        write_text(folder / file, (study.out / file).read_text("utf-8"))
    for choice, flags in study.choice_flags.items():
        train(study, folder, "s3ft", folder_name(choice), flags)
    run("evaluate.py", f"--out={folder}")


def folder_name(choice: str) -> str:
    return choice.replace(",", "").replace(" ", "-")


def train(study: Study, out: Path, method: str, name: str, more: list[str]) -> None:
    """One s3ft.py. Of flags given twice the last counts."""
    files = [f"--{split}-file={study.out / f'{split}.jsonl'}" for split in SHARES]
    run(
        "s3ft.py",
        "--task=custom",
        "--judge=recall",
        "--prompt=reading",
        *files,
        f"--method={method}",
        f"--name={name}",
        f"--model={study.model}",
        f"--out={out}",
        f"--steps={study.steps}",
        f"--eval-every={study.eval_every}",
        f"--lr={study.lr}",
        "--share-prefix",
        *more,
    )


def run(script: str, *flags: str) -> None:
    done = subprocess.run([sys.executable, str(ROOT / script), *flags])
    if done.returncode:
        sys.exit(done.returncode)


# --------------------------------------------------------------------------------------- what is kept of them


def collect(study: Study) -> dict:
    """What the report needs and no more: results.json, every row's verdict and metrics, the curves."""
    results = read_json(study.out / "results.json")
    rows = {split: len(read_jsonl(study.out / f"{split}.jsonl")) for split in SHARES}
    results["settings"] = {
        "steps": study.steps,
        "eval_every": study.eval_every,
        "lr": study.lr,
        "seeds": study.seeds,
        **rows,
    }

    test_ids = [row["id"] for row in read_jsonl(study.out / "test.jsonl")]
    wanted = wanted_documents(study)
    for name, model in results["models"].items():
        folder = study.out / name
        model["verdicts"] = verdict_marks(folder, test_ids)
        model |= benchmark_scores(folder, wanted)
        model.pop("benchmarks", None)
        if name != "base":
            model["curve"] = read_jsonl(folder / "log.jsonl")

    results["choices"] = collect_choices(study, test_ids) if study.choices else {}
    return results


def wanted_documents(study: Study) -> set[tuple[str, int]]:
    """(benchmark, index) of this study's documents. A larger one may have left others in the folder."""
    wanted = set()
    for names, limit in study.benchmark_limits.items():
        for name in names.split(","):
            for document in documents_of(name, study.data, Scoring(limit=limit, sampled=True)):
                wanted.add((name, document.index))
    return wanted


def benchmark_scores(folder: Path, wanted: set[tuple[str, int]]) -> dict:
    """Each document's metric, by benchmark, and how often the model answered A to MMLU."""
    documents = {benchmark: [] for benchmark in BENCHMARKS}
    letters = []
    for row in read_jsonl(folder / "benchmarks" / "samples.jsonl"):
        benchmark = row["benchmark"]
        if (benchmark, row["index"]) not in wanted:
            continue
        documents[benchmark].append(round(row["metrics"][BENCHMARKS[benchmark].headline], 4))
        if benchmark == "mmlu":
            letters.append(row["chosen"])
    return {"documents": documents, "mmlu_letter_a": letters.count(0) / len(letters)}


def collect_choices(study: Study, test_ids: list[str]) -> dict:
    models = read_json(study.choices_folder / "results.json")["models"]
    found = {}
    for choice in study.choice_flags:
        name = folder_name(choice)
        found[choice] = {
            "accuracy": models[name]["accuracy"],
            "drift": models[name]["drift"],
            "verdicts": verdict_marks(study.choices_folder / name, test_ids),
        }
    return found


def verdict_marks(folder: Path, test_ids: list[str]) -> str:
    """A 1 or 0 for every test row."""
    accepted = {row["id"]: bool(row["accepted"]) for row in read_jsonl(folder / "test.judged.jsonl")}
    return "".join("1" if accepted[id] else "0" for id in test_ids)


# --------------------------------------------------------------------------------------- the command line


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--report-only", action="store_true", help="write docs/study.md from docs/study/results.json"
    )
    parser.add_argument(
        "--docs", type=Path, default=ROOT / "docs", help="gets study.md, study/ (%(default)s)"
    )
    parser.add_argument("--xquad", type=Path, default=Path("data/xquad/xquad.en.json"), help="(%(default)s)")
    parser.add_argument("--data", type=Path, default=Path("data"), help="general benchmarks (%(default)s)")
    parser.add_argument(
        "--choices", action="store_true", help="also S3FT with other settings: a quarter of an hour more"
    )
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct", help="(%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/study"), help="run folder (%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="(%(default)s)")
    parser.add_argument("--steps", type=int, default=12, help="(%(default)s)")
    parser.add_argument("--eval-every", type=int, default=6, help="(%(default)s)")
    parser.add_argument(
        "--lr", type=float, default=1e-3, help="ten times the paper's, for a 400th of its steps (%(default)s)"
    )
    parser.add_argument("--train", type=int, default=96, help="rows (%(default)s)")
    parser.add_argument("--val", type=int, default=32, help="rows (%(default)s)")
    parser.add_argument("--test", type=int, default=128, help="rows (%(default)s)")
    parser.add_argument(
        "--documents",
        type=int,
        default=100,
        help="of TruthfulQA and of HellaSwag (%(default)s); WinoGrande: twice as many, each MMLU "
        "subject: a 100th",
    )
    args = parser.parse_args()

    kept = args.docs / "study" / "results.json"
    if not args.report_only:
        rows = {"train": args.train, "val": args.val, "test": args.test}
        study = Study(
            args.out,
            args.data,
            args.model,
            rows,
            args.seeds,
            args.steps,
            args.eval_every,
            args.lr,
            args.documents,
            args.choices,
        )
        make_rows(args.xquad, study.out, study.rows)
        run_all(study)
        write_json(kept, collect(study))

    results = read_json(kept)
    methods = seeds_of(results)
    draw_trade_off(methods, kept.parent / "trade-off.svg")
    draw_curves(methods, kept.parent / "curves.svg")
    write_text(args.docs / "study.md", report(results, kept.parent))


if __name__ == "__main__":
    exit_cleanly(main)
