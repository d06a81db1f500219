"""Figures, as SVG, all with one look. matplotlib (the extra `plots`) draws them. Without it there are none.

Colours are of Okabe and Ito's palette, which colour-blind people can tell apart. The background is
transparent and all text is a middle grey, so that a figure is legible on light and dark pages.
"""

import contextlib
import math
from pathlib import Path
from statistics import mean, stdev

from results.checks import NUMBER, read_rows
from results.markdown import paper_row
from results.paper import PAPER_SOURCES
from results.run_files import BRANCHES, KINDS
from support.stats import Z95, wilson

GREY = "#808080"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
KIND_COLOUR = {"prediction": "#0072B2", "paraphrase": "#009E73", "gold": "#D55E00"}
KIND_LABEL = {"prediction": "model responses", "paraphrase": "gold paraphrases", "gold": "gold responses"}
LOOK = {
    "axes.edgecolor": GREY,
    "axes.labelcolor": GREY,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 9,
    "savefig.transparent": True,
    "svg.hashsalt": "s3ft",  # the same bytes for the same numbers
    "text.color": GREY,
    "xtick.color": GREY,
    "ytick.color": GREY,
}


@contextlib.contextmanager
def drawing(path: Path):
    """pyplot in our look, None where matplotlib is not installed. `path` is where the figure is saved."""
    try:
        import matplotlib
    except ImportError:
        print("figures: skipped, matplotlib is not installed (pip install matplotlib)")
        yield None
        return
    matplotlib.use("svg")
    from matplotlib import pyplot

    with matplotlib.rc_context(LOOK):
        yield pyplot
        path.parent.mkdir(parents=True, exist_ok=True)
        pyplot.gcf().savefig(path, metadata={"Date": None}, bbox_inches="tight")
        pyplot.close()


# ------------------------------------------------------------------------------ Fig. 2


def draw_log_probabilities(scores: dict, path: Path) -> bool:
    """Fig. 2 -> was it drawn?

    A row of panels for each kind of response, whose histogram stands on the axis. That of the golds of the
    same rows hangs below it, so that neither hides the other.
    """
    panels = panels_of(scores)
    if not panels:
        return False
    with drawing(path) as pyplot:
        if pyplot is None:
            return False
        columns = max(len(row) for row in panels.values())
        size = (4.6 * columns, 2.6 * len(panels))
        figure, axes = pyplot.subplots(len(panels), columns, figsize=size, squeeze=False)
        for row, (kind, units) in zip(axes, panels.items(), strict=True):
            for panel, (unit, (responses, golds)) in zip(row, units.items(), strict=True):
                draw_mirrored(panel, kind.removesuffix("s"), responses, golds)
                panel.set_xlabel(f"log p(y | x) under the base model, nats{unit}")
        figure.tight_layout(h_pad=2)
    return True


def panels_of(scores: dict) -> dict[str, dict[str, tuple[list[float], list[float]]]]:
    """kind -> unit -> (values of the responses, values of the golds of the same rows)."""
    panels = {}
    for kind in KINDS:
        if "beside_gold" not in scores:  # older results have sums alone
            if scores[kind]:
                panels[kind] = {"": (scores[kind], scores["golds"])}
            continue
        rows = [row for row in scores["beside_gold"] if row["kind"] == kind]
        if rows:
            panels[kind] = {}
            panels[kind][""] = ([row["response"][0] for row in rows], [row["gold"][0] for row in rows])
            per_token = []
            for side in ("response", "gold"):
                per_token.append([row[side][0] / row[side][1] for row in rows])
            panels[kind][" a token"] = tuple(per_token)
    return panels


def draw_mirrored(axes, kind: str, responses: list[float], golds: list[float]) -> None:
    """Two histograms, one up and one down, each with its mean and the mean's 95 % interval."""
    lowest = min(*responses, *golds)
    highest = max(*responses, *golds)
    width = (highest - lowest or 1.0) / 20
    edges = [lowest + i * width for i in range(21)]
    tallest = 1
    for values, source, sign in ((responses, kind, 1), (golds, "gold", -1)):
        heights = [0] * 20
        for value in values:
            heights[min(int((value - lowest) / width), 19)] += 1
        tallest = max(tallest, *heights)
        colour = KIND_COLOUR[source]
        signed = [sign * height for height in heights]
        axes.bar(edges[:-1], signed, width=0.9 * width, align="edge", color=colour)

    for values, source, sign in ((responses, kind, 1), (golds, "gold", -1)):
        center = mean(values)
        half = Z95 * stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
        height = sign * 1.2 * tallest
        axes.errorbar(center, height, xerr=half, fmt="o", markersize=4, capsize=3, color=KIND_COLOUR[source])
        label = f"{KIND_LABEL[source]}, mean {center:.2f}"
        middle_of_panel = axes.get_yaxis_transform()  # the interval may be as wide as the panel
        place = {"ha": "center", "va": "center", "transform": middle_of_panel}
        axes.text(0.5, sign * 1.5 * tallest, label, color=KIND_COLOUR[source], **place)
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.set_ylim(-1.7 * tallest, 1.7 * tallest)
    axes.set_ylabel("rows")
    axes.yaxis.set_major_locator(_whole_numbers())
    axes.yaxis.set_major_formatter(lambda value, _: f"{abs(value):.0f}")


def _whole_numbers():
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=6, integer=True)


# ------------------------------------------------------------------------------ Table 3


def draw_sources(results: dict, path: Path) -> bool:
    """Where the targets come from, one bar a method, the paper's S3FT below -> was it drawn?"""
    bars = {}
    for name, model in results["models"].items():
        sources = model.get("training", {}).get("sources")
        if sources and sum(sources.values()):
            n = sum(sources.values())
            bars[name] = [100 * sources.get(source, 0) / n for source in BRANCHES]
    if not bars:
        return False
    paper = paper_row(PAPER_SOURCES, results)
    if paper:
        bars["s3ft in the paper"] = list(paper)

    with drawing(path) as pyplot:
        if pyplot is None:
            return False
        _, axes = pyplot.subplots(figsize=(7, 0.7 + 0.42 * len(bars)))
        for place, shares in enumerate(bars.values()):
            left = 0.0
            for source, share in zip(BRANCHES, shares, strict=True):
                axes.barh(place, share, left=left, height=0.7, color=KIND_COLOUR[source])
                if share >= 5:
                    center = left + share / 2
                    axes.text(center, place, f"{share:.1f}", ha="center", va="center", color="white")
                left += share
        for source, x in zip(BRANCHES, (0, 38, 76), strict=True):
            axes.text(x, -0.75, KIND_LABEL[source], color=KIND_COLOUR[source], weight="bold")
        axes.set_yticks(range(len(bars)), list(bars))
        axes.invert_yaxis()
        axes.set_xlabel("% of the training targets")
        axes.set_xlim(0, 100)
    return True


# ------------------------------------------------------------------------------ training


def draw_curves(run: Path, names: list[str], validation_rows: int) -> bool:
    """Training loss and validation accuracy of each method by step -> were they drawn?"""
    logs = {}
    for name in names:
        measured = {"loss": NUMBER, "validation": NUMBER}
        rows = read_rows(run / name / "log.jsonl", {"step": int}, may_lack=measured)
        if rows:
            logs[name] = rows
    if not logs:
        return False
    with drawing(run / "figures" / "learning_curves.svg") as pyplot:
        if pyplot is None:
            return False
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(9.6, 3.4))
        ends = {left: [], right: []}
        for i, (name, rows) in enumerate(logs.items()):
            colour = COLOURS[i % len(COLOURS)]
            losses = [(row["step"], row["loss"]) for row in rows if "loss" in row]
            found = [(row["step"], row["validation"]) for row in rows if "validation" in row]
            if losses:
                steps, values = smoothed(losses)
                left.plot(steps, values, color=colour)
                ends[left].append((name, steps[-1], values[-1], colour))
            if found:
                draw_validation(right, found, validation_rows, colour, i)
                ends[right].append((name, found[-1][0], 100 * found[-1][1], colour))
        for axes, marks in ends.items():
            if marks:
                last_step = max(step for _, step, _, _ in marks)
                axes.set_xlim(0, 1.1 * last_step)
                label_ends(axes, marks)
        left.set(xlabel="step", ylabel="training loss, nats a token")
        right.set(xlabel="step", ylabel="validation accuracy, %")
        for axes in ends:
            axes.xaxis.set_major_locator(_whole_numbers())
        figure.tight_layout(w_pad=6)
    return True


def smoothed(points: list[tuple[int, float]]) -> tuple[list[int], list[float]]:
    """At most 200 points: the means of as many equal stretches of steps."""
    stretch = max(1, math.ceil(len(points) / 200))
    steps, values = [], []
    for start in range(0, len(points), stretch):
        part = points[start : start + stretch]
        steps.append(part[-1][0])
        values.append(mean(value for _, value in part))
    return steps, values


def draw_validation(axes, found: list[tuple[int, float]], n: int, colour: str, place: int) -> None:
    """Accuracy with Wilson's interval at each validation. Methods stand apart, so that none hides another."""
    apart = place * 0.012 * found[-1][0]
    steps = [step + apart for step, _ in found]
    values = [100 * accuracy for _, accuracy in found]
    below, above = [], []
    for _, accuracy in found:
        low, high = wilson(round(accuracy * n), n)
        below.append(max(0.0, 100 * (accuracy - low)))
        above.append(max(0.0, 100 * (high - accuracy)))
    marks = {"fmt": "o-", "markersize": 4, "capsize": 3, "elinewidth": 0.8}
    axes.errorbar(steps, values, yerr=[below, above], color=colour, **marks)


def label_ends(axes, marks: list[tuple[str, float, float, str]]) -> None:
    """A method's name at the end of its line. Names that would overlap are moved apart."""
    low, high = axes.get_ylim()
    _, right = axes.get_xlim()
    line = (high - low) / 15
    lowest = -math.inf
    for name, _, y, colour in sorted(marks, key=lambda mark: mark[2]):
        lowest = max(y, lowest + line)
        axes.text(right, lowest, f" {name}", color=colour, va="center", clip_on=False)
