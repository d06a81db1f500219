"""Useful tokens a second and peak memory of a LoRA training step: ours, peft with a plain padded loop, trl's SFTTrainer + peft.

Every side trains the same model on the same rows in the same batches, each round in a process of its own (so that its peak
memory is its own), the sides taking turns; medians are compared. One step warms up, the others are timed: in CPU seconds with
one thread, else in wall time. Useful tokens are the rows' own, without padding. The limit is the step's matrix products alone,
forward and back to the inputs (frozen weights need no gradient), the head at target tokens only, at this machine's measured
rate for 512 rows at a time. A shared prefix computes fewer tokens, hence no share of the limit there.

    python -m bench.train --model models/SmolLM2-135M-Instruct --out runs/bench
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers

import lora
import train
from bench.generate import clock, row_seconds
from data import prompt
from engine.chat import training_ids
from engine.model import best_device, load_model, peak_memory_gib
from support.cli import exit_cleanly
from support.files import write_json, write_text
from tasks import TASKS
from tasks.reading import read_squad

ROOT = Path(__file__).resolve().parent.parent

RANK, ALPHA, DROPOUT, RATE = 8, 16, 0.1, 1e-4
BATCH = 8
TARGETS = {"q,v": ["q_proj", "v_proj"],
           "all-linear": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]}
PEFT, TRL = "peft, plain loop", "trl SFTTrainer + peft"
SIDES = {"ours": (), "ours, prefix shared": (), PEFT: ("peft",), TRL: ("trl", "peft")}


def encoded_rows(tokenizer, args) -> list:
    task = TASKS["reading"]
    every, needed = [row for article in read_squad(args.xquad) for row in article][:: args.stride], BATCH * (args.steps + 1)
    if len(every) < needed:
        sys.exit(f"{args.xquad}: {len(every)} rows after --stride {args.stride}, {needed} needed: lower --steps or --stride")
    rows = every[:needed]
    return [training_ids(tokenizer, prompt(task.train, row), task.gold(row)) for row in rows]


def batches(rows: list) -> list[list]:
    return [rows[i : i + BATCH] for i in range(0, len(rows), BATCH)]


def timed(steps, rows: list) -> float:
    """Seconds of all steps but the first."""
    start = None
    for step, batch in zip(steps, batches(rows), strict=True):
        step(batch)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = start or clock()
    return clock() - start


def ours(args, share_prefix: bool = False) -> float:
    model, tokenizer = load_model(args.model, dtype=args.dtype)
    lora.inject(model, RANK, ALPHA, DROPOUT, TARGETS[args.targets])
    optimizer = torch.optim.AdamW(lora.parameters(model), RATE, weight_decay=0.0)
    loss_of = train.Loss(model)
    settings = SimpleNamespace(micro_batch=BATCH, clip=1.0, dtype=args.dtype, share_prefix=share_prefix)
    rows = encoded_rows(tokenizer, args)
    model.train()
    return timed([lambda batch: train.optimizer_step(loss_of, optimizer, batch, settings)] * len(batches(rows)), rows)


def peft_model(args):
    from peft import LoraConfig, get_peft_model
    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).to(args.device)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=DROPOUT, target_modules=TARGETS[args.targets],
                        task_type="CAUSAL_LM")
    return get_peft_model(model, config), transformers.AutoTokenizer.from_pretrained(args.model)


def peft_loop(args) -> float:
    """What a user writes: padded batches, transformers' own loss."""
    model, tokenizer = peft_model(args)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], RATE, weight_decay=0.0)
    rows = encoded_rows(tokenizer, args)
    model.train()

    def step(batch):
        width = max(len(ids) for ids, _ in batch)
        ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in batch])
        mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in batch])
        labels = torch.tensor([[token if target else -100 for token, target in zip(*row, strict=True)]
                               + [-100] * (width - len(row[0])) for row in batch])
        loss = model(**{name: value.to(args.device) for name, value in
                        (("input_ids", ids), ("attention_mask", mask), ("labels", labels))}).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return timed([step] * len(batches(rows)), rows)


def trl_trainer(args, folder: str) -> float:
    """SFTTrainer on the same token ids in the same order, padded: padding-free and packing need flash attention."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer
    model, tokenizer = peft_model(args)
    rows = encoded_rows(tokenizer, args)
    data = Dataset.from_list([{"input_ids": ids, "completion_mask": [int(target) for target in mask]} for ids, mask in rows])
    config = SFTConfig(output_dir=folder, per_device_train_batch_size=BATCH, max_steps=args.steps + 1, learning_rate=RATE,
                       weight_decay=0.0, report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True,
                       max_length=None, completion_only_loss=True, gradient_checkpointing=False,
                       bf16=args.dtype == "bfloat16", train_sampling_strategy="sequential", use_cpu=args.device == "cpu")

    class Clock(transformers.TrainerCallback):
        first = last = None

        def on_step_end(self, *_, **__):
            self.last = clock()
            self.first = self.first or self.last

    steps = Clock()
    SFTTrainer(model, config, train_dataset=data, processing_class=tokenizer, callbacks=[steps]).train()
    return steps.last - steps.first


def one_side(args) -> None:
    """A round of one side: its seconds and peak memory, as a line of JSON."""
    with tempfile.TemporaryDirectory() as folder:
        run = {"ours": ours, "ours, prefix shared": lambda args: ours(args, True), PEFT: peft_loop,
               TRL: lambda args: trl_trainer(args, folder)}[args.side]
        print(json.dumps({"seconds": run(args), "peak_gib": peak_memory_gib()}))


def round_of(side: str, targets: str) -> dict:
    """Run one side in a process of its own, with this one's flags."""
    command = [sys.executable, "-m", "bench.train", *sys.argv[1:], "--side", side, "--targets", targets]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TQDM_DISABLE": "1"})
    if done.returncode:
        sys.exit(f"{side}, {targets}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def limit_seconds(args) -> tuple[float, int]:
    """(Seconds of the timed steps' matrix products, useful tokens in them)"""
    model, tokenizer = load_model(args.model, dtype=args.dtype)
    rows = encoded_rows(tokenizer, args)[BATCH:]
    body, whole = (row_seconds(model, 512, head) for head in (False, True))
    tokens, targets = sum(len(ids) for ids, _ in rows), sum(sum(mask) for _, mask in rows)
    return 2 * (tokens * body + targets * (whole - body)), tokens  # forward, and back to the inputs


def table(results: dict) -> str:
    lines = [f"{results['model']}, {results['machine']}; batch {BATCH}, {results['tokens']} useful tokens, "
             f"medians of {results['rounds']}", "",
             "| adapted | side | seconds | useful tokens/s | times as fast as peft, trl | % of limit | peak GiB | of peft's |",
             "|---|---|---|---|---|---|---|---|"]
    for targets, sides in results["cases"].items():
        for side, case in sides.items():
            spent, memory = case["seconds"], case["peak_gib"]
            peers = [sides.get(name) for name in (PEFT, TRL)]
            ratios = ", ".join(f"{peer['seconds'] / spent:.2f}" if peer else "-" for peer in peers)
            share = f"{memory / peers[0]['peak_gib']:.2f}" if peers[0] else "-"
            percent = "" if "shared" in side else f"{100 * results['limit'] / spent:.0f}"
            lines.append(f"| {targets} | {side} | {spent:.1f} | {results['tokens'] / spent:.0f} | {ratios} | {percent} | "
                         f"{memory:.2f} | {share} |")
    return "\n".join([*lines, *(f"\nskipped: {side}, not installed" for side in results["skipped"])]) + "\n"


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct", help="a folder or name (%(default)s)")
    parser.add_argument("--xquad", type=Path, default=ROOT / "examples/reading.json", help="SQuAD-format JSON (%(default)s)")
    parser.add_argument("--stride", type=int, default=5, help="take every N-th row (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="for train.json, train.md (%(default)s)")
    parser.add_argument("--steps", type=int, default=2, help="timed steps of 8 rows (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(%(default)s)")
    parser.add_argument("--threads", type=int, help="(torch's choice)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="(%(default)s)")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--targets", choices=TARGETS, help="only this choice of adapted modules")
    args = parser.parse_args()
    args.device = best_device()
    if args.threads:
        torch.set_num_threads(args.threads)
    return args


def main() -> None:
    args = parse()
    if args.side:
        return one_side(args)
    here = [side for side, needed in SIDES.items() if all(map(find_spec, needed))]
    device = torch.cuda.get_device_name() if args.device.startswith("cuda") else f"{torch.get_num_threads()} CPU threads"
    limit, tokens = limit_seconds(args)
    results = {"model": args.model, "machine": f"{device}, {args.dtype}, torch {torch.__version__}", "tokens": tokens,
               "limit": limit, "rounds": args.rounds, "cases": {}, "skipped": [side for side in SIDES if side not in here]}
    for targets in [args.targets] if args.targets else TARGETS:
        rounds = {side: [] for side in here}
        for _ in range(args.rounds):
            for side in here:
                rounds[side].append(round_of(side, targets))
        results["cases"][targets] = {side: {key: statistics.median(one[key] for one in found) for key in found[0]}
                                     for side, found in rounds.items()}
        write_json(args.out / "train.json", results)
        write_text(args.out / "train.md", table(results))
    print(table(results))


if __name__ == "__main__":
    exit_cleanly(main)
