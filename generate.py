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

import hashlib
import inspect
import os
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, StoppingCriteria
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from data import end_of_turn
from files import InputError

PREFILL_TOKENS = {"cpu": 1024, "cuda": 8192}  # the most that one forward reads: bounds its activations
REFILL_TOKENS = 512  # reading this many uses the machine well, so it need not wait for more free slots
FAMILY_TOKENS = 32  # a family has a forward of its own if that saves at least this many tokens
CPU_GIB = 2.0  # default budget for keys and values off the GPU
FALLBACK_BATCH = 32


@dataclass(frozen=True)
class Response:
    """What a model answered."""

    text: str  # without special tokens; ends right after the stop string where one was hit
    tokens: list[int]  # generated ids, with the end-of-turn token where there is one
    finished: bool  # False: the length limit cut it off


@dataclass(frozen=True)
class Sampling:
    """Draw tokens instead of taking the likeliest. A draw depends on seed, prompt and position, not on the batch."""

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    keys: Sequence[str] = ()  # a name for every prompt (default: its index), so that a part can be drawn again alone

    def __post_init__(self):
        if self.temperature <= 0 or not 0 < self.top_p <= 1:
            raise ValueError("sampling needs temperature > 0 and 0 < top_p <= 1 (for greedy decoding: sample=None)")

    def uniform(self, index: int, position: int) -> float:
        key = self.keys[index] if self.keys else index
        digest = hashlib.blake2b(f"{self.seed} {key} {position}".encode(), digest_size=6).digest()
        return int.from_bytes(digest, "big") / 2**48


@dataclass
class Row:
    """One prompt on its way to a response."""

    index: int
    tokens: list[int]  # the prompt, then what was generated so far
    start: int  # length of the prompt
    limit: int  # length at which the row must end
    family: int = -1  # rows of one family share their first `shared` tokens; -1: only what all prompts share
    shared: int = 0


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


class Ending:
    """Tells whether a row has ended, and with what response."""

    def __init__(self, model, tokenizer, stop: str | None):
        eos = model.generation_config.eos_token_id
        self.eos = {tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None}
        if getattr(tokenizer, "chat_template", None):
            self.eos.add(end_of_turn(tokenizer))  # what training_ids teaches the model to end with
        self.tokenizer, self.stop, self.closers = tokenizer, stop, {}

    def __call__(self, row: Row) -> Response | None:
        last, full = row.tokens[-1], len(row.tokens) >= row.limit
        if last not in self.eos and not full and not self._may_close(last):
            return None
        tokens = row.tokens[row.start :]
        text = self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if self.stop and self.stop in text:
            return Response(text[: text.index(self.stop) + len(self.stop)], tokens, True)
        return Response(text, tokens, last in self.eos) if full or last in self.eos else None

    def _may_close(self, token: int) -> bool:
        """Can this token complete the stop string? Only then is the row decoded, which keeps looking for it cheap."""
        if self.stop and token not in self.closers:
            piece = self.tokenizer.decode([token])
            # a token decoded alone can lose white space, and shows a part of a character as U+FFFD
            self.closers[token] = self.stop[-1] in piece or "\ufffd" in piece or self.stop[-1].isspace()
        return bool(self.stop) and self.closers[token]


class SlotCache(Cache):
    """Keys and values of all layers, each in one buffer `[slots + 1, kv_heads, max_length, head_dim]` written in place.

    The last slot keeps the prefix that all prompts share. `aim` says where the next forward writes; the model then calls
    `update` once a layer and attends over what it returns, `[rows, kv_heads, length, head_dim]`.
    """

    def __init__(self, probe: DynamicCache, slots: int, max_length: int):
        """`probe`: a cache in which the model has put one token; it shows each layer's shape, type and device."""
        super().__init__(layers=[])
        self.slots = slots
        self.buffers = [
            tuple(t.new_zeros(slots + 1, t.shape[1], max_length, t.shape[3]) for t in (layer.keys, layer.values))
            for layer in probe.layers
        ]

    def aim(self, first: int, positions: torch.Tensor, length: int) -> torch.Tensor:
        """Write next at `positions` `[rows, width]` of the slots from `first` on; attend over the first `length` keys.

        Returns the additive mask `[rows, 1, width, length]`: a token sees the keys at and before its own position.
        """
        keys, (rows, width) = self.buffers[0][0], positions.shape
        self.view = slice(first, first + rows), slice(None), slice(length)
        self.target = torch.arange(first, first + rows, device=keys.device)[:, None], slice(None), positions
        self.past = length - width
        hidden = torch.arange(length, device=keys.device) > positions[:, None, :, None]
        return keys.new_zeros(hidden.shape).masked_fill_(hidden, torch.finfo(keys.dtype).min)

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        for buffer, new in zip(self.buffers[layer_idx], (key_states, value_states), strict=True):
            buffer[self.target] = new.transpose(1, 2)
        return tuple(buffer[self.view] for buffer in self.buffers[layer_idx])

    def copy(self, sources: Sequence[int], targets: Sequence[int], length: int) -> None:
        """Copy the first `length` positions of the slots `sources` to the slots `targets`, all at once."""
        source, target = torch.tensor([list(sources), list(targets)], device=self.buffers[0][0].device)
        for buffer in (buffer for layer in self.buffers for buffer in layer):
            buffer[target, :, :length] = buffer[source, :, :length]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.past


def _probe(model, rows: list[Row]) -> tuple[DynamicCache | None, str]:
    """(A cache in which the model has put one token, ""), or (None, what the model has that slots do not cover)."""
    config, longest = model.config.get_text_config(decoder=True), max(row.limit for row in rows)
    if not {"position_ids", "logits_to_keep"} <= set(inspect.signature(model.forward).parameters):
        return None, "a forward without position_ids or logits_to_keep"
    if model.config.is_encoder_decoder or getattr(config, "alibi", False):
        return None, "an encoder or ALiBi"
    if any(kind in config._attn_implementation for kind in ("flash", "flex", "paged")):
        return None, f"{config._attn_implementation} attention"
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in ("dynamic", "longrope") and longest > rope.get("original_max_position_embeddings", 0):
        return None, "rotary frequencies that change with the length"
    cache = DynamicCache(config=model.config)
    model(input_ids=torch.tensor([rows[0].tokens[:1]], device=model.device), past_key_values=cache, use_cache=True)
    for layer in cache.layers:
        window = layer.sliding_window if type(layer) is DynamicSlidingWindowLayer else longest
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) or layer.keys is None or window < longest:
            return None, f"a cache of the kind {type(layer).__name__}"
    return cache, ""


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


def _slots(probe: DynamicCache, max_length: int, memory_gib: float | None) -> int:
    """How many rows of `max_length` tokens the memory budget holds, at least 1."""
    tensors = [t for layer in probe.layers for t in (layer.keys, layer.values)]
    device, token_bytes = tensors[0].device, sum(t.numel() * t.element_size() for t in tensors)  # of the probe's token
    if memory_gib is None and device.type == "cuda":
        torch.cuda.empty_cache()
        memory_gib = 0.8 * torch.cuda.mem_get_info(device)[0] / 2**30
    return max(1, int((memory_gib or CPU_GIB) * 2**30 / (token_bytes * max_length)) - 1)  # one holds the common prefix


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


def _choose(logits: torch.Tensor, rows: list[Row], sample: Sampling | None) -> list[int]:
    """The next token of each row, from logits `[rows, vocabulary]`, in one transfer off the device."""
    if sample is None:
        return logits.argmax(-1).tolist()
    probs, ids = torch.softmax(logits.float() / sample.temperature, -1).sort(descending=True, stable=True)
    probs = probs.masked_fill(probs.cumsum(-1) - probs >= sample.top_p, 0)  # the smallest set of mass top_p
    mass = probs.cumsum(-1)
    uniforms = [[sample.uniform(row.index, len(row.tokens) - row.start)] for row in rows]
    rank = (mass <= torch.tensor(uniforms, device=mass.device) * mass[:, -1:]).sum(-1, keepdim=True)
    rank = torch.minimum(rank, (probs > 0).sum(-1, keepdim=True) - 1)  # rounding can point past the set
    return ids.gather(-1, rank).flatten().tolist()


def _fallback(model, rows, ending, sample) -> Iterator[tuple[int, Response]]:
    """transformers' generate, in padded batches sorted by length, with its own defaults in place of the model's."""
    rows = sorted(rows, key=lambda row: -row.start)
    for batch in (rows[i : i + FALLBACK_BATCH] for i in range(0, len(rows), FALLBACK_BATCH)):
        width, watch, pad = batch[0].start, _Watch(batch, ending), min(ending.eos, default=0)
        tokens = [[pad] * (width - row.start) + row.tokens for row in batch]
        mask = [[0] * (width - row.start) + [1] * row.start for row in batch]
        own, model.generation_config = model.generation_config, GenerationConfig(pad_token_id=pad)
        try:
            model.generate(
                torch.tensor(tokens, device=model.device),
                attention_mask=torch.tensor(mask, device=model.device),
                max_new_tokens=max(row.limit - row.start for row in batch),
                do_sample=False,
                stopping_criteria=[watch],
                logits_processor=[_Draw(batch, sample)] if sample else [],
            )
        finally:
            model.generation_config = own
        yield from zip((row.index for row in batch), watch.responses, strict=True)


class _Watch(StoppingCriteria):
    """Follows a batch inside transformers' generate: each row's tokens, and its response once it has ended."""

    def __init__(self, rows: list[Row], ending: Ending):
        self.rows, self.ending, self.responses = rows, ending, [None] * len(rows)

    def __call__(self, input_ids, scores, **kwargs):
        for i, token in enumerate(input_ids[:, -1].tolist()):
            if self.responses[i] is None:
                self.rows[i].tokens.append(token)
                self.responses[i] = self.ending(self.rows[i])
        return torch.tensor([response is not None for response in self.responses], device=input_ids.device)


class _Draw(LogitsProcessor):
    """Leaves to greedy decoding only the token that `sample` draws."""

    def __init__(self, rows: list[Row], sample: Sampling):
        self.rows, self.sample = rows, sample

    def __call__(self, input_ids, scores):
        drawn = torch.tensor(_choose(scores, self.rows, self.sample), device=scores.device)[:, None]
        return torch.full_like(scores, float("-inf")).scatter(1, drawn, 0.0)
