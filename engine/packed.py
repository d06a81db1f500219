"""Many rows in one forward pass: the loss of training, and log-probabilities.

Rows of different lengths are packed end to end into one sequence `[1, sum of lengths]`, with positions that
restart at every row and attention that never crosses a row. Nothing is padded. The output head (the widest
matrix of a small model) runs only where a target token is predicted. Training goes through `target_loss`,
log-probabilities through `target_logits`.

Rows must not attend to each other. Where attention is plain and full, `packed_attention` runs it row by row. For
every other kind transformers masks the other rows, which it recognises by position_ids that start again. It does
so only without an attention_mask and with use_cache=False. Pass either, and rows see each other without a warning.
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
    """All rows as one sequence, in their order.

    Returns the model's inputs, the positions `[targets]` whose outputs predict the targets, and the targets
    `[targets]`.
    """
    shared = common_prefix(rows) if share_prefix and can_share_prefix(model) else 0
    ids, positions, is_target, lengths = [], [], [], []

    def add(row_ids, row_is_target, start):
        ids.extend(row_ids)
        positions.extend(range(start, start + len(row_ids)))
        is_target.extend(row_is_target)
        lengths.append(len(row_ids))

    if shared:
        add(rows[0][0][:shared], [False] * shared, start=0)
    for row_ids, row_is_target in rows:
        add(row_ids[shared:], row_is_target[shared:], start=shared)

    ids = torch.tensor(ids, device=model.device)
    positions = torch.tensor(positions, device=model.device)
    targets_at = torch.tensor(is_target, device=model.device).nonzero().squeeze(1)
    inputs = {"input_ids": ids[None], "position_ids": positions[None], "use_cache": False}
    inputs |= {"row_lengths": lengths, "shared": shared}  # read by packed_attention
    return inputs, targets_at - 1, ids[targets_at]  # the output at t - 1 predicts the token at t


def target_logits(model, rows: list[Row], share_prefix: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits `[targets, vocab]`, targets `[targets]`) of all rows' target tokens, in row order.

    `share_prefix` computes the tokens with which all rows begin only once. The numbers are the same, except that
    LoRA dropout then draws one mask for them all.
    """
    inputs, predicts, targets = pack(model, rows, share_prefix)
    return model(**inputs, logits_to_keep=predicts).logits[0], targets


def target_loss(model, rows: list[Row], share_prefix: bool = False) -> torch.Tensor:
    """-Σ log p(target) over all rows' target tokens, in nats.

    It is the cross entropy of `target_logits`, computed without keeping the logits where the head allows it.
    """
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
    if any(getattr(model.config, name, None) for name in changed):
        return False
    frozen = type(head) is torch.nn.Linear and head.bias is None and not head.weight.requires_grad
    return frozen and model.base_model is not model


class HeadLoss(torch.autograd.Function):
    """Cross entropy of softmax(h Wᵀ), summed, for h `[targets, hidden]` and a frozen W `[vocab, hidden]`.

    The vocabulary is the widest dimension of a model. Logits, their softmax and its gradient for every target of a
    step would be its largest tensors. So each chunk of targets goes forward, and back to h at once:
    dL/dh = (softmax(h Wᵀ) - onehot(target)) W.
    """

    CHUNK = 256

    @staticmethod
    def forward(ctx, hidden, weight, targets):
        total = hidden.new_zeros((), dtype=torch.float32)
        gradient = torch.empty_like(hidden)

        for start in range(0, len(hidden), HeadLoss.CHUNK):
            chunk = slice(start, start + HeadLoss.CHUNK)
            target = targets[chunk, None]

            # 1. Forward: the loss of a target is log Σ exp(logits) - logit of the target.
            logits = (hidden[chunk] @ weight.T).float()
            log_z = logits.logsumexp(-1, keepdim=True)
            total += (log_z - logits.gather(1, target)).sum()

            # 2. The gradient of the logits is softmax - onehot, written over the logits: they are wide.
            difference = logits.sub_(log_z).exp_()
            minus_one = difference.new_full(target.shape, -1)
            difference.scatter_add_(1, target, minus_one)

            # 3. Back to the hidden states.
            gradient[chunk] = difference.to(weight.dtype) @ weight

        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx, grad_output):
        (gradient,) = ctx.saved_tensors
        return gradient * grad_output, None, None


def common_prefix(rows: list[Row]) -> int:
    """How many first tokens all rows share. The token that predicts a row's first target stays in the row."""
    shared = len(os.path.commonprefix([ids for ids, _ in rows]))  # works on any lists, not only on paths
    for _, is_target in rows:
        predicts_first_target = is_target.index(True) - 1
        shared = min(shared, predicts_first_target)
    return max(shared, 0)


def can_share_prefix(model) -> bool:
    """Only `packed_attention` lets rows attend to a prefix outside themselves, and only where it is plain and full."""
    return model.config._attn_implementation == "rows" and not getattr(model.config, "sliding_window", None)


def split_by_tokens(rows: Iterable[Row], tokens: int = 4096) -> Iterator[list[Row]]:
    """Consecutive rows in groups of at most `tokens` (a longer row stands alone)."""
    group = []
    size = 0
    for row in rows:
        length = len(row[0])
        if group and size + length > tokens:
            yield group
            group = []
            size = 0
        group.append(row)
        size += length
    if group:
        yield group


@torch.no_grad()
def token_log_probs(model, rows: list[Row], share_prefix: bool = False) -> Iterator[list[float]]:
    """log p of every target token in nats, a list a row.

    Out of memory: the same rows again, in groups half as large. InputError: one row alone does not fit.
    """
    done = 0
    tokens = 4096
    while done < len(rows):
        group = next(split_by_tokens(islice(rows, done, None), tokens))
        log_p = group_log_probs(model, group, share_prefix)
        if log_p is not None:
            yield from log_p
            done += len(group)
            continue

        size = sum(len(ids) for ids, _ in group)
        if len(group) == 1:
            raise InputError(
                f"out of memory over one row of {size} tokens: leave out such long rows, or take a smaller model"
            )
        tokens = size // 2
        torch.cuda.empty_cache()
        tqdm.write(f"out of memory: going on with {tokens} tokens at a time")


def group_log_probs(model, group: list[Row], share_prefix: bool) -> list[list[float]] | None:
    """log p of every target token of rows that are forwarded together; None where memory runs out.

    It is a function of its own because the exception holds the tensors of the pass that failed. They are freed only
    once the exception is gone.
    """
    try:
        logits, targets = target_logits(model, group, share_prefix)
        log_p = -F.cross_entropy(logits.float(), targets, reduction="none")
    except torch.OutOfMemoryError:
        return None
    counts = [sum(is_target) for _, is_target in group]
    return [part.tolist() for part in log_p.split(counts)]


def log_probs(model, rows: list[Row], share_prefix: bool = False) -> list[float]:
    """log p(y | x) of every row: the sum over its target tokens, in nats (Table 1, Fig. 2)."""
    return [sum(row) for row in token_log_probs(model, rows, share_prefix)]
