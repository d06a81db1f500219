"""The study's numbers: rows of docs/study/results.json averaged over seeds, and paired differences."""

import math
from statistics import mean, stdev

from tasks.benchmarks import BENCHMARKS, paired_interval

METHODS = ["sft", "s3ft", "sdft", "ssr", "rft", "tries"]


def seeds_of(models: dict[str, dict]) -> dict[str, list[dict]]:
    """method -> its models, one a seed. `models` has them by name: base, sft-0, sft-1, ..."""
    found = {name: [] for name in ("base", *METHODS)}
    for name, model in sorted(models.items()):
        method = name.rpartition("-")[0] or name
        found[method].append(model)
    return {name: models for name, models in found.items() if models}


def row_means(models: list[dict], rows_of) -> list[float]:
    """Each row's (or document's) mean over the seeds."""
    by_model = [rows_of(model) for model in models]
    return [mean(values) for values in zip(*by_model, strict=True)]


def verdicts(model: dict) -> list[float]:
    """1 or 0 for every test row."""
    return [float(mark) for mark in model["verdicts"]]


def documents(models: list[dict], benchmark: str) -> list[float]:
    """Each document's metric in percent, averaged over the seeds."""
    return row_means(models, lambda model: [100 * value for value in model["documents"][benchmark]])


def log_p_of(models: list[dict], benchmark: str) -> list[float]:
    """Each document's log p of its right option in nats, averaged over the seeds."""
    return row_means(models, lambda model: model["log_p"][benchmark])


def marks_of(models: list[dict], judge: str) -> list[float]:
    """Each test row's verdict by a judge, averaged over the seeds."""
    return row_means(models, lambda model: [float(mark) for mark in model["by_judge"][judge]])


def ifeval_of(models: list[dict], metric: str = "prompt_level_strict") -> list[float]:
    """Each prompt's share of IFEval's metric, averaged over the seeds."""
    return row_means(models, lambda model: model["ifeval"][metric])


def human_text_of(models: list[dict], task: str) -> list[float]:
    """Each gold's negative log-likelihood in nats a token, averaged over the seeds."""
    return row_means(models, lambda model: model["human_text"][task])


def lost_on_human_text(models: list[dict], base: list[dict]) -> tuple[float, float]:
    """The primary measure: by how many nats a token GSM8K's golds became less likely."""
    return paired_difference(human_text_of(models, "gsm8k"), human_text_of(base, "gsm8k"))


T_975 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # Student's quantile by the number of seeds


def gain_over_seeds(sft: list[dict], s3ft: list[dict]) -> tuple[list[float], float]:
    """(how many nats a token less S3FT lost than SFT with each seed, half the 95 % interval of their mean).

    The interval is Student's. It speaks for other seeds too, as that over texts does not.
    """
    each = []
    for one, other in zip(sft, s3ft, strict=True):
        each.append(paired_difference(human_text_of([one], "gsm8k"), human_text_of([other], "gsm8k"))[0])
    return each, T_975[len(each)] * stdev(each) / math.sqrt(len(each))


def paired_difference(ours: list[float], theirs: list[float]) -> tuple[float, float]:
    """(mean difference over the same rows, half the width of its 95 % interval)"""
    found = paired_interval([a - b for a, b in zip(ours, theirs, strict=True)])
    return found["drop"], found["interval"][1] - found["drop"]


def average_paired_difference(
    models: list[dict], others: list[dict], of=documents, names=tuple(BENCHMARKS)
) -> tuple[float, float]:
    """The same for the mean of several benchmarks. Their documents are independent: the variances add up."""
    centers, halves = [], []
    for name in names:
        center, half = paired_difference(of(models, name), of(others, name))
        centers.append(center)
        halves.append(half)
    return mean(centers), math.hypot(*halves) / len(halves)


def with_interval(center: float, half: float, digits: int = 1) -> str:
    """A difference as a table shows it. A star marks an interval that leaves out zero."""
    low, high = center - half, center + half
    star = "" if low <= 0 <= high else " *"
    return f"{center:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f}){star}"


def nats_with_interval(center: float, half: float) -> str:
    return with_interval(center, half, digits=3)


def difference(ours: list[float], theirs: list[float]) -> str:
    """Of shares, in points."""
    center, half = paired_difference(ours, theirs)
    return with_interval(100 * center, 100 * half)


def nats_difference(ours: list[float], theirs: list[float]) -> str:
    return nats_with_interval(*paired_difference(ours, theirs))


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
