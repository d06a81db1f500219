"""The GPU memory that a run needs, by formula, with the activations measured: no GPU is needed for it.

    training   = weights + adapter + tokens of a micro-batch * activations + logits of one chunk of targets
    generation = weights + slots * longest row * keys and values          (slots: as many as 80 % of what is free holds)

What a layer keeps for its backward pass is counted here, by autograd's own hooks, on one and on two layers of the model's true
width on the CPU: the difference is a layer's, whatever the model. Frozen weights and what is kept twice are not counted.
Not in it: the CUDA context and the allocator's fragments (2 GiB are set aside), and a workspace of matrix products.

    python -m bench.memory --config mistral-7b --out docs
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, MistralConfig

import lora
from engine.packed import HeadLoss
from support.cli import exit_cleanly
from support.files import write_json, write_text
from train import Loss

ROOT = Path(__file__).resolve().parent.parent

GIB = 2**30
RESERVE = 2  # GiB
SHAPES = {"mistral-7b": dict(vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                             num_attention_heads=32, num_key_value_heads=8, sliding_window=None)}
ROW = 280  # tokens of a GSM8K row
LONGEST = 768  # prompt and response at most


def config_of(name: str):
    return MistralConfig(**SHAPES[name]) if name in SHAPES else AutoConfig.from_pretrained(name)


def saved_bytes(config, layers: int, targets: list[str], tokens: int, checkpointing: bool) -> int:
    """Bytes that autograd keeps after the forward pass of a training step over `tokens` tokens, but for parameters."""
    config = type(config)(**{**config.to_dict(), "num_hidden_layers": layers, "vocab_size": 64})
    net = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="rows").train()
    lora.inject(net, 8, 16, 0.1, targets)
    if checkpointing:
        net.gradient_checkpointing_enable()
    parameters = {p.untyped_storage().data_ptr() for p in net.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # holding the tensor keeps its address its own
        return tensor

    row = ([1] * tokens, [False] * (tokens - 1) + [True])
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        loss = Loss(net)([row])
    del loss
    return sum(size for size, _ in kept.values())


def budget(config, targets: list[str], tokens: int) -> dict:
    """Bytes of every term of the formula."""
    with torch.device("meta"):
        net = AutoModelForCausalLM.from_config(config)
        weights = 2 * sum(p.numel() for p in net.parameters())
        lora.inject(net, 8, 16, 0.1, targets)
    layer = {mode: (saved_bytes(config, 2, targets, tokens, mode) - saved_bytes(config, 1, targets, tokens, mode)) / tokens
             for mode in (False, True)}
    return {
        "weights": weights,
        "adapter": 16 * sum(p.numel() for p in lora.parameters(net)),  # float32: itself, gradient, two moments
        "activations a token": layer[False] * config.num_hidden_layers,
        "activations a token, checkpointing": layer[True] * config.num_hidden_layers + layer[False],  # and one layer's anew
        "logits of a chunk": 12 * HeadLoss.CHUNK * config.vocab_size,  # bfloat16 and float32, softmax in both
        "keys and values a token": key_value_bytes(config, torch.bfloat16),
    }


def key_value_bytes(config, dtype: torch.dtype) -> int:
    """Of one token, in all layers."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * dtype.itemsize * config.num_hidden_layers * config.num_key_value_heads * head


def rows_that_fit(terms: dict, card: int, checkpointing: bool) -> int:
    """The largest --micro-batch of GSM8K rows."""
    free = (card - RESERVE) * GIB - terms["weights"] - terms["adapter"] - terms["logits of a chunk"]
    a_token = terms["activations a token" + (", checkpointing" if checkpointing else "")]
    return max(0, int(free / (ROW * a_token)))


def slots_that_fit(terms: dict, card: int) -> int:
    return max(0, int(0.8 * ((card - RESERVE) * GIB - terms["weights"]) / (LONGEST * terms["keys and values a token"])) - 1)


def table(name: str, terms: dict, cards: list[int]) -> str:
    lines = [f"{name}, LoRA rank 8, bfloat16", "", "| term | bytes |", "|---|---|"]
    lines += [f"| {term} | {size:,.0f} |" for term, size in terms.items()]
    lines += ["", f"| card | --micro-batch, rows of {ROW} tokens | with --gradient-checkpointing | "
              f"slots of {LONGEST} tokens in generation |", "|---|---|---|---|"]
    lines += [f"| {card} GB | {rows_that_fit(terms, card, False)} | {rows_that_fit(terms, card, True)} | "
              f"{slots_that_fit(terms, card)} |" for card in cards]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="mistral-7b", help="this, or a model's name or folder (%(default)s)")
    parser.add_argument("--target-modules", default="q_proj,v_proj", help="(%(default)s)")
    parser.add_argument("--cards", type=int, nargs="+", default=[80, 48, 24], help="GB (%(default)s)")
    parser.add_argument("--tokens", type=int, default=64, help="to measure with (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="for memory.json, memory.md (%(default)s)")
    args = parser.parse_args()
    targets = args.target_modules if args.target_modules == "all-linear" else args.target_modules.split(",")
    terms = budget(config_of(args.config), targets, args.tokens)
    write_json(args.out / "memory.json", {"config": args.config, "target modules": args.target_modules, **terms})
    text = table(f"{args.config}, {args.target_modules}", terms, args.cards)
    write_text(args.out / "memory.md", text)
    print(text)


if __name__ == "__main__":
    exit_cleanly(main)
