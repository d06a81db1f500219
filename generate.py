"""Prompts -> greedy responses, fast: the one engine behind prediction, paraphrase, the LLM judge and evaluation.

Covered: any Hugging Face causal model whose attention keeps plain keys and values (Llama, Mistral, Qwen2/3, Gemma, Phi, ...),
on CPU and GPU, with LoRA layers or without. The tokens are those of transformers' own greedy `generate` (exactly so in float32;
in bfloat16 a near-tie can fall the other way, there as here, when the batch changes). A model's generation_config is ignored,
but for its end-of-turn tokens. Not covered, and handed to transformers' `generate` with a warning: sliding windows shorter
than the longest row, state-space and encoder-decoder models, ALiBi, attention other than sdpa and eager.

Why it is fast, in plain PyTorch:

1. Every layer has one preallocated buffer of keys and values. New ones are written in place; nothing is concatenated.
2. A row that ends gives its slot to the next prompt. Live rows stay contiguous (the last one moves into the hole), so what
   attention reads is always a slice, cut to the longest live row.
3. What prompts share is computed once: the prefix common to all of them, then the longer one of a family (one passage asked
   about five times, one prompt sampled ten times).
4. There are no padding tokens. Rows that are read in together all forward their last `width` tokens; the shorter ones
   compute a few of the shared tokens again.
5. The number of slots follows from a memory budget; running out of memory halves it and loses no row.
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

PREFILL_TOKENS = 4096  # most tokens one prefill forward takes: bounds its activations
REFILL_TOKENS = 512  # a refill of this many tokens uses the machine well, so it need not wait for more free slots
FAMILY_TOKENS = 32  # a family's own forward must save at least this many tokens
CPU_GIB = 1.0  # default budget for keys and values off the GPU
FALLBACK_BATCH = 32


@dataclass(frozen=True)
class Response:
    """What a model answered. `finished` is False where the length limit cut it off."""

    text: str  # without special tokens; ends right after the stop string where one was hit
    tokens: list[int]  # generated ids, with the end-of-turn token where there is one
    finished: bool


@dataclass(frozen=True)
class Sampling:
    """Draw tokens instead of taking the likeliest. A draw depends on (seed, prompt's key, position), not on the batch."""

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    keys: Sequence[str] = ()  # a name for every prompt (default: its index), so that a part can be drawn again alone

    def __post_init__(self):
        if self.temperature <= 0 or not 0 < self.top_p <= 1:
            raise ValueError("sampling needs temperature > 0 and 0 < top_p <= 1 (sample=None is greedy)")

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


class Ending:
    """Tells when a row has ended, and with what response."""

    def __init__(self, model, tokenizer, stop: str | None):
        eos = model.generation_config.eos_token_id
        self.eos = {tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None}
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
        """Can this token complete the stop string? Only then is the response decoded, which makes looking for it cheap."""
        if self.stop and token not in self.closers:
            piece = self.tokenizer.decode([token])
            # white space is lost, and part of a character shown as U+FFFD, when a token is decoded on its own
            self.closers[token] = self.stop[-1] in piece or "\ufffd" in piece or self.stop[-1].isspace()
        return bool(self.stop) and self.closers[token]


class SlotCache(Cache):
    """Keys and values of all layers, each in one buffer [slots + 1, kv_heads, max_length, head_dim] written in place.

    The last slot keeps the prefix that all prompts share. `aim` says which slots and positions the next forward writes;
    the model then calls `update` once a layer and attends over what comes back: [rows, kv_heads, length, head_dim].
    """

    def __init__(self, probe: DynamicCache, slots: int, max_length: int):
        """`probe`: a cache that the model has filled with one token; it shows each layer's shape, type and device."""
        super().__init__(layers=[])
        self.slots = slots
        self.buffers = [
            tuple(t.new_zeros(slots + 1, t.shape[1], max_length, t.shape[3]) for t in (layer.keys, layer.values))
            for layer in probe.layers
        ]

    def aim(self, first: int, positions: torch.Tensor, length: int) -> torch.Tensor:
        """Write next at `positions` [rows, width] of the slots from `first` on, attend over the first `length` keys.

        Returns the additive mask [rows, 1, width, length]: a token sees the keys at its own position and before it.
        """
        keys, (rows, width) = self.buffers[0][0], positions.shape
        self.view = slice(first, first + rows), slice(None), slice(length)
        self.target = torch.arange(first, first + rows, device=keys.device)[:, None], slice(None), positions
        self.past = length - width
        unseen = torch.arange(length, device=keys.device) > positions[:, None, :, None]
        return torch.zeros(unseen.shape, dtype=keys.dtype, device=keys.device).masked_fill_(
            unseen, torch.finfo(keys.dtype).min
        )

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        for buffer, new in zip(self.buffers[layer_idx], (key_states, value_states), strict=True):
            buffer[self.target] = new.transpose(1, 2)
        return tuple(buffer[self.view] for buffer in self.buffers[layer_idx])

    def copy(self, sources: list[int], first: int, length: int) -> None:
        """Copy the first `length` positions of the slots `sources` to the slots from `first` on."""
        for buffer in (buffer for layer in self.buffers for buffer in layer):
            buffer[first : first + len(sources), :, :length] = buffer[sources, :, :length]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.past

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.past + query_length, 0


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
    is full (the last two: finished=False). `memory_gib` bounds the keys and values (default: 80 % of what is free on the GPU,
    1 GiB elsewhere). The model is in eval mode until the iterator is exhausted or closed.
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
    if not rows:
        return
    training = model.training
    model.eval()
    try:
        probe, reason = _probe(model, rows)
        if reason:
            warnings.warn(f"{type(model).__name__}: {reason}; falling back to transformers' generate", stacklevel=2)
            yield from _fallback(model, rows, ending, sample)
        else:
            yield from _with_slots(model, probe, rows, ending, memory_gib, sample)
    finally:
        model.train(training)


def _probe(model, rows: list[Row]) -> tuple[DynamicCache | None, str]:
    """Let the model fill a cache with one token: (that cache, ""), or (None, why its cache is not one for slots)."""
    config = model.config.get_text_config(decoder=True)
    if model.config.is_encoder_decoder or getattr(config, "alibi", False):
        return None, "an encoder-decoder or ALiBi model"
    if not {"position_ids", "logits_to_keep"} <= set(inspect.signature(model.forward).parameters):
        return None, "forward takes no position_ids or no logits_to_keep"
    if any(word in config._attn_implementation for word in ("flash", "flex", "paged")):  # these take no 4-D mask
        return None, f"attention {config._attn_implementation!r}"
    longest = max(row.limit for row in rows)
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in ("dynamic", "longrope") and longest > rope.get("original_max_position_embeddings", 0):
        return None, "rotary frequencies that change with the length"
    cache = DynamicCache(config=model.config)
    model(input_ids=torch.tensor([rows[0].tokens[:1]], device=model.device), past_key_values=cache, use_cache=True)
    for layer in cache.layers:
        window = layer.sliding_window if type(layer) is DynamicSlidingWindowLayer else longest
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) or layer.keys is None or window < longest:
            return None, f"a cache layer of the kind {type(layer).__name__}"
    return cache, ""


def _with_slots(model, probe, rows, ending, memory_gib, sample) -> Iterator[tuple[int, Response]]:
    """Decode with as many slots as the budget holds; out of memory: half as many, the rows in flight queue again."""
    common = os.path.commonprefix([row.tokens for row in rows])[: min(row.start for row in rows) - 1]
    queue, live = deque(_families(rows, len(common))), []
    max_length = max(row.limit for row in rows)
    slots = _slots(probe, max_length, len(rows), memory_gib)
    while queue or live:
        queue.extendleft(reversed(live))
        live.clear()
        try:
            cache = SlotCache(probe, slots, max_length)
            yield from _decode(model, cache, queue, live, common, ending, sample)
        except torch.OutOfMemoryError:
            if slots == 1:
                raise
        if queue or live:
            cache, slots = None, slots // 2
            torch.cuda.empty_cache()
            warnings.warn(f"out of memory: going on with {slots} rows at a time", stacklevel=2)


def _slots(probe: DynamicCache, max_length: int, rows: int, memory_gib: float | None) -> int:
    """How many rows of `max_length` tokens the memory budget holds, at least 1 and at most as many as there are."""
    tensors = [t for layer in probe.layers for t in (layer.keys, layer.values)]
    if memory_gib is None and tensors[0].is_cuda:
        torch.cuda.empty_cache()
        memory_gib = 0.8 * torch.cuda.mem_get_info(tensors[0].device)[0] / 2**30
    budget = (memory_gib or CPU_GIB) * 2**30
    token_bytes = sum(t.numel() * t.element_size() for t in tensors)  # the probe holds one token
    return max(1, min(rows, int(budget / (token_bytes * max_length)) - 1))  # one slot is for the common prefix


def _families(rows: list[Row], common: int) -> list[Row]:
    """Find rows that share more than the `common` prefix of all; return the queue, longest first, families together."""
    families: list[list[Row]] = []
    shared: list[int] = []
    for row in sorted(rows, key=lambda row: row.tokens):  # in this order relatives are neighbours
        if families:
            size, old = len(families[-1]), shared[-1]
            new = min(old, len(os.path.commonprefix([families[-1][-1].tokens, row.tokens])), row.start - 1)
            if size * (new - common) >= (size - 1) * (old - common) + FAMILY_TOKENS:  # joining saves more tokens
                families[-1].append(row)
                shared[-1] = new
                continue
        families.append([row])
        shared.append(row.start - 1)
    for number, family in enumerate(families):
        for row in family:
            row.family, row.shared = (number, shared[number]) if len(family) > 1 else (-1, common)
    families.sort(key=lambda family: -max(row.start for row in family))
    return [row for family in families for row in family]


def _decode(model, cache, queue, live, common, ending, sample) -> Iterator[tuple[int, Response]]:
    """The loop: read in new rows where slots are free, else one token for every live row; hand out what has ended.

    `live[i]` sits in slot i. `queue` and `live` belong to the caller, who finds every unfinished row in them after an error.
    """
    if common:
        _forward(model, cache, cache.slots, [common], [len(common)], len(common))
    while queue or live:
        first, group = len(live), _admit(queue, len(live), cache.slots)
        if group:
            live += group
            logits = _prefill(model, cache, live, first, len(common))
        else:
            first = 0
            logits = _forward(model, cache, 0, [row.tokens for row in live], [len(row.tokens) for row in live], 1)
        for row, token in zip(live[first:], _choose(logits, live[first:], sample), strict=True):
            row.tokens.append(token)
        for slot in reversed(range(first, len(live))):  # backwards: the last live row has been looked at already
            response = ending(live[slot])
            if response:
                done, last = live[slot], live.pop()
                if done is not last:
                    live[slot] = last
                    cache.copy([len(live)], slot, len(last.tokens))
                yield done.index, response


def _admit(queue: deque[Row], live: int, slots: int) -> list[Row]:
    """Take the rows to read in now off the queue; none while the free slots are too few to be worth a forward."""
    count = width = 0
    for row in queue:
        wider = max(width, len(row.tokens) - row.shared)
        if count == slots - live or (count and (count + 1) * wider > PREFILL_TOKENS):
            break
        count, width = count + 1, wider
    enough = not live or count == len(queue) or 4 * count >= slots or count * width >= REFILL_TOKENS
    return [queue.popleft() for _ in range(count)] if enough else []


def _prefill(model, cache: SlotCache, live: list[Row], first: int, common: int) -> torch.Tensor:
    """Read the rows live[first:] into their slots; logits [rows, vocabulary] after their last tokens.

    A row starts from a copy of what its family shares: from a relative's slot where one is live, else computed here once.
    """
    group = live[first:]
    holders = {-1: cache.slots} | {row.family: slot for slot, row in enumerate(live[:first]) if row.family >= 0}
    founders = list({row.family: row for row in group if row.family not in holders}.values())
    if founders:
        ends = [row.shared for row in founders]
        cache.copy([cache.slots] * len(founders), first, common)
        _forward(model, cache, first, [row.tokens for row in founders], ends, max(ends) - common)
        holders |= {row.family: first + i for i, row in enumerate(founders)}
    cache.copy([holders[row.family] for row in group], first, max(row.shared for row in group))
    ends = [len(row.tokens) for row in group]
    return _forward(model, cache, first, [row.tokens for row in group], ends, max(len(r.tokens) - r.shared for r in group))


def _forward(model, cache: SlotCache, first: int, rows: list[list[int]], ends: list[int], width: int) -> torch.Tensor:
    """Forward the tokens [end - width, end) of each row into the slots from `first` on; logits [rows, vocabulary] at the end.

    What lies before must be in the cache. Where a row has fewer than `width` tokens, its first one is repeated in place.
    """
    spans = [[max(position, 0) for position in range(end - width, end)] for end in ends]
    positions = torch.tensor(spans, device=model.device)
    mask = cache.aim(first, positions, max(ends))
    tokens = torch.tensor([[row[p] for p in span] for row, span in zip(rows, spans, strict=True)], device=model.device)
    return model(
        input_ids=tokens,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    ).logits[:, -1]


def _choose(logits: torch.Tensor, rows: list[Row], sample: Sampling | None) -> list[int]:
    """The next token of each row, from logits [rows, vocabulary]: one transfer off the device."""
    if sample is None:
        return logits.argmax(-1).tolist()
    probs, ids = torch.softmax(logits.float() / sample.temperature, -1).sort(descending=True, stable=True)
    probs = probs.masked_fill(probs.cumsum(-1) - probs >= sample.top_p, 0)  # the smallest set with mass top_p
    mass = probs.cumsum(-1)
    uniforms = [[sample.uniform(row.index, len(row.tokens) - row.start)] for row in rows]
    rank = (mass <= torch.tensor(uniforms, device=mass.device) * mass[:, -1:]).sum(-1, keepdim=True)
    rank = torch.minimum(rank, (probs > 0).sum(-1, keepdim=True) - 1)  # rounding can point past the set
    return ids.gather(-1, rank).flatten().tolist()


class _Watch(StoppingCriteria):
    """Follows a batch inside transformers' generate: records each row's tokens, and its response once it has ended."""

    def __init__(self, rows: list[Row], ending: Ending):
        self.rows, self.ending = rows, ending
        self.responses: list[Response | None] = [None] * len(rows)

    def __call__(self, input_ids, scores, **kwargs):
        for i, token in enumerate(input_ids[:, -1].tolist()):
            if self.responses[i] is None:
                self.rows[i].tokens.append(token)
                self.responses[i] = self.ending(self.rows[i])
        return torch.tensor([response is not None for response in self.responses], device=input_ids.device)


class _Draw(LogitsProcessor):
    """Leaves greedy decoding only the token that `sample` draws."""

    def __init__(self, rows: list[Row], sample: Sampling):
        self.rows, self.sample = rows, sample

    def __call__(self, input_ids, scores):
        drawn = torch.tensor(_choose(scores, self.rows, self.sample), device=scores.device)[:, None]
        return torch.full_like(scores, float("-inf")).scatter(1, drawn, 0.0)


def _fallback(model, rows, ending, sample) -> Iterator[tuple[int, Response]]:
    """transformers' generate, in padded batches sorted by length, with its defaults in place of the model's."""
    rows = sorted(rows, key=lambda row: -row.start)
    for batch in (rows[i : i + FALLBACK_BATCH] for i in range(0, len(rows), FALLBACK_BATCH)):
        width, watch = batch[0].start, _Watch(batch, ending)
        pad = min(ending.eos, default=0)
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
