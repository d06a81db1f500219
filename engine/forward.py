"""Rows of tokens through a model, in the ways that the model allows.

Rows of different lengths are packed end to end into one sequence `[1, sum of lengths]`, with positions that
restart at every row and attention that never crosses a row. Nothing is padded. The output head (the widest
matrix of a small model) runs only where a target token is predicted.

Rows must not see each other. Where attention is plain, over a sliding window too, `packed_attention` runs it
row by row. For every other kind transformers masks the other rows, which it recognises by position_ids that
start again. It does so only without an attention_mask and with use_cache=False. Pass either, and rows see
each other without a warning. Layers with a state (state spaces, linear attention, convolutions) and some
attention carry over what came before, whatever is passed. `Ways` says what a model allows, and
engine/trial.py finds that out.
"""

import inspect
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch.nn import functional as F

import engine.attention  # noqa: F401, registers the attention that is named "rows"

Row = tuple[list[int], list[bool]]  # (ids, is_target), both [length]; see engine.chat.training_ids


@dataclass
class Ways:
    """The fast ways that a model allows.

    By default there is none, so each row goes alone. That is right for every model.
    """

    packed: bool = False  # rows that are packed end to end give what each gives alone
    pack_limit: int = sys.maxsize  # the most tokens in a pack; a longer row goes alone
    shared_prefix: bool = False  # what all rows begin with may be read once
    keeps_logits: bool = False  # the model's logits can be asked for at some positions only
    plain_head: bool = False  # the logits are hidden states times the head's weight, and nothing else
    slow: list[str] = field(default_factory=list)  # a line for each fast way that was tried in vain


def target_logits(
    model, rows: list[Row], share_prefix: bool, ways: Ways
) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits `[targets, vocab]`, targets `[targets]`) of all rows' target tokens, in row order."""
    logits = []
    targets = []
    for inputs, predicts, group_targets in forwards(model, rows, share_prefix, ways):
        logits.append(logits_at(model, inputs, predicts, ways.keeps_logits))
        targets.append(group_targets)
    return torch.cat(logits), torch.cat(targets)


def target_loss(model, rows: list[Row], share_prefix: bool, ways: Ways) -> torch.Tensor:
    """-Σ log p(target) over all rows' target tokens, in nats.

    Where the head allows it, the logits are not kept.
    """
    head = model.get_output_embeddings() if ways.plain_head else None
    frozen = type(head) is torch.nn.Linear and not head.weight.requires_grad  # not where LoRA is on the head
    if not frozen:
        logits, targets = target_logits(model, rows, share_prefix, ways)
        return F.cross_entropy(logits.float(), targets, reduction="sum")

    total = 0
    for inputs, predicts, targets in forwards(model, rows, share_prefix, ways):
        hidden = model.base_model(**inputs).last_hidden_state[0, predicts].to(head.weight.dtype)
        total = total + HeadLoss.apply(hidden, head.weight, targets)
    return total


def forwards(model, rows: list[Row], share_prefix: bool, ways: Ways) -> Iterator[tuple]:
    """What `pack` returns, for each forward pass over some of the rows."""
    for group in split_by_tokens(rows, ways.pack_limit if ways.packed else 0):
        shared = common_prefix(group) if share_prefix and ways.shared_prefix else 0
        yield pack(model, group, shared)


def pack(model, rows: list[Row], shared: int = 0) -> tuple[dict, torch.Tensor, torch.Tensor]:
    """All rows as one sequence, in their order.

    The `shared` tokens that all rows begin with come once, at the front. Returns the model's inputs, the
    positions `[targets]` whose outputs predict the targets, and the targets `[targets]`. One row alone is
    passed as plainly as can be.
    """
    ids = []
    positions = []
    is_target = []
    lengths = []

    def add(row_ids, row_is_target, start):
        ids.extend(row_ids)
        positions.extend(range(start, start + len(row_ids)))
        is_target.extend(row_is_target)
        lengths.append(len(row_ids))

    shared = shared if len(rows) > 1 else 0
    if shared:
        add(rows[0][0][:shared], [False] * shared, start=0)
    for row_ids, row_is_target in rows:
        add(row_ids[shared:], row_is_target[shared:], start=shared)

    ids = torch.tensor(ids, device=model.device)
    targets_at = torch.tensor(is_target, device=model.device).nonzero().squeeze(1)
    inputs = plain_inputs(model, ids)
    if len(rows) > 1:
        inputs["position_ids"] = torch.tensor(positions, device=model.device)[None]
        if model.config._attn_implementation == "rows":
            inputs |= {"row_lengths": lengths, "shared": shared}  # read by packed_attention
    return inputs, targets_at - 1, ids[targets_at]  # the output at t - 1 predicts the token at t


def plain_inputs(model, ids: torch.Tensor) -> dict:
    """The inputs of one row of token ids `[length]`."""
    inputs = {"input_ids": ids[None]}
    if takes(model, "use_cache"):
        inputs["use_cache"] = False
    return inputs


def takes(model, argument: str) -> bool:
    """Can the model's forward be called with an argument of that name?"""
    parameters = inspect.signature(model.forward).parameters
    return argument in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def logits_at(model, inputs: dict, positions: torch.Tensor, keeps_logits: bool) -> torch.Tensor:
    """Logits `[positions, vocab]` at some positions of a sequence."""
    if keeps_logits:
        return model(**inputs, logits_to_keep=positions).logits[0]
    return model(**inputs).logits[0, positions]


class HeadLoss(torch.autograd.Function):
    """Cross entropy of softmax(h Wᵀ), summed, for h `[targets, hidden]` and a frozen W `[vocab, hidden]`.

    The vocabulary is the widest dimension of a model. Logits, their softmax and its gradient for every target
    of a step would be its largest tensors. So each chunk of targets goes forward, and back to h at once:
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
