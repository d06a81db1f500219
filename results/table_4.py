"""Table 4: what fine-tuning made the model forget, over every call of `evaluate.py --benchmarks`.

A run's results.json keeps, for each model, a digest of its "weights" and its "benchmarks":
{"scores": {column: score}, "drop": {column: drop}, "drop_log_p": {column: drop}}. A score has its metrics, n
and "settings", how it was asked for. The column is the benchmark's name. Where a benchmark was asked for in
several ways, the latest one has that name, and the others say in theirs what was different.
"""

import math
from statistics import mean

from results.checks import metrics_of
from results.markdown import markdown_table, nats, paper_row, percent, points
from results.paper import GENERAL, PAPER_BENCHMARKS, paper_drop

DROPS = ("drop", "drop_log_p")  # of the headline metric, and of log p of the right option

# ------------------------------------------------------------------------------ several calls


def merge_benchmarks(models: dict[str, dict], earlier: dict[str, dict]) -> list[str]:
    """Add to each of `models` what an earlier call measured of it. What was asked for again is replaced.

    A name may stand for other weights today, as that of an adapter that was trained anew. Its earlier scores
    are left out, and so are all earlier drops where the base model is another. -> the names left out.
    """
    left_out = []
    same_base = same_weights(models.get("base", {}), earlier.get("base", {}))
    for name, model in models.items():
        before = earlier.get(name, {}).get("benchmarks")
        if not before:
            continue
        if not same_weights(model, earlier[name]):
            left_out.append(name)
            continue
        now = model.setdefault("benchmarks", {"scores": {}})
        asked = dict(now["scores"])
        for old_column, score in before["scores"].items():
            column = column_of_earlier(old_column, score, asked)
            if column is None:
                continue
            now["scores"][column] = score
            for kind in DROPS:
                drop = before.get(kind, {}).get(old_column)
                if drop and same_base:
                    now.setdefault(kind, {})[column] = drop
    return left_out


def same_weights(model: dict, earlier: dict) -> bool:
    """Are both of one model? Results that do not say their weights are of an older version: nobody knows."""
    return model.get("weights") is not None and model["weights"] == earlier.get("weights")


def column_of_earlier(column: str, score: dict, asked: dict[str, dict]) -> str | None:
    """Where an earlier score stands beside those that were `asked` for now. None: one of them replaces it."""
    benchmark = column.partition(",")[0]
    if benchmark not in asked:
        return column
    settings = score.get("settings")
    if settings is None or settings == asked[benchmark].get("settings"):
        return None
    return f"{benchmark}, {', '.join(settings_in_words(settings))}"


def settings_in_words(settings: dict) -> list[str]:
    words = [f"{settings['num_fewshot']}-shot"]
    if settings["apply_chat_template"]:
        words.append("chat template")
    if settings["add_bos"]:
        words.append("BOS")
    if settings["limit"]:
        words.append(f"{'sampled' if settings['sampled'] else 'first'} {settings['limit']}")
    if settings.get("max_new_tokens"):
        words.append(f"at most {settings['max_new_tokens']} tokens")
    return words


# ------------------------------------------------------------------------------ the table


def headline(column: str, score: dict) -> float:
    """The metric of Table 4. TruthfulQA's is the mean of mc1 and mc2, IFEval's is its first."""
    if column.partition(",")[0] == "truthfulqa":
        return score["mean"]
    if "acc" in score:
        return score["acc"]
    return next(score[metric] for metric in metrics_of(score))


def columns_of(models: dict[str, dict]) -> list[str]:
    """Every column that a model has a score in, those of the base model first."""
    columns = {}
    for model in models.values():
        columns |= dict.fromkeys(model["benchmarks"]["scores"])
    return list(columns)


def benchmarks_table(results: dict) -> str:
    """A row for each model and each of the paper's: scores, their average over GENERAL, and the drops."""
    models = {name: model for name, model in results["models"].items() if "benchmarks" in model}
    columns = columns_of(models) if models else []
    elsewhere = results.get("elsewhere", {})
    averaged = [column for column in columns if column in GENERAL] or columns

    rows = []
    for name, model in results["models"].items():
        measured = model.get("benchmarks", {"scores": {}})
        others = [found.get(name) for found in elsewhere.values()]
        if measured["scores"] or any(others):
            rows.append([name, *score_cells(measured, columns, averaged), *elsewhere_cells(others)])
    for method, values in (paper_row(PAPER_BENCHMARKS, results) or {}).items():
        cells = paper_cells(results["config"]["task"], method, values, columns)
        rows.append([f"{method} in the paper", *cells, *[""] * 2 * len(elsewhere)])

    header = ["method", *columns, "average", "mean drop, points (95 % interval)", "each drop (95 % interval)"]
    for task in elsewhere:
        header += [f"{task} %", f"{task}: drop, points (95 % interval)"]
    return markdown_table(header, rows)


def score_cells(measured: dict, columns: list[str], averaged: list[str]) -> list[str]:
    """A model's scores, their average, the mean drop against the base model, and each drop."""
    scores, drops = measured["scores"], measured.get("drop", {})
    cells = []
    for column in columns:
        cells.append(percent(headline(column, scores[column])) if column in scores else "")

    average, mean_cell = "", ""
    if all(column in scores for column in averaged):
        average = percent(mean(headline(column, scores[column]) for column in averaged)) if averaged else ""
        if averaged and all(column in drops for column in averaged):
            mean_cell = points(*mean_drop([drops[column] for column in averaged]))
    each = []
    for column in columns:
        if column in drops:
            each.append(f"{column} {points(drops[column]['drop'], *drops[column]['interval'])}")
    return [*cells, average, mean_cell, "; ".join(each)]


def mean_drop(drops: list[dict]) -> tuple[float, float | None, float | None]:
    """(mean of several benchmarks' drops, its 95 % interval).

    The documents of two benchmarks are independent, so the variances add up.
    """
    center = mean(drop["drop"] for drop in drops)
    squares = 0.0
    for drop in drops:
        low, high = drop["interval"]
        if low is None or high is None or math.isinf(high):
            return center, None, None  # of a single document
        squares += ((high - low) / 2) ** 2
    half = math.sqrt(squares) / len(drops)
    return center, center - half, center + half


def elsewhere_cells(others: list[dict | None]) -> list[str]:
    """Accuracy on each task that the models were not trained on, and its drop against the base model."""
    cells = []
    for other in others:
        against = other.get("against_base") if other else None
        cells.append(percent(other.get("accuracy")) if other else "")
        if against:
            low, high = against["interval"]
            cells.append(points(-against["difference"], -high, -low))
        else:
            cells.append("")
    return cells


def paper_cells(task: str, method: str, values: tuple, columns: list[str]) -> list[str]:
    """The paper's scores. Its average and drop are as printed, and stand only beside all four benchmarks."""
    by_name = dict(zip(GENERAL, values, strict=False))
    cells = [str(by_name.get(column, "")) for column in columns]
    if not all(name in columns for name in GENERAL):
        return [*cells, "", "", ""]
    drop = "" if method == "base" else f"{paper_drop(task, method):.1f}"
    return [*cells, str(values[-1]), drop, ""]


# ------------------------------------------------------------------------------ how it was asked


def settings_table(models: dict[str, dict]) -> str:
    """n, shots, template, BOS and limit of every column."""
    rows = []
    for column in columns_of(models):
        score = next(model["benchmarks"]["scores"][column] for model in models.values()
                     if column in model["benchmarks"]["scores"])
        settings = score.get("settings")
        asked = ["not recorded"] * 4
        if settings:
            limit = "all"
            if settings["limit"]:
                limit = f"{'sampled' if settings['sampled'] else 'first'} {settings['limit']}"
            if settings.get("max_new_tokens"):
                limit += f", at most {settings['max_new_tokens']} tokens a response"
            template = "yes" if settings["apply_chat_template"] else "no"
            bos = "yes" if settings["add_bos"] else "no"
            asked = [str(settings["num_fewshot"]), template, bos, limit]
        rows.append([column, str(score["n"]), *asked])
    return markdown_table(["benchmark", "n", "shots", "chat template", "BOS", "documents of each task"], rows)


def scores_table(scores: dict) -> str:
    """Every metric of every benchmark with its unit and standard error."""
    rows = []
    for column, score in scores.items():
        for metric in metrics_of(score):
            in_nats = metric.startswith("log_p")
            write = nats if in_nats else percent
            value = write(score[metric])
            error = write(score.get(f"{metric}_stderr"))
            rows.append([column, metric, value, "nats" if in_nats else "%", error, str(score["n"])])
    return markdown_table(["benchmark", "metric", "value", "unit", "standard error", "n"], rows)


def log_p_table(models: dict[str, dict]) -> str:
    """log p of the right option of every model, and its drop against base. "" where no score has it."""
    columns = []
    for column in columns_of(models):
        if any("log_p" in model["benchmarks"]["scores"].get(column, {}) for model in models.values()):
            columns.append(column)
    if not columns:
        return ""

    header, rows = ["method"], []
    for column in columns:
        header += [f"{column}: log p, nats", "drop, nats (95 % interval)"]
    for name, model in models.items():
        measured = model["benchmarks"]
        cells = []
        for column in columns:
            drop = measured.get("drop_log_p", {}).get(column)
            cells.append(nats(measured["scores"].get(column, {}).get("log_p")))
            cells.append(nats(drop["drop"], drop["interval"]) if drop else "")
        rows.append([name, *cells])
    return markdown_table(header, rows)


def benchmarks_section(results: dict) -> list[str]:
    """Table 4 with what a reader must know of it. Empty where nothing was measured."""
    models = {name: model for name, model in results["models"].items() if "benchmarks" in model}
    if not models and not results.get("elsewhere"):
        return []
    parts = ["## General benchmarks (Table 4)", benchmarks_table(results)]
    halves = []
    for name, model in models.items():
        found = model["benchmarks"]["scores"].get("truthfulqa")
        if found:
            halves.append(f"{name} {percent(found['mc1'])} and {percent(found['mc2'])}")
    if halves:
        parts.append(f"`truthfulqa` is the mean of mc1 and mc2 ({', '.join(halves)}).")
    parts.append(
        "Drops: against the base model, on the same documents, intervals of paired differences. Average and "
        "mean drop are over the paper's four benchmarks, or those of them that are there. The paper's "
        "average and drop are those it prints.")
    log_p = log_p_table(models)
    if log_p:
        parts.append(log_p)
        parts.append(
            "log p: of the right option among the options, a softmax over their log-likelihoods. Accuracy "
            "only sees which option comes first. log p moves with every change of the model, so fewer "
            "documents tell two models apart. A drop above 0: the model is less sure of the right option "
            "than base.")
    if models:
        parts.append(settings_table(models))
    return parts
