"""results.json -> report.md and figures/: the paper's tables and Fig. 2, ours beside the paper's.

Nothing is measured here: a report holds what is in results.json, and shares and means of it. The learning
curves are drawn from the log of each method.
"""

from pathlib import Path
from statistics import mean

from results import tables
from results.figures import draw_curves, draw_log_probabilities, draw_sources
from results.markdown import markdown_table
from results.run_files import KINDS
from results.table_4 import benchmarks_section, scores_table, settings_table
from results.training_texts import describe
from support.files import write_text


def write_report(results: dict, run: Path) -> str:
    """Write report.md (and the figures, where matplotlib is installed) -> the report's text."""
    parts = [
        *heading(results),
        *accuracy_section(results),
        *sources_section(results, run),
        *training_section(results, run),
        *log_probability_section(results["log_probabilities"], run),
        *examples_section(results),
        *metrics_section(results),
        *reading_section(results),
        *benchmarks_section(results),
        *bigcode_section(results),
        *costs_section(results),
    ]
    text = "\n\n".join(parts) + "\n"
    write_text(run / "report.md", text)
    return text


def write_benchmark_report(model: str, scores: dict, folder: Path) -> str:
    """The report of a model on its own."""
    settings = settings_table({model: {"benchmarks": {"scores": scores}}})
    text = f"# General benchmarks: {model}\n\n{scores_table(scores)}\n\n{settings}\n"
    write_text(folder / "report.md", text)
    return text


def heading(results: dict) -> list[str]:
    """Which task and model, and where, when and on how many rows it was measured."""
    config = results["config"]
    machine = results["machine"]
    trained_on = f" (trained on {config['trained_on']})" if "trained_on" in config else ""
    limit = f", first {config['limit']} rows of every split" if config["limit"] else ""
    facts = [
        machine["date"],
        f"{machine['device']}, {config['dtype']}",
        f"torch {machine['torch']}",
        f"transformers {machine['transformers']}",
        f"peak memory of the evaluation {machine['peak_memory_gib']} GiB",
        f"{results['models']['base']['n']} test rows{limit}",
        f"judge: {config['judge'] or 'the task’s own'}{others_in_words(config)}",
    ]
    return [f"# {config['task']}{trained_on}: {config['model']}", ", ".join(facts) + "."]


def others_in_words(shared: dict) -> str:
    """Which other models a run asks, behind the name of its judge."""
    words = ""
    if shared.get("judge_model"):
        words += f", which asks {shared['judge_model']}"
    if shared.get("engine"):
        words += f"; the training rows' responses come from {shared['engine']}"
    return words


def answered_by_line(models: dict) -> list[str]:
    """Who answered the test rows, where a server did for one of the models."""
    engines = {name: model.get("answered_by") for name, model in models.items()}
    if not any(engines.values()):
        return []
    facts = [f"{name} {engine or 'here'}" for name, engine in engines.items()]
    line = f"The test rows were answered by these served models, or here: {', '.join(facts)}."
    if len({engine is None for engine in engines.values()}) > 1:
        line += " So models that were answered by different engines are compared."
    return [line]


def accuracy_section(results: dict) -> list[str]:
    models = results["models"]
    parts = [
        "## In-domain accuracy (Table 2) and drift",
        tables.accuracy_table(results),
        "Intervals: Wilson. Against SFT: difference in points on the same rows, McNemar's exact test. Drift: "
        "mean KL(base || tuned) per token, in nats, over the base model's own responses. General drift is "
        "the one to read first. Drift on the task is measured on answers of the base model, and on such "
        "answers S3FT trains. So it is low there by construction. Minutes: training alone.",
        f"Length limit hit: {counts(models, 'length_limit_hit')}. "
        f"Unreadable verdicts, counted as not accepted: {counts(models, 'unreadable_verdicts')}.",
    ]
    parts += answered_by_line(models)
    if len([name for name in models if name.startswith("base")]) > 1:
        parts.append(
            "`base (train prompt)` is the base model under the prompt that trained models get. The paper "
            "accepts 49.5 % of its responses to GSM8K's training questions and scores 40.3 % on the test "
            "questions, which one prompt does not explain.")
    return parts


def counts(models: dict, field: str) -> str:
    return ", ".join(f"{name} {model[field]}" for name, model in models.items())


def sources_section(results: dict, run: Path) -> list[str]:
    """Table 3, and what of the responses to the training rows was not used."""
    parts = ["## Where the training targets come from (Table 3)", tables.sources_table(results)]
    if draw_sources(results, run / "figures" / "sources.svg"):
        parts.append("![sources of the training targets](figures/sources.svg)")
    for kind, found in results["selection"].items():
        parts.append(selection_lines(kind, found, results["unused"][kind]))
    for name, note in results["notes"].items():
        parts.append(f"{name}: {note}")
    return parts


def selection_lines(kind: str, found: dict, unused: dict) -> str:
    """What of the predictions, or of the paraphrases, was not used, and why."""
    lines = [f"Of {found['n']} {kind}, the length limit cut off {found['length_limit_hit'] or 'none'}."]
    if found["length_limit_hit"]:
        lines.append(f"The judge accepts {unused['cut_off']} of these, which are not used.")
    lines.append(f"Unreadable verdicts, counted as not accepted: {found['unreadable_verdicts']}.")
    if "marks_another_number" in unused:
        lines.append(
            f"Marked with \\boxed, #### or \"the answer is\", but ending in another number, which the judge "
            f"reads: {unused['marks_another_number']}.")
    return " ".join(lines)


def training_section(results: dict, run: Path) -> list[str]:
    parts = ["## Training", tables.training_table(results)]
    names = [name for name, model in results["models"].items() if "training" in model]
    if "validation_rows" in results and draw_curves(run, names, results["validation_rows"]):
        parts.append("![loss and validation accuracy](figures/learning_curves.svg)")
    return parts


def log_probability_section(scores: dict | None, run: Path) -> list[str]:
    """Fig. 2: a table and the figure."""
    if not scores:
        return []
    parts = ["## Log-probability under the base model (Fig. 2)"]
    if "beside_gold" in scores:
        parts += beside_gold_table(scores)
    else:
        parts.append(log_probability_lines(scores))
    if draw_log_probabilities(scores, run / "figures" / "log_probability.svg"):
        parts.append("![Fig. 2](figures/log_probability.svg)")
    return parts


def beside_gold_table(scores: dict) -> list[str]:
    """Each kind beside the gold of its own rows: the sum over a response, and its mean over the tokens."""
    rows = []
    for kind in KINDS:
        found = [row for row in scores["beside_gold"] if row["kind"] == kind]
        if found:
            cells = []
            for side in ("response", "gold"):
                cells.append(f"{mean(row[side][0] for row in found):.1f}")
            for side in ("response", "gold"):
                cells.append(f"{mean(row[side][0] / row[side][1] for row in found):.3f}")
            likelier = sum(row["response"][0] > row["gold"][0] for row in found)
            rows.append([f"accepted {kind}", str(len(found)), *cells, f"{likelier} of {len(found)}"])
    header = ["responses", "n", "mean log p(y given x), nats", "of their golds", "a token", "of their golds",
              "likelier than the gold"]
    return [
        markdown_table(header, rows),
        f"{scores['n']} random training rows ({scores['rows']}), each response beside the gold of its own "
        "row. The sum favours a short text, whoever wrote it. The mean over the tokens does not.",
    ]


def log_probability_lines(scores: dict) -> str:
    """The table of results that were made before each response stood beside its own gold."""
    rows = []
    for kind in (*KINDS, "golds"):
        if scores[kind]:
            rows.append([kind, str(len(scores[kind])), f"{mean(scores[kind]):.1f}"])
    table = markdown_table(["responses", "n", "mean log p(y given x), nats"], rows)
    return f"{table}\n\n{scores['n']} random training rows ({scores['rows']})."


def examples_section(results: dict) -> list[str]:
    """Table 1: rows on their way through the three branches."""
    examples = results.get("examples")
    if not examples:
        return []
    parts = ["## Rows on their way through the three branches (Table 1)",
             "log p is the base model's, of the text as its response to the prediction prompt. "
             "`evaluate.py --show ID` shows any other row."]
    for example in examples:
        parts.append(describe(example))
    return parts


def metrics_section(results: dict) -> list[str]:
    if not all("metrics" in model for model in results["models"].values()):
        return []
    return [
        "## The task's own metrics",
        tables.metrics_table(results),
        "Means over the test rows. They judge nothing: no row was selected by them.",
    ]


def reading_section(results: dict) -> list[str]:
    if not all("reading" in model for model in results["models"].values()):
        return []
    return [
        "## Reading comprehension, as SSR reports it",
        tables.reading_table(results),
        "Recall, modified recall (our definition), answerability: see `results/reading_scores.py`. "
        "Recall rewards a long answer. Exact match and F1 do not: read them beside it.",
    ]


def bigcode_section(results: dict) -> list[str]:
    if "bigcode" not in results["models"]["base"]:
        return []
    return [
        "## MBPP as bigcode-evaluation-harness asks it",
        tables.bigcode_table(results),
        "The paper scores MBPP with that harness. Its prompt is a docstring of the task and its first test, "
        "which the model goes on with: no chat template, and not the prompt that the models were trained on. "
        "Ours decodes greedily, as the paper does. The harness itself draws at temperature 0.2 by default. "
        "Prompt and continuation, up to the first stop word, are run with all tests of the row, without its "
        "setup code.",
    ]


def costs_section(results: dict) -> list[str]:
    if not results.get("costs"):
        return []
    return [
        "## What D', training and evaluation cost",
        tables.costs_table(results),
        "Every call of a stage, and the tokens that it generated. Of training, its steps and the tokens of "
        "prompts and targets. `load` is reading and checking the rows, loading the model and its trial. The "
        "base model's answers are made once and serve every method. `evaluate` is the answers to test rows, "
        "with their verdicts. Loading, Table 1 and Fig. 2 of an evaluation are those of its last call. With "
        "torchrun the minutes are those of the process that took longest. Not counted: what another engine "
        "made, and the loading of a run that was killed. The paper: one A100 80 GB, predictions with vLLM.",
    ]
