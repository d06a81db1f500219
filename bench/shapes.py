"""Models of a known shape with random weights: their rows, and the GPU memory that they need.

Weights do not matter for time or memory, lengths do. So prompts and responses get GSM8K's lengths, and
responses are cut there. bench/generate.py and bench/train.py time such a model with --shape. Without a GPU
they take a tiny shape, which only shows that the script runs, and the GPU's column says "not measured".

    python -m bench.shapes --out docs       what fits a card, by the formula in docs/scale.md (needs no GPU)
"""

import argparse
import random
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, GenerationConfig, MistralConfig

import engine.attention  # noqa: F401, registers the attention that is named "rows"
import lora
from engine.decoding import Row
from engine.packed import HeadLoss, target_loss
from support.cli import exit_cleanly
from support.files import write_json, write_text

MISTRAL_7B = dict(vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                  num_attention_heads=32, num_key_value_heads=8, sliding_window=None)
TINY = dict(vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, sliding_window=None)
SHAPES = {"mistral-7b": MISTRAL_7B}

# As Gemma 3 270M, five layers of six with a sliding window, except two numbers. The vocabulary is that of the
# tokenizer at hand. The window is 128 instead of 512, so that the prompts at hand are longer than it.
GEMMA_3 = dict(hidden_size=640, intermediate_size=2048, num_hidden_layers=18, num_attention_heads=4,
               num_key_value_heads=1, head_dim=256, sliding_window=128)
TINY_GEMMA_3 = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=4,
                    num_key_value_heads=1, head_dim=16, sliding_window=32)
WINDOWED = {"gemma-3": GEMMA_3, "tiny": TINY_GEMMA_3}
FULL_EVERY = 6  # layers, of which the last sees all that came before

# Deciles of tokens, from the minimum to the maximum, by SmolLM2's tokenizer: Fig. 3's prompts of every tenth
# training row, and that model's own greedy responses to 96 of them. A tenth of these loop up to the limit, as
# a 7B model's hardly would. So the responses are rather too long.
PROMPT = [110, 125, 130, 136, 140, 144, 149, 156, 164, 179, 260]
RESPONSE = [7, 49, 114, 140, 151, 183, 188, 212, 287, 512, 512]
COMMON = 72  # first tokens of every prompt: its instruction

# The paper's GSM8K job: predictions, paraphrases where they are wrong (Table 3: half), test answers, and ten
# validations.
JOB_RESPONSES = 7323 + 3662 + 1319 + 10 * 150
JOB_STEPS = 5000


# --------------------------------------------------------------------------------------- models and rows


def random_model(shape: str, device: str):
    """A model of that shape with random weights on a GPU, in bfloat16. Elsewhere a tiny one in float32."""
    gpu = device.startswith("cuda")
    config = MistralConfig(**(SHAPES[shape] if gpu else TINY))
    dtype = torch.bfloat16 if gpu else torch.float32
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="rows")
    model.generation_config = GenerationConfig(pad_token_id=0, eos_token_id=None)  # only length ends a row
    return model.eval()


def windowed_model(shape: str, vocabulary: int, end: int, dtype: torch.dtype, device):
    """A Gemma 3 of that shape with random weights. The token `end` ends a row."""
    sizes = WINDOWED[shape]
    kinds = []
    for number in range(1, sizes["num_hidden_layers"] + 1):
        kinds.append("sliding_attention" if number % FULL_EVERY else "full_attention")
    config = Gemma3TextConfig(**sizes, layer_types=kinds, vocab_size=vocabulary, bos_token_id=end,
                              eos_token_id=end, pad_token_id=end)
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def weights_of(model) -> int:
    """Weights that every token passes: all except the embedding, which is only looked up."""
    return sum(p.numel() for p in model.parameters()) - model.get_input_embeddings().weight.numel()


def lengths(deciles: list[int], n: int, seed: int) -> list[int]:
    """`n` lengths spread evenly over a distribution, in random order."""
    found = []
    for i in range(n):
        decile, share = divmod(10 * (i + 0.5) / n, 1)
        low, high = deciles[int(decile)], deciles[int(decile) + 1]
        found.append(round(low + share * (high - low)))
    random.Random(seed).shuffle(found)
    return found


def random_rows(vocabulary: int, n: int) -> list[Row]:
    """Prompts of GSM8K's lengths with the same first tokens, each with the length at which it ends."""
    draw = random.Random(0)

    def tokens(count: int) -> list[int]:
        return [draw.randrange(3, vocabulary) for _ in range(count)]

    common = tokens(COMMON)
    rows = []
    prompts, responses = lengths(PROMPT, n, seed=1), lengths(RESPONSE, n, seed=2)
    for prompt, response in zip(prompts, responses, strict=True):
        own = tokens(prompt - COMMON)
        rows.append(Row(len(rows), common + own, start=prompt, limit=prompt + response))
    return rows


def shape_table(results: dict, figures: dict[str, str], projected: dict[str, str]) -> str:
    """Figures in the GPU's column or in the tiny shape's. Without a GPU its column says "not measured"."""
    gpu = results["gpu"]
    tiny_column = "a tiny shape, which only shows that the script runs"
    lines = [results["machine"], "", f"| | {results['shape']}'s shape on a GPU | {tiny_column} |",
             "|---|---|---|"]
    for name, value in (figures | projected).items():
        tiny = "" if gpu or name in projected else value
        lines.append(f"| {name} | {value if gpu else 'not measured'} | {tiny} |")
    return "\n".join(lines) + "\n"


# --------------------------------------------------------------------------------------- memory


GIB = 2**30
RESERVE_GIB = 2  # for the CUDA context, the allocator's fragments, and a workspace of matrix products
ROW = 280  # tokens of a GSM8K row
LONGEST = 768  # prompt and response at most
TARGETS = ["q_proj", "v_proj"]
CARDS_GB = (80, 48, 24)


def key_value_bytes(config, dtype: torch.dtype) -> int:
    """Keys and values of one token, in all layers."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * dtype.itemsize * config.num_hidden_layers * config.num_key_value_heads * head


def saved_bytes(config, layers: int, targets: list[str], tokens: int, checkpointing: bool) -> int:
    """Bytes that autograd keeps of `tokens` tokens after a training step's forward pass, parameters aside."""
    few = type(config)(**{**config.to_dict(), "num_hidden_layers": layers, "vocab_size": 64})
    model = AutoModelForCausalLM.from_config(few, dtype=torch.bfloat16, attn_implementation="rows").train()
    lora.inject(model, 8, 16, 0.1, targets)
    if checkpointing:
        model.gradient_checkpointing_enable()
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no other gets its address
        return tensor

    row = ([1] * tokens, [False] * (tokens - 1) + [True])
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16):
        loss = target_loss(model, [row])
    del loss
    return sum(size for size, _ in kept.values())


def layer_bytes_a_token(config, targets, tokens: int, checkpointing: bool) -> float:
    """What one layer keeps of a token for its backward pass: two layers' bytes less one layer's.

    It is counted on layers of the model's true width on the CPU, by autograd's own hooks.
    """
    one = saved_bytes(config, 1, targets, tokens, checkpointing)
    two = saved_bytes(config, 2, targets, tokens, checkpointing)
    return (two - one) / tokens


def memory_terms(config, targets: list[str], tokens: int = 64) -> dict[str, float]:
    """The terms of the formula in docs/scale.md, in bytes."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        weights = 2 * sum(p.numel() for p in model.parameters())
        lora.inject(model, 8, 16, 0.1, targets)
    layers = config.num_hidden_layers
    plain = layer_bytes_a_token(config, targets, tokens, checkpointing=False)
    checkpointed = layer_bytes_a_token(config, targets, tokens, checkpointing=True)
    adapter = sum(p.numel() for p in lora.parameters(model))
    return {
        "weights": weights,
        "adapter": 16 * adapter,  # in float32: itself, its gradient and two moments
        "activations a token": plain * layers,
        "activations a token, checkpointing": checkpointed * layers + plain,  # and one layer's, once more
        "logits of a chunk": 12 * HeadLoss.CHUNK * config.vocab_size,  # and their softmax, in 16 and 32 bits
        "keys and values a token": key_value_bytes(config, torch.bfloat16),
    }


def rows_that_fit(terms: dict, card_gb: int, checkpointing: bool) -> int:
    """The largest --micro-batch of GSM8K rows."""
    fixed = terms["weights"] + terms["adapter"] + terms["logits of a chunk"]
    free = (card_gb - RESERVE_GIB) * GIB - fixed
    a_token = terms["activations a token, checkpointing" if checkpointing else "activations a token"]
    return max(0, int(free / (ROW * a_token)))


def slots_that_fit(terms: dict, card_gb: int) -> int:
    """Rows side by side in generation. They get 80 % of what is free, and the shared prefix needs a slot."""
    free = (card_gb - RESERVE_GIB) * GIB - terms["weights"]
    slot = LONGEST * terms["keys and values a token"]
    return max(0, int(0.8 * free / slot) - 1)


def memory_table(results: dict) -> str:
    lines = [f"{results['config']}, {results['target modules']}, LoRA rank 8, bfloat16", "",
             "| term | bytes |", "|---|---|"]
    for name, size in results.items():
        if name not in ("config", "target modules"):
            lines.append(f"| {name} | {size:,.0f} |")

    lines += ["", f"| card | --micro-batch, rows of {ROW} tokens | with --gradient-checkpointing | "
              f"slots of {LONGEST} tokens in generation |", "|---|---|---|---|"]
    for card in CARDS_GB:
        plain, checkpointed = rows_that_fit(results, card, False), rows_that_fit(results, card, True)
        lines.append(f"| {card} GB | {plain} | {checkpointed} | {slots_that_fit(results, card)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="mistral-7b", choices=SHAPES, help="(%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="(%(default)s)")
    args = parser.parse_args()
    terms = memory_terms(MistralConfig(**SHAPES[args.shape]), TARGETS)
    results = {"config": args.shape, "target modules": ",".join(TARGETS), **terms}
    write_json(args.out / "memory.json", results)
    write_text(args.out / "memory.md", memory_table(results))
    print(memory_table(results))


if __name__ == "__main__":
    exit_cleanly(main)
