"""IFEval (Zhou et al., 2023): 541 prompts with instructions that a program can verify ("use no commas").

A row: {"key": 1001, "prompt": "Write an itinerary. You are not allowed to use any commas in your response.",
        "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}

A generated benchmark: a model answers the prompt, and a checker per instruction says whether the answer
follows it. The checkers are those of lm-evaluation-harness (`pip install "lm-eval[ifeval]==0.4.13"`), and so
are its four metrics: prompt level (all instructions of a prompt are followed) and instruction level (the
share of all instructions), each strict and loose. Loose also tries the answer without its first line, its
last line, and asterisks.

Differences from the harness, on purpose:
1. Nothing is downloaded while a model is graded. The harness fetches NLTK's sentence splitter when it is
   imported. Here the file is fetched once into the data folder, like the rows.
2. The guess of an answer's language is seeded. In the harness it may differ from run to run.
3. Standard errors are over prompts, also at the instruction level: the instructions of one prompt are not
   independent.
"""

import math
import random
import zipfile
from pathlib import Path
from statistics import mean, stdev

from support.cli import InputError
from support.files import download, line_numbers, write_bytes
from tasks.benchmarks import paired_interval
from tasks.rows import list_of, read_counted, shown, text_of, texts_of

FILE = "ifeval/input_data.jsonl"
COUNT = 541
HOME = (
    "https://raw.githubusercontent.com/google-research/google-research/master/instruction_following_eval/data/"
    "input_data.jsonl")
SHA256 = "67ffeee0fcb87c317c5b08a2de85557b4a7e96ada6178aa645b4954fe4b53d49"
SPLITTER_HOME = "https://raw.githubusercontent.com/nltk/nltk_data/gh-pages/packages/tokenizers/punkt_tab.zip"
SPLITTER_FILES = ("abbrev_types.txt", "collocations.tab", "ortho_context.tab", "sent_starters.txt")

MAX_NEW_TOKENS = 1280  # the harness's limit of a response
METRICS = ("prompt_level_strict", "inst_level_strict", "prompt_level_loose", "inst_level_loose")
HEADLINE = "prompt_level_strict"


# -------------------------------------------------------------------------------- prompts


def rows(data_dir: Path, limit: int | None = None, sampled: bool = False) -> list[dict]:
    """The first `limit` rows in the order of the file.

    With `sampled` they are a seeded draw that only grows with the limit.
    InputError: the file cannot be fetched, is not whole, or a row is faulty.
    """
    path = data_dir / FILE
    download(HOME, path, SHA256)
    found = read_counted(path, COUNT, ("key", "prompt", "instruction_id_list", "kwargs"))
    for line, row in zip(line_numbers(path), found, strict=True):
        check_row(row, f"{path}, line {line}")

    places = list(range(len(found)))
    if sampled:
        places = random.Random(0).sample(places, len(places))
    return [found[place] for place in sorted(places[:limit])]


def check_row(row: dict, where: str) -> None:
    text_of(row, "key", where)
    text_of(row, "prompt", where)
    instructions = texts_of(row, "instruction_id_list", where)
    settings = list_of(row, "kwargs", where)
    if not instructions or len(instructions) != len(settings):
        raise InputError(f"{where}: {len(instructions)} instructions, but {len(settings)} 'kwargs' for them")
    for number, values in enumerate(settings, 1):
        if not isinstance(values, dict):
            raise InputError(f"{where}, 'kwargs' {number}: expected an object, found {shown(values)}")


# -------------------------------------------------------------------------------- responses -> grades


def load_checkers(data_dir: Path):
    """The harness's module of checkers. To be called before responses are made, which may take hours.

    InputError: a package is not installed, or the sentence splitter is missing and cannot be fetched.
    """
    folder = data_dir / "ifeval" / "nltk_data"
    try:
        import langdetect
        import nltk

        fetch_splitter(folder)
        nltk.data.path.insert(0, str(folder))  # before the harness looks for it, and would download it
        from lm_eval.tasks.ifeval import utils
    except ImportError as error:
        advice = "pip install 'lm-eval[ifeval]==0.4.13'"
        raise InputError(f"--benchmarks ifeval needs its checkers ({error}): {advice}") from None
    langdetect.DetectorFactory.seed = 0
    return utils


def fetch_splitter(folder: Path) -> None:
    """NLTK's model of English sentences: tables as text, unpacked as NLTK wants them."""
    unpacked = folder / "tokenizers" / "punkt_tab" / "english"
    if all((unpacked / name).exists() for name in SPLITTER_FILES):
        return
    archive = folder / "punkt_tab.zip"
    download(SPLITTER_HOME, archive)
    try:
        with zipfile.ZipFile(archive) as opened:
            for name in SPLITTER_FILES:
                write_bytes(unpacked / name, opened.read(f"punkt_tab/english/{name}"))
    except (zipfile.BadZipFile, KeyError) as error:
        raise InputError(
            f"{archive}: not the archive of {SPLITTER_HOME} ({error}): remove it and try again") from None


def grade(checkers, row: dict, response: str) -> dict:
    """Which instructions of a prompt a response follows.

    {"key", prompt_level_strict: bool, inst_level_strict: [bool for each instruction], and both for loose}
    """
    found = checkers.process_results(row, [response])
    return {"key": row["key"]} | {metric: found[f"{metric}_acc"] for metric in METRICS}


# -------------------------------------------------------------------------------- grades -> scores


def summary(grades: list[dict]) -> dict:
    """{n, instructions, metric: value, metric_stderr: value} for the four metrics.

    A single prompt has no error.
    """
    n = len(grades)
    result = {"n": n, "instructions": sum(len(grade["inst_level_strict"]) for grade in grades)}
    for metric in METRICS:
        values = values_by_prompt(grades, metric)
        result[metric] = mean(values)
        result[f"{metric}_stderr"] = stdev(values) / math.sqrt(n) if n > 1 else None
    return result


def paired_drop(base: list[dict], tuned: list[dict]) -> dict:
    """{metric: {drop, interval, n}}: how much lower the tuned model's metrics are, on the same prompts."""
    if [grade["key"] for grade in base] != [grade["key"] for grade in tuned]:
        raise InputError("base and tuned model were graded on different prompts; use the same --limit")
    drops = {}
    for metric in METRICS:
        pairs = zip(values_by_prompt(base, metric), values_by_prompt(tuned, metric), strict=True)
        drops[metric] = paired_interval([before - after for before, after in pairs])
    return drops


def values_by_prompt(grades: list[dict], metric: str) -> list[float]:
    """A number for each prompt, of which the metric is the mean.

    At the instruction level a prompt counts by the instructions that it has: (followed) * prompts /
    instructions.
    """
    if metric.startswith("prompt_level"):
        return [float(grade[metric]) for grade in grades]
    instructions = sum(len(grade[metric]) for grade in grades)
    return [sum(grade[metric]) * len(grades) / instructions for grade in grades]
