"""Prompts -> greedy responses, fast: the one engine behind prediction, paraphrase, the LLM judge and evaluation.

Covered: any Hugging Face causal model whose attention keeps plain keys and values (Llama, Mistral, Qwen2/3, Gemma, Phi,
...), on CPU and GPU, with LoRA layers or without. In float32 the tokens are those of transformers' own greedy `generate`;
in bfloat16 a near-tie can fall the other way when the batch changes, there as here. Of the model's generation_config only
the end-of-turn tokens count. Not covered, and handed to transformers' `generate` with a warning: sliding windows shorter
than the longest row, state-space models, ALiBi, attention that takes no mask (flash, flex).

Why it is fast, in plain PyTorch:

1. Every layer has one preallocated buffer of keys and values. New ones are written in place; nothing is concatenated.
2. A row that ends gives its slot to the next prompt. Live rows stay contiguous (the last one moves into the hole), so
   what attention reads is always a slice, cut to the longest live row.
3. What prompts share is computed once: the prefix common to all of them, then the longer one of a family (a passage that
   is asked about five times, a prompt that is sampled ten times).
4. There is no padding. Rows that are read together all forward their last `width` tokens: where a row has fewer new ones,
   it computes a few of the shared ones again.
5. The number of slots follows from a memory budget. Running out of memory halves it and loses no row.
"""

import os
import warnings
from collections import deque
from collections.abc import Iterator, Sequence

import torch

from engine.decoding import Ending, Response, Row, Sampling, _choose
from engine.fallback import _fallback
from engine.slots import SlotCache, _probe, _slots
from support.cli import InputError

PREFILL_TOKENS = {"cpu": 1024, "cuda": 8192}  # the most that one forward reads: bounds its activations
REFILL_TOKENS = 512  # reading this many uses the machine well, so it need not wait for more free slots
FAMILY_TOKENS = 32  # a family has a forward of its own if that saves at least this many tokens


def generate(
    model,
    tokenizer,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    stop: str | None = None,
    *,
    memory_gib: float | None = None,
    sample: Sampling | None = None,
) -> Iterator[tuple[int, Response]]:
    """Yield (index of the prompt, response) for every prompt of token ids, each as soon as it is finished.

    A response ends with any end-of-turn token, after the string `stop`, at `max_new_tokens`, or where the model's context
    is full (the last two: finished=False). `memory_gib` bounds the keys and values (default: 80 % of what is free on a
    GPU, 2 GiB on the CPU). The model is in eval mode until the iterator is exhausted or closed.
    ValueError: max_new_tokens < 1, an empty prompt, a prompt that fills the context (named by its index).
    """
    context = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or 2**31
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    for index, prompt in enumerate(prompts):
        if not 0 < len(prompt) < context:
            raise ValueError(f"prompt {index} has {len(prompt)} tokens; the model takes 1 to {context - 1}")
    rows = [Row(i, list(p), len(p), min(len(p) + max_new_tokens, context)) for i, p in enumerate(prompts)]
    return _generate(model, rows, Ending(model, tokenizer, stop), memory_gib, sample)


@torch.no_grad()
def _generate(model, rows, ending, memory_gib, sample) -> Iterator[tuple[int, Response]]:
    training = model.training
    model.eval()
    try:
        probe, reason = _probe(model, rows) if rows else (None, "")
        if reason:
            warnings.warn(f"{type(model).__name__} has {reason}: falling back to transformers' generate", stacklevel=2)
            yield from _fallback(model, rows, ending, sample)
        elif rows:
            yield from _with_slots(model, probe, rows, ending, memory_gib, sample)
    finally:
        model.train(training)


def _with_slots(model, probe, rows, ending, memory_gib, sample) -> Iterator[tuple[int, Response]]:
    """Decode with as many slots as the budget holds. Out of memory: half as many, and the rows in flight queue again."""
    common = os.path.commonprefix([row.tokens for row in rows])[: min(row.start for row in rows) - 1]
    queue, live = deque(_families(rows, len(common))), []
    max_length = max(row.limit for row in rows)
    slots = min(len(rows), _slots(probe, max_length, memory_gib))
    while queue or live:
        try:
            cache = SlotCache(probe, slots, max_length)
            yield from _decode(model, cache, queue, live, common, ending, sample)
        except torch.OutOfMemoryError:
            if slots == 1:
                raise InputError(f"out of memory with one row of {max_length} tokens: take a lower --max-new-tokens, leave out "
                                 "the longest rows, or take a smaller model") from None
        if queue or live:
            queue.extendleft(reversed(live))
            live.clear()
            cache, slots = None, slots // 2
            torch.cuda.empty_cache()
            warnings.warn(f"out of memory: going on with {slots} rows at a time", stacklevel=2)


def _families(rows: list[Row], common: int) -> list[Row]:
    """Find rows that share more than the `common` prefix; return all rows, longest first, families together."""
    families: list[list[Row]] = []
    shared: list[int] = []
    for row in sorted(rows, key=lambda row: row.tokens):  # in this order relatives are neighbours
        if families:
            size, old = len(families[-1]), shared[-1]
            new = min(old, len(os.path.commonprefix([families[-1][-1].tokens, row.tokens])), row.start - 1)
            if size * (new - common) >= (size - 1) * (old - common) + FAMILY_TOKENS:  # joining saves tokens
                families[-1].append(row)
                shared[-1] = new
                continue
        families.append([row])
        shared.append(row.start - 1)
    for number, family in enumerate(families):
        for row in family:
            row.family, row.shared = (number, shared[number]) if len(family) > 1 else (-1, common)
    return [row for family in sorted(families, key=lambda f: -max(row.start for row in f)) for row in family]


def _decode(model, cache, queue, live, common, ending, sample) -> Iterator[tuple[int, Response]]:
    """Read new rows in where slots are free, else generate one token for every live row; hand out what has ended.

    `live[i]` sits in slot i. `queue` and `live` are the caller's, who finds every unfinished row there after an error.
    """
    if common:
        _forward(model, cache, cache.slots, [common], len(common))
    while queue or live:
        first, group = len(live), _admit(queue, len(live), cache.slots, PREFILL_TOKENS.get(model.device.type, 1024))
        if group:
            live += group
            logits = _prefill(model, cache, live, first, len(common))
        else:
            first, logits = 0, _forward(model, cache, 0, [row.tokens for row in live], 1)
        for row, token in zip(live[first:], _choose(logits, live[first:], sample), strict=True):
            row.tokens.append(token)
        slots = list(range(len(live)))
        for slot in reversed(range(first, len(live))):  # backwards: the row that moves has been looked at already
            if response := ending(live[slot]):
                yield live[slot].index, response
                live[slot], slots[slot] = live[-1], slots[-1]
                live.pop(), slots.pop()
        moves = [(source, target) for target, source in enumerate(slots) if source != target]
        if moves:
            cache.copy(*zip(*moves, strict=True), max(len(row.tokens) for row in live))


def _admit(queue: deque[Row], live: int, slots: int, most: int) -> list[Row]:
    """Take the rows to read now off the queue: about `most` tokens; none where they are too few for a forward."""
    count = width = prefixes = 0
    families = {-1}
    for row in queue:
        wider = max(width, len(row.tokens) - row.shared)
        longer = prefixes + (0 if row.family in families else row.shared)
        if count == slots - live or (count and (count + 1) * wider + longer > most):
            break
        count, width, prefixes = count + 1, wider, longer
        families.add(row.family)
    enough = not live or count == len(queue) or 4 * count >= slots or count * width + prefixes >= REFILL_TOKENS
    return [queue.popleft() for _ in range(count)] if enough else []


def _prefill(model, cache: SlotCache, live: list[Row], first: int, common: int) -> torch.Tensor:
    """Read the rows live[first:] into their slots; logits `[rows, vocabulary]` after their last tokens.

    What a row shares with its family is copied: from a relative's slot where one is live, else it is computed here once.
    """
    group = live[first:]
    holders = {-1: cache.slots} | {row.family: slot for slot, row in enumerate(live[:first]) if row.family >= 0}
    founders = list({row.family: row for row in group if row.family not in holders}.values())
    if founders:
        cache.copy([cache.slots] * len(founders), range(first, first + len(founders)), common)
        prefixes = [row.tokens[: row.shared] for row in founders]
        _forward(model, cache, first, prefixes, max(map(len, prefixes)) - common)
        holders |= {row.family: first + i for i, row in enumerate(founders)}
    sources = [holders[row.family] for row in group]
    cache.copy(sources, range(first, len(live)), max(row.shared for row in group))
    return _forward(model, cache, first, [r.tokens for r in group], max(len(r.tokens) - r.shared for r in group))


def _forward(model, cache: SlotCache, first: int, sequences: list[list[int]], width: int) -> torch.Tensor:
    """Forward the last `width` tokens of the sequences, one a slot from `first` on; logits `[rows, vocabulary]` at the end.

    What comes before them is in the cache. A sequence shorter than `width` repeats its first token, in place.
    """
    spans = [[max(i, 0) for i in range(len(sequence) - width, len(sequence))] for sequence in sequences]
    tokens = [[sequence[i] for i in span] for sequence, span in zip(sequences, spans, strict=True)]
    positions = torch.tensor(spans, device=model.device)
    output = model(
        input_ids=torch.tensor(tokens, device=model.device),
        position_ids=positions,
        attention_mask=cache.aim(first, positions, max(map(len, sequences))),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return output.logits[:, -1]
