"""Does the claim hold on a small open model? Five methods, three seeds, on XQuAD reading comprehension, in one run folder.

    python -m bench.study --xquad data/xquad/xquad.en.json --data data --out runs/study     trains, evaluates, writes the report
    python -m bench.study --report-only                                                     the report from docs/study/ alone

Rows: the first 36 of XQuAD's English articles; train, validation and test apart by article, a quarter of the questions made
unanswerable by a context of another article. Judge: every word of the gold in at most 50 words, or abstention. The report is
docs/study.md, made from docs/study/results.json and nothing else; what an earlier call finished is not made again.
"""

import argparse
import math
import random
import subprocess
import sys
from pathlib import Path
from statistics import mean

from data import Example
from results.paper import PAPER_ACCURACY, PAPER_BENCHMARKS, PAPER_SOURCES
from results.report import SOURCES, log_probability_section, markdown_table
from support.cli import exit_cleanly
from support.files import download, read_json, read_jsonl, write_json, write_jsonl, write_text
from tasks.benchmarks import BENCHMARKS, Scoring, paired_interval
from tasks.benchmarks import documents as documents_of
from tasks.reading import pair_unanswerable, read_squad

ROOT = Path(__file__).resolve().parent.parent

XQUAD = "https://raw.githubusercontent.com/google-deepmind/xquad/master/xquad.en.json"
SHARES = {"train": 0.5, "val": 0.125, "test": 0.375}  # of the articles
ARTICLES = 36  # the first of XQuAD's 48
METHODS = ["sft", "sdft", "ssr", "s3ft", "rft"]

CHOICES = {  # what the paper is silent on, and its learning rate: S3FT with seed 0 and one change
    "batch 4, twice the steps": lambda args: [
        "--batch-size=4", f"--steps={2 * args.steps}", f"--eval-every={2 * args.eval_every}"],
    "all linear layers adapted": lambda args: ["--target-modules=all-linear"],
    "peak rate 1e-4": lambda args: ["--lr=1e-4"],
}


# ------------------------------------------------------------------------------------------------ the runs


def make_rows(source: Path, out: Path, sizes: dict[str, int]) -> None:
    """The files of a custom task, each a random sample of its articles' rows."""
    download(XQUAD, source)
    articles, start = read_squad(source)[:ARTICLES], 0
    for split, share in SHARES.items():
        part = articles[start : start + round(share * len(articles))]
        start += len(part)
        rows = pair_unanswerable(part)
        chosen = sorted(random.Random(0).sample(range(len(rows)), min(sizes[split], len(rows))))
        write_jsonl(out / f"{split}.jsonl", [row_of(rows[i]) for i in chosen])


def row_of(x: Example) -> dict:
    return {"id": x.id, "question": x.question, "context": x.context, "unanswerable": x.unanswerable, "answer": x.answer}


def run_all(args) -> None:
    for seed in range(args.seeds):
        for method in METHODS:
            train(args, args.out, method, f"{method}-{seed}", [f"--seed={seed}"])
    for names, limit in limits(args.documents).items():
        run("evaluate.py", f"--out={args.out}", f"--data={args.data}", f"--benchmarks={names}", f"--limit={limit}", "--sampled")
    if args.choices:
        run_choices(args)


def limits(n: int) -> dict[str, int]:
    """How many documents of each benchmark; of MMLU, of each of its 57 subjects."""
    return {"mmlu": max(1, n // 100), "truthfulqa,hellaswag": n, "winogrande": 2 * n}


def run_choices(args) -> None:
    choices = choices_folder(args.out)
    for file in ("predictions.jsonl", "paraphrases.jsonl"):
        write_text(choices / file, (args.out / file).read_text("utf-8"))
    for choice, flags in CHOICES.items():
        train(args, choices, "s3ft", name_of(choice), flags(args))
    run("evaluate.py", f"--out={choices}")


def choices_folder(out: Path) -> Path:
    """A run folder of its own, which begins with the base model's responses of the first."""
    return out.with_name(f"{out.name}-choices")


def name_of(choice: str) -> str:
    return choice.replace(",", "").replace(" ", "-")


def train(args, out: Path, method: str, name: str, more: list[str]) -> None:
    """One s3ft.py; of flags given twice the last counts."""
    files = [f"--{split}-file={args.out / f'{split}.jsonl'}" for split in SHARES]
    run("s3ft.py", "--task=custom", "--judge=recall", *files, f"--method={method}", f"--name={name}", f"--model={args.model}",
        f"--out={out}", f"--steps={args.steps}", f"--eval-every={args.eval_every}", f"--lr={args.lr}", "--share-prefix", *more)


def run(script: str, *flags: str) -> None:
    done = subprocess.run([sys.executable, str(ROOT / script), *flags])
    if done.returncode:
        sys.exit(done.returncode)


def collect(args) -> dict:
    """What the report needs, small enough to keep: results.json, row by row verdicts and metrics, learning curves."""
    results = read_json(args.out / "results.json")
    results["settings"] = {name: getattr(args, name) for name in ("steps", "eval_every", "lr", "seeds")} | {
        split: len(read_jsonl(args.out / f"{split}.jsonl")) for split in SHARES}
    wanted = {(name, x.index) for names, limit in limits(args.documents).items() for name in names.split(",")
              for x in documents_of(name, args.data, Scoring(limit=limit, sampled=True))}
    order, choices = [row["id"] for row in read_jsonl(args.out / "test.jsonl")], choices_folder(args.out)
    for name, model in results["models"].items():
        model["verdicts"] = verdict_marks(args.out / name, order)
        samples = [row for row in read_jsonl(args.out / name / "benchmarks" / "samples.jsonl")
                   if (row["benchmark"], row["index"]) in wanted]
        model["documents"] = {benchmark: [round(row["metrics"][BENCHMARKS[benchmark].headline], 4) for row in samples
                                          if row["benchmark"] == benchmark] for benchmark in BENCHMARKS}
        letters = [row["chosen"] for row in samples if row["benchmark"] == "mmlu"]
        model["mmlu_letter_a"] = letters.count(0) / len(letters)
        model.pop("benchmarks", None)
        if name != "base":
            model["curve"] = read_jsonl(args.out / name / "log.jsonl")
    found = read_json(choices / "results.json")["models"] if args.choices else {}
    results["choices"] = {choice: {"accuracy": found[name]["accuracy"], "drift": found[name]["drift"],
                                   "verdicts": verdict_marks(choices / name, order)}
                          for choice, name in zip(CHOICES, map(name_of, CHOICES), strict=True) if found}
    return results


def verdict_marks(folder: Path, order: list[str]) -> str:
    """A 1 or 0 for every test row."""
    verdicts = {row["id"]: bool(row["accepted"]) for row in read_jsonl(folder / "test.judged.jsonl")}
    return "".join("01"[verdicts[x]] for x in order)


# ------------------------------------------------------------------------------------------------ the report


def seeds_of(results: dict) -> dict[str, list[dict]]:
    """method -> its models, one a seed."""
    found: dict[str, list[dict]] = {}
    for name, model in results["models"].items():
        found.setdefault(name.rpartition("-")[0] or name, []).append(model)
    return {name: found[name] for name in ["base", *METHODS] if name in found}


def row_means(models: list[dict], what) -> list[float]:
    """Each row's (or document's) mean over the seeds."""
    return [mean(values) for values in zip(*map(what, models), strict=True)]


def documents(models: list[dict], benchmark: str) -> list[float]:
    return row_means(models, lambda m: m["documents"][benchmark])


def verdicts(model: dict) -> list[float]:
    return [float(mark) for mark in model["verdicts"]]


def difference(ours: list[float], theirs: list[float]) -> str:
    """Points of difference over the same rows, with the 95 % interval over rows; * where that leaves out zero."""
    found = paired_interval([100 * (a - b) for a, b in zip(ours, theirs, strict=True)])
    return marked(found["drop"], found["interval"][1] - found["drop"])


def marked(center: float, half: float) -> str:
    low, high = center - half, center + half
    return f"{center:+.1f} ({low:+.1f} to {high:+.1f}){'' if low <= 0 <= high else ' *'}"


def average_difference(models: list[dict], others: list[dict]) -> str:
    """The same for the mean of the four benchmarks, whose documents are independent: the variances add up."""
    found = [paired_interval([100 * (a - b) for a, b in zip(documents(models, name), documents(others, name), strict=True)])
             for name in BENCHMARKS]
    halves = [x["interval"][1] - x["drop"] for x in found]
    return marked(mean(x["drop"] for x in found), math.hypot(*halves) / len(found))


def numbers(models: list[dict], what, digits: int = 1) -> str:
    """Mean over the seeds, and each seed's value."""
    values = [what(model) for model in models]
    every = f" ({', '.join(f'{value:.{digits}f}' for value in values)})" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{every}"


def accuracy_table(methods: dict) -> str:
    rows = []
    base, sft = row_means(methods["base"], verdicts), row_means(methods["sft"], verdicts)
    for name, models in methods.items():
        own = row_means(models, verdicts)
        rows.append([name, numbers(models, lambda m: 100 * m["accuracy"]), "" if name == "base" else difference(own, base),
                     "" if name == "sft" else difference(own, sft),
                     *("" if name == "base" else numbers(models, lambda m, kind=kind: m["drift"][kind], 3)
                       for kind in ("general", "task")),
                     "" if name == "base" else numbers(models, lambda m: m["training"]["minutes"])])
    return markdown_table(["method", "accuracy % (each seed)", "against base", "against SFT", "drift, general", "drift, task",
                           "training, minutes"], rows)


def reading_table(methods: dict) -> str:
    columns = [("answerable", "exact"), ("answerable", "f1"), ("answerable", "recall"), ("unanswerable", "recall"),
               ("all", "exact"), ("all", "f1"), ("all", "modified_recall")]
    rows = [[name, *(f"{100 * mean(m['reading'][group][metric] for m in models):.1f}" for group, metric in columns),
             f"{mean(m['reading']['answerable']['words'] for m in models):.1f}"] for name, models in methods.items()]
    header = [f"{group}: {metric.replace('_', ' ')} %" for group, metric in columns]
    return markdown_table(["method", *header, "words an answer"], rows)


def sources_table(methods: dict) -> str:
    rows = []
    for name, models in methods.items():
        if name != "base":
            sources = models[0]["training"]["sources"]
            n = sum(sources.values())
            rows.append([name, str(n), *(f"{100 * sources[source] / n:.1f}" for source in SOURCES)])
    rows += [[f"s3ft in the paper, {task}", "", *map(str, shares)] for task, shares in PAPER_SOURCES.items()]
    return markdown_table(["method", "rows", "model responses %", "gold paraphrases %", "gold responses %"], rows)


def retained(model: dict) -> float:
    return mean(100 * mean(values) for values in model["documents"].values())


def benchmarks_table(methods: dict) -> str:
    names, base, rows = list(BENCHMARKS), methods["base"], []
    for name, models in methods.items():
        cells = [numbers(models, lambda m, b=b: 100 * mean(m["documents"][b])) for b in names]
        drops = ["" if name == side else average_difference(models, methods[side]) for side in ("base", "sft")]
        each = "" if name == "base" else "; ".join(difference(documents(models, b), documents(base, b)) for b in names)
        rows.append([name, *cells, numbers(models, retained), *drops, each])
    for task, table in PAPER_BENCHMARKS.items():
        rows += [[f"{method} in the paper, {task}", *map(str, values), "", "", ""] for method, values in table.items()]
    return markdown_table(["method", *names, "average", "average against base", "average against SFT",
                           "each against base, in the same order"], rows)


def choices_table(results: dict) -> str:
    plain, rows = results["models"]["s3ft-0"], []
    for name, model in {"as above": plain, **results["choices"]}.items():
        beside = "" if model is plain else difference(verdicts(model), verdicts(plain))
        rows.append([name, f"{100 * model['accuracy']:.1f}", beside,
                     *(f"{model['drift'][kind]:.3f}" for kind in ("general", "task"))])
    return markdown_table(["S3FT, seed 0", "accuracy %", "against the first row", "drift, general", "drift, task"], rows)


def paper_accuracy_table() -> str:
    methods = ["base", "sft", "sdft", "s3ft"]
    return markdown_table(["in the paper (Mistral-7B)", *methods],
                          [[task, *(str(row[method]) for method in methods)] for task, row in PAPER_ACCURACY.items()])


def draw(methods: dict, folder: Path) -> None:
    """trade-off.svg: accuracy against what was retained, a point a seed; curves.svg: loss and validation by step."""
    import matplotlib
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "s3ft"
    from matplotlib import pyplot
    folder.mkdir(parents=True, exist_ok=True)
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for name, models in methods.items():
        axes.scatter([retained(m) for m in models], [100 * m["accuracy"] for m in models], label=name, s=40)
    axes.set(xlabel="mean of the four general benchmarks, %", ylabel="accuracy on the task, %")
    axes.legend()
    figure.savefig(folder / "trade-off.svg", metadata={"Date": None})
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4))
    for i, (name, models) in enumerate(methods.items()):
        for model in models if name != "base" else ():
            for axes, field in ((left, "loss"), (right, "validation")):
                points = [(row["step"], row[field]) for row in model["curve"] if field in row]
                axes.plot(*zip(*points, strict=True), color=f"C{i}", alpha=0.7, label=name if model is models[0] else None)
    left.set(xlabel="step", ylabel="training loss, nats a token")
    right.set(xlabel="step", ylabel="validation accuracy")
    right.legend()
    figure.savefig(folder / "curves.svg", metadata={"Date": None})


INTERVALS = """\
A difference is the mean over the same rows, each averaged over the seeds, with the normal 95 % interval over rows; * marks one
that leaves out zero. It speaks for these seeds; how much a seed matters is seen in the values of each. Rows of one passage are
not independent, so that the intervals are somewhat too narrow; and of 50 comparisons without any difference, two or three would
get a star."""


CHANGES = """\
One change at a time. Two others cannot be tried on these rows: the prompt at test time (prediction and training have the same)
and the gold's format (golds are phrases)."""
SETTING = """\
Made by `make study` and `make study-report`. {model}, {date}, {device}, torch {torch}. {train} training, {val} validation,
{test} test rows, out of XQuAD's first {articles} articles and apart by article, a quarter of them unanswerable; seeds 0 to
{last_seed} (order of rows, LoRA's start, dropout); rank 8, alpha 16, dropout 0.1 on q_proj, v_proj as in the paper; {steps}
steps of 8 rows at a peak rate of {lr:g}; the checkpoint with the best validation accuracy (every {eval_every} steps). Judge:
every word of the gold in at most 50 words, or abstention where there is no answer."""


def report(results: dict, folder: Path) -> str:
    """The text of study.md; Fig. 2 is drawn into `folder`."""
    methods, settings = seeds_of(results), results["settings"]
    setting = {**results["machine"], **settings, "model": results["config"]["model"], "articles": ARTICLES,
               "last_seed": settings["seeds"] - 1}
    log_probabilities = log_probability_section(results["log_probabilities"], folder)
    documents = ", ".join(f"{name} {len(values)}" for name, values in methods["base"][0]["documents"].items())
    return "\n\n".join([
        "# Study: XQuAD reading comprehension", SETTING.format(**setting), INTERVALS,
        "## Accuracy (Table 2) and drift", accuracy_table(methods), paper_accuracy_table(),
        "![accuracy against general benchmarks](study/trade-off.svg)",
        "## What the judge's choice does", reading_table(methods),
        "## Where the training targets come from (Table 3)", sources_table(methods),
        "## General benchmarks (Table 4)",
        f"Documents: {documents}: a random sample, of MMLU of each subject, the same for every model. "
        f"To MMLU the base model answers A in {100 * methods['base'][0]['mmlu_letter_a']:.0f} % of its questions: near 100 %, "
        "that column says nothing about what is forgotten.",
        benchmarks_table(methods),
        *(["## Other settings", CHANGES, choices_table(results)] if results["choices"] else []),
        "## Learning curves", "![loss and validation](study/curves.svg)",
        *(part.replace("(figures/", "(study/figures/") for part in log_probabilities),
    ]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report-only", action="store_true", help="write docs/study.md from docs/study/results.json")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="for study.md and study/ (%(default)s)")
    parser.add_argument("--xquad", type=Path, default=Path("data/xquad/xquad.en.json"), help="(%(default)s)")
    parser.add_argument("--data", type=Path, default=Path("data"), help="the general benchmarks (%(default)s)")
    parser.add_argument("--choices", action="store_true", help="also S3FT with other settings: a quarter of an hour more")
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct", help="(%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/study"), help="the run folder (%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="(%(default)s)")
    parser.add_argument("--steps", type=int, default=12, help="(%(default)s)")
    parser.add_argument("--eval-every", type=int, default=6, help="(%(default)s)")
    parser.add_argument("--lr", type=float, default=1e-3, help="ten times the paper's, for a 400th of its steps")
    for split, size in (("train", 96), ("val", 32), ("test", 128)):
        parser.add_argument(f"--{split}", type=int, default=size, help="rows (%(default)s)")
    parser.add_argument("--documents", type=int, default=100,
                        help="of TruthfulQA and of HellaSwag; WinoGrande: twice, each MMLU subject: a 100th (%(default)s)")
    args = parser.parse_args()
    kept = args.docs / "study" / "results.json"
    if not args.report_only:
        make_rows(args.xquad, args.out, {split: getattr(args, split) for split in SHARES})
        run_all(args)
        write_json(kept, collect(args))
    results = read_json(kept)
    draw(seeds_of(results), kept.parent)
    write_text(args.docs / "study.md", report(results, kept.parent))


if __name__ == "__main__":
    exit_cleanly(main)
