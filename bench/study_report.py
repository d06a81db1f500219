"""The study's report: docs/study.md and its figures, from docs/study/results.json and nothing else."""

import math
from pathlib import Path
from statistics import mean

from results.paper import PAPER_ACCURACY, PAPER_BENCHMARKS, PAPER_SOURCES
from results.report import log_probability_section, markdown_table
from results.run_files import BRANCHES
from tasks.benchmarks import BENCHMARKS, paired_interval

ARTICLES = 36  # the first of XQuAD's 48
METHODS = ["sft", "sdft", "ssr", "s3ft", "rft"]

INTERVALS = """\
A difference is the mean over the same rows, each averaged over the seeds, with the normal 95 % interval
over rows. A star marks an interval that leaves out zero. It speaks for these seeds. How much a seed
matters is seen in the values of each. Rows of one passage are not independent, so the intervals are
somewhat too narrow. Of 50 comparisons without any difference, two or three would get a star."""
CHANGES = """\
One change at a time. Two others cannot be tried on these rows: the prompt at test time (prediction and
training have the same) and the gold's format (golds are phrases)."""
SETTING = """\
Made by `make study` and `make study-report`. {model}, {date}, {device}, torch {torch}.

- Rows: {train} training, {val} validation, {test} test, out of XQuAD's first {articles} articles. The
  three parts share no article. A quarter of the rows is unanswerable.
- Seeds: 0 to {last_seed}, for the order of rows, LoRA's start and dropout.
- Training: rank 8, alpha 16, dropout 0.1 on q_proj and v_proj as in the paper, {steps} steps of 8 rows at
  a peak rate of {lr:g}. The checkpoint with the best validation accuracy is kept (every {eval_every}
  steps).
- Judge: every word of the gold in at most 50 words, or abstention where there is no answer."""
TRADE_OFF = """\
Each method's mean over its seeds. A bar is the 95 % interval of its difference from the base model over
the same rows: one that does not cross a dashed line is a difference with a star. Small marks are single
seeds."""


def report(results: dict, folder: Path) -> str:
    """The text of study.md. Fig. 2 is drawn into `folder`."""
    # 1. What was done.
    methods, settings = seeds_of(results), results["settings"]
    setting = {
        **results["machine"],
        **settings,
        "model": results["config"]["model"],
        "articles": ARTICLES,
        "last_seed": settings["seeds"] - 1,
    }
    parts = ["# Study: XQuAD reading comprehension", SETTING.format(**setting), INTERVALS]

    # 2. Accuracy, and where it comes from.
    parts += [
        "## Accuracy (Table 2) and drift",
        accuracy_table(methods),
        paper_accuracy_table(),
        "![accuracy against general benchmarks](study/trade-off.svg)",
        TRADE_OFF,
    ]
    parts += ["## What the judge's choice does", reading_table(methods)]
    parts += ["## Where the training targets come from (Table 3)", sources_table(methods)]

    # 3. What was forgotten.
    base = methods["base"][0]
    sizes = ", ".join(f"{name} {len(values)}" for name, values in base["documents"].items())
    parts += [
        "## General benchmarks (Table 4)",
        f"Documents: {sizes}: a random sample, of MMLU of each subject, the same for every model. "
        f"To MMLU the base model answers A in {100 * base['mmlu_letter_a']:.0f} % of its questions: near "
        "100 %, that column says nothing about what is forgotten.",
        benchmarks_table(methods),
    ]

    # 4. Other settings, curves, and Fig. 2.
    if results["choices"]:
        parts += ["## Other settings", CHANGES, choices_table(results)]
    parts += ["## Learning curves", "![loss and validation](study/curves.svg)"]
    for part in log_probability_section(results["log_probabilities"], folder):
        parts.append(part.replace("(figures/", "(study/figures/"))
    return "\n\n".join(parts) + "\n"


def seeds_of(results: dict) -> dict[str, list[dict]]:
    """method -> its models, one a seed."""
    found = {name: [] for name in ("base", *METHODS)}
    for name, model in results["models"].items():
        method = name.rpartition("-")[0] or name
        found[method].append(model)
    return {name: models for name, models in found.items() if models}


# --------------------------------------------------------------------------------------- rows and differences


def row_means(models: list[dict], rows_of) -> list[float]:
    """Each row's (or document's) mean over the seeds."""
    by_model = [rows_of(model) for model in models]
    return [mean(values) for values in zip(*by_model, strict=True)]


def verdicts(model: dict) -> list[float]:
    """1 or 0 for every test row."""
    return [float(mark) for mark in model["verdicts"]]


def documents(models: list[dict], benchmark: str) -> list[float]:
    """Each document's metric, averaged over the seeds."""
    return row_means(models, lambda model: model["documents"][benchmark])


def paired_difference(ours: list[float], theirs: list[float]) -> tuple[float, float]:
    """(points of difference over the same rows, half the width of its 95 % interval)"""
    found = paired_interval([100 * (a - b) for a, b in zip(ours, theirs, strict=True)])
    return found["drop"], found["interval"][1] - found["drop"]


def average_paired_difference(models: list[dict], others: list[dict]) -> tuple[float, float]:
    """The same for the mean of the four benchmarks. Their documents are independent: the variances add up."""
    centers, halves = [], []
    for name in BENCHMARKS:
        center, half = paired_difference(documents(models, name), documents(others, name))
        centers.append(center)
        halves.append(half)
    return mean(centers), math.hypot(*halves) / len(halves)


def with_interval(center: float, half: float) -> str:
    """A difference as a table shows it. A star marks an interval that leaves out zero."""
    low, high = center - half, center + half
    star = "" if low <= 0 <= high else " *"
    return f"{center:+.1f} ({low:+.1f} to {high:+.1f}){star}"


def difference(ours: list[float], theirs: list[float]) -> str:
    return with_interval(*paired_difference(ours, theirs))


def average_difference(models: list[dict], others: list[dict]) -> str:
    return with_interval(*average_paired_difference(models, others))


def mean_and_each(values: list[float], digits: int = 1) -> str:
    """The mean over the seeds, and each seed's value."""
    center = f"{mean(values):.{digits}f}"
    if len(values) == 1:
        return center
    each = ", ".join(f"{value:.{digits}f}" for value in values)
    return f"{center} ({each})"


def values_of(models: list[dict], *keys: str) -> list[float]:
    """What results.json has under these keys, for every seed."""
    found = []
    for model in models:
        value = model
        for key in keys:
            value = value[key]
        found.append(value)
    return found


def accuracies(models: list[dict]) -> list[float]:
    """In percent, for every seed."""
    return [100 * accuracy for accuracy in values_of(models, "accuracy")]


def retained(model: dict) -> float:
    """The mean of the four benchmarks, in percent."""
    return mean(100 * mean(values) for values in model["documents"].values())


# --------------------------------------------------------------------------------------- the tables


def accuracy_table(methods: dict) -> str:
    base, sft = row_means(methods["base"], verdicts), row_means(methods["sft"], verdicts)
    rows = []
    for name, models in methods.items():
        own = row_means(models, verdicts)
        against_base = "" if name == "base" else difference(own, base)
        against_sft = "" if name == "sft" else difference(own, sft)
        row = [name, mean_and_each(accuracies(models)), against_base, against_sft]
        if name == "base":
            row += ["", "", ""]
        else:
            row += [
                mean_and_each(values_of(models, "drift", "general"), digits=3),
                mean_and_each(values_of(models, "drift", "task"), digits=3),
                mean_and_each(values_of(models, "training", "minutes")),
            ]
        rows.append(row)
    header = [
        "method",
        "accuracy % (each seed)",
        "against base",
        "against SFT",
        "drift, general",
        "drift, task",
        "training, minutes",
    ]
    return markdown_table(header, rows)


def paper_accuracy_table() -> str:
    methods = ["base", "sft", "sdft", "s3ft"]
    rows = []
    for task, accuracy in PAPER_ACCURACY.items():
        rows.append([task, *(str(accuracy[method]) for method in methods)])
    return markdown_table(["in the paper (Mistral-7B)", *methods], rows)


def reading_table(methods: dict) -> str:
    columns = [
        ("answerable", "exact"),
        ("answerable", "f1"),
        ("answerable", "recall"),
        ("unanswerable", "recall"),
        ("all", "exact"),
        ("all", "f1"),
        ("all", "modified_recall"),
    ]
    rows = []
    for name, models in methods.items():
        row = [name]
        for group, metric in columns:
            value = mean(values_of(models, "reading", group, metric))
            row.append(f"{100 * value:.1f}")
        words = mean(values_of(models, "reading", "answerable", "words"))
        rows.append([*row, f"{words:.1f}"])
    header = [f"{group}: {metric.replace('_', ' ')} %" for group, metric in columns]
    return markdown_table(["method", *header, "words an answer"], rows)


def sources_table(methods: dict) -> str:
    rows = []
    for name, models in methods.items():
        if name == "base":
            continue
        counts = models[0]["training"]["sources"]
        total = sum(counts.values())
        row = [name, str(total)]
        for source in BRANCHES:
            row.append(f"{100 * counts[source] / total:.1f}")
        rows.append(row)
    for task, shares in PAPER_SOURCES.items():
        rows.append([f"s3ft in the paper, {task}", "", *map(str, shares)])
    header = ["method", "rows", "model responses %", "gold paraphrases %", "gold responses %"]
    return markdown_table(header, rows)


def benchmarks_table(methods: dict) -> str:
    base = methods["base"]
    rows = []
    for name, models in methods.items():
        row = [name]
        for benchmark in BENCHMARKS:
            row.append(mean_and_each([100 * mean(model["documents"][benchmark]) for model in models]))
        row.append(mean_and_each([retained(model) for model in models]))
        row.append("" if name == "base" else average_difference(models, base))
        row.append("" if name == "sft" else average_difference(models, methods["sft"]))
        row.append("" if name == "base" else each_difference(models, base))
        rows.append(row)
    for task, table in PAPER_BENCHMARKS.items():
        for method, values in table.items():
            rows.append([f"{method} in the paper, {task}", *map(str, values), "", "", ""])
    header = [
        "method",
        *BENCHMARKS,
        "average",
        "average against base",
        "average against SFT",
        "each against base, in the same order",
    ]
    return markdown_table(header, rows)


def each_difference(models: list[dict], base: list[dict]) -> str:
    """The differences of the single benchmarks."""
    found = [difference(documents(models, name), documents(base, name)) for name in BENCHMARKS]
    return "; ".join(found)


def choices_table(results: dict) -> str:
    plain = results["models"]["s3ft-0"]
    rows = []
    for name, model in {"as above": plain, **results["choices"]}.items():
        beside = "" if model is plain else difference(verdicts(model), verdicts(plain))
        general, task = model["drift"]["general"], model["drift"]["task"]
        rows.append([name, f"{100 * model['accuracy']:.1f}", beside, f"{general:.3f}", f"{task:.3f}"])
    header = ["S3FT, seed 0", "accuracy %", "against the first row", "drift, general", "drift, task"]
    return markdown_table(header, rows)


# --------------------------------------------------------------------------------------- the figures


# (colour, mark). Okabe and Ito's colours, which people with any colour vision tell apart.
LOOK = {
    "base": ("#000000", "*"),
    "sft": ("#D55E00", "s"),
    "sdft": ("#E69F00", "^"),
    "ssr": ("#009E73", "D"),
    "s3ft": ("#0072B2", "o"),
    "rft": ("#CC79A7", "v"),
}


def start_figure(columns: int, size: tuple[float, float]):
    """(figure, its axes), in SVG with the same bytes for the same numbers."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "s3ft"
    from matplotlib import pyplot

    return pyplot.subplots(1, columns, figsize=size, layout="constrained")


def save_figure(figure, path: Path) -> None:
    from matplotlib import pyplot

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def draw_trade_off(methods: dict, path: Path) -> None:
    """Accuracy against what was retained: the mean over the seeds, with bars, and every seed as a small mark.

    A bar is the 95 % interval of the difference from base over the same rows. So one that does not cross the
    base model's line stands for a difference with a star in the tables.
    """
    from matplotlib import patheffects

    figure, axes = start_figure(1, (7.5, 5))
    base = methods["base"]
    base_x, base_y = retained(base[0]), accuracies(base)[0]
    axes.axvline(base_x, color="0.6", linewidth=0.8, linestyle="--", zorder=0)
    axes.axhline(base_y, color="0.6", linewidth=0.8, linestyle="--", zorder=0)

    for name, models in methods.items():
        color, mark = LOOK[name]
        x = mean(retained(model) for model in models)
        y = mean(accuracies(models))
        if name != "base":
            _, x_half = average_paired_difference(models, base)
            _, y_half = paired_difference(row_means(models, verdicts), row_means(base, verdicts))
            axes.errorbar(x, y, xerr=x_half, yerr=y_half, color=color, elinewidth=1, capsize=3, alpha=0.6)
            seeds_x = [retained(model) for model in models]
            axes.scatter(seeds_x, accuracies(models), color=color, marker=mark, s=16, alpha=0.5, linewidths=0)
        size = 180 if name == "base" else 80
        axes.scatter(x, y, color=color, marker=mark, s=size, edgecolors="white", zorder=3)
        side = -1 if x < base_x else 1  # the label stands away from the base model
        label = axes.annotate(
            name,
            (x, y),
            xytext=(8 * side, 7),
            textcoords="offset points",
            color=color,
            weight="bold",
            ha="right" if side < 0 else "left",
            zorder=4,
        )
        label.set_path_effects([patheffects.withStroke(linewidth=3, foreground="white")])

    axes.set(xlabel="mean of the four general benchmarks, %", ylabel="accuracy on the task, %")
    save_figure(figure, path)


def draw_curves(methods: dict, path: Path) -> None:
    """Training loss and validation accuracy by step, a line a seed."""
    figure, both_axes = start_figure(2, (11, 4))
    labels = {"loss": "training loss, nats a token", "validation": "validation accuracy"}
    for axes, field in zip(both_axes, labels, strict=True):
        for name, models in methods.items():
            if name == "base":
                continue
            for number, model in enumerate(models):
                points = [(row["step"], row[field]) for row in model["curve"] if field in row]
                steps, values = zip(*points, strict=True)
                label = name if number == 0 else None  # one entry in the legend for all seeds
                axes.plot(steps, values, color=LOOK[name][0], alpha=0.7, label=label)
        axes.set(xlabel="step", ylabel=labels[field])
    both_axes[1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
    save_figure(figure, path)
