"""Seconds of our greedy decoding and of transformers' `generate` on the same prompts, beside what this machine could do.

The sides take turns in one process, `--rounds` times (continuous batching, the slowest here, once); the medians are compared.
The peers get 32 rows at a time in the order of the data set. With one thread CPU seconds are counted (a busy machine changes
little), else wall time. The limit is what no implementation in this precision can leave out, at the rates measured here: prompt
tokens through the matrix products, 512 rows at a time (once all of them, once without what prompts share); then steps in which
all rows decode side by side, the products at the rate of 64 rows or all weights read once, whichever is longer; and in every
step the rows' keys and values, read once. Left out: attention's products, all that is elementwise, waiting.

    python bench/generate.py --model models/SmolLM2-135M-Instruct --gsm8k data/gsm8k/train.jsonl --out runs/bench
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data import TASKS, chat_ids, prompt  # noqa: E402
from files import exit_cleanly, read_jsonl, write_json, write_text  # noqa: E402
from generate import generate  # noqa: E402
from model import best_device  # noqa: E402
from reading import read_squad  # noqa: E402
from records import Example  # noqa: E402

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
    """Seconds a row of the model's matrix products take when `rows` go through at once: the best of five passes."""
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not model.get_output_embeddings()]
    layers += [model.get_output_embeddings()] if head else []
    inputs = {m.in_features: torch.randn(rows, m.in_features, device=model.device, dtype=model.dtype) for m in layers}
    times = []
    for _ in range(5):
        start = clock()
        for layer in layers:
            total = layer(inputs[layer.in_features])
        total[0, 0].item()
        times.append(clock() - start)
    return min(times) / rows


def bandwidth(device) -> float:
    """Bytes a second at which 1 GiB is read: the best of five passes."""
    numbers, times = torch.ones(2**28, device=device), []
    for _ in range(5):
        start = time.perf_counter()
        numbers.sum().item()
        times.append(time.perf_counter() - start)
    return 2**30 / min(times)


def distinct(prompts: list[list[int]]) -> int:
    """Prompt tokens that have to be computed when what two prompts share is computed once."""
    count, last = 0, []
    for current in sorted(prompts):
        same = next((i for i, (a, b) in enumerate(zip(last, current, strict=False)) if a != b), min(len(last), len(current)))
        count, last = count + len(current) - same, current
    return count


def measure(model, tokenizer, template: str, rows: list[Example], new: int, rounds: int) -> dict:
    """Medians, ratio, and share of the limit of one workload."""
    prompts = [chat_ids(tokenizer, prompt(template, row)) for row in rows]
    read, write, speed = row_seconds(model, 512, head=False), row_seconds(model, 64, head=True), bandwidth(model.device)
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
    floor, weights = 0, flops(model, head=True) / 2 * model.dtype.itemsize  # seconds, bytes
    for t in range(1, max(map(len, answers["ours"]))):  # token 0 comes with the prompt
        lengths = [len(ids) + t for ids, answer in zip(prompts, answers["ours"], strict=True) if len(answer) > t]
        floor += max(weights / speed, len(lengths) * write) + sum(lengths) * key_value_bytes(model) / speed
    return {
        "prompts": len(prompts), "prompt tokens": prompt_tokens, "distinct": distinct(prompts), "generated": generated,
        "seconds": seconds, "rounds": times, "answers that differ": differ,
        "tokens a second": {name: generated / spent for name, spent in seconds.items()},
        "ratio": seconds[PEER] / seconds["ours"],
        "limit": {"every prompt token": floor + prompt_tokens * read, "shared once": floor + distinct(prompts) * read},
        "GFLOP/s": {"512 rows": flops(model, head=False) / read / 1e9, "64 rows": flops(model, head=True) / write / 1e9},
        "GB/s": speed / 1e9,
    }


def flops(model, head: bool) -> int:
    """Operations of one token's matrix products."""
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    return 2 * sum(m.weight.numel() for m in layers if head or m is not model.get_output_embeddings())


def key_value_bytes(model) -> int:
    """Of one token, in all layers."""
    config = model.config.get_text_config(decoder=True)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * config.num_key_value_heads * head * model.dtype.itemsize


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
        rates = ", ".join(f"{rate:.0f} GFLOP/s at {rows}" for rows, rate in case["GFLOP/s"].items())
        lines.append(f"| {name} | | measured here | | | | {rates}; memory: {case['GB/s']:.0f} GB/s | | |")
    return "\n".join(lines) + "\n"


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
               "clock": "CPU" if counts_cpu() else "wall"}
    for name, (template, rows, new) in workloads(args).items():
        results["workloads"][name] = measure(model, tokenizer, template, rows, new, args.rounds)
        write_json(args.out / "generate.json", results)
        write_text(args.out / "generate.md", table(results))
    print(table(results))


if __name__ == "__main__":
    exit_cleanly(main)
