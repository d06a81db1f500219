"""Preallocated keys and values of all layers, in which each row has a slot."""

import inspect
from collections.abc import Sequence

import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from engine.decoding import Row

CPU_GIB = 2.0  # default budget for keys and values off the GPU


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


def _slots(probe: DynamicCache, max_length: int, memory_gib: float | None) -> int:
    """How many rows of `max_length` tokens the memory budget holds, at least 1."""
    tensors = [t for layer in probe.layers for t in (layer.keys, layer.values)]
    device, token_bytes = tensors[0].device, sum(t.numel() * t.element_size() for t in tensors)  # of the probe's token
    if memory_gib is None and device.type == "cuda":
        torch.cuda.empty_cache()
        memory_gib = 0.8 * torch.cuda.mem_get_info(device)[0] / 2**30
    return max(1, int((memory_gib or CPU_GIB) * 2**30 / (token_bytes * max_length)) - 1)  # one holds the common prefix
