"""Speed and peak memory of a LoRA training step: ours, peft in a plain loop, trl's SFTTrainer.

Every side trains the same model on the same rows in the same batches, each round in a process of its own (so
that its peak memory is its own). The sides take turns, and medians are compared. One step warms up, the
others are timed: in CPU seconds with one thread, else in wall time. Useful tokens are the rows' own, without
padding.

The limit is the step's matrix products alone, forward and back to the inputs (frozen weights need no
gradient), the head at target tokens only, at this machine's measured rate for 512 rows at a time. A shared
prefix computes fewer tokens. So it has no share of the limit.

    python -m bench.train --model models/SmolLM2-135M-Instruct --out runs/bench
    python -m bench.train --shape mistral-7b --out runs/bench       random weights, for a GPU (shapes.py)
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
import transformers

import lora
from bench import shapes
from bench.machine import clock, device_name, flops, seconds_a_row
from data import prompt
from engine.chat import training_ids
from engine.model import best_device, load_model, peak_memory_gib
from support.cli import InputError, exit_cleanly
from support.files import write_json, write_text
from tasks import TASKS
from tasks.reading import read_squad
from train import TrainingSettings, training_step

ROOT = Path(__file__).resolve().parent.parent

RANK, ALPHA, DROPOUT, RATE = 8, 16, 0.1, 1e-4
BATCH = 8
TARGETS = {
    "q,v": ["q_proj", "v_proj"],
    "all-linear": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
OURS, SHARED, PEFT, TRL = "ours", "ours, prefix shared", "peft, plain loop", "trl SFTTrainer + peft"
SIDES = {OURS: (), SHARED: (), PEFT: ("peft",), TRL: ("trl", "peft")}  # and what must be installed


@dataclass(frozen=True)
class Job:
    """What every side trains."""

    model: str  # a folder or name
    targets: list[str]  # names of the adapted modules
    dtype: str
    device: str
    data: Path  # SQuAD-format JSON
    stride: int  # every so many rows one is taken
    steps: int  # timed ones, after one that warms up


def encoded_rows(tokenizer, job: Job) -> list:
    """(ids, is_target) of the rows of all steps."""
    task = TASKS["reading"]
    rows = []
    for article in read_squad(job.data):
        rows += article
    rows = rows[:: job.stride]
    needed = BATCH * (job.steps + 1)
    if len(rows) < needed:
        raise InputError(
            f"{job.data}: {len(rows)} rows after --stride {job.stride}, {needed} needed: lower "
            "--steps or --stride"
        )
    return [training_ids(tokenizer, prompt(task.train, row), task.gold(row)) for row in rows[:needed]]


def batches(rows: list) -> list[list]:
    return [rows[start : start + BATCH] for start in range(0, len(rows), BATCH)]


# --------------------------------------------------------------------------------------- the sides


def our_step(model, share_prefix: bool = False):
    """Our optimizer step, as a function of its rows."""
    lora_parameters = lora.parameters(model)
    optimizer = torch.optim.AdamW(lora_parameters, RATE, weight_decay=0.0, fused=model.device.type == "cuda")
    bf16 = model.dtype == torch.bfloat16
    settings = TrainingSettings(steps=1, eval_every=1, bf16=bf16, share_prefix=share_prefix)
    model.train()
    return lambda rows: training_step(model, optimizer, rows, settings)


def timed(step, rows: list) -> float:
    """Seconds of all steps except the first."""
    first, *others = batches(rows)
    step(first)
    start = clock()
    for batch in others:
        step(batch)
    return clock() - start


def ours(job: Job, share_prefix: bool) -> float:
    model, tokenizer = load_model(job.model, dtype=job.dtype)
    lora.inject(model, RANK, ALPHA, DROPOUT, job.targets)
    return timed(our_step(model, share_prefix), encoded_rows(tokenizer, job))


def peft_model(job: Job):
    from peft import LoraConfig, get_peft_model

    model = transformers.AutoModelForCausalLM.from_pretrained(job.model, dtype=getattr(torch, job.dtype))
    model.to(job.device)
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=DROPOUT, target_modules=job.targets, task_type="CAUSAL_LM"
    )
    return get_peft_model(model, config), transformers.AutoTokenizer.from_pretrained(job.model)


def peft_loop(job: Job) -> float:
    """What a user writes: padded batches, transformers' own loss."""
    model, tokenizer = peft_model(job)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, RATE, weight_decay=0.0)
    model.train()

    def step(batch):
        loss = model(**padded(batch, job.device)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return timed(step, encoded_rows(tokenizer, job))


def padded(batch: list, device: str) -> dict[str, torch.Tensor]:
    """A model's inputs `[batch, longest]`, padded on the right. Only targets have a label."""
    width = max(len(ids) for ids, _ in batch)
    inputs = {"input_ids": [], "attention_mask": [], "labels": []}
    for ids, is_target in batch:
        missing = width - len(ids)
        labels = [token if target else -100 for token, target in zip(ids, is_target, strict=True)]
        inputs["input_ids"].append(ids + [0] * missing)
        inputs["attention_mask"].append([1] * len(ids) + [0] * missing)
        inputs["labels"].append(labels + [-100] * missing)
    return {name: torch.tensor(rows, device=device) for name, rows in inputs.items()}


def trl_trainer(job: Job) -> float:
    """SFTTrainer on the same token ids in the same order, padded, since its packing needs flash attention."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    class Clock(transformers.TrainerCallback):
        first = last = None

        def on_step_end(self, *_, **__):
            self.last = clock()
            self.first = self.first or self.last

    model, tokenizer = peft_model(job)
    rows = []
    for ids, is_target in encoded_rows(tokenizer, job):
        rows.append({"input_ids": ids, "completion_mask": [int(target) for target in is_target]})
    steps = Clock()
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            output_dir=folder,
            per_device_train_batch_size=BATCH,
            max_steps=job.steps + 1,
            learning_rate=RATE,
            weight_decay=0.0,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            max_length=None,
            completion_only_loss=True,
            gradient_checkpointing=False,
            bf16=job.dtype == "bfloat16",
            train_sampling_strategy="sequential",
            use_cpu=job.device == "cpu",
        )
        SFTTrainer(
            model,
            config,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[steps],
        ).train()
    return steps.last - steps.first


def run_side(side: str, job: Job) -> None:
    """A round of one side: its seconds and peak memory, as a line of JSON."""
    if side == PEFT:
        spent = peft_loop(job)
    elif side == TRL:
        spent = trl_trainer(job)
    else:
        spent = ours(job, share_prefix=side == SHARED)
    print(json.dumps({"seconds": spent, "peak_gib": peak_memory_gib()}))


def round_of(side: str, targets: str) -> dict:
    """Run one side in a process of its own, with this one's flags."""
    command = [sys.executable, "-m", "bench.train", *sys.argv[1:], "--side", side, "--targets", targets]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TQDM_DISABLE": "1"})
    if done.returncode:
        sys.exit(f"{side}, {targets}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


# --------------------------------------------------------------------------------------- all sides


def compare(job: Job, names: list[str], rounds: int, out: Path) -> None:
    """All sides, in turns, for each choice of adapted modules -> train.json and train.md."""
    installed = [side for side, needed in SIDES.items() if all(find_spec(name) for name in needed)]
    limit, tokens = limit_seconds(job)
    machine = f"{device_name(job.device)}, {job.dtype}, torch {torch.__version__}"
    skipped = [side for side in SIDES if side not in installed]
    results = {
        "model": job.model,
        "machine": machine,
        "tokens": tokens,
        "limit": limit,
        "rounds": rounds,
        "cases": {},
        "skipped": skipped,
    }
    for name in names:
        found = {side: [] for side in installed}
        for _ in range(rounds):
            for side in installed:
                found[side].append(round_of(side, name))

        case = results["cases"][name] = {}
        for side, measured in found.items():
            case[side] = {
                "seconds": statistics.median(one["seconds"] for one in measured),
                "peak_gib": statistics.median(one["peak_gib"] for one in measured),
            }
        write_json(out / "train.json", results)
        write_text(out / "train.md", table(results))
    print(table(results))


def limit_seconds(job: Job) -> tuple[float, int]:
    """(seconds of the timed steps' matrix products, useful tokens in them)"""
    model, tokenizer = load_model(job.model, dtype=job.dtype)
    rows = encoded_rows(tokenizer, job)[BATCH:]
    tokens = sum(len(ids) for ids, _ in rows)
    targets = sum(sum(is_target) for _, is_target in rows)
    body = seconds_a_row(model, 512, head=False)
    head = seconds_a_row(model, 512, head=True) - body
    return 2 * (tokens * body + targets * head), tokens  # forward, and back to the inputs


def table(results: dict) -> str:
    lines = [
        f"{results['model']}, {results['machine']}; batch {BATCH}, {results['tokens']} useful tokens, "
        f"medians of {results['rounds']}",
        "",
        "| adapted | side | seconds | useful tokens/s | times as fast as peft, trl | % of limit | "
        "peak GiB | of peft's |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for targets, sides in results["cases"].items():
        for side, case in sides.items():
            spent, memory = case["seconds"], case["peak_gib"]
            ratios = f"{times_as_fast(sides, PEFT, spent)}, {times_as_fast(sides, TRL, spent)}"
            limit = "" if side == SHARED else f"{100 * results['limit'] / spent:.0f}"
            of_peft = f"{memory / sides[PEFT]['peak_gib']:.2f}" if PEFT in sides else "-"
            speed = results["tokens"] / spent
            lines.append(
                f"| {targets} | {side} | {spent:.1f} | {speed:.0f} | {ratios} | {limit} | "
                f"{memory:.2f} | {of_peft} |"
            )
    for side in results["skipped"]:
        lines.append(f"\nskipped: {side}, not installed")
    return "\n".join(lines) + "\n"


def times_as_fast(sides: dict, peer: str, spent: float) -> str:
    return f"{sides[peer]['seconds'] / spent:.2f}" if peer in sides else "-"


# --------------------------------------------------------------------------------------- a known shape


PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # bf16 operations a second, by the data sheets


def measure_shape(model, steps: int) -> dict:
    """Tokens a second of steps of 8 rows of GSM8K's lengths, and the share of the peak rate they reach."""
    # 1. Train: two steps warm up, the others are timed.
    measured_rate = flops(model, head=False) / seconds_a_row(model, 512, head=False)
    lora.inject(model, RANK, ALPHA, DROPOUT, TARGETS["q,v"])
    step = our_step(model)
    rows = []
    for row in shapes.random_rows(model.config.vocab_size, BATCH * (steps + 2)):
        is_target = [False] * row.start + [True] * (row.limit - row.start)
        rows.append(([3] * row.limit, is_target))
    first, second, *timed_batches = batches(rows)
    step(first)
    step(second)
    start = clock()
    for batch in timed_batches:
        step(batch)
    spent = clock() - start

    # 2. Count operations: forward, and back to the inputs. Frozen weights have no gradient.
    tokens = sum(len(ids) for batch in timed_batches for ids, _ in batch)
    operations = 4 * shapes.weights_of(model) * tokens
    peak, peak_is = measured_rate, "the rate measured at 512 rows"
    for card, rate in PEAK.items():
        if model.device.type == "cuda" and card in torch.cuda.get_device_name():
            peak, peak_is = rate, "the data sheet's rate"
    return {
        "tokens a second": tokens / spent,
        "seconds a step": spent / steps,
        "share of peak": operations / spent / peak,
        "peak is": peak_is,
        "peak GiB": peak_memory_gib(),
        "job, minutes": shapes.JOB_STEPS * spent / steps / 60,
    }


def shape_table(results: dict) -> str:
    figures = {
        "training tokens/s": f"{results['tokens a second']:,.0f}",
        f"training, share of {results['peak is']}": f"{100 * results['share of peak']:.0f} %",
        "peak GiB": f"{results['peak GiB']:.1f}",
    }
    job = {"the paper's GSM8K job, training, minutes (projected)": f"{results['job, minutes']:.1f}"}
    return shapes.shape_table(results, figures, job)


def run_shape(shape: str, steps: int | None, out: Path) -> None:
    """A model of a known shape with random weights -> train-SHAPE.json and .md."""
    model = shapes.random_model(shape, best_device())
    gpu = model.device.type == "cuda"
    found = measure_shape(model, steps or (20 if gpu else 2))
    machine = f"{device_name(model.device)}, torch {torch.__version__}"
    results = {"machine": machine, "shape": shape, "gpu": gpu, **found}
    write_json(out / f"train-{shape}.json", results)
    write_text(out / f"train-{shape}.md", shape_table(results))
    print(shape_table(results))


# --------------------------------------------------------------------------------------- the command line


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct", help="(%(default)s)")
    parser.add_argument(
        "--xquad", type=Path, default=ROOT / "examples/reading.json", help="SQuAD-format JSON (%(default)s)"
    )
    parser.add_argument("--stride", type=int, default=5, help="take every N-th row (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="(%(default)s)")
    parser.add_argument("--steps", type=int, help="timed steps of 8 rows (2; with --shape on a GPU 20)")
    parser.add_argument("--rounds", type=int, default=3, help="(%(default)s)")
    parser.add_argument("--threads", type=int, help="(torch's choice)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="(%(default)s)")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--targets", choices=TARGETS, help="only this choice of adapted modules")
    parser.add_argument("--shape", choices=shapes.SHAPES, help="random weights in place of --model")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.shape:
        return run_shape(args.shape, args.steps, args.out)

    names = [args.targets] if args.targets else list(TARGETS)
    job = Job(
        args.model, TARGETS[names[0]], args.dtype, best_device(), args.xquad, args.stride, args.steps or 2
    )
    if args.side:
        return run_side(args.side, job)
    compare(job, names, args.rounds, args.out)


if __name__ == "__main__":
    exit_cleanly(main)
