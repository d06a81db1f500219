"""The model as this project uses it: loaded once, and run over many rows in one forward pass.

Rows of different lengths are packed end to end into one sequence `[1, sum of lengths]`, with positions that restart at every
row and attention that never crosses a row. Nothing is padded, and the output head (the widest matrix of a small model) runs
only where a target token is predicted. Training, log-probabilities and drift are all read off `target_logits`.

A packed row is kept apart by two means, and needs one: transformers builds the block-diagonal mask from position_ids (only
where no attention_mask is passed and use_cache is False; otherwise rows silently see each other), and `row_attention` computes
the blocks alone, where that is faster: plain full attention.
"""

import os
import resource
import sys

import torch
import transformers
from torch.nn import functional as F
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

import ranks
from files import InputError

Row = tuple[list[int], list[bool]]  # (ids, is_target), both [length]; see data.training_ids


def row_attention(module, query, key, value, attention_mask, row_lengths=None, shared=0, **kwargs):
    """Causal attention inside each packed row; query, key, value `[1, heads, sum of lengths, head_dim]`.

    Where `shared` > 0, the first row holds that many tokens which every other row begins with, and attends to.
    """
    if row_lengths is None or kwargs.get("sliding_window"):  # not packed, or the mask says more than "causal"
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    rows = list(zip(*(states.split(row_lengths, dim=2) for states in (query, key, value)), strict=True))
    masks = [None] * len(rows)
    if shared:
        _, prefix_key, prefix_value = rows[0]
        rows[1:] = [(q, torch.cat([prefix_key, k], 2), torch.cat([prefix_value, v], 2)) for q, k, v in rows[1:]]
        masks[1:] = [torch.ones(n, shared + n, dtype=torch.bool, device=key.device).tril(shared) for n in row_lengths[1:]]
    outputs = [sdpa_attention_forward(module, *row, mask, **kwargs)[0] for row, mask in zip(rows, masks, strict=True)]
    return torch.cat(outputs, dim=1), None


AttentionInterface.register("rows", row_attention)
AttentionMaskInterface.register("rows", sdpa_mask)


transformers.logging.disable_progress_bar()


def best_device() -> str:
    return f"cuda:{ranks.LOCAL_RANK}" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def load_model(name: str, device: str | None = None, dtype: str | None = None, trust_remote_code: bool = False):
    """(model, tokenizer) of a Hugging Face name or folder: safetensors only, bfloat16 on a GPU and float32 elsewhere."""
    device = device or best_device()
    dtype = getattr(torch, dtype or ("bfloat16" if device.startswith("cuda") else "float32"))
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
        model = AutoModelForCausalLM.from_pretrained(
            name, config=config, dtype=dtype, use_safetensors=True, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"--model {name}: cannot be loaded ({' '.join(str(error).split())[:300]})") from None
    if not tokenizer.chat_template:
        raise InputError(f"--model {name}: its tokenizer has no chat template; take an instruct model")
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation("rows")
    return model.to(device).eval(), tokenizer


def target_logits(model, rows: list[Row], share_prefix: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits `[targets, vocab]`, targets `[targets]`) of all rows' target tokens, in row order.

    `share_prefix` computes the tokens with which all rows begin only once: the same numbers, but for a LoRA dropout that then
    draws one mask for them all.
    """
    shared = common_prefix(rows) if share_prefix and can_share_prefix(model) else 0
    prefix = [(rows[0][0][:shared], [False] * shared)] if shared else []
    parts = prefix + [(ids[shared:], mask[shared:]) for ids, mask in rows]
    lengths = [len(ids) for ids, _ in parts]
    starts = [0] * len(prefix) + [shared] * len(rows)
    ids = torch.tensor([token for ids, _ in parts for token in ids], device=model.device)
    positions = torch.cat([torch.arange(start, start + n) for start, n in zip(starts, lengths, strict=True)]).to(model.device)
    is_target = torch.tensor([target for _, mask in parts for target in mask], device=model.device)
    predicts = is_target.nonzero().squeeze(1) - 1  # the logits at t - 1 predict the token at t
    output = model(input_ids=ids[None], position_ids=positions[None], use_cache=False,
                   logits_to_keep=predicts, row_lengths=lengths, shared=shared)
    return output.logits[0], ids[predicts + 1]


def common_prefix(rows: list[Row]) -> int:
    """How many first tokens all rows share; each keeps at least the token that predicts its first target."""
    return max(0, min(len(os.path.commonprefix([ids for ids, _ in rows])), *(mask.index(True) - 1 for _, mask in rows)))


def can_share_prefix(model) -> bool:
    """Only `row_attention` lets rows attend to a prefix outside themselves, and only where attention is plain and full."""
    return model.config._attn_implementation == "rows" and not getattr(model.config, "sliding_window", None)


def packs(rows: list[Row], tokens: int = 4096):
    """Consecutive rows in groups of at most `tokens` (a longer row stands alone)."""
    group, size = [], 0
    for row in rows:
        if group and size + len(row[0]) > tokens:
            yield group
            group, size = [], 0
        group.append(row)
        size += len(row[0])
    if group:
        yield group


@torch.inference_mode()
def log_probs(model, rows: list[Row], share_prefix: bool = False) -> list[float]:
    """log p(y | x) of every row: the sum over its target tokens, in nats (Table 1, Fig. 2)."""
    sums = []
    for group in packs(rows):
        logits, targets = target_logits(model, group, share_prefix)
        token_log_probs = -F.cross_entropy(logits.float(), targets, reduction="none")
        sums += [part.sum().item() for part in token_log_probs.split([sum(mask) for _, mask in group])]
    return sums


def peak_memory_gib() -> float:
    """The most memory this process has held: of the GPU's if it used one, else resident."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return round(torch.cuda.max_memory_allocated() / 2**30, 2)
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB on Linux
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30, 2)
