"""Does the claim hold on a small open model? Six methods, three seeds, on reading comprehension.

    python -m bench.study --xquad data/xquad/xquad.en.json --out runs/study    the runs, then the report
    python -m bench.study --methods sft,s3ft --seeds 1                         some of them, then the report
    python -m bench.study --report-only                                        the report alone

What is measured, and what counts for and against the claim, was written before the runs:
docs/study-protocol.md.

Rows: the first 36 of XQuAD's English articles, and the embedded passages. Train, validation and test are
apart by article and passage, and a quarter of the questions is made unanswerable by a context of another
article. Judge: every word of the gold in at most 50 words, or abstention.

All runs share one run folder. What an earlier call finished is not made again, so that the study may be
broken off. `--equal-steps`, `--judges` and `--choices` add further runs. The report is docs/study.md. It is
made from docs/study/results.json and nothing else (bench/study_report.py).
"""

import argparse
import random
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from bench.human_text import score_human_text
from bench.study_figures import draw_curves, draw_trade_off
from bench.study_numbers import METHODS, seeds_of
from bench.study_report import ARTICLES, report
from data import Example
from judges import judge_all
from support.cli import exit_cleanly
from support.files import download, read_json, read_jsonl, write_json, write_jsonl, write_text
from tasks import TASKS, ifeval
from tasks.benchmarks import BENCHMARKS, Scoring
from tasks.benchmarks import documents as documents_of
from tasks.reading import pair_unanswerable, read_squad

ROOT = Path(__file__).resolve().parent.parent

XQUAD = "https://raw.githubusercontent.com/google-deepmind/xquad/master/xquad.en.json"
ARTICLES_OF = {"train": 16, "val": 4, "test": 16}
TRIES = ["--tries=4", "--shots=3"]  # of the method "tries"
JUDGES = ["exact", "f1"]  # selecting judges that S3FT is tried with beside recall, with one seed
IFEVAL_TOKENS = 256  # of a response


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
    documents: int  # of IFEval
    methods: list[str]
    equal_steps: bool  # SFT and S3FT after the last step, too
    judges: bool  # S3FT with other selecting judges, too
    choices: bool  # S3FT with other settings, too

    @property
    def benchmark_limits(self) -> dict[str, int]:
        """How many documents of each benchmark. Of MMLU, of each of its 57 subjects."""
        n = self.documents
        return {"mmlu": max(1, n // 100), "truthfulqa,hellaswag,winogrande": 2 * n, "ifeval": n}

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
    """The files of a custom task: a random sample of the rows of its articles and embedded passages."""
    download(XQUAD, source)
    articles = read_squad(source)[:ARTICLES]
    embedded = TASKS["reading"].load(source.parent)
    start = 0
    for (split, number), passages in zip(ARTICLES_OF.items(), embedded, strict=True):
        part = articles[start : start + number]
        start += number
        rows = [*pair_unanswerable(part), *passages]
        size = min(sizes[split], len(rows))
        chosen = sorted(random.Random(0).sample(range(len(rows)), size))
        write_jsonl(out / f"{split}.jsonl", [to_row(rows[i]) for i in chosen])


def example_of(row: dict) -> Example:
    """The example of a row that `to_row` made."""
    x = Example(row["id"], row["question"], row["answer"], row["context"])
    return replace(x, unanswerable=row["unanswerable"])


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
    # 1. Every method with every seed.
    for method in study.methods:
        for seed in range(study.seeds):
            train(study, study.out, method, f"{method}-{seed}", [f"--seed={seed}"])

    # 2. What they learned and forgot.
    for names, limit in study.benchmark_limits.items():
        run(
            "evaluate.py",
            f"--out={study.out}",
            f"--data={study.data}",
            f"--benchmarks={names}",
            f"--limit={limit}",
            "--sampled",
            *([f"--max-new-tokens={IFEVAL_TOKENS}"] if "ifeval" in names else []),
        )
    score_human_text(study.out, study.model, study.data)

    # 3. What it hangs on.
    if study.equal_steps:
        run_equal_steps(study)
    if study.judges:
        run_judges(study)
    if study.choices:
        run_choices(study)


def run_equal_steps(study: Study) -> None:
    """SFT and S3FT validated after the last step only, so that it is the last one's adapter that is kept."""
    folder = with_base_responses(study, "last-step")
    for method in ("sft", "s3ft"):
        for seed in range(study.seeds):
            flags = [f"--seed={seed}", f"--eval-every={study.steps}"]
            train(study, folder, method, f"{method}-{seed}", flags)
    score_human_text(folder, study.model, study.data)


def run_judges(study: Study) -> None:
    """S3FT with other selecting judges. Its model is tested by all of them."""
    for judge in JUDGES:
        folder = with_base_responses(study, f"judged-by-{judge}")
        train(study, folder, "s3ft", "s3ft", [f"--judge={judge}"])
        run("evaluate.py", f"--out={folder}")


def with_base_responses(study: Study, name: str) -> Path:
    """A run folder of its own, which begins with the base model's responses of the study's."""
    folder = study.out.with_name(f"{study.out.name}-{name}")
    for file in ("predictions.jsonl", "paraphrases.jsonl"):
        write_text(folder / file, (study.out / file).read_text("utf-8"))
    return folder


def run_choices(study: Study) -> None:
    folder = with_base_responses(study, "choices")
    for choice, flags in study.choice_flags.items():
        train(study, folder, "s3ft", folder_name(choice), flags)
    run("evaluate.py", f"--out={folder}")


def folder_name(choice: str) -> str:
    return choice.replace(",", "").replace(" ", "-")


def train(study: Study, out: Path, method: str, name: str, more: list[str]) -> None:
    """One method with one seed. Of flags given twice the last counts."""
    files = [f"--{split}-file={study.out / f'{split}.jsonl'}" for split in ARTICLES_OF]
    program = ["-m", "examples.tries", *TRIES] if method == "tries" else ["s3ft.py", f"--method={method}"]
    run(
        *program,
        "--task=custom",
        "--judge=recall",
        "--prompt=reading",
        *files,
        f"--name={name}",
        f"--model={study.model}",
        f"--out={out}",
        f"--steps={study.steps}",
        f"--eval-every={study.eval_every}",
        f"--lr={study.lr}",
        "--share-prefix",
        *more,
    )


def run(*words: str) -> None:
    """A program of this project, as a person would call it."""
    done = subprocess.run([sys.executable, *words], cwd=ROOT)
    if done.returncode:
        sys.exit(done.returncode)


# --------------------------------------------------------------------------------------- what is kept of them


def collect(study: Study) -> dict:
    """What the report needs and no more: results.json, every row's verdict and metrics, the curves."""
    results = read_json(study.out / "results.json")
    rows = {split: len(read_jsonl(study.out / f"{split}.jsonl")) for split in ARTICLES_OF}
    results["settings"] = {
        "steps": study.steps,
        "eval_every": study.eval_every,
        "lr": study.lr,
        "seeds": study.seeds,
        **rows,
    }

    test = [example_of(row) for row in read_jsonl(study.out / "test.jsonl")]
    wanted = wanted_documents(study)
    human_text = read_json(study.out / "human_text.json")
    for name, model in results["models"].items():
        folder = study.out / name
        model["verdicts"] = verdict_marks(folder, test)
        model["by_judge"] = marks_by_judge(folder, test)
        model |= benchmark_scores(folder, wanted)
        model["ifeval"] = ifeval_grades(study, folder)
        model["human_text"] = human_text[name]["nats_a_token"]
        model.pop("benchmarks", None)
        if name != "base":
            model["curve"] = read_jsonl(folder / "log.jsonl")
    for unused in ("examples", "notes", "unused", "costs"):
        results.pop(unused, None)
    results["config"] = {"model": Path(results["config"]["model"]).name}  # and no paths

    results["last_step"] = collect_last_step(study) if study.equal_steps else {}
    results["judges"] = collect_judges(study, test) if study.judges else {}
    results["choices"] = collect_choices(study, test) if study.choices else {}
    return results


def wanted_documents(study: Study) -> set[tuple[str, int]]:
    """(benchmark, index) of this study's documents. A larger one may have left others in the folder."""
    wanted = set()
    for names, limit in study.benchmark_limits.items():
        for name in set(names.split(",")) & BENCHMARKS.keys():
            for document in documents_of(name, study.data, Scoring(limit=limit, sampled=True)):
                wanted.add((name, document.index))
    return wanted


def benchmark_scores(folder: Path, wanted: set[tuple[str, int]]) -> dict:
    """By benchmark, each document's metric and log p of its right option. How often MMLU was answered A."""
    documents = {benchmark: [] for benchmark in BENCHMARKS}
    log_p = {benchmark: [] for benchmark in BENCHMARKS}
    letters = []
    rows = read_jsonl(folder / "benchmarks" / "samples.jsonl")
    for row in sorted(rows, key=lambda row: (row["benchmark"], row["index"])):
        benchmark = row["benchmark"]
        if (benchmark, row["index"]) not in wanted:
            continue
        documents[benchmark].append(round(row["metrics"][BENCHMARKS[benchmark].headline], 4))
        log_p[benchmark].append(round(row["metrics"]["log_p"], 4))
        if benchmark == "mmlu":
            letters.append(row["chosen"])
    return {"documents": documents, "log_p": log_p, "mmlu_letter_a": letters.count(0) / len(letters)}


def ifeval_grades(study: Study, folder: Path) -> dict[str, list[float]]:
    """By metric, a number for each prompt."""
    checkers = ifeval.load_checkers(study.data)
    responses = {}
    for row in read_jsonl(folder / "benchmarks" / f"ifeval.{IFEVAL_TOKENS}-tokens.jsonl"):
        responses[row["id"]] = row["response"]
    grades = []
    for row in ifeval.rows(study.data, study.documents, sampled=True):
        grades.append(ifeval.grade(checkers, row, responses[str(row["key"])]))
    return {metric: ifeval.values_by_prompt(grades, metric) for metric in ifeval.METRICS}


def collect_last_step(study: Study) -> dict:
    """What human text costs the base model, and SFT and S3FT after the last step."""
    folder = study.out.with_name(f"{study.out.name}-last-step")
    found = {}
    for name, scored in read_json(folder / "human_text.json").items():
        found[name] = {"human_text": scored["nats_a_token"]}
    return found


def collect_judges(study: Study, test: list[Example]) -> dict:
    """S3FT by selecting judge, its answers judged by all of them. Recall's is the study's own."""
    folders = {"recall": study.out / "s3ft-0"}
    for judge in JUDGES:
        folders[judge] = study.out.with_name(f"{study.out.name}-judged-by-{judge}") / "s3ft"
    found = {}
    for judge, folder in folders.items():
        sources = read_json(folder / "training.json")["sources"]
        found[judge] = {"by_judge": marks_by_judge(folder, test), "sources": sources}
    return found


def collect_choices(study: Study, test: list[Example]) -> dict:
    folder = study.out.with_name(f"{study.out.name}-choices")
    models = read_json(folder / "results.json")["models"]
    found = {}
    for choice in study.choice_flags:
        name = folder_name(choice)
        found[choice] = {
            "accuracy": models[name]["accuracy"],
            "drift": models[name]["drift"],
            "verdicts": verdict_marks(folder / name, test),
        }
    return found


def verdict_marks(folder: Path, test: list[Example]) -> str:
    """A 1 or 0 for every test row."""
    accepted = {row["id"]: bool(row["accepted"]) for row in read_jsonl(folder / "test.judged.jsonl")}
    return "".join("1" if accepted[x.id] else "0" for x in test)


def marks_by_judge(folder: Path, test: list[Example]) -> dict[str, str]:
    """A 1 or 0 for every test row, by each judge that can select on this task."""
    responses = {row["id"]: row["response"] for row in read_jsonl(folder / "test.jsonl")}
    pairs = [(x, responses[x.id]) for x in test]
    found = {}
    for judge in ("recall", *JUDGES):
        found[judge] = "".join("1" if accepted else "0" for accepted in judge_all(judge, pairs))
    return found


# --------------------------------------------------------------------------------------- the command line


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--report-only", action="store_true", help="write docs/study.md from docs/study/results.json")
    add("--docs", type=Path, default=ROOT / "docs", help="gets study.md, study/ (%(default)s)")
    add("--xquad", type=Path, default=Path("data/xquad/xquad.en.json"), help="(%(default)s)")
    add("--data", type=Path, default=Path("data"), help="general benchmarks, GSM8K (%(default)s)")
    add("--model", default="models/SmolLM2-135M-Instruct", help="(%(default)s)")
    add("--out", type=Path, default=Path("runs/study"), help="run folder (%(default)s)")
    add("--methods", default=",".join(METHODS), help="(%(default)s)")
    add("--seeds", type=int, default=3, help="(%(default)s)")
    add("--steps", type=int, default=50, help="(%(default)s)")
    add("--eval-every", type=int, default=25, help="(%(default)s)")
    add("--lr", type=float, default=1e-3, help="(%(default)s)")
    add("--train", type=int, default=400, help="rows (%(default)s)")
    add("--val", type=int, default=64, help="rows (%(default)s)")
    add("--test", type=int, default=400, help="rows (%(default)s)")
    add("--documents", type=int, default=100,
        help="of IFEval (%(default)s); of the others twice as many, of each MMLU subject a 100th")
    add("--equal-steps", action="store_true", help="also SFT and S3FT after the last step, all seeds")
    add("--judges", action="store_true", help="also S3FT with other selecting judges, one seed")
    add("--choices", action="store_true", help="also S3FT with other settings, one seed")
    args = parser.parse_args()
    if not {"sft", "s3ft"} <= set(args.methods.split(",")):
        parser.error("--methods: the report compares sft with s3ft, so both must be there")
    return args


def main() -> None:
    args = parse()
    kept = args.docs / "study" / "results.json"
    if not args.report_only:
        study = Study(
            out=args.out.absolute(),
            data=args.data.absolute(),
            model=args.model,
            rows={"train": args.train, "val": args.val, "test": args.test},
            seeds=args.seeds,
            steps=args.steps,
            eval_every=args.eval_every,
            lr=args.lr,
            documents=args.documents,
            methods=args.methods.split(","),
            equal_steps=args.equal_steps,
            judges=args.judges,
            choices=args.choices,
        )
        make_rows(args.xquad, study.out, study.rows)
        run_all(study)
        write_json(kept, collect(study))

    results = read_json(kept)
    methods = seeds_of(results["models"])
    draw_trade_off(methods, kept.parent / "trade-off.svg")
    draw_curves(methods, kept.parent / "curves.svg")
    write_text(args.docs / "study.md", report(results, kept.parent))


if __name__ == "__main__":
    exit_cleanly(main)
