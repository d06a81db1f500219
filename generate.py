"""Prompts -> responses, greedy or drawn: one engine for selection, the LLM judge and evaluation.

Covered: any Hugging Face causal model whose attention keeps keys and values, with sliding windows or chunks
too (Llama, Mistral, Qwen, Gemma, gpt-oss, Phi, ...), on CPU and GPU, with LoRA layers or without. A trial
on the model decides (engine/slot_trial.py). In float32 the tokens are those of transformers' own greedy
`generate`. In bfloat16 a near-tie can fall the other way when the batch changes, there as here. Of the
model's generation_config only the end-of-turn tokens count. Models on which the trial fails (state spaces,
most of ALiBi, attention that takes no mask) are handed to transformers' `generate`, and where that fails
too, to a plain forward pass for every token. A warning says why.

Why it is fast, in plain PyTorch:

1. Every layer has one preallocated buffer of keys and values. New ones are written in place, nothing is
   concatenated.
2. A row that ends gives its slot to the next prompt. Running rows stay contiguous (the last one moves into
   the free slot), so what attention reads is always a slice, cut to the longest running row.
3. What prompts share is computed once: the prefix common to all of them, then the longer one of a group (a
   passage that is asked about five times, a prompt that is sampled ten times).
4. There is no padding. The rows of one prefill are all as wide as the one with the most new tokens. A row
   with fewer begins earlier, and computes some of its shared tokens again.
5. The number of slots follows from a memory budget. Running out of memory halves it and loses no row.
"""

import warnings
from collections import deque
from collections.abc import Iterator, Sequence

import torch

from engine.decoding import Ending, Response, Row, Sampling, choose_tokens
from engine.fallback import generate_padded, out_of_memory, rows_in_memory
from engine.model import context_length
from engine.prefixes import group_by_prefix, shared_prefix
from engine.slot_trial import longest_harmless_row, why_no_cache, why_no_padding, why_no_slots
from engine.slots import SlotCache, forward_in_slots, layers_of, slots_in_memory

PREFILL_TOKENS = {"cpu": 1024, "cuda": 8192}  # the most that one forward reads: bounds its activations
REFILL_TOKENS = 512  # reading this many uses the machine well, so it need not wait for more free slots


def generate(
    model,
    tokenizer,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    stop: str | Sequence[str] | None = None,
    *,
    chat: bool = True,
    memory_gib: float | None = None,
    sample: Sampling | None = None,
) -> Iterator[tuple[int, Response]]:
    """Yield (index of the prompt, response) for every prompt of token ids, each as soon as it is finished.

    A response ends with any end-of-turn token, after the string `stop` (or the first of several), at
    `max_new_tokens`, or where the model's context is full (the last two: finished=False). Without `chat` the
    prompts are texts that the model goes on with. `memory_gib` bounds the keys and values (default: 80 % of
    what is free on a GPU, 2 GiB on the CPU). The model is in eval mode until the iterator is exhausted or
    closed. ValueError: max_new_tokens < 1, an empty prompt, a prompt that fills the context (named by its
    index).
    """
    context = context_length(model.config)
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    rows = []
    for index, prompt in enumerate(prompts):
        if not 0 < len(prompt) < context:
            raise ValueError(f"prompt {index} has {len(prompt)} tokens; the model takes 1 to {context - 1}")
        limit = min(len(prompt) + max_new_tokens, context)
        rows.append(Row(index, list(prompt), start=len(prompt), limit=limit))
    return generate_rows(model, rows, Ending(model, tokenizer, stop, chat), memory_gib, sample)


@torch.no_grad()
def generate_rows(
    model, rows: list[Row], ending: Ending, memory_gib: float | None = None, sample: Sampling | None = None
) -> Iterator[tuple[int, Response]]:
    """Generate in slots where they give the model's own logits, else in a slower way."""
    if not rows:
        return
    was_training = model.training
    model.eval()
    try:
        # 1. Rows so long that they change the rotary frequencies, also of the rows beside them: alone.
        harmless_length = longest_harmless_row(model, longest(rows))
        long_rows = [row for row in rows if row.limit > harmless_length]
        if long_rows:
            warn(f"{len(long_rows)} rows of more than {harmless_length} tokens change the rotary frequencies "
                 f"of {type(model).__name__}: they are generated one at a time")
            keeps_cache = not why_no_cache(model, longest(long_rows))
            yield from generate_padded(model, long_rows, ending, sample, 1, keeps_cache)

        # 2. All others side by side: in slots, or padded, or where the model bears neither, alone.
        rows = [row for row in rows if row.limit <= harmless_length]
        if not rows:
            return
        reason = why_no_slots(model, longest(rows))
        if reason:
            rows_at_a_time = rows_in_memory(model, longest(rows), memory_gib)
            slower_way = "transformers' generate"
            padding = why_no_padding(model, longest(rows))
            if padding:
                rows_at_a_time = 1
                reason += f"; {padding}, so one row at a time"
            no_cache = padding and why_no_cache(model, longest(rows))
            if no_cache:
                slower_way = "a forward pass over the whole row for every token"
            warn(f"{type(model).__name__}: falling back to {slower_way} ({reason})")
            yield from generate_padded(model, rows, ending, sample, rows_at_a_time, keeps_cache=not no_cache)
        else:
            yield from SlotDecoder(model, rows, ending, memory_gib, sample).run()
    finally:
        model.train(was_training)


def longest(rows: list[Row]) -> int:
    """The most tokens that one of the rows can have, prompt and response."""
    return max(row.limit for row in rows)


def warn(message: str) -> None:
    warnings.warn(message, stacklevel=3)


class SlotDecoder:
    """Rows are `waiting` for a slot, or `running`: `running[i]` sits in slot i of the cache."""

    def __init__(
        self, model, rows: list[Row], ending: Ending, memory_gib: float | None, sample: Sampling | None
    ):
        self.model = model
        self.ending = ending
        self.sample = sample
        self.prefill_tokens = PREFILL_TOKENS.get(model.device.type, 1024)

        self.common_prefix = shared_prefix(rows)
        self.waiting: deque[Row] = deque()
        self.running: list[Row] = []
        self.group_of = {}  # index of a row -> its PrefixGroup
        for group in group_by_prefix(rows, common=len(self.common_prefix)):
            self.waiting.extend(group.rows)
            for row in group.rows:
                self.group_of[row.index] = group

        self.layers = layers_of(model)
        self.max_length = longest(rows)
        self.slots = min(len(rows), slots_in_memory(self.layers, self.max_length, memory_gib))

    def run(self) -> Iterator[tuple[int, Response]]:
        """Decode all rows. Out of memory: half as many slots from then on, the running rows wait again."""
        while self.waiting or self.running:
            try:
                yield from self.run_with_one_cache()
            except torch.OutOfMemoryError:
                if self.slots == 1:
                    raise out_of_memory(self.max_length) from None

            # Here and not in the `except`, where the traceback keeps all tensors alive.
            if self.waiting or self.running:
                self.waiting.extendleft(reversed(self.running))
                self.running.clear()
                self.cache = None
                self.slots //= 2
                torch.cuda.empty_cache()
                warn(f"out of memory: going on with {self.slots} rows at a time")

    def run_with_one_cache(self) -> Iterator[tuple[int, Response]]:
        """Whatever interrupts it, every unfinished row is waiting or running, and has all its tokens."""
        self.cache = SlotCache(self.layers, self.slots, self.max_length)
        if self.common_prefix:
            self.forward(self.cache.common_slot, [self.common_prefix], width=len(self.common_prefix))
        while self.waiting or self.running:
            yield from self.step()

    def step(self) -> Iterator[tuple[int, Response]]:
        """Read new rows in where enough slots are free, else generate one more token of every running row."""
        new_rows = self.admit()
        if new_rows:
            self.running.extend(new_rows)
            rows = new_rows
            logits = self.prefill(new_rows)
        else:
            rows = self.running
            logits = self.decode()

        for row, token in zip(rows, choose_tokens(logits, rows, self.sample), strict=True):
            row.tokens.append(token)
        yield from self.finish(rows)

    def admit(self) -> list[Row]:
        """Take rows off `waiting` that are to be read now: as many as the free slots and one forward hold."""
        free = self.slots - len(self.running)
        count = width = prefix_tokens = 0
        groups = set()
        for row in self.waiting:
            group = self.group_of[row.index]
            wider = max(width, len(row.tokens) - group.shared)
            more_prefix_tokens = prefix_tokens
            if group not in groups and len(group.rows) > 1:
                more_prefix_tokens += group.shared
            fits = (count + 1) * wider + more_prefix_tokens <= self.prefill_tokens
            if count == free or (count > 0 and not fits):
                break
            count += 1
            width = wider
            prefix_tokens = more_prefix_tokens
            groups.add(group)

        # A forward over a few tokens wastes the machine: rather decode on, until more slots are free.
        nothing_to_decode = not self.running
        last_rows = count == len(self.waiting)
        fills_a_quarter_of_the_slots = count >= self.slots / 4
        fills_a_forward = count * width + prefix_tokens >= REFILL_TOKENS
        if not (nothing_to_decode or last_rows or fills_a_quarter_of_the_slots or fills_a_forward):
            return []
        return [self.waiting.popleft() for _ in range(count)]

    def prefill(self, new_rows: list[Row]) -> torch.Tensor:
        """Read the new rows, the last of `running`, into their slots -> logits `[rows, vocabulary]`."""
        first_new = len(self.running) - len(new_rows)
        common = len(self.common_prefix)
        slot_with_prefix = {}
        for slot, row in enumerate(self.running[:first_new]):
            slot_with_prefix[self.group_of[row.index]] = slot

        # 1. The prefix of a group that has no slot yet is computed once, here, in the first of the new slots.
        first_of_group = []
        for row in new_rows:
            group = self.group_of[row.index]
            if len(group.rows) == 1:
                slot_with_prefix[group] = self.cache.common_slot
            elif group not in slot_with_prefix:
                slot_with_prefix[group] = first_new + len(first_of_group)
                first_of_group.append(row.tokens[: group.shared])
        if first_of_group:
            targets = range(first_new, first_new + len(first_of_group))
            self.cache.copy([self.cache.common_slot] * len(targets), targets, length=common)
            self.forward(first_new, first_of_group, width=max(map(len, first_of_group)) - common)

        # 2. Every row gets a copy of the prefix that it shares, and computes what comes after.
        groups = [self.group_of[row.index] for row in new_rows]
        sources = [slot_with_prefix[group] for group in groups]
        targets = range(first_new, len(self.running))
        # All at once, so that a slot may be source and target.
        self.cache.copy(sources, targets, length=max(group.shared for group in groups))
        own_tokens = [len(row.tokens) - group.shared for row, group in zip(new_rows, groups, strict=True)]
        return self.forward(first_new, [row.tokens for row in new_rows], width=max(own_tokens))

    def decode(self) -> torch.Tensor:
        """One more token of every running row: logits `[rows, vocabulary]`."""
        return self.forward(0, [row.tokens for row in self.running], width=1)

    def forward(self, first_slot: int, sequences: list[list[int]], width: int) -> torch.Tensor:
        """The last `width` tokens of the sequences, one a slot: logits `[rows, vocabulary]` at their ends."""
        return forward_in_slots(
            self.model, self.cache, first_slot=first_slot, sequences=sequences, width=width)

    def finish(self, rows: list[Row]) -> Iterator[tuple[int, Response]]:
        """Hand out which of these rows have ended. The last running rows move into their slots."""
        ended = {}
        for row in rows:
            response = self.ending(row)
            if response:
                ended[row.index] = response

        remaining = len(self.running) - len(ended)
        is_free = [row.index in ended for row in self.running]
        free_slots = [slot for slot in range(remaining) if is_free[slot]]
        moving = [slot for slot in range(remaining, len(self.running)) if not is_free[slot]]
        for source, target in zip(moving, free_slots, strict=True):
            self.running[target] = self.running[source]
        del self.running[remaining:]

        yield from ended.items()  # before the copy, which can run out of memory
        if moving:
            self.cache.copy(moving, free_slots, length=max(len(row.tokens) for row in self.running))
