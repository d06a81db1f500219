"""The loss of training, and log-probabilities: many rows in one forward pass wherever the model allows it.

Training goes through `target_loss`, log-probabilities through `target_logits`. A model that nobody has tried
yet is tried at first use (engine/trial.py).
"""

from collections.abc import Iterator
from itertools import islice

import torch
from torch.nn import functional as F
from tqdm import tqdm

from engine import forward
from engine.forward import HeadLoss, Row, split_by_tokens  # noqa: F401, others import these from here
from engine.trial import ways_of
from support.cli import InputError


def target_logits(model, rows: list[Row], share_prefix: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits `[targets, vocab]`, targets `[targets]`) of all rows' target tokens, in row order.

    `share_prefix` computes the tokens with which all rows begin only once. The numbers are the same, except
    that LoRA dropout then draws one mask for them all.
    """
    return forward.target_logits(model, rows, share_prefix, ways_of(model))


def target_loss(model, rows: list[Row], share_prefix: bool = False) -> torch.Tensor:
    """-Σ log p(target) over all rows' target tokens, in nats: the cross entropy of `target_logits`, summed.

    Where the head allows it, the logits are not kept.
    """
    return forward.target_loss(model, rows, share_prefix, ways_of(model))


@torch.no_grad()
def token_log_probs(model, rows: list[Row], share_prefix: bool = False) -> Iterator[list[float]]:
    """log p of every target token in nats, a list a row.

    Where memory runs out, the same rows go again, in groups half as large. InputError: one row alone does
    not fit.
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
                f"out of memory over one row of {size} tokens: leave out such long rows, "
                "or take a smaller model"
            )
        tokens = size // 2
        torch.cuda.empty_cache()
        tqdm.write(f"out of memory: going on with {tokens} tokens at a time")


def group_log_probs(model, group: list[Row], share_prefix: bool) -> list[list[float]] | None:
    """log p of every target token of rows that are forwarded together. None: memory ran out.

    It is a function of its own because the exception holds the tensors of the pass that failed. They are
    freed only once the exception is gone.
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
