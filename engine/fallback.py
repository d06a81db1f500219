"""The slower ways of generating, for models whose keys and values slots do not cover.

The first is transformers' own generate, the last a plain forward pass over the whole row for every token.
"""

import contextlib
import warnings
from collections import deque
from collections.abc import Iterator

import torch
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, StoppingCriteria

from engine.decoding import Ending, Response, Row, Sampling, choose_tokens
from engine.forward import plain_inputs
from engine.slots import memory_budget
from support.cli import InputError

MOST_ROWS = {"cpu": 32, "cuda": 256}  # of a batch: it runs until its longest response ends


def generate_padded(
    model,
    rows: list[Row],
    ending: Ending,
    sample: Sampling | None,
    rows_at_a_time: int,
    keeps_cache: bool = True,
) -> Iterator[tuple[int, Response]]:
    """(index of the prompt, response) of every row, in batches padded on the left, the longest prompts first.

    A model whose cache fails (`keeps_cache` is False) reads each row anew for every token. Out of memory: the
    batches are half as large from there on. InputError: one row alone does not fit.
    """
    waiting = deque(sorted(rows, key=lambda row: row.start, reverse=True))
    while waiting:
        batch = [waiting.popleft() for _ in range(min(rows_at_a_time, len(waiting)))]
        try:
            if keeps_cache:
                responses = generate_batch(model, batch, ending, sample)
            else:
                responses = [generate_without_cache(model, row, ending, sample) for row in batch]
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise out_of_memory(batch[0].limit) from None
            responses = None

        # Here and not in the `except`, where the traceback keeps all tensors alive.
        if responses is None:
            for row in batch:
                del row.tokens[row.start :]
            waiting.extendleft(reversed(batch))
            rows_at_a_time = len(batch) // 2
            torch.cuda.empty_cache()
            warnings.warn(f"out of memory: going on with {rows_at_a_time} rows at a time", stacklevel=2)
            continue
        for row, response in zip(batch, responses, strict=True):
            yield row.index, response


def out_of_memory(length: int) -> InputError:
    return InputError(
        f"out of memory with one row of {length} tokens: take a lower --max-new-tokens, leave out long rows, "
        "or take a smaller model"
    )


def generate_batch(model, rows: list[Row], ending: Ending, sample: Sampling | None) -> list[Response]:
    """The responses of one batch."""
    follower = FollowRows(rows, ending)
    greedy_generate(
        model,
        [row.tokens for row in rows],
        pad=min(ending.eos, default=0),
        max_new_tokens=max(row.limit - row.start for row in rows),
        stopping_criteria=[follower],
        logits_processor=[KeepDrawnToken(rows, sample)] if sample else [],
    )
    return follower.responses


def generate_without_cache(model, row: Row, ending: Ending, sample: Sampling | None) -> Response:
    """The response of one row, by a plain forward pass over the whole row for every token."""
    response = None
    while response is None:
        ids = torch.tensor(row.tokens, device=model.device)
        with transformers_attention(model):
            logits = model(**plain_inputs(model, ids)).logits[:, -1]
        row.tokens += choose_tokens(logits, [row], sample)
        response = ending(row)
    return response


def greedy_generate(model, prompts: list[list[int]], pad: int, **options):
    """transformers' generate on prompts padded on the left, with its own defaults in place of the model's."""
    width = max(map(len, prompts))
    tokens, mask = [], []
    for prompt in prompts:
        padding = width - len(prompt)
        tokens.append([pad] * padding + prompt)
        mask.append([0] * padding + [1] * len(prompt))

    models_own_config = model.generation_config
    model.generation_config = GenerationConfig(pad_token_id=pad)
    try:
        with transformers_attention(model):
            return model.generate(
                torch.tensor(tokens, device=model.device),
                attention_mask=torch.tensor(mask, device=model.device),
                do_sample=False,
                **options,
            )
    finally:
        model.generation_config = models_own_config


@contextlib.contextmanager
def transformers_attention(model):
    """A model whose attention was switched to "rows" computes with transformers' own again."""
    if model.config._attn_implementation != "rows":
        yield
        return
    model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation("rows")


class FollowRows(StoppingCriteria):
    """Follows a batch inside transformers' generate: each row's tokens, and its response once it ended."""

    def __init__(self, rows: list[Row], ending: Ending):
        self.rows = rows
        self.ending = ending
        self.responses: list[Response | None] = [None] * len(rows)

    def __call__(self, input_ids, scores, **kwargs):
        """`input_ids` `[rows, length]` -> `[rows]`: has it ended?"""
        for i, token in enumerate(input_ids[:, -1].tolist()):
            if self.responses[i] is None:
                self.rows[i].tokens.append(token)
                self.responses[i] = self.ending(self.rows[i])
        ended = [response is not None for response in self.responses]
        return torch.tensor(ended, device=input_ids.device)


class KeepDrawnToken(LogitsProcessor):
    """Leaves to greedy decoding only the token that `sample` draws."""

    def __init__(self, rows: list[Row], sample: Sampling):
        self.rows = rows
        self.sample = sample

    def __call__(self, input_ids, scores):
        """`scores` `[rows, vocabulary]` -> the same shape, -inf everywhere except at the drawn token."""
        drawn = choose_tokens(scores, self.rows, self.sample)
        drawn = torch.tensor(drawn, device=scores.device)[:, None]
        return torch.full_like(scores, float("-inf")).scatter(1, drawn, 0.0)


def rows_in_memory(model, length: int, memory_gib: float | None) -> int:
    """How many rows of `length` tokens a batch may have, by what two short rows leave in the cache."""
    most = MOST_ROWS.get(model.device.type, 32)
    try:
        one_token = cache_bytes(model, tokens=1)
        token_bytes = cache_bytes(model, tokens=2) - one_token
    except Exception:  # whatever a model raises that has a cache of another kind
        return min(most, 32)
    row_bytes = max(1, one_token + token_bytes * (length - 1))
    fitting = int(memory_budget(model.device, memory_gib) / row_bytes)
    return max(1, min(most, fitting))


def cache_bytes(model, tokens: int) -> int:
    """The bytes of all tensors that a row of so many tokens leaves in the layers of the cache."""
    cache = DynamicCache(config=model.config)
    ids = torch.zeros(1, tokens, dtype=torch.long, device=model.device)
    model(input_ids=ids, past_key_values=cache, use_cache=True)
    total = 0
    for layer in cache.layers:
        for held in vars(layer).values():
            tensors = held.values() if isinstance(held, dict) else [held]  # a state-space layer has several
            total += sum(tensor.nbytes for tensor in tensors if torch.is_tensor(tensor))
    return total
