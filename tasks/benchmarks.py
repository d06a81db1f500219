"""General benchmarks as lm-evaluation-harness 0.4.13 defines them: MMLU, TruthfulQA, HellaSwag, WinoGrande (Table 4).

A row of a benchmark becomes options, each a context and a continuation; likelihood.py says how likely a model finds each; a
metric compares that with the gold. Covered: zero-shot, k-shot MMLU, the chat template, BOS, and the harness's two readings
of a GSM8K answer. Not covered: shots for the other three (the harness draws those of HellaSwag and WinoGrande at random from
their training sets, and gives TruthfulQA none).

Differences from the harness, on purpose:
1. `add_bos` puts one BOS token in front also where the tokenizer's own settings would not.
2. mc2 of options whose probabilities all underflow is their ratio; the harness prints nan.
3. The standard error of MMLU is that of the mean over all documents; the harness pools the subjects' errors.
"""

import math
import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist, mean, stdev

import numpy as np
import torch
from tqdm import tqdm

from engine.likelihood import Encoder, Option, can_share, log_likelihoods, max_length, trial
from support import ranks
from support.cli import InputError
from support.files import RowFile, line_numbers, read_json, read_jsonl, write_json
from tasks.benchmark import Benchmark
from tasks.hellaswag import fetch_hellaswag, hellaswag_metrics, hellaswag_options
from tasks.mmlu import MMLU_SHOTS, fetch_mmlu, mmlu_metrics, mmlu_options
from tasks.truthfulqa import fetch_truthfulqa, truthfulqa_metrics, truthfulqa_options
from tasks.winogrande import fetch_winogrande, winogrande_metrics, winogrande_options

BENCHMARKS = {
    "mmlu": Benchmark("mmlu/test.jsonl", ("question", "subject", "choices", "answer"), mmlu_options, mmlu_metrics),
    "truthfulqa": Benchmark("truthfulqa/multiple_choice.jsonl", ("question", "mc1_targets", "mc2_targets"),
                            truthfulqa_options, truthfulqa_metrics, headline="mean"),
    "hellaswag": Benchmark("hellaswag/validation.jsonl", ("activity_label", "ctx_a", "ctx_b", "endings", "label"),
                           hellaswag_options, hellaswag_metrics),
    "winogrande": Benchmark("winogrande/validation.jsonl", ("sentence", "option1", "option2", "answer"),
                            winogrande_options, winogrande_metrics),
}
COUNTS = {"mmlu/test.jsonl": 14042, "mmlu/dev.jsonl": 285, "truthfulqa/multiple_choice.jsonl": 817,
          "hellaswag/validation.jsonl": 10042, "winogrande/validation.jsonl": 1267}


def rows_of(file: str, data_dir: Path, fields: tuple[str, ...]) -> list[dict]:
    """The rows of a benchmark's file, which is fetched from its public home if it is not there."""
    path = data_dir / file
    if not path.exists():
        FETCH[file.partition("/")[0]](path.parent)
    rows = read_jsonl(path, fields)
    if len(rows) != COUNTS[file]:
        raise InputError(f"{path} has {len(rows)} rows, the original has {COUNTS[file]}: remove it to download it again")
    return rows


FETCH = {"mmlu": fetch_mmlu, "truthfulqa": fetch_truthfulqa, "hellaswag": fetch_hellaswag, "winogrande": fetch_winogrande}


@dataclass(frozen=True)
class Document:
    """One row of a benchmark with its options. `task`: the documents of a task begin alike (an MMLU subject is one)."""

    benchmark: str
    index: int  # in its file, from 0
    row: dict
    options: list[Option]
    where: str  # file and line, for messages

    @property
    def task(self) -> str:
        return self.row.get("subject", self.benchmark)


def documents(name: str, data_dir: Path, limit: int | None, num_fewshot: int, sampled: bool = False) -> list[Document]:
    """A benchmark's documents, of each task the `limit` that `chosen` takes. InputError names a bad row."""
    benchmark, found = BENCHMARKS[name], []
    shots = mmlu_shots(data_dir, num_fewshot) if name == "mmlu" and num_fewshot else defaultdict(list)
    rows, path = rows_of(benchmark.file, data_dir, benchmark.fields), data_dir / benchmark.file
    for index, (row, line) in enumerate(zip(rows, line_numbers(path), strict=True)):
        where = f"{path}, line {line}"
        try:
            options = benchmark.options(row, shots[row.get("subject")])
            benchmark.metrics(row, np.zeros(len(options)))
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise InputError(f"{where}: not a row of {name} ({error!r})") from None
        found.append(Document(name, index, row, options, where))
    return chosen(found, limit, sampled)


def chosen(found: list[Document], limit: int | None, sampled: bool) -> list[Document]:
    """Of each task the first `limit`, as in the harness; or `sampled`, a seeded draw that only grows with the limit."""
    tasks = defaultdict(list)
    for document in random.Random(0).sample(found, len(found)) if sampled else found:
        tasks[document.task].append(document)
    return sorted((document for task in tasks.values() for document in task[:limit]), key=lambda document: document.index)


def mmlu_shots(data_dir: Path, k: int) -> dict[str, list[dict]]:
    """The first k solved questions of every subject."""
    shots = defaultdict(list)
    for row in rows_of(MMLU_SHOTS, data_dir, BENCHMARKS["mmlu"].fields):
        shots[row["subject"]].append(row)
    fewest = min(map(len, shots.values()))
    if k > fewest:
        raise InputError(f"--num-fewshot {k}: {data_dir / MMLU_SHOTS} has {fewest} questions of a subject")
    return {subject: rows[:k] for subject, rows in shots.items()}


def score(model, tokenizer, names, data_dir, out_dir, limit=None, num_fewshot=0, apply_chat_template=False,
          add_bos=False, sampled=False) -> tuple[dict, list[dict]]:
    """Score a model on the benchmarks `names` -> (scores, the samples that they are the means of, in document order).

    Scores: {name: {metric: value, metric_stderr: value, n}}; MMLU also by "subjects". A sample is one document: the
    log-likelihoods of its options (TruthfulQA: of mc1's, then of mc2's), the option chosen, the gold, its metrics. Each is
    appended to samples_path(...) as it is done, and is not scored again by a later call.
    `limit`: documents of each task (for MMLU, of each subject), the first ones or a random sample. `num_fewshot`: of MMLU.
    InputError: unknown names, bad data, samples of another model in out_dir.
    """
    data_dir = Path(data_dir)
    for name in names:
        if name not in BENCHMARKS:
            raise InputError(f"unknown benchmark {name!r}: choose from {', '.join(BENCHMARKS)}")
    if num_fewshot < 0:
        raise InputError(f"--num-fewshot {num_fewshot}: it must be 0 or more")
    if add_bos and tokenizer.bos_token is None:
        raise InputError("--add-bos: this model's tokenizer has no BOS token")
    with ranks.rank_0_first():  # it downloads what is missing
        wanted = {(x.benchmark, x.index): x for name in names for x in documents(name, data_dir, limit, num_fewshot, sampled)}
    path = samples_path(Path(out_dir), num_fewshot, apply_chat_template, add_bos)
    check_model(model, path.with_suffix(".config.json"))
    file = RowFile(path, key=lambda row: (row["benchmark"], row["index"]))
    encoder = Encoder(tokenizer, max_length(model, tokenizer), apply_chat_template, add_bos)
    todo = [wanted[key] for key in file.missing(wanted)]
    for row in watched(scored(model, encoder, todo), len(todo)):
        file.append(row)
    samples = file.finish(sorted(file.rows.keys() | wanted.keys()))
    used = [samples[key] for key in wanted]
    return {name: summary([row for row in used if row["benchmark"] == name]) for name in names}, used


def samples_path(out_dir: Path, num_fewshot: int, apply_chat_template: bool, add_bos: bool) -> Path:
    """samples.jsonl; a way of asking that is not the default has a file of its own, like samples.5-shot.chat.bos.jsonl."""
    ways = {f"{num_fewshot}-shot": num_fewshot, "chat": apply_chat_template, "bos": add_bos}
    return out_dir / ".".join(["samples", *(way for way, asked in ways.items() if asked), "jsonl"])


def by_document(samples: list[dict]) -> dict[tuple[str, int], dict]:
    return {(row["benchmark"], row["index"]): row for row in samples}


def watched(samples: Iterator[dict], n: int) -> Iterator[dict]:
    with tqdm(total=n, unit="document") as bar:
        for row in samples:
            yield row
            bar.set_description(row["benchmark"], refresh=False)
            bar.update()


def check_model(model, path: Path) -> None:
    """Samples of one file are of one model. It is told by its scores of a made-up document, which `path` keeps."""
    mine, tolerance = trial(model, share=False), 1e-5 if model.dtype == torch.float32 else 0.02  # as another GPU may differ
    if not path.exists():
        write_json(path, {"trial": mine})
    elif not np.allclose(read_json(path)["trial"], mine, rtol=tolerance):
        raise InputError(f"{path}: the samples there are of another model; take another folder")


def scored(model, encoder: Encoder, todo: list[Document]) -> Iterator[dict]:
    """The samples of all documents, task after task."""
    tasks, share = defaultdict(list), bool(todo) and can_share(model)
    for document in todo:
        tasks[document.benchmark, document.task].append(document)
    for group in tasks.values():
        for index, scores in log_likelihoods(model, [encoded(encoder, document) for document in group], share):
            yield sample(group[index], scores)


def encoded(encoder: Encoder, document: Document) -> list:
    try:
        return encoder.requests(document.options)
    except ValueError as error:
        raise InputError(f"{document.where}: {error}") from None


def sample(document: Document, scores: list[float]) -> dict:
    result = BENCHMARKS[document.benchmark].metrics(document.row, np.array(scores))
    task = {"subject": document.task} if document.benchmark == "mmlu" else {}
    return {"benchmark": document.benchmark, "index": document.index, **task, "log_likelihoods": scores, **result}


def summary(samples: list[dict]) -> dict:
    """Means over documents with their standard errors (None of a single document). MMLU's acc is so weighted by size."""
    result = {"n": len(samples)}
    for metric in samples[0]["metrics"]:
        values = [row["metrics"][metric] for row in samples]
        result[metric] = mean(values)
        result[f"{metric}_stderr"] = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    subjects = defaultdict(list)
    for row in samples:
        if "subject" in row:
            subjects[row["subject"]].append({"metrics": row["metrics"]})
    return result | ({"subjects": {name: summary(rows) for name, rows in subjects.items()}} if subjects else {})


def paired_drop(base_samples: list[dict], tuned_samples: list[dict]) -> dict:
    """{benchmark: {drop, interval, n}}: how much lower the tuned model's headline metric is, on the same documents (Table 4).

    The 95 % interval is the normal one for the mean of paired differences, document by document.
    """
    base, tuned = ({(row["benchmark"], row["index"]): row for row in samples} for samples in (base_samples, tuned_samples))
    if base.keys() != tuned.keys():
        raise InputError("base and tuned model were scored on different documents; use the same --benchmarks and --limit")
    differences = defaultdict(list)
    for (name, index), row in base.items():
        metric = BENCHMARKS[name].headline
        differences[name].append(row["metrics"][metric] - tuned[name, index]["metrics"][metric])
    return {name: paired_interval(values) for name, values in differences.items()}


def paired_interval(differences: list[float]) -> dict:
    n, center = len(differences), mean(differences)
    half = NormalDist().inv_cdf(0.975) * stdev(differences) / math.sqrt(n) if n > 1 else math.inf
    return {"drop": center, "interval": [center - half, center + half], "n": n}
