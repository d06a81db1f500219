"""Documents a second of our log-likelihood scoring, and of lm-evaluation-harness on the same documents.

Both go from rows to metrics. Reading files and loading the model are left out. (So is the harness's own
cleaning of HellaSwag's rows, which it does while it reads them. Ours is timed.) The sides take turns in one
process on one thread: ours, then the harness with each batch size. Where there is no GPU, CPU seconds are
counted, so that a busy machine changes little.

HellaSwag's documents are spread over the file. MMLU's are the first ones of a few subjects, as many of each
as a subject needs to be worth its shots. The largest difference between the two sides' log-likelihoods stands
beside.

    pip install lm-eval==0.4.13 accelerate
    python -m bench.evaluate --model models/SmolLM2-135M-Instruct --data data --out runs/bench
"""

import argparse
import functools
import platform
import tempfile
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from statistics import mean

import torch

from bench import harness
from bench.machine import seconds
from engine.likelihood import Encoder, max_length
from engine.model import load_model
from support.cli import exit_cleanly
from support.files import read_jsonl, write_json, write_text
from tasks import benchmarks, mmlu

CASES = [("hellaswag", 0), ("mmlu", 0), ("mmlu", 5), ("truthfulqa", 0), ("winogrande", 0)]  # benchmark, shots
SUBJECTS = ("anatomy", "high_school_physics", "professional_law")
METRICS = {  # benchmark -> our metric -> (the harness's task, its metric). MMLU has a task for every subject
    "hellaswag": {"acc": ("hellaswag", "acc"), "acc_norm": ("hellaswag", "acc_norm")},
    "winogrande": {"acc": ("winogrande", "acc")},
    "truthfulqa": {"mc1": ("truthfulqa_mc1", "acc"), "mc2": ("truthfulqa_mc2", "acc")},
}


def choose(name: str, shots: int, data_dir: Path, n: int) -> list[benchmarks.Document]:
    """The documents of a case."""
    found = benchmarks.documents(name, data_dir, benchmarks.Scoring(num_fewshot=shots))
    if name != "mmlu":
        return found[:: len(found) // n][:n]
    chosen = []
    for subject in SUBJECTS:
        of_subject = [document for document in found if document.task == subject]
        chosen += of_subject[: n // len(SUBJECTS)]
    return chosen


def ours(
    model, encoder: Encoder, chosen: list[benchmarks.Document], shots: dict[str, list[dict]]
) -> list[dict]:
    """Samples from the rows of the documents. Their options are made anew, because making them is timed."""
    make_options = benchmarks.BENCHMARKS[chosen[0].benchmark].options
    documents = []
    for document in chosen:
        options = make_options(document.row, shots.get(document.task, []))
        documents.append(replace(document, options=options))
    return list(benchmarks.scored(model, encoder, documents))


def measure(
    model, tokenizer, name: str, shots: int, data: Path, n: int, rounds: int, batch_sizes: list[int]
) -> dict:
    """Seconds of every side, over all rounds."""
    # 1. The same documents for both.
    chosen = choose(name, shots, data, n)
    solved = benchmarks.mmlu_shots(data, shots) if shots else {}
    solved_rows = read_jsonl(data / mmlu.MMLU_SHOTS) if name == "mmlu" else []
    encoder = Encoder(tokenizer, max_length(model, tokenizer))
    times = {"ours": 0.0}
    worst = 0.0
    with tempfile.TemporaryDirectory() as folder:
        rows = [document.row for document in chosen]
        harness.write_tasks(name, rows, Path(folder), solved_rows)
        loaded = harness.load_tasks(Path(folder), name, shots)

        # 2. The sides in turns.
        for _ in range(rounds):
            spent, samples = seconds(functools.partial(ours, model, encoder, chosen, solved))
            times["ours"] += spent
            for size in batch_sizes:
                side = f"harness, batch {size}"
                lm = harness.language_model(model, tokenizer, batch_size=size)
                spent, result = seconds(functools.partial(harness.evaluate, lm, loaded))
                times[side] = times.get(side, 0.0) + spent
                worst = max(worst, difference(samples, result, loaded))
        metrics = compare_metrics(name, samples, result, loaded)

    # 3. What they came to.
    done = len(chosen) * rounds
    per_second = {side: round(done / spent, 3) for side, spent in times.items()}
    ratios = {side: round(spent / times["ours"], 2) for side, spent in times.items() if side != "ours"}
    return {
        "benchmark": name,
        "shots": shots,
        "documents": len(chosen),
        "rounds": rounds,
        "documents a second": per_second,
        "times as fast": ratios,
        "largest difference": worst,
        "metrics, ours and the harness's": metrics,
    }


def difference(samples: list[dict], result: dict, loaded: dict) -> float:
    """The largest between our log-likelihoods and the harness's."""
    in_order = sorted(samples, key=lambda row: row["index"])
    theirs = harness_documents(samples[0]["benchmark"], result, loaded)
    largest = 0.0
    for row, scores in zip(in_order, theirs, strict=True):
        for mine, other in zip(row["log_likelihoods"], scores, strict=True):
            largest = max(largest, abs(mine - other))
    return largest


def harness_documents(benchmark: str, result: dict, loaded: dict) -> list[list[float]]:
    """The harness's log-likelihoods `[documents][options]`, the documents in our order."""
    by_task = [harness.log_likelihoods(result, task) for task in loaded["tasks"]]
    documents = []
    if (
        benchmark == "truthfulqa"
    ):  # its two tasks have the same documents: the options of mc1, then those of mc2
        for mc1, mc2 in zip(*by_task, strict=True):
            documents.append(mc1 + mc2)
    else:
        for of_task in by_task:
            documents += of_task
    return documents


def compare_metrics(name: str, samples: list[dict], result: dict, loaded: dict) -> dict[str, list[float]]:
    """metric -> [our mean, the harness's]. MMLU's are over all documents."""
    compared = {}
    for metric, (task, their_metric) in METRICS.get(name, {"acc": (None, "acc")}).items():
        theirs = []
        for one in [task] if task else loaded["tasks"]:
            theirs += [sample[their_metric] for sample in result["samples"][one]]
        compared[metric] = [mean(row["metrics"][metric] for row in samples), mean(theirs)]
    return compared


def table(results: dict) -> str:
    lines = [
        f"{results['model']}, {results['machine']}, {results['versions']}",
        "",
        "| benchmark | documents | ours, documents/s | against | its documents/s | times as fast | "
        "largest difference of a log-likelihood | metrics: ours, the harness's |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case in results["cases"]:
        rates = case["documents a second"]
        metrics = []
        for metric, (ours, theirs) in case["metrics, ours and the harness's"].items():
            metrics.append(f"{metric} {ours:.4f}, {theirs:.4f}")
        for side, ratio in case["times as fast"].items():
            lines.append(
                f"| {case['benchmark']}, {case['shots']}-shot | {case['documents']} x {case['rounds']} | "
                f"{rates['ours']} | {side} | {rates[side]} | {ratio} | {case['largest difference']:.1e} | "
                f"{'; '.join(metrics)} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct", help="(%(default)s)")
    parser.add_argument(
        "--data", type=Path, default=Path("data"), help="where the benchmarks are (%(default)s)"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="(%(default)s)")
    parser.add_argument("--documents", type=int, default=60, help="of each case (%(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="(%(default)s)")
    parser.add_argument(
        "--batch-sizes",
        type=int,
        nargs="+",
        default=[1, 8],
        help="of the harness, whose own default is 1 (%(default)s)",
    )
    args = parser.parse_args()

    torch.set_num_threads(1)
    model, tokenizer = load_model(args.model, dtype="float32")
    device = f"{platform.processor() or 'CPU'}, 1 thread"
    if model.device.type == "cuda":
        device = torch.cuda.get_device_name()
    versions = ", ".join(f"{name} {version(name)}" for name in ("lm_eval", "torch", "transformers"))
    cases = []
    for name, shots in CASES:
        cases.append(
            measure(model, tokenizer, name, shots, args.data, args.documents, args.rounds, args.batch_sizes)
        )
    results = {"model": args.model, "machine": f"{device}, float32", "versions": versions, "cases": cases}
    write_json(args.out / "evaluate.json", results)
    write_text(args.out / "evaluate.md", table(results))
    print(table(results))


if __name__ == "__main__":
    exit_cleanly(main)
