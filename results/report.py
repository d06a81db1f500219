"""results.json -> report.md and figures/: the paper's tables and Fig. 2, ours beside the paper's.

Nothing is measured here: a report holds what is in results.json, and shares and means of it.
"""

from pathlib import Path
from statistics import mean

from results.figures import KINDS, draw_log_probabilities
from results.paper import PAPER_ACCURACY, PAPER_BENCHMARKS, PAPER_SOURCES
from support.files import write_text

SOURCES = ("prediction", "paraphrase", "gold")


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *rows])


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def of_the_paper(table: dict, results: dict):
    """The paper's row for this task; None where it has none, as for models that were trained on another task."""
    return None if "trained_on" in results["config"] else table.get(results["config"]["task"])


def accuracy_table(results: dict) -> str:
    """Table 2: accuracy with its interval, and each method against SFT on the same rows."""
    paper = of_the_paper(PAPER_ACCURACY, results) or {}
    rows = [accuracy_row(name, model, paper) for name, model in results["models"].items()]
    header = ["method", "accuracy %", "95 % interval", "against SFT", "drift general", "drift task", "training min", "paper %"]
    return markdown_table(header, rows)


def accuracy_row(name: str, model: dict, paper: dict) -> list[str]:
    low, high = model["interval"]
    versus, training = model.get("against_sft"), model.get("training", {})
    return [
        name, percent(model["accuracy"]), f"{percent(low)} to {percent(high)}",
        f"{100 * versus['difference']:+.1f} (p = {versus['p']:.2g})" if versus else "",
        *(f"{value:.4f}" for value in model.get("drift", {"general": 0, "task": 0}).values()),
        f"{training['minutes']:.1f}" if training else "", str(paper.get(training.get("method", "base"), "")),
    ]


def sources_table(results: dict) -> str:
    """Table 3: where the training targets come from."""
    rows = []
    for name, model in results["models"].items():
        if "training" in model:
            sources = model["training"]["sources"]
            n = sum(sources.values())
            others = "".join(f" (and {percent(sources[kind] / n)} {kind})" for kind in sources if kind not in SOURCES)
            rows.append([name + others, str(n), *(percent(sources[source] / n) for source in SOURCES)])
    paper = of_the_paper(PAPER_SOURCES, results)
    if paper:
        rows.append(["s3ft in the paper", "", *map(str, paper)])
    return markdown_table(["method", "rows", "model responses %", "gold paraphrases %", "gold responses %"], rows)


def reading_table(results: dict) -> str:
    """SSR's setting: answerable and unanswerable rows apart, and together."""
    metrics = ("exact", "f1", "recall", "modified_recall", "answerability")
    rows = [[name, group, str(scores["n"]), *(percent(scores[metric]) for metric in metrics), f"{scores['words']:.1f}"]
            for name, model in results["models"].items() for group, scores in model["reading"].items()]
    return markdown_table(["method", "rows", "n", "exact match %", "F1 %", "recall %", "modified recall %", "answerability %",
                           "words"], rows)


def training_table(results: dict) -> str:
    fields = ("steps", "step", "tokens_per_second", "peak_memory_gib")
    rows = [[name, percent(training["validation"]), *(str(training[field]) for field in fields)]
            for name, model in results["models"].items() if (training := model.get("training"))]
    return markdown_table(["method", "validation %", "steps", "best step", "tokens/s", "peak memory GiB"], rows)


def benchmarks_table(results: dict) -> str:
    """Table 4: general benchmarks, and the mean drop against the base model."""
    models = {name: model["benchmarks"] for name, model in results["models"].items() if "benchmarks" in model}
    names = list(models["base"]["scores"])
    rows = []
    for model_name, found in models.items():
        values = [headline(name, found["scores"][name]) for name in names]
        rows.append([model_name, *map(percent, values), percent(mean(values)),
                     ", ".join(drop_cell(found["drop"][name]) for name in names) if "drop" in found else ""])
    for method, values in (of_the_paper(PAPER_BENCHMARKS, results) or {}).items():
        by_name = dict(zip(("mmlu", "truthfulqa", "hellaswag", "winogrande"), values, strict=False))  # without the average
        shown = [by_name[name] for name in names]
        rows.append([f"{method} in the paper", *map(str, shown), f"{mean(shown):.1f}", ""])
    return markdown_table(["method", *names, "average", "drop against base, points (95 % interval)"], rows)


def headline(name: str, score: dict) -> float:
    return score["mean" if name == "truthfulqa" else "acc"]


def drop_cell(drop: dict) -> str:
    low, high = drop["interval"]
    return f"{100 * drop['drop']:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def scores_table(scores: dict) -> str:
    """Every metric of every benchmark with its standard error."""
    rows = []
    for name, score in scores.items():
        metrics = [key for key in score if key not in ("n", "subjects") and not key.endswith("_stderr")]
        rows += [[name, key, percent(score[key]), "" if score[f"{key}_stderr"] is None else percent(score[f"{key}_stderr"]),
                  str(score["n"])] for key in metrics]
    return markdown_table(["benchmark", "metric", "%", "standard error", "n"], rows)


def write_benchmark_report(model: str, scores: dict, folder: Path) -> str:
    text = f"# General benchmarks: {model}\n\n{scores_table(scores)}\n"
    write_text(folder / "report.md", text)
    return text


def write_report(results: dict, run: Path) -> str:
    """Write report.md (and Fig. 2, where matplotlib is installed) -> the report's text."""
    models = results["models"]
    parts = [
        *heading(results),
        "## In-domain accuracy (Table 2) and drift",
        accuracy_table(results),
        "Intervals: Wilson. Against SFT: difference in points on the same rows, McNemar's exact test. Drift: mean "
        "KL(base || tuned) per token, in nats, over the base model's own responses. Minutes: training alone.",
        f"Length limit hit: {counts(models, 'length_limit_hit')}. Unreadable verdicts, counted as not accepted: "
        f"{counts(models, 'unreadable_verdicts')}.",
        "## Where the training targets come from (Table 3)",
        sources_table(results),
        *(f"Of {found['n']} {kind}, {found['length_limit_hit']} were cut off by the length limit and "
          f"{found['unreadable_verdicts']} had an unreadable verdict, counted as not accepted."
          for kind, found in results["selection"].items()),
        *([results["reflect"]] if results["reflect"] else []),
        "## Training",
        training_table(results),
        *log_probability_section(results["log_probabilities"], run),
        *optional_sections(results),
    ]
    text = "\n\n".join(parts) + "\n"
    write_text(run / "report.md", text)
    return text


def heading(results: dict) -> list[str]:
    config, machine = results["config"], results["machine"]
    trained_on = f" (trained on {config['trained_on']})" if "trained_on" in config else ""
    limit = f", first {config['limit']} rows of every split" if config["limit"] else ""
    n = next(iter(results["models"].values()))["n"]
    return [f"# {config['task']}{trained_on}: {config['model']}",
            f"{machine['date']}, {machine['device']}, torch {machine['torch']}, transformers {machine['transformers']}, "
            f"peak memory of the evaluation {machine['peak_memory_gib']} GiB; "
            f"{n} test rows{limit}, judge: {config['judge'] or 'the task’s own'}."]


def optional_sections(results: dict) -> list[str]:
    """What only some tasks and commands have."""
    models, parts = results["models"], []
    if all("reading" in model for model in models.values()):
        parts += ["## Reading comprehension, as SSR reports it", reading_table(results),
                  "Recall, modified recall (our definition), answerability: see `results/reading_scores.py`."]
    scores = {name: model["benchmarks"]["scores"] for name, model in models.items() if "benchmarks" in model}
    if "base" in scores:
        halves = ", ".join(f"{name} {percent(found['mc1'])} and {percent(found['mc2'])}" for name, score in scores.items()
                           if (found := score.get("truthfulqa")))
        parts += ["## General benchmarks (Table 4)", benchmarks_table(results),
                  *([f"`truthfulqa` is the mean of mc1 and mc2 ({halves})."] if halves else []),
                  "Drops: on the same documents, intervals of paired differences."]
    if all("harness" in model for model in models.values()):
        parts += ["## GSM8K as lm-evaluation-harness reads it", markdown_table(
            ["method", "strict %", "flexible %"],
            [[name, *(percent(value) for value in model["harness"].values())] for name, model in models.items()]),
            "`strict` reads the number after `####`, a form that the paper's prompts do not ask for."]
    return parts


def log_probability_section(scores: dict | None, run: Path) -> list[str]:
    if not scores:
        return []
    parts = ["## Log-probability under the base model (Fig. 2)", log_probability_lines(scores)]
    if draw_log_probabilities(scores, run / "figures" / "log_probability.svg"):
        parts.append("![Fig. 2](figures/log_probability.svg)")
    return parts


def counts(models: dict, field: str) -> str:
    return ", ".join(f"{name} {model[field]}" for name, model in models.items())


def log_probability_lines(scores: dict) -> str:
    kinds = [[kind, str(len(scores[kind])), f"{mean(scores[kind]):.1f}"] for kind in KINDS if scores[kind]]
    table = markdown_table(["responses", "n", "mean log p(y given x), nats"], kinds)
    return f"{table}\n\n{scores['n']} random training rows ({scores['rows']})."
