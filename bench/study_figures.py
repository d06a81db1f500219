"""The study's figures: forgetting against accuracy, and the learning curves."""

from pathlib import Path

from bench.study_numbers import (
    lost_on_human_text,
    paired_difference,
    row_means,
    verdicts,
)

# (colour, mark). Okabe and Ito's colours, which people with any colour vision tell apart.
LOOK = {
    "base": ("#000000", "*"),
    "sft": ("#D55E00", "s"),
    "sdft": ("#E69F00", "^"),
    "ssr": ("#009E73", "D"),
    "s3ft": ("#0072B2", "o"),
    "rft": ("#CC79A7", "v"),
    "tries": ("#56B4E9", "P"),
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
    """What was learned against what was forgotten, both beside the base model."""
    from matplotlib import patheffects

    figure, axes = start_figure(1, (7.5, 5))
    base = methods["base"]
    base_marks = row_means(base, verdicts)
    axes.axvline(0, color="0.6", linewidth=0.8, linestyle="--", zorder=0)
    axes.axhline(0, color="0.6", linewidth=0.8, linestyle="--", zorder=0)
    axes.scatter(0, 0, color=LOOK["base"][0], marker=LOOK["base"][1], s=220, edgecolors="white", zorder=5)

    for name, models in methods.items():
        color, mark = LOOK[name]
        x, x_half = lost_on_human_text(models, base)
        y, y_half = paired_difference(row_means(models, verdicts), base_marks)
        if name != "base":
            seeds_x = [lost_on_human_text([model], base)[0] for model in models]
            seeds_y = [100 * paired_difference(verdicts(model), base_marks)[0] for model in models]
            axes.errorbar(
                x, 100 * y, xerr=x_half, yerr=100 * y_half, color=color, elinewidth=1, capsize=3, alpha=0.6)
            axes.scatter(seeds_x, seeds_y, color=color, marker=mark, s=16, alpha=0.5, linewidths=0)
            axes.scatter(x, 100 * y, color=color, marker=mark, s=80, edgecolors="white", zorder=3)
        label = axes.annotate(
            name,
            (x, 100 * y),
            xytext=(9, 9),
            textcoords="offset points",
            color=color,
            weight="bold",
            zorder=6,
        )
        label.set_path_effects([patheffects.withStroke(linewidth=3, foreground="white")])

    axes.set(
        xlabel="GSM8K's golds, nats a token more than base (right: forgotten)",
        ylabel="accuracy on the task, points against base",
    )
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
