"""How long the paper's GSM8K job would take here: generation and training of a Mistral-7B-shaped model with random weights.

Weights do not matter for time, lengths do: prompts and responses get GSM8K's lengths (deciles below), responses are cut there.
Beside each figure stands the machine's own limit: bytes over measured bandwidth, operations over measured matrix-product rate.
Without a GPU a tiny shape runs through the same code, and the GPU's rows say "not measured".

    python -m bench.gpu --out docs
"""

import argparse
import random
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers
from transformers import AutoModelForCausalLM, GenerationConfig, MistralConfig

import lora
import train
from bench.memory import SHAPES
from engine.decoding import Ending, Row
from engine.model import best_device, peak_memory_gib
from engine.slots import SlotCache, forward_in_slots, layers_of, slots_in_memory
from generate import generate_rows
from support.cli import exit_cleanly
from support.files import write_json, write_text

TINY = SHAPES["mistral-7b"] | dict(vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                                   num_attention_heads=4, num_key_value_heads=2)
# Deciles of tokens, minimum to maximum, by SmolLM2's tokenizer: Fig. 3's prompts of every tenth training row, and that model's
# own greedy responses to 96 of them. A tenth of these loop up to the limit, as a 7B model's hardly would: rather too long.
PROMPT = [110, 125, 130, 136, 140, 144, 149, 156, 164, 179, 260]
RESPONSE = [7, 49, 114, 140, 151, 183, 188, 212, 287, 512, 512]
COMMON = 72  # first tokens of every prompt: its instruction
# Responses of the paper's job: predictions, paraphrases where they are wrong (Table 3: half), test answers, 10 validations.
JOB = {"responses": 7323 + 3662 + 1319 + 10 * 150, "steps": 5000}
BATCH, PEER_BATCHES, CONTEXT = 8, (32, 128), 400
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # bf16 operations a second, by the data sheets


def lengths(deciles: list[int], n: int, seed: int) -> list[int]:
    """`n` lengths spread evenly over a distribution, in random order."""
    found = []
    for i in range(n):
        place, share = divmod(10 * (i + 0.5) / n, 1)
        low, high = deciles[int(place)], deciles[int(place) + 1]
        found.append(round(low + share * (high - low)))
    random.Random(seed).shuffle(found)
    return found


def make_rows(vocabulary: int, n: int) -> list[Row]:
    draw = random.Random(0)
    common = [draw.randrange(3, vocabulary) for _ in range(COMMON)]
    return [Row(i, common + [draw.randrange(3, vocabulary) for _ in range(p - COMMON)], p, p + r)
            for i, (p, r) in enumerate(zip(lengths(PROMPT, n, 1), lengths(RESPONSE, n, 2), strict=True))]


def seconds(device: torch.device, work) -> float:
    """Of one call, everything on the device finished."""
    def wait():
        if device.type == "cuda":
            torch.cuda.synchronize()

    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start


def machine_limits(model) -> dict:
    """Measured: bytes a second of a large copy (read and written), operations a second of a large matrix product."""
    size = 2**28 if model.device.type == "cuda" else 2**24
    source = torch.zeros(size, device=model.device, dtype=model.dtype)
    target = torch.empty_like(source)
    side = 8192 if model.device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=model.device, dtype=model.dtype) for _ in range(2))
    copying = min(seconds(model.device, lambda: target.copy_(source)) for _ in range(5))
    product = min(seconds(model.device, lambda: a @ b) for _ in range(5))
    return {"bytes/s": 2 * source.nbytes / copying, "operations/s": 2 * side**3 / product}


def weights_of(model) -> int:
    """Weights that every token passes: all but the embedding, which is only looked up."""
    return sum(p.numel() for p in model.parameters()) - model.get_input_embeddings().weight.numel()


@torch.no_grad()
def decode_step(model, slots: int, limits: dict) -> dict:
    """One decode step of `slots` rows of CONTEXT tokens, beside the least time its bytes and its operations need."""
    layers = layers_of(model)
    cache, rows = SlotCache(layers, slots, CONTEXT + 1), [[3] * CONTEXT for _ in range(slots)]

    def step():
        forward_in_slots(model, cache, first_slot=0, sequences=rows, width=1)[0, 0].item()

    for _ in range(3):
        step()
    spent = min(seconds(model.device, step) for _ in range(10))
    token_bytes = sum(t.nbytes for layer in layers for t in (layer.keys, layer.values))
    weights = weights_of(model)
    memory = (weights * model.dtype.itemsize + slots * CONTEXT * token_bytes) / limits["bytes/s"]
    arithmetic = 2 * weights * slots / limits["operations/s"]
    return {"slots": slots, "ms": 1e3 * spent, "memory floor, ms": 1e3 * memory, "arithmetic floor, ms": 1e3 * arithmetic}


def ours(model, rows: list[Row]) -> float:
    """Generated tokens a second of generate.py, every response ending at its row's limit."""
    model.set_attn_implementation("rows")
    tokenizer = SimpleNamespace(eos_token_id=None, chat_template=None, decode=lambda *_, **__: "")
    ending, made = Ending(model, tokenizer, None), []

    def work():
        made.extend(len(response.tokens) for _, response in generate_rows(model, rows, ending))

    spent = seconds(model.device, work)
    return sum(made) / spent


def peer(model, rows: list[Row], size: int) -> float:
    """Useful tokens a second of transformers' generate in batches of `size`: each runs until its longest response ends."""
    model.set_attn_implementation("sdpa")

    def work():
        for batch in (rows[i : i + size] for i in range(0, len(rows), size)):
            width, new = max(row.start for row in batch), max(row.limit - row.start for row in batch)
            ids = torch.tensor([[0] * (width - row.start) + row.tokens for row in batch], device=model.device)
            mask = torch.tensor([[0] * (width - row.start) + [1] * row.start for row in batch], device=model.device)
            model.generate(ids, attention_mask=mask, min_new_tokens=new, max_new_tokens=new, do_sample=False)

    return sum(row.limit - row.start for row in rows) / seconds(model.device, work)


def train_steps(model, steps: int, limits: dict) -> dict:
    """Tokens a second of optimizer steps of 8 GSM8K rows, and the share of the peak rate that their operations make up."""
    lora.inject(model, 8, 16, 0.1, ["q_proj", "v_proj"])
    optimizer = torch.optim.AdamW(lora.parameters(model), 1e-4, weight_decay=0.0, fused=True)
    settings = SimpleNamespace(micro_batch=BATCH, clip=1.0, dtype=str(model.dtype).removeprefix("torch."), share_prefix=False)
    rows = [([3] * row.limit, [False] * row.start + [True] * (row.limit - row.start)) for row in
            make_rows(model.config.vocab_size, BATCH * (steps + 2))]
    loss_of, batches = train.Loss(model.train()), [rows[i : i + BATCH] for i in range(0, len(rows), BATCH)]

    def work(part):
        for batch in part:
            train.optimizer_step(loss_of, optimizer, batch, settings)

    work(batches[:2])
    spent = seconds(model.device, lambda: work(batches[2:]))
    tokens = sum(len(ids) for batch in batches[2:] for ids, _ in batch)
    operations = 4 * weights_of(model) * tokens  # forward, and back to the inputs: frozen weights have no gradient
    name = torch.cuda.get_device_name() if model.device.type == "cuda" else ""
    peak = next((rate for card, rate in PEAK.items() if card in name), limits["operations/s"])
    return {"tokens/s": tokens / spent, "seconds a step": spent / steps, "MFU": operations / spent / peak,
            "MFU of": "the data sheet's rate" if peak in PEAK.values() else "the measured rate"}


def measure(model, args) -> dict:
    limits = machine_limits(model)
    rows = make_rows(model.config.vocab_size, args.prompts)
    slots = min(len(rows), slots_in_memory(layers_of(model), max(row.limit for row in rows), None))
    steps = [decode_step(model, n, limits) for n in sorted({min(n, slots) for n in (64, 128, 256)})]
    ours(model, make_rows(model.config.vocab_size, 8))  # warms up
    others = make_rows(model.config.vocab_size, args.peer_prompts)
    rates = {f"transformers generate, batch {size}": peer(model, others, size) for size in PEER_BATCHES}
    rates["ours"] = ours(model, rows)
    found = {"limits": limits, "decode": steps, "tokens/s": rates}
    found["generation, peak GiB"] = peak_memory_gib()
    if model.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    found["training"] = train_steps(model, args.steps, limits)
    found["training, peak GiB"] = peak_memory_gib()
    response = sum(lengths(RESPONSE, 1000, 0)) / 1000
    found["job, minutes"] = {"generation": JOB["responses"] * response / found["tokens/s"]["ours"] / 60,
                             "training": JOB["steps"] * found["training"]["seconds a step"] / 60}
    return found


def table(results: dict) -> str:
    """The figures, or "not measured" for what only a GPU can show."""
    case, gpu = results["measured"], results["gpu"]
    rates, training, job = case["tokens/s"], case["training"], case["job, minutes"]
    rows = [*((f"generated tokens/s, {name}", f"{rate:,.0f}") for name, rate in rates.items()),
            *((f"decode step of {step['slots']} rows of {CONTEXT} tokens: ms (memory floor, arithmetic floor)",
               f"{step['ms']:.2f} ({step['memory floor, ms']:.2f}, {step['arithmetic floor, ms']:.2f})")
              for step in case["decode"]),
            ("generation, peak GiB", f"{case['generation, peak GiB']:.1f}"),
            ("training tokens/s", f"{training['tokens/s']:,.0f}"),
            (f"training, share of {training['MFU of']}", f"{100 * training['MFU']:.0f} %"),
            ("training, peak GiB", f"{case['training, peak GiB']:.1f}"),
            ("the paper's GSM8K job, generation + training, minutes (projected)",
             f"{job['generation']:.1f} + {job['training']:.1f}")]
    lines = [f"{results['machine']}; the paper: up to 300 minutes on an A100", "",
             "| | Mistral-7B's shape on a GPU | the tiny shape, which only shows that the script runs |", "|---|---|---|"]
    lines += [f"| {name} | {value if gpu else 'not measured'} | {'' if gpu or 'projected' in name else value} |"
              for name, value in rows]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="for gpu.json, gpu.md (%(default)s)")
    parser.add_argument("--prompts", type=int, help="ours (2048; without a GPU 64)")
    parser.add_argument("--peer-prompts", type=int, help="transformers generate (128; without a GPU 32)")
    parser.add_argument("--steps", type=int, help="timed optimizer steps (20; without a GPU 2)")
    args = parser.parse_args()
    device = best_device()
    gpu = device.startswith("cuda")
    for name, (large, small) in {"prompts": (2048, 64), "peer_prompts": (128, 32), "steps": (20, 2)}.items():
        setattr(args, name, getattr(args, name) or (large if gpu else small))
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(MistralConfig(**SHAPES["mistral-7b"] if gpu else TINY),
                                                 dtype=torch.bfloat16 if gpu else torch.float32, attn_implementation="rows")
    model.eval().generation_config = GenerationConfig(pad_token_id=0, eos_token_id=None)
    name = torch.cuda.get_device_name() if gpu else f"no GPU ({torch.get_num_threads()} CPU threads)"
    results = {"machine": f"{name}, torch {torch.__version__}, transformers {transformers.__version__}", "gpu": gpu,
               "measured": measure(model, args)}
    write_json(args.out / "gpu.json", results)
    write_text(args.out / "gpu.md", table(results))
    print(table(results))


if __name__ == "__main__":
    exit_cleanly(main)
