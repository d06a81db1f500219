"""Many rows in one forward pass: the loss of training, and log-probabilities.

Rows of different lengths are packed end to end into one sequence `[1, sum of lengths]`, with positions that restart at every
row and attention that never crosses a row. Nothing is padded, and the output head (the widest matrix of a small model) runs
only where a target token is predicted. Training goes through `target_loss`, log-probabilities through `target_logits`.

Rows must not attend to each other. Where attention is plain and full, `packed_attention` runs it row by row. For every other
kind transformers masks the other rows, which it recognises by position_ids that start again. It does so only without an
attention_mask and with use_cache=False. Pass either, and rows see each other without a warning.
"""

import os
from collections.abc import Iterable, Iterator
from itertools import islice

import torch
from torch.nn import functional as F
from tqdm import tqdm

from support.cli import InputError

Row = tuple[list[int], list[bool]]  # (ids, is_target), both [length]; see data.training_ids


def pack(model, rows: list[Row], share_prefix: bool) -> tuple[dict, torch.Tensor, torch.Tensor]:
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
    inputs, predicts, targets = pack(model, rows, share_prefix)
    return model(**inputs, logits_to_keep=predicts).logits[0], targets


def target_loss(model, rows: list[Row], share_prefix: bool = False) -> torch.Tensor:
    """-Σ log p(target) over all rows' target tokens, in nats: cross entropy on `target_logits`, without keeping logits."""
    head = model.get_output_embeddings()
    if not plain_head(model, head):
        logits, targets = target_logits(model, rows, share_prefix)
        return F.cross_entropy(logits.float(), targets, reduction="sum")
    inputs, predicts, targets = pack(model, rows, share_prefix)
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
    """Only `packed_attention` lets rows attend to a prefix outside themselves, and only where attention is plain and full."""
    return model.config._attn_implementation == "rows" and not getattr(model.config, "sliding_window", None)


def split_by_tokens(rows: Iterable[Row], tokens: int = 4096) -> Iterator[list[Row]]:
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
        group = next(split_by_tokens(islice(rows, done, None), tokens))
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
