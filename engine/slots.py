"""Preallocated keys and values of all layers, in which each row has a slot."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

CPU_GIB = 2.0  # default budget for keys and values off the GPU


@dataclass(frozen=True)
class NextWrite:
    """Where the next forward writes its keys and values, and how far it reads."""

    first_slot: int  # its rows are written to the slots from this one on
    positions: torch.Tensor  # [rows, width], of the new tokens
    length: int  # attention reads the first `length` positions of these slots


class SlotCache(Cache):
    """Keys and values of all layers, in buffers `[slots + 1, kv_heads, max_length, head_dim]` written in place.

    The last slot, `common_slot`, keeps the prefix that all prompts share. Set `next_write` before each
    forward. The model then calls `update` once a layer, and attends over what it returns.
    """

    def __init__(self, one_token: DynamicCache, slots: int, max_length: int):
        """`one_token`: a cache in which the model has put one token. It shows every layer's shape and type."""
        super().__init__(layers=[])
        self.slots = slots
        self.common_slot = slots
        self.next_write: NextWrite | None = None
        self.buffers = []  # (keys, values) of each layer
        for layer in one_token.layers:
            _, kv_heads, _, key_dim = layer.keys.shape
            value_dim = layer.values.shape[3]
            keys = layer.keys.new_zeros(slots + 1, kv_heads, max_length, key_dim)
            values = layer.values.new_zeros(slots + 1, kv_heads, max_length, value_dim)
            self.buffers.append((keys, values))

    def mask(self) -> torch.Tensor:
        """The additive mask `[rows, 1, width, length]` of the next forward: a token sees keys up to its position."""
        keys = self.buffers[0][0]
        key_positions = torch.arange(self.next_write.length, device=keys.device)
        hidden = key_positions > self.next_write.positions[:, None, :, None]
        return keys.new_zeros(hidden.shape).masked_fill_(hidden, torch.finfo(keys.dtype).min)

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        """Write keys and values `[rows, kv_heads, width, head_dim]`, return `[rows, kv_heads, length, head_dim]`."""
        keys, values = self.buffers[layer_idx]
        write = self.next_write
        slots = slice(write.first_slot, write.first_slot + len(write.positions))
        slot_numbers = torch.arange(slots.start, slots.stop, device=keys.device)[:, None]
        keys[slot_numbers, :, write.positions] = key_states.transpose(1, 2)
        values[slot_numbers, :, write.positions] = value_states.transpose(1, 2)
        return keys[slots, :, : write.length], values[slots, :, : write.length]

    def copy(self, sources: Sequence[int], targets: Sequence[int], length: int) -> None:
        """Copy the first `length` positions of the slots `sources` to the slots `targets`, all at once."""
        device = self.buffers[0][0].device
        source = torch.tensor(list(sources), device=device)
        target = torch.tensor(list(targets), device=device)
        for keys, values in self.buffers:
            keys[target, :, :length] = keys[source, :, :length]
            values[target, :, :length] = values[source, :, :length]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Some models ask how many tokens came before the new ones."""
        return self.next_write.length - self.next_write.positions.shape[1]


def forward_in_slots(
    model, cache: SlotCache, *, first_slot: int, sequences: list[list[int]], width: int
) -> torch.Tensor:
    """Forward the last `width` tokens of the sequences, one a slot from `first_slot` on.

    What comes before them is in the cache. A sequence shorter than `width` repeats its first token, in place.
    Returns the logits `[rows, vocabulary]` after the last tokens.
    """
    tokens, positions = [], []
    for sequence in sequences:
        places = [max(place, 0) for place in range(len(sequence) - width, len(sequence))]
        tokens.append([sequence[place] for place in places])
        positions.append(places)
    positions = torch.tensor(positions, device=model.device)
    cache.next_write = NextWrite(first_slot, positions, length=max(map(len, sequences)))
    output = model(
        input_ids=torch.tensor(tokens, device=model.device),
        position_ids=positions,
        attention_mask=cache.mask(),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return output.logits[:, -1]


def one_token_cache(model) -> DynamicCache:
    """transformers' own cache, in which the model has put one token."""
    cache = DynamicCache(config=model.config)
    model(input_ids=torch.tensor([[0]], device=model.device), past_key_values=cache, use_cache=True)
    return cache


def why_no_slots(model, longest: int) -> str:
    """What the model has that slots do not cover, for rows of up to `longest` tokens, or ""."""
    config = model.config.get_text_config(decoder=True)
    if not {"position_ids", "logits_to_keep"} <= set(inspect.signature(model.forward).parameters):
        return "a forward without position_ids or logits_to_keep"
    if model.config.is_encoder_decoder or getattr(config, "alibi", False):
        return "an encoder or ALiBi"
    if any(kind in config._attn_implementation for kind in ("flash", "flex", "paged")):
        return f"{config._attn_implementation} attention"
    rope = getattr(config, "rope_parameters", None) or {}
    original_length = rope.get("original_max_position_embeddings", 0)
    if rope.get("rope_type") in ("dynamic", "longrope") and longest > original_length:
        return "rotary frequencies that change with the length"

    for layer in one_token_cache(model).layers:
        window = layer.sliding_window if type(layer) is DynamicSlidingWindowLayer else longest
        plain = type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) and layer.keys is not None
        if not plain or window < longest:
            return f"a cache of the kind {type(layer).__name__}"
    return ""


def slots_in_memory(one_token: DynamicCache, max_length: int, memory_gib: float | None) -> int:
    """How many rows of `max_length` tokens the memory budget holds, at least 1."""
    token_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in one_token.layers)
    device = one_token.layers[0].keys.device
    if memory_gib is None and device.type == "cuda":
        torch.cuda.empty_cache()
        memory_gib = 0.8 * torch.cuda.mem_get_info(device)[0] / 2**30
    budget = (memory_gib or CPU_GIB) * 2**30
    return max(1, int(budget / (token_bytes * max_length)) - 1)  # one holds the common prefix
