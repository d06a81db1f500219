"""General benchmarks (Table 4), as lm-evaluation-harness 0.4.13 defines them.

They are MMLU, TruthfulQA, HellaSwag and WinoGrande, each in a file of its own.

A row of a benchmark becomes options, each a context and a continuation. engine/likelihood.py says how likely
a model finds each. A metric compares that with the gold. Covered: zero-shot, k-shot MMLU, the chat template,
BOS. Not covered: shots for the other three. The harness draws those of HellaSwag and WinoGrande at random
from their training sets, and gives TruthfulQA none.

Differences from the harness, on purpose:
1. `add_bos` puts one BOS token in front also where the tokenizer's own settings would not.
2. mc2 of options whose probabilities all underflow is their ratio. The harness prints nan.
3. The standard error of MMLU is that of the mean over all documents. The harness pools the subjects' errors.
"""

import math
import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import NormalDist, mean, stdev

import numpy as np
import torch
from tqdm import tqdm

from engine.likelihood import Encoder, Option, can_share, log_likelihoods, max_length, trial
from support import ranks
from support.cli import InputError
from support.costs import CostMeter
from support.files import RowFile, digest, line_numbers, read_json, write_json
from tasks.hellaswag import HELLASWAG
from tasks.mmlu import MMLU, MMLU_SHOTS
from tasks.rows import read_counted
from tasks.truthfulqa import TRUTHFULQA
from tasks.winogrande import WINOGRANDE

BENCHMARKS = {"mmlu": MMLU, "truthfulqa": TRUTHFULQA, "hellaswag": HELLASWAG, "winogrande": WINOGRANDE}
COUNTS = MMLU.counts | TRUTHFULQA.counts | HELLASWAG.counts | WINOGRANDE.counts  # rows of each original file


@dataclass(frozen=True)
class Scoring:
    """How a model is asked, and how many documents."""

    num_fewshot: int = 0  # solved questions shown before one of MMLU
    apply_chat_template: bool = False  # ask in the model's chat template
    add_bos: bool = False  # put one BOS token in front
    limit: int | None = None  # documents of each task (for MMLU, of each subject)
    sampled: bool = False  # `limit` documents at random instead of the first ones
    max_new_tokens: int | None = None  # of a response of IFEval (None: the harness's limit)

    def settings(self) -> dict:
        """What is recorded beside a score. A limit of tokens is, where there is one."""
        settings = asdict(self)
        if self.max_new_tokens is None:
            del settings["max_new_tokens"]
        return settings


ZERO_SHOT = Scoring()


@dataclass(frozen=True)
class Document:
    """One row of a benchmark with its options.

    `task`: the documents of a task begin alike (an MMLU subject is one).
    """

    benchmark: str
    index: int  # in its file, from 0
    row: dict
    options: list[Option]
    where: str  # file and line, for messages

    @property
    def key(self) -> tuple[str, int]:
        return self.benchmark, self.index

    @property
    def task(self) -> str:
        return self.row.get("subject", self.benchmark)

    @property
    def digest(self) -> str:
        """Of what the model is asked. It changes where the row, or our prompt, is edited."""
        return digest([[x.description, x.shots, x.context, x.continuation] for x in self.options])


# -------------------------------------------------------------------------------- rows -> documents


def documents(name: str, data_dir: Path, scoring: Scoring = ZERO_SHOT) -> list[Document]:
    """A benchmark's documents, of each task as many as `scoring` says. InputError names a bad row."""
    benchmark = BENCHMARKS[name]
    path = data_dir / benchmark.file
    rows = read_rows(benchmark, benchmark.file, data_dir)
    shots = {}
    if name == "mmlu" and scoring.num_fewshot:
        shots = mmlu_shots(data_dir, scoring.num_fewshot)

    found = []
    for index, (row, line) in enumerate(zip(rows, line_numbers(path), strict=True)):
        where = f"{path}, line {line}"
        try:
            options = benchmark.options(row, shots.get(row.get("subject"), []))
            benchmark.metrics(row, np.zeros(len(options)))
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise InputError(f"{where}: not a row of {name} ({error!r})") from None
        found.append(Document(name, index, row, options, where))
    return choose(found, scoring)


def read_rows(benchmark, file: str, data_dir: Path) -> list[dict]:
    """The rows of one file of a benchmark. Where it is missing, it is fetched from its public home."""
    path = data_dir / file
    if not path.exists():
        benchmark.fetch(path.parent)
    return read_counted(path, COUNTS[file], benchmark.fields)


def mmlu_shots(data_dir: Path, k: int) -> dict[str, list[dict]]:
    """The first k solved questions of every subject."""
    shots = defaultdict(list)
    for row in read_rows(MMLU, MMLU_SHOTS, data_dir):
        shots[row["subject"]].append(row)
    fewest = min(map(len, shots.values()))
    if k > fewest:
        raise InputError(f"--num-fewshot {k}: {data_dir / MMLU_SHOTS} has {fewest} questions of a subject")
    return {subject: rows[:k] for subject, rows in shots.items()}


def choose(found: list[Document], scoring: Scoring) -> list[Document]:
    """Of each task the first `limit`, as in the harness, or a seeded draw that only grows with the limit."""
    if scoring.sampled:
        found = random.Random(0).sample(found, len(found))
    tasks = defaultdict(list)
    for document in found:
        tasks[document.task].append(document)

    chosen = []
    for task in tasks.values():
        chosen += task[: scoring.limit]
    return sorted(chosen, key=lambda document: document.index)


# -------------------------------------------------------------------------------- documents -> samples


def score(
    model,
    tokenizer,
    names: list[str],
    data_dir: Path | str,
    out_dir: Path | str,
    scoring: Scoring = ZERO_SHOT,
) -> tuple[dict, list[dict]]:
    """Score a model on the benchmarks `names` -> (scores, samples).

    Scores: {name: {metric: value, metric_stderr: value, n}}, those of MMLU also by "subjects". They are means
    over the samples, which come in document order.

    A sample is one document: the log-likelihoods of its options (TruthfulQA: of mc1's, then of mc2's), the
    option chosen, the gold, its metrics. Each is appended to samples_path(...) as it is done, and is not
    scored again by a later call.
    InputError: unknown names, bad data, samples of another model in out_dir.
    """
    check_request(tokenizer, names, scoring)

    # 1. The documents, with the files that are missing fetched by one process.
    wanted = {}
    with ranks.rank_0_first():
        for name in names:
            for document in documents(name, Path(data_dir), scoring):
                wanted[document.key] = document

    # 2. The samples that are not in the file yet.
    path = samples_path(Path(out_dir), scoring)
    check_model(model, path.with_suffix(".config.json"))
    longest = max_length(model, tokenizer)
    encoder = Encoder(tokenizer, longest, scoring.apply_chat_template, scoring.add_bos)
    file = RowFile(path, key=document_of)
    for key, document in wanted.items():
        if key in file.rows and file.rows[key].get("digest", document.digest) != document.digest:
            del file.rows[key]  # it answers another question, and is scored anew
    missing = [wanted[key] for key in file.missing(wanted)]
    with CostMeter(path.with_name("benchmarks")) as cost:
        for sample in scored(model, encoder, missing):
            file.append(sample)
            cost.add(calls=1)
    samples = file.finish(sorted(file.rows.keys() | wanted.keys()))

    # 3. The means over what was asked for: the file may hold more.
    used = [regraded(document, samples[key]) for key, document in wanted.items()]
    scores = {}
    for name in names:
        scores[name] = summary([sample for sample in used if sample["benchmark"] == name])
    return scores, used


def check_request(tokenizer, names: list[str], scoring: Scoring) -> None:
    for name in names:
        if name not in BENCHMARKS:
            raise InputError(f"unknown benchmark {name!r}: choose from {', '.join(BENCHMARKS)}")
    if scoring.num_fewshot < 0:
        raise InputError(f"--num-fewshot {scoring.num_fewshot}: it must be 0 or more")
    if scoring.add_bos and tokenizer.bos_token is None:
        raise InputError("--add-bos: this model's tokenizer has no BOS token")


def samples_path(out_dir: Path, scoring: Scoring) -> Path:
    """samples.jsonl.

    A way of asking that is not the default has a file of its own, like samples.5-shot.chat.bos.jsonl.
    """
    name = "samples"
    if scoring.num_fewshot:
        name += f".{scoring.num_fewshot}-shot"
    if scoring.apply_chat_template:
        name += ".chat"
    if scoring.add_bos:
        name += ".bos"
    return out_dir / f"{name}.jsonl"


def check_model(model, path: Path) -> None:
    """Samples of one file are of one model.

    It is told by its scores of a made-up document, which `path` keeps.
    """
    mine = trial(model, share=False)
    tolerance = 1e-5 if model.dtype == torch.float32 else 0.02  # as another GPU may differ
    if not path.exists():
        write_json(path, {"trial": mine})
    elif not np.allclose(read_json(path)["trial"], mine, rtol=tolerance):
        raise InputError(f"{path}: the samples there are of another model; take another folder")


def document_of(sample: dict) -> tuple[str, int]:
    return sample["benchmark"], sample["index"]


def by_document(samples: list[dict]) -> dict[tuple[str, int], dict]:
    return {document_of(sample): sample for sample in samples}


def scored(model, encoder: Encoder, todo: list[Document]) -> Iterator[dict]:
    """The samples of all documents, task after task, as soon as each is there."""
    tasks = defaultdict(list)
    for document in todo:
        tasks[document.benchmark, document.task].append(document)
    share = bool(todo) and can_share(model)

    with tqdm(total=len(todo), unit="document", disable=not todo) as bar:
        for group in tasks.values():
            bar.set_description(group[0].benchmark, refresh=False)
            requests = [requests_of(encoder, document) for document in group]
            for index, scores in log_likelihoods(model, requests, share):
                yield sample_of(group[index], scores)
                bar.update()


def requests_of(encoder: Encoder, document: Document) -> list:
    try:
        return encoder.requests(document.options)
    except ValueError as error:
        raise InputError(f"{document.where}: {error}") from None


def sample_of(document: Document, scores: list[float]) -> dict:
    """What is kept of a scored document."""
    sample = {"benchmark": document.benchmark, "index": document.index, "digest": document.digest}
    if document.benchmark == "mmlu":
        sample["subject"] = document.task
    sample["log_likelihoods"] = scores
    return sample | BENCHMARKS[document.benchmark].metrics(document.row, np.array(scores))


def regraded(document: Document, sample: dict) -> dict:
    """A kept sample with the metrics of today. They follow from its document and log-likelihoods alone."""
    scores = np.array(sample["log_likelihoods"])
    return sample | BENCHMARKS[document.benchmark].metrics(document.row, scores)


# -------------------------------------------------------------------------------- samples -> scores


def summary(samples: list[dict]) -> dict:
    """Means over documents with their standard errors (None of a single document).

    So MMLU's acc weights each subject by its size.
    """
    result = means(samples)
    subjects = defaultdict(list)
    for sample in samples:
        if "subject" in sample:
            subjects[sample["subject"]].append(sample)
    if subjects:
        result["subjects"] = {name: means(rows) for name, rows in subjects.items()}
    return result


def means(samples: list[dict]) -> dict:
    n = len(samples)
    result = {"n": n}
    for metric in samples[0]["metrics"]:
        values = [sample["metrics"][metric] for sample in samples]
        result[metric] = mean(values)
        result[f"{metric}_stderr"] = stdev(values) / math.sqrt(n) if n > 1 else None
    return result


def paired_drop(base_samples: list[dict], tuned_samples: list[dict], metric: str | None = None) -> dict:
    """{benchmark: {drop, interval, n}}: how much lower the tuned model's metric is, on the same documents.

    The metric is the headline of each benchmark (Table 4), or `metric`, such as log_p. The 95 % interval is
    the normal one for the mean of paired differences, document by document.
    """
    base = by_document(base_samples)
    tuned = by_document(tuned_samples)
    if base.keys() != tuned.keys():
        raise InputError(
            "base and tuned model were scored on different documents; use the same --benchmarks and --limit")

    differences = defaultdict(list)
    for (name, index), sample in base.items():
        wanted = metric or BENCHMARKS[name].headline
        differences[name].append(sample["metrics"][wanted] - tuned[name, index]["metrics"][wanted])
    return {name: paired_interval(values) for name, values in differences.items()}


def paired_interval(differences: list[float]) -> dict:
    """The mean of paired differences with its normal 95 % interval."""
    n = len(differences)
    center = mean(differences)
    half = NormalDist().inv_cdf(0.975) * stdev(differences) / math.sqrt(n) if n > 1 else math.inf
    return {"drop": center, "interval": [center - half, center + half], "n": n}
