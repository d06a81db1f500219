"""The study's report: docs/study.md and its figures, from docs/study/results.json and nothing else."""

from pathlib import Path
from statistics import mean

from bench.study_numbers import (
    METHODS,
    accuracies,
    average_difference,
    average_paired_difference,
    difference,
    documents,
    gain_over_seeds,
    human_text_of,
    ifeval_of,
    log_p_of,
    lost_on_human_text,
    marks_of,
    mean_and_each,
    nats_difference,
    nats_with_interval,
    paired_difference,
    retained,
    row_means,
    seeds_of,
    values_of,
    verdicts,
    with_interval,
)
from results.markdown import markdown_table
from results.paper import PAPER_ACCURACY, PAPER_BENCHMARKS, PAPER_SOURCES
from results.report import log_probability_section
from results.run_files import BRANCHES
from results.tables import SOURCES_HEADER
from tasks.benchmarks import BENCHMARKS

ARTICLES = 36  # the first of XQuAD's 48
SEEDS = 3  # of the protocol

CLAIM = """\
The paper claims that S3FT is better than SFT on the task (56.9 against 53.4 % on GSM8K) and forgets about
half as much (its mean drop on four benchmarks is 2.5 against 4.4 points)."""
INTERVALS = """\
A difference is the mean over the same rows, each averaged over the seeds, with the normal 95 % interval
over rows. A star marks an interval that leaves out zero. It speaks for these seeds. How much a seed
matters is seen in the values of each. Rows of one passage are not independent, so the intervals are
somewhat too narrow. Of 50 comparisons without any difference, two or three would get a star."""
CHANGES = """\
One change at a time. Two others cannot be tried on these rows: the prompt at test time (prediction and
training have the same) and the gold's format (golds are phrases)."""
SETTING = """\
Made by `make study` and `make study-report`. {model}, {date}, {device}, torch {torch}. What was to be
measured, and what was to count for and against the claim, was written before the runs:
[study-protocol.md](study-protocol.md).

- Rows: {train} training, {val} validation, {test} test, out of XQuAD's first {articles} articles and the
  embedded passages. The three parts share no article and no passage. A quarter of the rows is unanswerable.
- Seeds: 0 to {last_seed}, for the order of rows, LoRA's start and dropout.
- Training: rank 8, alpha 16, dropout 0.1 on q_proj and v_proj as in the paper, {steps} steps of 8 rows at
  a peak rate of {lr:g}. The checkpoint with the best validation accuracy is kept (every {eval_every}
  steps).
- Judge: every word of the gold in at most 50 words, or abstention where there is no answer."""
PRIMARY = """\
The negative log-likelihood of texts that people wrote and that no method was trained on: 100 solutions of
GSM8K, each after its question, paired against the base model. Positive differences are forgetting. MBPP's
programs stand beside them."""
EQUAL_STEPS = """\
The kept checkpoints differ in their steps, and fewer steps may forget less by themselves. The same models
after the last step, whichever validation would have kept:"""
OPTIONS = """\
log p of the right option among the options (softmax over their log-likelihoods), for each document of the
four benchmarks of Table 4, paired against the base model. A benchmark's drop is the mean over its documents,
and the four drops are averaged. Positive numbers are forgetting."""
TRADE_OFF = """\
Each method's mean over its seeds, beside the base model at the star. A bar is the 95 % interval of its
difference from the base model over the same rows: one that does not cross a dashed line is a difference with
a star. Small marks are single seeds."""
IFEVAL = """\
A random sample of IFEval's prompts, responses of at most 256 tokens. The differences are of the prompt level,
strict."""


def report(results: dict, folder: Path) -> str:
    """The text of study.md. Fig. 2 is drawn into `folder`."""
    # 1. One page: what was claimed, and what was found.
    methods, settings = seeds_of(results["models"]), results["settings"]
    setting = {
        **results["machine"],
        **settings,
        "model": results["config"]["model"],
        "articles": ARTICLES,
        "last_seed": settings["seeds"] - 1,
    }
    parts = ["# Study: does S3FT forget less?", *still_to_run(methods)]
    last_step = seeds_of(results["last_step"])
    parts += first_page(methods, last_step)
    parts += ["![forgetting against accuracy](study/trade-off.svg)", TRADE_OFF]
    parts += ["## What was done", SETTING.format(**setting), kept_checkpoints(methods), INTERVALS]

    # 2. What was forgotten.
    base = methods["base"][0]
    sizes = ", ".join(f"{name} {len(values)}" for name, values in base["documents"].items())
    parts += ["## Forgetting: the primary measure", PRIMARY, primary_table(methods)]
    if last_step:
        parts += [EQUAL_STEPS, equal_steps_table(last_step)]
    parts += ["## Forgetting: log p of the right option", OPTIONS, log_p_table(methods)]
    parts += ["## Forgetting: following instructions (IFEval)", IFEVAL, ifeval_table(methods)]
    parts += [
        "## Forgetting: accuracy on general benchmarks (Table 4)",
        f"Documents: {sizes}: a random sample, of MMLU of each subject, the same for every model. "
        f"To MMLU the base model answers A in {100 * base['mmlu_letter_a']:.0f} % of its questions: near "
        "100 %, that column says nothing about what is forgotten.",
        benchmarks_table(methods),
    ]

    # 3. What was learned, and where it comes from.
    parts += ["## The task: accuracy (Table 2) and drift", accuracy_table(methods), paper_accuracy_table()]
    parts += ["## What the judge's choice does", by_judge_table(methods), reading_table(methods)]
    if results["judges"]:
        parts += ["S3FT with seed 0, D' selected by each judge:", selecting_judges_table(results["judges"])]
    parts += ["## Where the training targets come from (Table 3)", sources_table(methods)]

    # 4. Other settings, curves, and Fig. 2.
    if results["choices"]:
        parts += ["## Other settings", CHANGES, choices_table(results)]
    parts += ["## Learning curves", "![loss and validation](study/curves.svg)"]
    for part in log_probability_section(results["log_probabilities"], folder):
        parts.append(part.replace("(figures/", "(study/figures/"))
    return "\n\n".join(parts) + "\n"


# --------------------------------------------------------------------------------------- the first page


def first_page(methods: dict, last_step: dict) -> list[str]:
    """What was claimed and what was found, in six sentences."""
    base, sft, s3ft = methods["base"], methods["sft"], methods["s3ft"]
    lost = lost_on_human_text(sft, base)
    kept = lost_on_human_text(s3ft, base)
    gain = lost_on_human_text(sft, s3ft)
    found = (
        f"By the primary measure, the likelihood of GSM8K's golds, which people wrote, SFT loses "
        f"{nats_with_interval(*lost)} nats a token and S3FT {nats_with_interval(*kept)}: S3FT loses "
        f"{nats_with_interval(*gain)} nats less, and the claim that it forgets less "
        f"{answer_of(gain, lost[0])}.")
    if len(sft) > 1:
        each, half = gain_over_seeds(sft, s3ft)
        by_seed = ", ".join(f"{value:+.3f}" for value in each)
        over_seeds = nats_with_interval(mean(each), half)
        found += f" By seed it loses {by_seed} less, and an interval over the seeds is {over_seeds}."
    if last_step:
        equal = lost_on_human_text(last_step["sft"], last_step["s3ft"])
        found += f" After equally many steps it loses {nats_with_interval(*equal)} less."
    instructions = (
        f"On IFEval SFT loses {difference(ifeval_of(base), ifeval_of(sft))} points, S3FT "
        f"{difference(ifeval_of(base), ifeval_of(s3ft))}.")
    options = (
        f"Of log p of the right option on the four benchmarks SFT loses "
        f"{nats_with_interval(*average_paired_difference(base, sft, log_p_of))} nats, S3FT "
        f"{nats_with_interval(*average_paired_difference(base, s3ft, log_p_of))}.")
    accuracy = "; ".join(
        f"by {judge} {difference(marks_of(s3ft, judge), marks_of(sft, judge))} points"
        for judge in ("recall", "exact", "f1"))
    others = [name for name in methods if name not in ("base", "sft", "s3ft")]
    beside = "; ".join(
        f"{name} {nats_with_interval(*lost_on_human_text(methods[name], base))}"
        for name in others)
    beside_it = measures_beside_it(sft, s3ft)
    lines = [CLAIM, found, options, instructions, beside_it, f"On the task, S3FT against SFT: {accuracy}."]
    if others:
        lines.append(f"The other methods lose, in nats a token of the primary measure: {beside}.")
    return lines


def measures_beside_it(sft: list[dict], s3ft: list[dict]) -> str:
    """Which of the other measures of forgetting say what the primary one says."""
    gains = {  # how much less S3FT loses than SFT
        "MBPP's golds": paired_difference(human_text_of(sft, "mbpp"), human_text_of(s3ft, "mbpp")),
        "log p of the right option": average_paired_difference(s3ft, sft, log_p_of),
        "IFEval": paired_difference(ifeval_of(s3ft), ifeval_of(sft)),
        "accuracy on the four benchmarks": average_paired_difference(s3ft, sft),
    }
    said = {"S3FT forgets less": [], "S3FT forgets more": [], "nothing beyond chance": []}
    for name, (center, half) in gains.items():
        if center - half > 0:
            said["S3FT forgets less"].append(name)
        elif center + half < 0:
            said["S3FT forgets more"].append(name)
        else:
            said["nothing beyond chance"].append(name)
    parts = [f"{words}: {', '.join(names)}" for words, names in said.items() if names]
    return f"The measures beside it say: {'; '.join(parts)}."


def still_to_run(methods: dict) -> list[str]:
    """A line about what the protocol names and nobody has run yet."""
    missing = []
    for name in METHODS:
        seeds = len(methods.get(name, []))
        if seeds < SEEDS:
            missing.append(f"{name} {seeds}")
    if not missing:
        return []
    return [
        f"**In progress: of {SEEDS} seeds {', '.join(missing)} are there.** "
        "`make study` goes on where it stopped."
    ]


def kept_checkpoints(methods: dict) -> str:
    """At which step the best validation accuracy was found, by method and seed."""
    found = []
    for name, models in methods.items():
        if name != "base":
            steps = ", ".join(str(model["training"]["step"]) for model in models)
            found.append(f"{name} {steps}")
    return f"The kept checkpoints are of the steps {'; '.join(found)}."


def answer_of(gain: tuple[float, float], lost_by_sft: float) -> str:
    """What the protocol says of S3FT's gain over SFT (its center and half-width)."""
    low, high = gain[0] - gain[1], gain[0] + gain[1]
    if low > 0:
        return "is supported"
    if high < 0:
        return "is contradicted"
    if max(abs(low), abs(high)) < lost_by_sft / 5:
        return "is not supported: the difference is under a fifth of SFT's own loss"
    return "is neither supported nor refuted: the interval is too wide"


# --------------------------------------------------------------------------------------- the tables


def primary_table(methods: dict) -> str:
    """By how much human text became less likely, in nats a token."""
    base = methods["base"]
    rows = []
    for name, models in methods.items():
        if name == "base":
            continue
        row = loss_cells(name, methods)
        row.append(nats_difference(human_text_of(models, "mbpp"), human_text_of(base, "mbpp")))
        rows.append(row)
    return markdown_table(["method", "GSM8K: loss", "each seed", "against SFT's", "MBPP: loss"], rows)


def loss_cells(name: str, methods: dict) -> list[str]:
    """Cells: the method, its loss by the primary measure, each seed's, and the difference to SFT's."""
    models = methods[name]
    each_seed = [lost_on_human_text([model], methods["base"])[0] for model in models]
    return [
        name,
        nats_with_interval(*lost_on_human_text(models, methods["base"])),
        ", ".join(f"{value:+.3f}" for value in each_seed),
        "" if name == "sft" else nats_with_interval(*lost_on_human_text(models, methods["sft"])),
    ]


def equal_steps_table(methods: dict) -> str:
    """The primary measure of SFT and S3FT after as many steps, in nats a token."""
    rows = [loss_cells(name, methods) for name in ("sft", "s3ft")]
    return markdown_table(["after the last step", "GSM8K: loss", "each seed", "against SFT's"], rows)


def log_p_table(methods: dict) -> str:
    """What every method lost on the benchmarks, in nats of log p of the right option."""
    base = methods["base"]
    rows = []
    for name, models in methods.items():
        if name == "base":
            continue
        each_seed = [average_paired_difference(base, [model], log_p_of)[0] for model in models]
        row = [name, nats_with_interval(*average_paired_difference(base, models, log_p_of))]
        row.append(", ".join(f"{value:+.3f}" for value in each_seed))
        row.append("")
        if name != "sft":
            row[-1] = nats_with_interval(*average_paired_difference(methods["sft"], models, log_p_of))
        for benchmark in BENCHMARKS:
            row.append(nats_difference(log_p_of(base, benchmark), log_p_of(models, benchmark)))
        rows.append(row)
    return markdown_table(["method", "drop, nats", "each seed", "drop against SFT's", *BENCHMARKS], rows)


def ifeval_table(methods: dict) -> str:
    rows = []
    for name, models in methods.items():
        row = [name]
        for metric in models[0]["ifeval"]:
            row.append(mean_and_each([100 * mean(model["ifeval"][metric]) for model in models]))
        row.append("" if name == "base" else difference(ifeval_of(models), ifeval_of(methods["base"])))
        row.append("" if name == "sft" else difference(ifeval_of(models), ifeval_of(methods["sft"])))
        rows.append(row)
    metrics = [f"{metric.replace('_', ' ')} %" for metric in methods["base"][0]["ifeval"]]
    return markdown_table(["method", *metrics, "against base", "against SFT"], rows)


def by_judge_table(methods: dict) -> str:
    """The same answers judged by all judges: does the ranking hang on the judge?"""
    judges = list(methods["base"][0]["by_judge"])
    rows = []
    for name, models in methods.items():
        row = [name]
        for judge in judges:
            own = marks_of(models, judge)
            against = "" if name == "sft" else f": {difference(own, marks_of(methods['sft'], judge))}"
            row.append(f"{100 * mean(own):.1f}{against}")
        rows.append(row)
    header = [f"accepted by {judge} %, against SFT" for judge in judges]
    return markdown_table(["method", *header], rows)


def selecting_judges_table(judges: dict) -> str:
    rows = []
    for name, model in judges.items():
        total = sum(model["sources"].values())
        row = [name]
        for source in BRANCHES:
            row.append(f"{100 * model['sources'][source] / total:.1f}")
        for marks in model["by_judge"].values():
            row.append(f"{100 * marks.count('1') / len(marks):.1f}")
        rows.append(row)
    tested = [f"accepted by {judge} %" for judge in judges]
    return markdown_table(["selecting judge", *SOURCES_HEADER, *tested], rows)


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
    return markdown_table(["method", "rows", *SOURCES_HEADER], rows)


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
    found = []
    for name in BENCHMARKS:
        found.append(with_interval(*paired_difference(documents(models, name), documents(base, name))))
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
