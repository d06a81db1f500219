"""Seconds of our greedy decoding and of transformers' `generate` on the same prompts, beside a limit.

The sides take turns in one process, `--rounds` times, and the medians are compared. (Continuous batching, the
slowest here, has one turn.) The peers get 32 rows at a time in the order of the data set.

The limit is that of decoding one token a row a step in this precision, at rates measured here once. Prompt
tokens go through the matrix products, 512 rows at a time: all of them, or each shared one once. Then all rows
decode side by side. A step takes as long as its products at the rate of 64 rows, or as reading all weights
and the rows' keys and values, whichever is longer. Left out: attention's products, all that is elementwise,
waiting. Keys before a sliding window are counted as read.

The same workloads once more on a model with sliding windows, of Gemma 3's shape and with random weights
(shapes.py): what it answers is no language, and both sides must answer it. It ends no response by itself. So
its responses may have a quarter of the tokens, which is about what a trained model's have.

    python -m bench.generate --gsm8k data/gsm8k/train.jsonl --out runs/bench
    python -m bench.generate --shape mistral-7b --out runs/bench    random weights, for a GPU (shapes.py)
"""

import argparse
import functools
import os
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from bench import shapes
from bench.machine import counts_cpu_time, device_name, flops, measured_rates, seconds
from data import Example, prompt
from engine.chat import chat_ids
from engine.decoding import Response, Row
from engine.model import best_device, peak_memory_gib
from generate import generate, generate_rows
from support.cli import exit_cleanly
from support.files import read_jsonl, write_json, write_text
from tasks import TASKS
from tasks.reading import read_squad

ROOT = Path(__file__).resolve().parent.parent

BATCH = 32  # of the peers
PAGE = 16  # tokens of a page in continuous batching
WINDOWED = "Gemma 3's shape"


# --------------------------------------------------------------------------------------- what is generated


@dataclass(frozen=True)
class Workload:
    """Prompts, and how many tokens a response may have."""

    name: str
    template: str
    rows: list[Example]
    new_tokens: int


def reading_workloads(file: Path, n: int, new_tokens: int) -> list[Workload]:
    """At most n questions: all about a passage one after the other, and one about every passage."""
    template = TASKS["reading"].predict
    rows = []
    for article in read_squad(file):
        rows += article
    return [Workload("reading, every question of a passage", template, rows[:n], new_tokens),
            Workload("reading, one question a passage", template, one_a_passage(rows)[:n], new_tokens)]


def one_a_passage(rows: list[Example]) -> list[Example]:
    """The first answerable question of every passage: prompts that share no context."""
    first = {}
    for row in rows:
        if not row.unanswerable:
            first.setdefault(row.context, row)
    return list(first.values())


def gsm8k_workload(file: Path, n: int, new_tokens: int) -> Workload:
    rows = []
    for number, row in enumerate(read_jsonl(file)[:n]):
        rows.append(Example(str(number), row["question"], row["answer"]))
    return Workload("gsm8k", TASKS["gsm8k"].predict, rows, new_tokens)


# --------------------------------------------------------------------------------------- the sides


def ours(model, tokenizer, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    model.set_attn_implementation("rows")  # as load_model does
    responses = dict(generate(model, tokenizer, prompts, new_tokens))
    return [responses[i].tokens for i in range(len(prompts))]


@torch.no_grad()
def peer(model, tokenizer, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    """transformers' generate, left-padded batches in the order given."""
    end = tokenizer.eos_token_id
    model.set_attn_implementation("sdpa")
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=end)
    responses = []
    for start in range(0, len(prompts), BATCH):
        batch = prompts[start : start + BATCH]
        ids, mask = pad_left(batch, end, model.device)
        output = model.generate(ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False)
        for row in output[:, ids.shape[1] :].tolist():
            responses.append(row[: row.index(end) + 1] if end in row else row)
    return responses


def pad_left(batch: list[list[int]], padding: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, attention mask), both `[batch, longest]`."""
    width = max(len(tokens) for tokens in batch)
    ids, mask = [], []
    for tokens in batch:
        missing = width - len(tokens)
        ids.append([padding] * missing + tokens)
        mask.append([0] * missing + [1] * len(tokens))
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


@torch.no_grad()
def continuous(model, tokenizer, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    """transformers' continuous batching, with pages for 32 rows (its own choice is all free memory)."""
    end = tokenizer.eos_token_id
    model.set_attn_implementation("sdpa")
    config = GenerationConfig(eos_token_id=end, pad_token_id=end, do_sample=False, max_new_tokens=new_tokens)
    longest = max(len(tokens) for tokens in prompts) + new_tokens
    pages_a_row = -(-longest // PAGE)  # rounded up
    pages = transformers.ContinuousBatchingConfig(page_size=PAGE, num_blocks=BATCH * pages_a_row,
                                                  max_batch_tokens=512)
    found = model.generate_batch(prompts, generation_config=config, continuous_batching_config=pages,
                                 warmup=False)
    return [output.generated_tokens for output in found.values()]


PEER = "transformers generate, batch 32"
CONTINUOUS = "transformers continuous batching, 32 rows"
SIDES = {"ours": ours, PEER: peer}
if hasattr(transformers, "ContinuousBatchingConfig"):  # else another version has it, under other names
    SIDES[CONTINUOUS] = continuous


# -------------------------------------------------------------------------------------- times and their limit


def measure(
    model, tokenizer, workload: Workload, rounds: int, rates: dict[str, float], sides: dict = SIDES
) -> dict:
    """Medians, ratio, and the limit of one workload, in seconds."""
    # 1. All sides, in turns.
    prompts = [chat_ids(tokenizer, prompt(workload.template, row)) for row in workload.rows]
    times = {name: [] for name in sides}
    answers = {}
    for number in range(rounds):
        for name, side in sides.items():
            if name == CONTINUOUS and number > 0:
                continue
            work = functools.partial(side, model, tokenizer, prompts, workload.new_tokens)
            spent, answers[name] = seconds(work)
            times[name].append(spent)

    # 2. What they came to.
    generated = sum(len(answer) for answer in answers["ours"])
    medians, rate, differ = {}, {}, {}
    for name in sides:
        medians[name] = statistics.median(times[name])
        rate[name] = generated / medians[name]
        pairs = zip(answers["ours"], answers[name], strict=True)
        differ[name] = sum(mine != theirs for mine, theirs in pairs)

    # 3. The limit.
    lengths = [(len(ids), len(answer)) for ids, answer in zip(prompts, answers["ours"], strict=True)]
    prompt_tokens = sum(start for start, _ in lengths)
    decoding = decode_limit(lengths, *step_seconds(model, rates))
    read_one = flops(model, head=False) / 1e9 / rates["GFLOP/s at 512 rows"]
    return {
        "prompts": len(prompts), "prompt tokens": prompt_tokens, "distinct": distinct(prompts),
        "generated": generated, "seconds": medians, "rounds": times, "answers that differ": differ,
        "tokens a second": rate, "ratio": medians[PEER] / medians["ours"],
        "limit": {"every prompt token": decoding + prompt_tokens * read_one,
                  "shared once": decoding + distinct(prompts) * read_one},
    }


def step_seconds(model, rates: dict[str, float]) -> tuple[float, float, float]:
    """Seconds of a row's products in a decode step, of reading the weights, of reading one token's cache."""
    operations = flops(model, head=True)
    config = model.config.get_text_config(decoder=True)
    row = operations / 1e9 / rates["GFLOP/s at 64 rows"]
    weights = operations / 2 * model.dtype.itemsize / 1e9 / rates["GB/s"]
    key_values = shapes.key_value_bytes(config, model.dtype) / 1e9 / rates["GB/s"]
    return row, weights, key_values


def decode_limit(lengths: list[tuple[int, int]], row: float, weights: float, key_values: float) -> float:
    """Seconds of the steps after the first token of rows with (prompt, generated) tokens, all side by side.

    A step's products take `row` seconds a row. Reading takes `weights` seconds, and `key_values` seconds for
    every token in the cache.
    """
    total = 0.0
    for step in range(1, max(generated for _, generated in lengths)):
        cached = [start + step for start, generated in lengths if generated > step]  # tokens of each live row
        total += max(len(cached) * row, weights + sum(cached) * key_values)
    return total


def distinct(prompts: list[list[int]]) -> int:
    """Prompt tokens that have to be computed when what two prompts begin with is computed once."""
    count = 0
    before = []
    for current in sorted(prompts):
        shared = os.path.commonprefix([before, current])  # works on any lists, not only on paths
        count += len(current) - len(shared)
        before = current
    return count


def table(results: dict) -> str:
    lines = [f"{results['model']}, {results['machine']}, {results['clock']} seconds, "
             f"medians of {results['rounds']}, {results['date']}", "",
             "| workload | prompts, tokens in (distinct), out | side | seconds | tok/s | times as fast | "
             "% of limit | % of limit, shared once | answers that differ from ours |",
             "|---|---|---|---|---|---|---|---|---|"]
    for name, case in results["workloads"].items():
        size = f"{case['prompts']}, {case['prompt tokens']} ({case['distinct']}), {case['generated']}"
        for side, spent in case["seconds"].items():
            every, once = (100 * limit / spent for limit in case["limit"].values())
            rate, ratio = case["tokens a second"][side], case["seconds"][PEER] / spent
            lines.append(f"| {name} | {size} | {side} | {spent:.1f} | {rate:.1f} | {ratio:.2f} | "
                         f"{every:.0f} | {once:.0f} | {case['answers that differ'][side]} |")
    lines += ["", f"Measured for the limit: {rates_in_words(results['rates'])}"]
    if "windowed" in results:
        lines += ["", f"{WINDOWED}: {results['windowed']}. Measured for its limit: "
                  f"{rates_in_words(results['windowed rates'])}"]
    return "\n".join(lines) + "\n"


def rates_in_words(rates: dict[str, float]) -> str:
    return ", ".join(f"{rate:.0f} {name}" for name, rate in rates.items())


# ----------------------------------------------------------------------------------- a model of a known shape


CONTEXT = 400  # tokens of a row whose decode steps are timed
STEPS = 32  # so many are timed
SLOTS = (64, 128, 256)  # rows side by side in them
PEER_BATCHES = (32, 128)


def ends_by_length(row: Row) -> Response | None:
    """In place of decoding.Ending: each row has a limit of its own, and nothing else ends it."""
    if len(row.tokens) < row.limit:
        return None
    return Response("", row.tokens[row.start :], finished=False)


def our_rows(model, rows: list[Row]) -> int:
    """Our engine, every response up to its own row's limit -> how many tokens were made."""
    model.set_attn_implementation("rows")
    made = 0
    for _, response in generate_rows(model, rows, ends_by_length):
        made += len(response.tokens)
    return made


@torch.no_grad()
def peer_rows(model, rows: list[Row], size: int) -> int:
    """transformers' generate, each batch until its longest response ends -> how many tokens were wanted."""
    model.set_attn_implementation("sdpa")
    for start in range(0, len(rows), size):
        batch = rows[start : start + size]
        longest = max(row.limit - row.start for row in batch)
        ids, mask = pad_left([row.tokens for row in batch], 0, model.device)
        model.generate(ids, attention_mask=mask, min_new_tokens=longest, max_new_tokens=longest,
                       do_sample=False)
    return sum(row.limit - row.start for row in rows)


def seconds_of_steps(model, slots: int, steps: int) -> float:
    """Seconds of reading `slots` rows of CONTEXT tokens, and of so many decode steps after that."""
    times = []
    for _ in range(3):
        rows = [Row(i, [3] * CONTEXT, start=CONTEXT, limit=CONTEXT + 1 + steps) for i in range(slots)]
        spent, _ = seconds(functools.partial(our_rows, model, rows))
        times.append(spent)
    return min(times)


def decode_step(model, slots: int, rates: dict[str, float]) -> dict:
    """One decode step of `slots` rows, beside what its bytes and its operations need at least."""
    spent = (seconds_of_steps(model, slots, STEPS) - seconds_of_steps(model, slots, 0)) / STEPS
    row, weights, key_values = step_seconds(model, rates)
    memory = weights + slots * CONTEXT * key_values
    return {"slots": slots, "ms": 1e3 * spent, "memory floor, ms": 1e3 * memory,
            "arithmetic floor, ms": 1e3 * slots * row}


def measure_shape(model, prompts: int, peer_prompts: int) -> dict:
    """Decode steps, and generated tokens a second on rows of GSM8K's lengths: ours and transformers'."""
    vocabulary = model.config.vocab_size
    rates = measured_rates(model)
    our_rows(model, shapes.random_rows(vocabulary, 8))  # warms up
    steps = [decode_step(model, slots, rates) for slots in sorted({min(n, prompts) for n in SLOTS})]

    speeds = {}
    for size in PEER_BATCHES:
        rows = shapes.random_rows(vocabulary, peer_prompts)
        spent, wanted = seconds(functools.partial(peer_rows, model, rows, size))
        speeds[f"transformers generate, batch {size}"] = wanted / spent
    rows = shapes.random_rows(vocabulary, prompts)
    spent, made = seconds(functools.partial(our_rows, model, rows))
    speeds["ours"] = made / spent

    lengths = shapes.lengths(shapes.RESPONSE, 1000, seed=0)
    job_tokens = shapes.JOB_RESPONSES * statistics.mean(lengths)
    return {"rates": rates, "decode": steps, "tokens a second": speeds, "peak GiB": peak_memory_gib(),
            "job, minutes": job_tokens / speeds["ours"] / 60}


def shape_table(results: dict) -> str:
    figures = {}
    for name, speed in results["tokens a second"].items():
        figures[f"generated tokens/s, {name}"] = f"{speed:,.0f}"
    for step in results["decode"]:
        name = f"decode step of {step['slots']} rows of {CONTEXT} tokens: ms (floor of memory, of arithmetic)"
        memory, arithmetic = step["memory floor, ms"], step["arithmetic floor, ms"]
        figures[name] = f"{step['ms']:.2f} ({memory:.2f}, {arithmetic:.2f})"
    figures["peak GiB"] = f"{results['peak GiB']:.1f}"
    job = {"the paper's GSM8K job, generation, minutes (projected)": f"{results['job, minutes']:.1f}"}
    return shapes.shape_table(results, figures, job)


# --------------------------------------------------------------------------------------- the command line


def compare(
    model_name: str, dtype: str, workloads: list[Workload], rounds: int, windowed: str, out: Path
) -> None:
    """All workloads on a real model, and on one with windows unless that is "none".

    Writes generate.json and generate.md.
    """
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    model = AutoModelForCausalLM.from_pretrained(model_name, dtype=getattr(torch, dtype))
    model.to(best_device()).eval()
    results = {
        "model": model_name,
        "machine": f"{device_name(model.device)}, {dtype}, torch {torch.__version__}, "
                   f"transformers {transformers.__version__}",
        "date": time.strftime("%Y-%m-%d"),
        "rounds": rounds, "workloads": {}, "clock": "CPU" if counts_cpu_time() else "wall",
        "rates": measured_rates(model),
    }
    for workload in workloads:
        case = measure(model, tokenizer, workload, rounds, results["rates"])
        keep_case(results, workload.name, case, out)

    if windowed != "none":
        end = tokenizer.eos_token_id
        model = shapes.windowed_model(windowed, len(tokenizer), end, model.dtype, model.device)
        config = model.config
        full = config.layer_types.count("full_attention")
        results["windowed"] = (f"random weights, {config.num_hidden_layers} layers, {full} of them full, the "
                               f"others with a window of {config.sliding_window} tokens, {results['date']}")
        results["windowed rates"] = measured_rates(model)
        sides = {"ours": ours, PEER: peer}  # continuous batching, the slowest, has had its turn
        for workload in workloads:
            workload = replace(workload, new_tokens=max(1, workload.new_tokens // 4))
            case = measure(model, tokenizer, workload, rounds, results["windowed rates"], sides)
            keep_case(results, f"{WINDOWED}: {workload.name}", case, out)
    print(table(results))


def keep_case(results: dict, name: str, case: dict, out: Path) -> None:
    """Whatever ends the benchmark, what was measured before is kept."""
    results["workloads"][name] = case
    write_json(out / "generate.json", results)
    write_text(out / "generate.md", table(results))


def run_shape(shape: str, prompts: int | None, peer_prompts: int | None, out: Path) -> None:
    """A model of a known shape with random weights -> generate-SHAPE.json and .md."""
    model = shapes.random_model(shape, best_device())
    gpu = model.device.type == "cuda"
    found = measure_shape(model, prompts or (2048 if gpu else 64), peer_prompts or (128 if gpu else 32))
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    results = {"machine": f"{device_name(model.device)}, {versions}", "shape": shape, "gpu": gpu, **found}
    write_json(out / f"generate-{shape}.json", results)
    write_text(out / f"generate-{shape}.md", shape_table(results))
    print(shape_table(results))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct", help="(%(default)s)")
    parser.add_argument("--xquad", type=Path, default=ROOT / "examples/reading.json",
                        help="SQuAD-format JSON (%(default)s)")
    parser.add_argument("--gsm8k", type=Path, help="GSM8K's train.jsonl (left out: no GSM8K)")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="(%(default)s)")
    parser.add_argument("--reading", type=int, default=96, help="prompts of each kind, at most (%(default)s)")
    parser.add_argument("--reading-tokens", type=int, default=96, help="new tokens at most (%(default)s)")
    parser.add_argument("--problems", type=int, default=64, help="GSM8K prompts (%(default)s)")
    parser.add_argument("--problem-tokens", type=int, default=256, help="new tokens at most (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(%(default)s)")
    parser.add_argument("--threads", type=int, help="(torch's choice)")
    parser.add_argument("--dtype", default="float32", help="(%(default)s)")
    parser.add_argument("--windowed", choices=(*shapes.WINDOWED, "none"), default="gemma-3",
                        help="a model with sliding windows beside --model (%(default)s)")
    parser.add_argument("--shape", choices=shapes.SHAPES, help="random weights in place of --model")
    parser.add_argument("--prompts", type=int, help="with --shape: ours (2048, without a GPU 64)")
    parser.add_argument("--peer-prompts", type=int, help="with --shape: theirs (128, without a GPU 32)")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.shape:
        return run_shape(args.shape, args.prompts, args.peer_prompts, args.out)

    workloads = reading_workloads(args.xquad, args.reading, args.reading_tokens)
    if args.gsm8k:
        workloads.append(gsm8k_workload(args.gsm8k, args.problems, args.problem_tokens))
    compare(args.model, args.dtype, workloads, args.rounds, args.windowed, args.out)


if __name__ == "__main__":
    exit_cleanly(main)
