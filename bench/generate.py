"""Seconds of our greedy decoding and of transformers' `generate` on the same prompts, beside what this machine could do.

The sides take turns in one process, `--rounds` times (continuous batching, the slowest here, once); the medians are compared.
The peers get 32 rows at a time in the order of the data set. With one thread CPU seconds are counted (a busy machine changes
little), else wall time. The limit is that of decoding one token a row a step in this precision, at rates measured here once:
prompt tokens through the matrix products, 512 rows at a time (all of them; and without what prompts share, computed once), then
steps in which all rows decode side by side, each as long as its products at the rate of 64 rows, or as reading all weights and
the rows' keys and values, whichever is longer. Left out: attention's products, all that is elementwise, waiting.

    python -m bench.generate --model models/SmolLM2-135M-Instruct --gsm8k data/gsm8k/train.jsonl --out runs/bench
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from bench.memory import key_value_bytes
from data import Example, prompt
from engine.chat import chat_ids
from engine.model import best_device
from generate import generate
from support.cli import exit_cleanly
from support.files import read_jsonl, write_json, write_text
from tasks import TASKS
from tasks.reading import read_squad

ROOT = Path(__file__).resolve().parent.parent

BATCH = 32  # of the peers
PAGE = 16  # tokens of a page in continuous batching


def workloads(args) -> dict[str, tuple[str, list[Example], int]]:
    """name -> (prompt template, rows, new tokens at most)"""
    reading = [row for article in read_squad(args.xquad) for row in article]
    template, n = TASKS["reading"].predict, args.reading
    found = {"reading, every question of a passage": (template, reading[:n], args.reading_tokens),
             "reading, one question a passage": (template, one_a_passage(reading)[:n], args.reading_tokens)}
    if args.gsm8k:
        rows = [Example(str(i), row["question"], row["answer"]) for i, row in enumerate(read_jsonl(args.gsm8k))]
        found["gsm8k"] = (TASKS["gsm8k"].predict, rows[: args.problems], args.problem_tokens)
    return found


def one_a_passage(rows: list[Example]) -> list[Example]:
    """The first answerable question of every passage: prompts that share no context."""
    return list({row.context: row for row in reversed(rows) if not row.unanswerable}.values())[::-1]


def ours(model, tokenizer, prompts: list[list[int]], new: int) -> list[list[int]]:
    model.set_attn_implementation("rows")  # as load_model does
    found = dict(generate(model, tokenizer, prompts, new))
    return [found[i].tokens for i in range(len(prompts))]


@torch.no_grad()
def peer(model, tokenizer, prompts: list[list[int]], new: int) -> list[list[int]]:
    """transformers' generate, left-padded batches in the order given."""
    end = tokenizer.eos_token_id
    model.set_attn_implementation("sdpa")
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=end)
    found = []
    for batch in (prompts[i : i + BATCH] for i in range(0, len(prompts), BATCH)):
        width = max(map(len, batch))
        ids = torch.tensor([[end] * (width - len(p)) + p for p in batch], device=model.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in batch], device=model.device)
        output = model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False)[:, width:].tolist()
        found += [row[: row.index(end) + 1] if end in row else row for row in output]
    return found


@torch.no_grad()
def continuous(model, tokenizer, prompts: list[list[int]], new: int) -> list[list[int]]:
    """transformers' continuous batching, with pages for 32 rows (its own choice is all free memory)."""
    end = tokenizer.eos_token_id
    model.set_attn_implementation("sdpa")
    config = GenerationConfig(eos_token_id=end, pad_token_id=end, do_sample=False, max_new_tokens=new)
    blocks = BATCH * -(-(max(map(len, prompts)) + new) // PAGE)
    pages = transformers.ContinuousBatchingConfig(page_size=PAGE, num_blocks=blocks, max_batch_tokens=512)
    found = model.generate_batch(prompts, generation_config=config, continuous_batching_config=pages, warmup=False)
    return [output.generated_tokens for output in found.values()]


PEER, CONTINUOUS = "transformers generate, batch 32", "transformers continuous batching, 32 rows"
SIDES = {"ours": ours, PEER: peer}
if hasattr(transformers, "ContinuousBatchingConfig"):  # else another version has it, under other names
    SIDES[CONTINUOUS] = continuous


def counts_cpu() -> bool:
    return torch.get_num_threads() == 1 and not torch.cuda.is_available()


def clock() -> float:
    return time.process_time() if counts_cpu() else time.perf_counter()


@torch.no_grad()
def row_seconds(model, rows: int, head: bool) -> float:
    """Seconds a row of the model's matrix products take when `rows` go through at once: the best of ten passes."""
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not model.get_output_embeddings()]
    layers += [model.get_output_embeddings()] if head else []
    inputs = {m.in_features: torch.randn(rows, m.in_features, device=model.device, dtype=model.dtype) for m in layers}
    times = []
    for _ in range(10):
        start = clock()
        for layer in layers:
            total = layer(inputs[layer.in_features])
        total[0, 0].item()
        times.append(clock() - start)
    return min(times) / rows


def bandwidth(device) -> float:
    """Bytes a second at which 1 GiB is read: the best of ten passes."""
    numbers, times = torch.ones(2**28, device=device), []
    for _ in range(10):
        start = clock()
        numbers.sum().item()
        times.append(clock() - start)
    return 2**30 / min(times)


def decode_limit(lengths: list[tuple[int, int]], row: float, weights: float, key_values: float) -> float:
    """Seconds of the steps after the first token of rows with so many (prompt, generated) tokens, all side by side.

    A step's products take `row` seconds a row; reading takes `weights` seconds, and `key_values` a token in the cache.
    """
    total = 0.0
    for t in range(1, max(new for _, new in lengths)):
        live = [start + t for start, new in lengths if new > t]
        total += max(len(live) * row, weights + sum(live) * key_values)
    return total


def distinct(prompts: list[list[int]]) -> int:
    """Prompt tokens that have to be computed when what two prompts share is computed once."""
    count, last = 0, []
    for current in sorted(prompts):
        same = next((i for i, (a, b) in enumerate(zip(last, current, strict=False)) if a != b), min(len(last), len(current)))
        count, last = count + len(current) - same, current
    return count


def measure(model, tokenizer, template: str, rows: list[Example], new: int, rounds: int, rates: dict) -> dict:
    """Medians, ratio, and share of the limit of one workload."""
    prompts = [chat_ids(tokenizer, prompt(template, row)) for row in rows]
    times, answers = {name: [] for name in SIDES}, {}
    for number in range(rounds):
        for name, side in SIDES.items():
            if number and name == CONTINUOUS:
                continue
            start = clock()
            answers[name] = side(model, tokenizer, prompts, new)
            times[name].append(clock() - start)
    seconds = {name: statistics.median(spent) for name, spent in times.items()}
    generated, prompt_tokens = sum(map(len, answers["ours"])), sum(map(len, prompts))
    differ = {name: sum(a != b for a, b in zip(answers["ours"], found, strict=True)) for name, found in answers.items()}
    read = flops(model, head=False) / 1e9 / rates["GFLOP/s at 512 rows"]  # seconds a prompt token
    row = flops(model, head=True) / 1e9 / rates["GFLOP/s at 64 rows"]
    weights = flops(model, head=True) / 2 * model.dtype.itemsize / 1e9 / rates["GB/s"]
    key_values = key_value_bytes(model.config.get_text_config(decoder=True), model.dtype) / 1e9 / rates["GB/s"]
    lengths = [(len(ids), len(answer)) for ids, answer in zip(prompts, answers["ours"], strict=True)]
    floor = decode_limit(lengths, row, weights, key_values)
    return {
        "prompts": len(prompts), "prompt tokens": prompt_tokens, "distinct": distinct(prompts), "generated": generated,
        "seconds": seconds, "rounds": times, "answers that differ": differ,
        "tokens a second": {name: generated / spent for name, spent in seconds.items()},
        "ratio": seconds[PEER] / seconds["ours"],
        "limit": {"every prompt token": floor + prompt_tokens * read, "shared once": floor + distinct(prompts) * read},
    }


def flops(model, head: bool) -> int:
    """Operations of one token's matrix products."""
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    return 2 * sum(m.weight.numel() for m in layers if head or m is not model.get_output_embeddings())


def measured_rates(model) -> dict[str, float]:
    """What the limit is made of: matrix products without the head for prompts, with it for decoding; reading memory."""
    return {"GFLOP/s at 512 rows": flops(model, head=False) / row_seconds(model, 512, head=False) / 1e9,
            "GFLOP/s at 64 rows": flops(model, head=True) / row_seconds(model, 64, head=True) / 1e9,
            "GB/s": bandwidth(model.device) / 1e9}


def table(results: dict) -> str:
    lines = [f"{results['model']}, {results['machine']}, {results['clock']} seconds, medians of {results['rounds']}", "",
             "| workload | prompts, tokens in (distinct), out | side | seconds | tok/s | times as fast | % of limit | "
             "% of limit, shared once | answers that differ from ours |", "|---|---|---|---|---|---|---|---|---|"]
    for name, case in results["workloads"].items():
        size = f"{case['prompts']}, {case['prompt tokens']} ({case['distinct']}), {case['generated']}"
        for side, spent in case["seconds"].items():
            percent = [f"{100 * limit / spent:.0f}" for limit in case["limit"].values()]
            lines.append(f"| {name} | {size} | {side} | {spent:.1f} | {case['tokens a second'][side]:.1f} | "
                         f"{case['seconds'][PEER] / spent:.2f} | {' | '.join(percent)} | "
                         f"{case['answers that differ'][side]} |")
    rates = ", ".join(f"{rate:.0f} {name}" for name, rate in results["rates"].items())
    return "\n".join([*lines, "", f"Measured for the limit: {rates}"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct", help="a folder or name (%(default)s)")
    parser.add_argument("--xquad", type=Path, default=ROOT / "examples/reading.json", help="SQuAD-format JSON (%(default)s)")
    parser.add_argument("--gsm8k", type=Path, help="GSM8K's train.jsonl (left out: no GSM8K)")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="for generate.json, generate.md (%(default)s)")
    parser.add_argument("--reading", type=int, default=96, help="prompts of each kind of reading, at most (%(default)s)")
    parser.add_argument("--reading-tokens", type=int, default=96, help="new tokens at most (%(default)s)")
    parser.add_argument("--problems", type=int, default=64, help="GSM8K prompts (%(default)s)")
    parser.add_argument("--problem-tokens", type=int, default=256, help="new tokens at most (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(%(default)s)")
    parser.add_argument("--threads", type=int, help="(torch's choice)")
    parser.add_argument("--dtype", default="float32", help="(%(default)s)")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).to(best_device()).eval()
    device = torch.cuda.get_device_name() if model.device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    results = {"model": args.model, "machine": f"{device}, {args.dtype}, torch {torch.__version__}, "
               f"transformers {transformers.__version__}", "rounds": args.rounds, "workloads": {},
               "clock": "CPU" if counts_cpu() else "wall", "rates": measured_rates(model)}
    for name, (template, rows, new) in workloads(args).items():
        results["workloads"][name] = measure(model, tokenizer, template, rows, new, args.rounds, results["rates"])
        write_json(args.out / "generate.json", results)
        write_text(args.out / "generate.md", table(results))
    print(table(results))


if __name__ == "__main__":
    exit_cleanly(main)
