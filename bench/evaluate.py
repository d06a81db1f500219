"""Documents a second of our log-likelihood scoring and of lm-evaluation-harness, on the same documents and model.

Both go from rows to metrics; reading files and loading the model are left out (and the harness's own cleaning of HellaSwag's
rows, which it does while it reads them; ours is timed). They take turns (ours, then the harness with
each batch size) in one process on one thread, timed in CPU seconds where there is no GPU, so that a busy machine changes
little. HellaSwag's documents are spread over the file; MMLU's are the first ones of a few subjects, as many of each as a
subject needs to be worth its shots. The largest difference between the two sides' log-likelihoods is printed beside.

    pip install lm-eval==0.4.13 accelerate
    python -m bench.evaluate --model models/SmolLM2-135M-Instruct --data data --out runs/bench
"""

import argparse
import platform
import tempfile
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from statistics import mean

import torch

from bench import harness
from engine.likelihood import Encoder, max_length
from engine.model import load_model
from support.cli import exit_cleanly
from support.files import read_jsonl, write_json, write_text
from tasks import benchmarks, mmlu

CASES = [("hellaswag", 0), ("mmlu", 0), ("mmlu", 5), ("truthfulqa", 0), ("winogrande", 0)]  # benchmark, shots
METRICS = {"hellaswag": {"acc": ("hellaswag", "acc"), "acc_norm": ("hellaswag", "acc_norm")},  # ours -> harness's task, metric
           "winogrande": {"acc": ("winogrande", "acc")},
           "truthfulqa": {"mc1": ("truthfulqa_mc1", "acc"), "mc2": ("truthfulqa_mc2", "acc")}}
SUBJECTS = ("anatomy", "high_school_physics", "professional_law")


def choose(name: str, shots: int, data_dir: Path, n: int) -> list[benchmarks.Document]:
    found = benchmarks.documents(name, data_dir, benchmarks.Scoring(num_fewshot=shots))
    if name != "mmlu":
        return found[::len(found) // n][:n]
    each = n // len(SUBJECTS)
    return [x for subject in SUBJECTS for x in [y for y in found if y.task == subject][:each]]


def ours(model, encoder: Encoder, chosen: list[benchmarks.Document], shots: dict[str, list[dict]]) -> list[dict]:
    """Samples from the rows of the documents: their options are made anew, because making them is timed."""
    build = benchmarks.BENCHMARKS[chosen[0].benchmark].options
    return list(benchmarks.scored(model, encoder, [replace(x, options=build(x.row, shots.get(x.task, []))) for x in chosen]))


def seconds(work) -> tuple[float, object]:
    """(time that `work()` took, what it returned)"""
    clock = time.monotonic if torch.cuda.is_available() else time.process_time
    start = clock()
    result = work()
    return clock() - start, result


def measure(model, tokenizer, name: str, shots: int, args) -> dict:
    """CPU (or, on a GPU, wall) seconds of every side, over all rounds."""
    chosen = choose(name, shots, args.data, args.documents)
    solved = benchmarks.mmlu_shots(args.data, shots) if shots else {}
    encoder = Encoder(tokenizer, max_length(model, tokenizer))
    times = {"ours": 0.0} | {f"harness, batch {size}": 0.0 for size in args.batch_sizes}
    worst = 0.0
    with tempfile.TemporaryDirectory() as folder:
        harness.write_tasks(name, [x.row for x in chosen], Path(folder), read_jsonl(args.data / mmlu.MMLU_SHOTS))
        loaded = harness.load_tasks(Path(folder), name, shots)
        for _ in range(args.rounds):
            spent, samples = seconds(lambda: ours(model, encoder, chosen, solved))
            times["ours"] += spent
            for size in args.batch_sizes:
                lm = harness.language_model(model, tokenizer, batch_size=size)
                spent, result = seconds(lambda lm=lm: harness.evaluate(lm, loaded))
                times[f"harness, batch {size}"] += spent
                worst = max(worst, difference(samples, result, loaded))
        metrics = compare_metrics(name, samples, result, loaded)
    done = len(chosen) * args.rounds
    return {"benchmark": name, "shots": shots, "documents": len(chosen), "rounds": args.rounds,
            "documents a second": {side: round(done / spent, 3) for side, spent in times.items()},
            "times as fast": {side: round(spent / times["ours"], 2) for side, spent in times.items() if side != "ours"},
            "largest difference": worst, "metrics, ours and the harness's": metrics}


def difference(samples: list[dict], result: dict, loaded: dict) -> float:
    """The largest between our log-likelihoods and the harness's."""
    ours = [row["log_likelihoods"] for row in sorted(samples, key=lambda row: row["index"])]
    theirs = [harness.log_likelihoods(result, task) for task in loaded["tasks"]]
    if samples[0]["benchmark"] == "truthfulqa":  # its two tasks have the same documents, the others' have different ones
        theirs = [[mc1 + mc2 for mc1, mc2 in zip(*theirs, strict=True)]]
    theirs = [document for task in theirs for document in task]
    pairs = (pair for mine, yours in zip(ours, theirs, strict=True) for pair in zip(mine, yours, strict=True))
    return max(abs(mine - yours) for mine, yours in pairs)


def compare_metrics(name: str, samples: list[dict], result: dict, loaded: dict) -> dict[str, list[float]]:
    """metric -> [our mean, the harness's]; MMLU's over all documents."""
    tasks = METRICS.get(name, {"acc": (None, "acc")})
    theirs = {ours: [sample[key] for one in ([task] if task else loaded["tasks"]) for sample in result["samples"][one]]
              for ours, (task, key) in tasks.items()}
    return {ours: [mean(row["metrics"][ours] for row in samples), mean(values)] for ours, values in theirs.items()}


def table(results: dict) -> str:
    lines = ["| benchmark | documents | ours, documents/s | against | its documents/s | times as fast | largest difference "
             "of a log-likelihood | metrics: ours, the harness's |", "|---|---|---|---|---|---|---|---|"]
    for case in results["cases"]:
        rates = case["documents a second"]
        metrics = "; ".join(f"{metric} {ours:.4f}, {theirs:.4f}" for metric, (ours, theirs) in
                            case["metrics, ours and the harness's"].items())
        lines += [f"| {case['benchmark']}, {case['shots']}-shot | {case['documents']} x {case['rounds']} | {rates['ours']} "
                  f"| {side} | {rates[side]} | {ratio} | {case['largest difference']:.1e} | {metrics} |"
                  for side, ratio in case["times as fast"].items()]
    return f"{results['model']}, {results['machine']}, {results['versions']}\n\n" + "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct", help="(%(default)s)")
    parser.add_argument("--data", type=Path, default=Path("data"), help="where the benchmarks are (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="for evaluate.json, evaluate.md (%(default)s)")
    parser.add_argument("--documents", type=int, default=60, help="of each case (%(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="(%(default)s)")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8],
                        help="of the harness, whose own default is 1 (%(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load_model(args.model, dtype="float32")
    device = torch.cuda.get_device_name() if model.device.type == "cuda" else f"{platform.processor() or 'CPU'}, 1 thread"
    versions = ", ".join(f"{name} {version(name)}" for name in ("lm_eval", "torch", "transformers"))
    results = {"model": args.model, "machine": f"{device}, float32", "versions": versions,
               "cases": [measure(model, tokenizer, name, shots, args) for name, shots in CASES]}
    write_json(args.out / "evaluate.json", results)
    write_text(args.out / "evaluate.md", table(results))
    print(table(results))


if __name__ == "__main__":
    exit_cleanly(main)
