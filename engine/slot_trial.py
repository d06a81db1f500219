"""Which way of generating gives a model's own logits: tried on it, not read off its configuration.

The made-up rows of a trial are as long as the longest row at hand, so that windows, chunks and sparse
attention show.
"""

from collections.abc import Callable
from weakref import WeakKeyDictionary

import torch

from engine.fallback import greedy_generate, transformers_attention
from engine.slots import SlotCache, forward_in_slots, layers_of

SHORTEST = 10  # tokens of a long row, at least
SHARED = 4  # tokens with which the made-up rows begin
PIECE = 512  # tokens of the long row that one forward reads: its mask grows with both lengths
TOLERANCE = {torch.float32: 1e-4}  # of the logits, relative to how much they vary
TOLERANCE_16_BIT = 0.2  # SmolLM2-135M in bfloat16 differs by up to 0.06 from one batch to another
TRIED = WeakKeyDictionary()  # model -> {(name of the trial, length): its result}


def why_no_slots(model, longest: int) -> str:
    """Why slots do not serve this model for rows of up to `longest` tokens, or ""."""
    attention = model.config._attn_implementation
    return tried_once(model, f"slots under {attention} attention", difference_in_slots, longest)


def why_no_padding(model, longest: int) -> str:
    """Why rows of unlike lengths cannot go through transformers' generate in one batch, or ""."""
    return tried_once(model, "padding", difference_by_padding, longest)


def why_no_cache(model, longest: int) -> str:
    """Why transformers' generate cannot even generate from one row alone, or ""."""
    return tried_once(model, "cache", failure_of_one_row, longest)


def tried_once(model, name: str, trial: Callable, length: int) -> str:
    """What `trial(model, length)` says is wrong, or "". A longer trial that went well covers shorter ones."""
    length = max(length, SHORTEST)
    results = TRIED.setdefault(model, {})
    for (other, tried_length), reason in results.items():
        if other == name and tried_length >= length and not reason:
            return ""
    if (name, length) not in results:
        try:
            results[name, length] = trial(model, length)
        except torch.OutOfMemoryError:
            if length <= SHORTEST:
                raise
            results[name, length] = tried_once(model, name, trial, length // 2)  # what there is memory for
        except Exception as error:  # whatever a model can raise: then it goes the other way
            message = " ".join(str(error).split())
            results[name, length] = f"{type(error).__name__}: {message[:200]}"
    return results[name, length]


def difference_in_slots(model, length: int) -> str:
    """Three rows in slots, behind a shared prefix, and each of them alone: "" if all logits are equal."""
    ids = made_up_tokens(model, length)
    shared = ids[:SHARED]
    long_row = ids[:-1]
    short_rows = [shared + ids[-2:-1], shared + ids[-4:-1]]
    rows = [long_row, *short_rows]

    # 1. The shared prefix, and a copy of it for every row.
    cache = SlotCache(layers_of(model), slots=3, max_length=length)
    forward_in_slots(model, cache, first_slot=cache.common_slot, sequences=[shared], width=SHARED)
    cache.copy([cache.common_slot] * 3, range(3), length=SHARED)

    # 2. The long row is read, then the short ones, of which the shorter repeats its first token.
    read = SHARED
    while read < len(long_row):
        width = min(PIECE, len(long_row) - read)
        read += width
        long_logits = forward_in_slots(model, cache, first_slot=0, sequences=[long_row[:read]], width=width)
    short_logits = forward_in_slots(model, cache, first_slot=1, sequences=short_rows, width=SHARED + 3)

    # 3. One more token of each, at three different positions.
    next_rows = [row + ids[-1:] for row in rows]
    next_logits = forward_in_slots(model, cache, first_slot=0, sequences=next_rows, width=1)

    first_logits = torch.cat([long_logits, short_logits])
    in_slots = torch.stack([first_logits, next_logits], dim=1)  # [rows, 2, vocabulary]
    alone = torch.stack([own_logits(model, row) for row in next_rows])
    return difference(model, in_slots, alone, "slots change its logits")


def own_logits(model, row: list[int]) -> torch.Tensor:
    """Logits `[2, vocabulary]` after the last two tokens, as transformers computes them without a cache."""
    ids = torch.tensor([row], device=model.device)
    with transformers_attention(model):
        return model(input_ids=ids, use_cache=False, logits_to_keep=2).logits[0, -2:]


def difference_by_padding(model, length: int) -> str:
    """A short row, padded beside a long one, and the same row alone: "" if its first two logits are equal."""
    ids = made_up_tokens(model, length)
    long_row = ids[:-2]
    short_row = ids[: length // 2]
    together = generated_logits(model, [short_row, long_row], pad=ids[-1])
    alone = generated_logits(model, [short_row], pad=ids[-1])
    return difference(model, together, alone, "padding changes its logits")


def failure_of_one_row(model, length: int) -> str:
    """Two tokens behind a long row, one of them by the cache: "" if nothing is raised."""
    ids = made_up_tokens(model, length)
    generated_logits(model, [ids[:-2]], pad=ids[-1])
    return ""


def generated_logits(model, prompts: list[list[int]], pad: int) -> torch.Tensor:
    """Logits `[2, vocabulary]` of the first row's first two tokens in transformers' generate."""
    output = greedy_generate(
        model, prompts, pad, max_new_tokens=2, output_logits=True, return_dict_in_generate=True)
    return torch.stack(output.logits)[:, 0]


def made_up_tokens(model, length: int) -> list[int]:
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().num_embeddings
    return torch.randint(vocabulary, (length,), generator=generator).tolist()


def difference(model, found: torch.Tensor, expected: torch.Tensor, what: str) -> str:
    """No text if the logits `[..., vocabulary]` are equal, else `what`, and by how much of their spread."""
    expected = expected.float()
    spread = (expected - expected.mean(-1, keepdim=True)).norm(dim=-1)
    worst = ((found.float() - expected).norm(dim=-1) / spread).max().item()
    if worst <= TOLERANCE.get(model.dtype, TOLERANCE_16_BIT):
        return ""
    return f"{what} by {worst:.2g}"  # NaN comes here too


def longest_harmless_row(model, longest: int) -> int:
    """Longer rows change rotary frequencies (longrope, dynamic NTK), and so change the rows beside them.

    Found by what a token at the last position leaves in the model's buffers. At most `longest`, the rows at
    hand.
    """
    results = TRIED.setdefault(model, {})
    trial = ("frequencies", longest)
    if trial not in results:
        try:
            results[trial] = find_harmless_length(model, longest)
        except Exception:  # whatever a model raises that takes no positions
            results[trial] = longest
    return results[trial]


def find_harmless_length(model, longest: int) -> int:
    if not changes_buffers(model, longest):
        return longest
    harmless = 1
    harmful = longest
    while harmful - harmless > 1:
        middle = (harmless + harmful) // 2
        if changes_buffers(model, middle):
            harmful = middle
        else:
            harmless = middle
    return harmless


def changes_buffers(model, length: int) -> bool:
    """Does a row of `length` tokens leave buffers other than a row of one token does?"""
    short = buffers_after(model, position=0)
    long = buffers_after(model, position=length - 1)
    for name, before in short.items():
        if before.shape == long[name].shape and not torch.equal(before, long[name]):
            return True
    return False


def buffers_after(model, position: int) -> dict[str, torch.Tensor]:
    """The model's buffers after a forward of one token at `position`."""
    ids = torch.tensor([[0]], device=model.device)
    model(input_ids=ids, position_ids=torch.full_like(ids, position), use_cache=False)
    return {name: buffer.clone() for name, buffer in model.named_buffers()}
