"""The paper's Tables 2 and 3 of one run's results.json, and several runs in the paper's Tables 2 to 4.

    python -m results.tables runs/gsm8k runs/mbpp runs/nq --out tables.md
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from results.checks import NUMBER, check_fields
from results.markdown import markdown_table, paper_row, percent, points, shown
from results.paper import (
    PAPER_ACCURACY,
    PAPER_CYCLE_MINUTES,
    PAPER_PREDICTION_MINUTES,
    PAPER_SOURCES,
    PAPER_TRAINING_MINUTES,
)
from results.run_files import BRANCHES, read_elsewhere, read_results
from results.table_4 import benchmarks_section
from support.cli import InputError, exit_cleanly, one_line_error
from support.files import write_text

SOURCES_HEADER = ["model responses %", "gold paraphrases %", "gold responses %"]

# ------------------------------------------------------------------------------ one run


def accuracy_table(results: dict) -> str:
    """Table 2: accuracy with its interval, and each method against SFT on the same rows."""
    paper = paper_row(PAPER_ACCURACY, results) or {}
    rows = [accuracy_row(name, model, paper) for name, model in results["models"].items()]
    header = ["method", "accuracy %", "95 % interval", "against SFT", "drift general", "drift task"]
    return markdown_table([*header, "training min", "paper %"], rows)


def accuracy_row(name: str, model: dict, paper: dict) -> list[str]:
    low, high = model["interval"]
    versus = model.get("against_sft")
    training = model.get("training", {})
    drift = model.get("drift")
    minutes = training.get("minutes")
    return [
        name,
        percent(model["accuracy"]),
        f"{percent(low)} to {percent(high)}",
        f"{100 * versus['difference']:+.1f} (p = {versus['p']:.2g})" if versus else "",
        drift_text(drift["general"]) if drift else "0",
        drift_text(drift["task"]) if drift else "0",
        "" if minutes is None else f"{minutes:.1f}",
        shown(paper.get(training.get("method", name))),
    ]


def drift_text(value: float) -> str:
    """Nats with four decimals. What a short training moves is less than they show, and is not nothing."""
    return "below 0.0001" if 0 < value < 0.0001 else f"{value:.4f}"


def sources_table(results: dict) -> str:
    """Table 3: where the training targets come from."""
    rows = []
    for name, model in results["models"].items():
        if "training" in model:
            rows.append([name, *source_cells(model["training"]["sources"])])
    paper = paper_row(PAPER_SOURCES, results)
    if paper:
        rows.append(["s3ft in the paper", "", *map(str, paper)])
    return markdown_table(["method", "rows", *SOURCES_HEADER], rows)


def source_cells(sources: dict[str, int]) -> list[str]:
    """The number of rows and the share of each source. Empty cells: an older run did not record them."""
    n = sum(sources.values())
    if not n:
        return [""] * (1 + len(BRANCHES))
    cells = [percent(sources.get(source, 0) / n) for source in BRANCHES]
    others = [f"{percent(sources[kind] / n)} {kind}" for kind in sources if kind not in BRANCHES]
    return [f"{n} (of which {', '.join(others)})" if others else str(n), *cells]


def reading_table(results: dict) -> str:
    """SSR's setting: answerable and unanswerable rows apart, and together."""
    metrics = ("exact", "f1", "recall", "modified_recall", "answerability")
    rows = []
    for name, model in results["models"].items():
        for group, scores in model["reading"].items():
            cells = [percent(scores[metric]) for metric in metrics]
            rows.append([name, group, str(scores["n"]), *cells, f"{scores['words']:.1f}"])
    header = ["exact match %", "F1 %", "recall %", "modified recall %", "answerability %"]
    return markdown_table(["method", "rows", "n", *header, "words"], rows)


def metrics_table(results: dict) -> str:
    """The task's own metrics: a column each."""
    rows = []
    for name, model in results["models"].items():
        cells = ["" if value is None else f"{value:.3f}" for value in model["metrics"].values()]
        rows.append([name, *cells])
    header = results["models"]["base"]["metrics"]
    return markdown_table(["method", *header], rows)


def bigcode_table(results: dict) -> str:
    """The paper's Table 2 beside it: its models are scored with that harness."""
    paper = paper_row(PAPER_ACCURACY, results) or {}
    rows = []
    for name, model in results["models"].items():
        if "bigcode" in model:
            found = model["bigcode"]
            low, high = found["interval"]
            method = model.get("training", {}).get("method", name)
            cells = [percent(found["accuracy"]), f"{percent(low)} to {percent(high)}"]
            cells += [str(found["length_limit_hit"]), percent(model["accuracy"]), shown(paper.get(method))]
            rows.append([name, *cells])
    header = ["method", "bigcode's prompt: accuracy %", "95 % interval", "length limit hit"]
    return markdown_table([*header, "the task's prompt (Table 2) %", "paper %"], rows)


def training_table(results: dict) -> str:
    rows = []
    for name, model in results["models"].items():
        training = model.get("training")
        if training:
            fields = ("steps", "step", "tokens_per_second", "peak_memory_gib")
            cells = [shown(training[field]) for field in fields]
            rows.append([name, percent(training["validation"]), *cells])
    header = ["method", "validation %", "steps", "best step", "tokens/s", "peak memory of training GiB"]
    return markdown_table(header, rows)


def costs_table(results: dict) -> str:
    """What D', training and evaluation cost, the paper's minutes beside it."""
    paper = {"train": f"at most {PAPER_TRAINING_MINUTES}"}
    minutes = paper_row(PAPER_PREDICTION_MINUTES, results)
    if minutes:
        paper["predict"] = str(minutes)
    whole = sum(row["seconds"] for row in results["costs"])
    rows = []
    for row in results["costs"]:
        share = row["seconds"] / whole if whole else 0.0
        cells = [shown(row["calls"]), shown(row["tokens"]), f"{row['seconds'] / 60:.1f}", percent(share)]
        rows.append([row["stage"], row["model"], *cells, paper.get(row["stage"], "")])
    cycle = f"at most {PAPER_CYCLE_MINUTES} for one method"
    rows.append(["all of these", "", "", "", f"{whole / 60:.1f}", "100.0", cycle])
    return markdown_table(["stage", "model", "calls", "tokens", "minutes", "%", "the paper's minutes"], rows)


# ------------------------------------------------------------------------------ several runs


def read_run(run: Path) -> dict:
    """A run's results.json. InputError: the file is not a run's, or names a bad field."""
    results = read_results(run)
    where = str(run / "results.json")
    check_fields(results, {"config": dict, "machine": dict, "models": dict}, where)
    check_fields(results["config"], {"task": str, "model": str}, f"{where}, config")
    check_fields(results["machine"], {"date": str, "device": str}, f"{where}, machine")
    check_fields(results["models"], {"base": dict}, f"{where}, models")
    for name, model in results["models"].items():
        check_fields(model, {"accuracy": NUMBER, "interval": list, "n": int}, f"{where}, model {name}")
    return results | {"elsewhere": read_elsewhere(run)}


def merged_tables(runs: dict[str, dict], missing: Sequence[str] = ()) -> str:
    """Several runs (folder -> results) as the paper's Tables 2 to 4, in one Markdown page.

    `missing` are folders without results, which the page names.
    """
    parts = ["# Tables 2 to 4 of the paper, and ours"]
    lines = []
    for folder, results in runs.items():
        machine = results["machine"]
        config = results["config"]
        n = results["models"]["base"]["n"]
        lines.append(f"- {folder}: {config['task']}, {config['model']}, {machine['date']}, "
                     f"{machine['device']}, {n} test rows")
    for folder in missing:
        lines.append(f"- {folder}: left out, it has no results.json (python evaluate.py --out {folder})")
    parts.append("\n".join(lines))
    parts += ["## Table 2: in-domain accuracy", merged_accuracy(runs)]
    parts += ["## Table 3: where the training targets come from", merged_sources(runs)]
    for folder, results in runs.items():
        section = benchmarks_section(results)
        if section:
            parts += [f"## Table 4, trained on {results['config']['task']} ({folder})", *section[1:]]
    return "\n\n".join(parts) + "\n"


def merged_accuracy(runs: dict[str, dict]) -> str:
    """A row for each model, a column for each run and one for the paper's value beside it."""
    names = {}
    for results in runs.values():
        names |= dict.fromkeys(results["models"])
    rows = []
    for name in names:
        cells = []
        for results in runs.values():
            model = results["models"].get(name)
            if not model:
                cells += ["", ""]
                continue
            paper = paper_row(PAPER_ACCURACY, results) or {}
            method = model.get("training", {}).get("method", name)
            cells += [points(model["accuracy"], *model["interval"]), shown(paper.get(method))]
        rows.append([name, *cells])

    header = ["method"]
    for folder, results in runs.items():
        header += [f"{results['config']['task']} % ({folder}), 95 % interval", "paper %"]
    return markdown_table(header, rows)


def merged_sources(runs: dict[str, dict]) -> str:
    rows = []
    for results in runs.values():
        task = results["config"]["task"]
        for name, model in results["models"].items():
            if "training" in model:
                rows.append([task, name, *source_cells(model["training"]["sources"])])
        paper = paper_row(PAPER_SOURCES, results)
        if paper:
            rows.append([task, "s3ft in the paper", "", *map(str, paper)])
    return markdown_table(["trained on", "method", "rows", *SOURCES_HEADER], rows)


def main(argv=None) -> None:
    about = "Several runs in the paper's Tables 2 to 4."
    parser = argparse.ArgumentParser(description=about, allow_abbrev=False)
    parser.error = one_line_error
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="which evaluate.py measured")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the page there too")
    args = parser.parse_args(argv)
    there = [run for run in args.runs if (run / "results.json").exists()]
    missing = [str(run) for run in args.runs if run not in there]
    if not there:
        names = ", ".join(missing)
        raise InputError(f"no results.json of a run in {names}: give python evaluate.py --out RUN first")
    text = merged_tables({str(run): read_run(run) for run in there}, missing)
    if args.out:
        write_text(args.out, text)
    print(text)


if __name__ == "__main__":
    exit_cleanly(main)
