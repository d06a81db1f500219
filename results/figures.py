"""Figures, as SVG."""

import math
from pathlib import Path
from statistics import mean

KINDS = ("predictions", "paraphrases", "golds")


def draw_log_probabilities(scores: dict, path: Path) -> bool:
    """Fig. 2 as an SVG -> was matplotlib (the extra `plots`) there to draw it?"""
    try:
        import matplotlib
    except ImportError:
        print("figures: skipped, matplotlib is not installed (pip install 's3ft[plots]')")
        return False
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "s3ft"  # the same bytes for the same numbers
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(figsize=(7, 4))
    lowest = math.floor(min(min(scores[kind], default=0) for kind in KINDS))
    bins = [lowest * (1 - i / 24) for i in range(25)]
    for kind, label in (("golds", "gold responses"), ("paraphrases", "gold paraphrases"), ("predictions", "model responses")):
        if scores[kind]:
            axes.hist(scores[kind], bins=bins, alpha=0.55, label=f"{label} (mean {mean(scores[kind]):.1f})")
    axes.set(xlabel="log p(y | x) under the base model, nats", ylabel="rows")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    return True
