"""The model as this project uses it: loaded once, and run over many rows in one forward pass.

Rows of different lengths are packed end to end into one sequence `[1, sum of lengths]`, with positions that restart at every
row and attention that never crosses a row. Nothing is padded, and the output head (the widest matrix of a small model) runs
only where a target token is predicted. Training goes through `target_loss`, log-probabilities through `target_logits`.

A packed row is kept apart by two means, and needs one: transformers builds the block-diagonal mask from position_ids (only
where no attention_mask is passed and use_cache is False; otherwise rows silently see each other), and `row_attention` computes
the blocks alone, where that is faster: plain full attention.
"""

import contextlib
import math
import os
import resource
import sys
from collections.abc import Iterable, Iterator
from itertools import islice

import torch
import transformers
from safetensors import SafetensorError
from torch.nn import functional as F
from tqdm import tqdm
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

import ranks
from files import InputError

Row = tuple[list[int], list[bool]]  # (ids, is_target), both [length]; see data.training_ids


def row_attention(module, query, key, value, attention_mask, row_lengths=None, shared=0, **kwargs):
    """Causal attention inside each packed row; query, key, value `[1, heads, sum of lengths, head_dim]`.

    Where `shared` > 0, the first row holds that many tokens which every other row begins with, and attends to. Rows that are
    not packed come from generate.py, with a mask.
    """
    if row_lengths is None and attention_mask is not None and kwargs.keys().isdisjoint(UNUSUAL):
        return masked_attention(query, key, value, attention_mask, **kwargs)
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


UNUSUAL = ("softcap", "position_bias", "s_aux")  # what changes the scores: transformers' own attention knows, or refuses


def masked_attention(query, key, value, mask, scaling=None, dropout=0.0, **_):
    """Attention under `mask` `[rows, 1, width, length]`; query `[rows, heads, width, head_dim]`.

    The heads that share a key head ask as so many queries more of it, so that no key is copied for each of them.
    """
    (rows, heads, width, _), kv_heads = query.shape, key.shape[1]
    grouped = query.reshape(rows, kv_heads, heads // kv_heads * width, -1)
    mask = mask.repeat(1, 1, heads // kv_heads, 1)
    output = F.scaled_dot_product_attention(grouped, key, value, mask, dropout_p=dropout, scale=scaling)
    return output.reshape(rows, heads, width, -1).transpose(1, 2).contiguous(), None


AttentionInterface.register("rows", row_attention)
AttentionMaskInterface.register("rows", sdpa_mask)


transformers.logging.disable_progress_bar()


def best_device() -> str:
    return f"cuda:{ranks.LOCAL_RANK}" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def usable_device(name: str | None) -> str:
    """The device of that name, or the best there is. InputError: this machine has none."""
    name = name or best_device()
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError):
        raise InputError(f"--device {name}: this machine has none, or torch cannot use it") from None
    if name.startswith("cuda"):
        torch.cuda.set_device(name)
    return name


@contextlib.contextmanager
def naming(name: str):
    """Turn whatever loading a model can raise into one line."""
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        raise InputError(f"--model {name}: cannot be loaded ({' '.join(str(error).split())[:300]})") from None


def load_tokenizer(name: str, trust_remote_code: bool = False, chat: bool = True):
    """InputError: it cannot be loaded, or has no chat template where one is needed."""
    with naming(name):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    if chat and not tokenizer.chat_template:
        raise InputError(f"--model {name}: its tokenizer has no chat template; take an instruct model")
    return tokenizer


def load_model(name: str, device: str | None = None, dtype: str | None = None, trust_remote_code: bool = False,
               chat: bool = True):
    """(model, tokenizer) of a Hugging Face name or folder: safetensors only, bfloat16 on a GPU and float32 elsewhere."""
    device = usable_device(device)
    dtype = getattr(torch, dtype or ("bfloat16" if device.startswith("cuda") else "float32"))
    tokenizer = load_tokenizer(name, trust_remote_code, chat)
    with naming(name):
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
        model = AutoModelForCausalLM.from_pretrained(
            name, config=config, dtype=dtype, use_safetensors=True, trust_remote_code=trust_remote_code)
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation("rows")
    return model.to(device).eval(), tokenizer


def context_length(model) -> float:
    """How many tokens the model takes; infinity where its configuration does not say."""
    return getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or math.inf


def count_weights(name: str, trust_remote_code: bool = False) -> int:
    """How many weights a model has, from its configuration alone: nothing is loaded."""
    with naming(name), torch.device("meta"):
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    return sum(p.numel() for p in model.parameters())


def packed(model, rows: list[Row], share_prefix: bool) -> tuple[dict, torch.Tensor, torch.Tensor]:
    """(the model's inputs, positions `[targets]` whose outputs predict the targets, targets `[targets]`), in row order."""
    shared = common_prefix(rows) if share_prefix and can_share_prefix(model) else 0
    prefix = [(rows[0][0][:shared], [False] * shared)] if shared else []
    parts = prefix + [(ids[shared:], mask[shared:]) for ids, mask in rows]
    lengths = [len(ids) for ids, _ in parts]
    starts = [0] * len(prefix) + [shared] * len(rows)
    ids = torch.tensor([token for ids, _ in parts for token in ids], device=model.device)
    positions = torch.cat([torch.arange(start, start + n) for start, n in zip(starts, lengths, strict=True)]).to(model.device)
    is_target = torch.tensor([target for _, mask in parts for target in mask], device=model.device)
    at = is_target.nonzero().squeeze(1)
    inputs = {"input_ids": ids[None], "position_ids": positions[None], "use_cache": False, "row_lengths": lengths,
              "shared": shared}
    return inputs, at - 1, ids[at]  # the output at t - 1 predicts the token at t


def target_logits(model, rows: list[Row], share_prefix: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits `[targets, vocab]`, targets `[targets]`) of all rows' target tokens, in row order.

    `share_prefix` computes the tokens with which all rows begin only once: the same numbers, but for a LoRA dropout that then
    draws one mask for them all.
    """
    inputs, predicts, targets = packed(model, rows, share_prefix)
    return model(**inputs, logits_to_keep=predicts).logits[0], targets


def target_loss(model, rows: list[Row], share_prefix: bool = False) -> torch.Tensor:
    """-Σ log p(target) over all rows' target tokens, in nats: cross entropy on `target_logits`, without keeping logits."""
    head = model.get_output_embeddings()
    if not plain_head(model, head):
        logits, targets = target_logits(model, rows, share_prefix)
        return F.cross_entropy(logits.float(), targets, reduction="sum")
    inputs, predicts, targets = packed(model, rows, share_prefix)
    hidden = model.base_model(**inputs).last_hidden_state[0, predicts]
    return HeadLoss.apply(hidden, head.weight, targets)


def plain_head(model, head) -> bool:
    """Are the logits hidden @ weight.T and nothing else, with a frozen weight?"""
    changed = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")
    return (type(head) is torch.nn.Linear and head.bias is None and not head.weight.requires_grad
            and model.base_model is not model and not any(getattr(model.config, name, None) for name in changed))


class HeadLoss(torch.autograd.Function):
    """Cross entropy of softmax(h Wᵀ), summed; h `[targets, hidden]`, frozen W `[vocab, hidden]`, targets `[targets]`.

    The vocabulary is the widest dimension of a model: logits, their softmax and its gradient for every target of a step would
    be its largest tensors. So a chunk of targets goes forward, and back to h at once: dL/dh = (softmax(h Wᵀ) - onehot) W.
    """

    CHUNK = 256

    @staticmethod
    def forward(ctx, hidden, weight, targets):
        total, gradient = hidden.new_zeros((), dtype=torch.float32), torch.empty_like(hidden)
        for h, t, g in zip(*(tensor.split(HeadLoss.CHUNK) for tensor in (hidden, targets, gradient)), strict=True):
            logits = (h @ weight.T).float()
            log_z = logits.logsumexp(-1, keepdim=True)
            total += (log_z - logits.gather(1, t[:, None])).sum()
            probabilities = logits.sub_(log_z).exp_()
            probabilities.scatter_add_(1, t[:, None], probabilities.new_full((len(t), 1), -1))
            g.copy_(probabilities.to(weight.dtype) @ weight)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx, grad_output):
        return ctx.saved_tensors[0] * grad_output, None, None


def common_prefix(rows: list[Row]) -> int:
    """How many first tokens all rows share; each keeps at least the token that predicts its first target."""
    return max(0, min(len(os.path.commonprefix([ids for ids, _ in rows])), *(mask.index(True) - 1 for _, mask in rows)))


def can_share_prefix(model) -> bool:
    """Only `row_attention` lets rows attend to a prefix outside themselves, and only where attention is plain and full."""
    return model.config._attn_implementation == "rows" and not getattr(model.config, "sliding_window", None)


def packs(rows: Iterable[Row], tokens: int = 4096) -> Iterator[list[Row]]:
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


@torch.no_grad()
def token_log_probs(model, rows: list[Row], share_prefix: bool = False) -> Iterator[list[float]]:
    """log p of every target token in nats, a list a row. Out of memory: the same rows again, in packs half as large."""
    done, tokens = 0, 4096
    while done < len(rows):
        group = next(packs(islice(rows, done, None), tokens))
        found = None
        try:
            logits, targets = target_logits(model, group, share_prefix)
            found = (-F.cross_entropy(logits.float(), targets, reduction="none")).split([sum(mask) for _, mask in group])
        except torch.OutOfMemoryError:
            if len(group) == 1:
                raise InputError(f"out of memory over one row of {len(group[0][0])} tokens: leave out such long rows, or "
                                 "take a smaller model") from None
        if found is None:  # here, since the exception holds the tensors of what failed
            tokens = sum(len(ids) for ids, _ in group) // 2
            torch.cuda.empty_cache()
            tqdm.write(f"out of memory: going on with {tokens} tokens at a time")
            continue
        yield from (part.tolist() for part in found)
        done += len(group)


def log_probs(model, rows: list[Row], share_prefix: bool = False) -> list[float]:
    """log p(y | x) of every row: the sum over its target tokens, in nats (Table 1, Fig. 2)."""
    return [sum(row) for row in token_log_probs(model, rows, share_prefix)]


def peak_memory_gib() -> float:
    """The most memory this process has held: of the GPU's if it used one, else resident."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return round(torch.cuda.max_memory_allocated() / 2**30, 2)
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB on Linux
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30, 2)
