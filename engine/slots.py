"""Preallocated keys and values of all layers, in which each row has a slot."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache

CPU_GIB = 2.0  # default budget for keys and values off the GPU


@dataclass(frozen=True)
class Layer:
    """One layer's keys and values of one token, and how far back its tokens look."""

    keys: torch.Tensor  # [1, kv_heads, 1, key_dim]
    values: torch.Tensor  # [1, kv_heads, 1, value_dim]
    kind: str  # transformers' name for it: full_attention, sliding_attention, chunked_attention
    window: int | None  # tokens of a window or of a chunk; None: its tokens see all that came before

    def first_visible(self, positions: torch.Tensor) -> torch.Tensor:
        """The position of the first key that the tokens at `positions` see. The last one is their own."""
        if self.window is None:
            return torch.zeros_like(positions)
        if self.kind == "chunked_attention":
            return positions - positions % self.window
        return positions - self.window + 1


def layers_of(model) -> list[Layer]:
    """The layers, as one token in transformers' own cache shows them. ValueError: one keeps no keys."""
    cache = DynamicCache(config=model.config)
    model(input_ids=torch.tensor([[0]], device=model.device), past_key_values=cache, use_cache=True)
    config = model.config.get_text_config(decoder=True)
    kinds = getattr(config, "layer_types", None) or [None] * len(cache.layers)

    layers = []
    for number, layer in enumerate(cache.layers):
        keys = getattr(layer, "keys", None)
        if keys is None or keys.dim() != 4:
            raise ValueError(f"layer {number} keeps no plain keys and values: {type(layer).__name__}")
        window = getattr(layer, "sliding_window", None)
        kind = kinds[number] or "sliding_attention"  # a model whose layers are all alike need not name them
        layers.append(Layer(keys, layer.values, kind, window))
    return layers


@dataclass(frozen=True)
class NextWrite:
    """Where the next forward writes its keys and values, and how far it reads."""

    first_slot: int  # its rows are written to the slots from this one on
    positions: torch.Tensor  # [rows, width], of the new tokens
    length: int  # attention reads the first `length` positions of these slots


class SlotCache(Cache):
    """Keys and values of all layers in buffers `[slots + 1, kv_heads, max_length, head_dim]`.

    The last slot, `common_slot`, keeps the prefix that all prompts share. Set `next_write` before each
    forward. The model then calls `update` once a layer, and attends over what it returns.
    """

    def __init__(self, layers: list[Layer], slots: int, max_length: int):
        super().__init__(layers=[])
        self.slots = slots
        self.common_slot = slots
        self.next_write: NextWrite | None = None
        self.buffers = []  # (keys, values) of each layer
        for layer in layers:
            _, kv_heads, _, key_dim = layer.keys.shape
            value_dim = layer.values.shape[3]
            keys = layer.keys.new_zeros(slots + 1, kv_heads, max_length, key_dim)
            values = layer.values.new_zeros(slots + 1, kv_heads, max_length, value_dim)
            self.buffers.append((keys, values))

        self.layer_of_kind = {layer.kind: layer for layer in layers}
        self.has_windows = any(layer.window and layer.window < max_length for layer in layers)

    def masks(self) -> torch.Tensor | dict[str, torch.Tensor]:
        """The additive mask `[rows, 1, width, length]` of the next forward, or one for each kind of layer.

        So transformers' models take them: a tensor serves all layers, a dictionary names the kinds.
        """
        masks = {kind: self.mask(layer) for kind, layer in self.layer_of_kind.items()}
        if self.has_windows and len(masks) > 1:
            return masks
        return masks.popitem()[1]

    def mask(self, layer: Layer) -> torch.Tensor:
        """A token sees the keys up to its own position, from the first in the layer's window."""
        keys = self.buffers[0][0]
        positions = self.next_write.positions[:, None, :, None]
        key_positions = torch.arange(self.next_write.length, device=keys.device)
        hidden = key_positions > positions
        if self.has_windows:
            hidden |= key_positions < layer.first_visible(positions)
        return keys.new_zeros(hidden.shape).masked_fill_(hidden, torch.finfo(keys.dtype).min)

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        """Write `[rows, kv_heads, width, head_dim]`, return `[rows, kv_heads, length, head_dim]`."""
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
        attention_mask=cache.masks(),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return output.logits[:, -1]


def slots_in_memory(layers: list[Layer], max_length: int, memory_gib: float | None) -> int:
    """How many rows of `max_length` tokens the memory budget holds, at least 1."""
    token_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
    budget = memory_budget(layers[0].keys.device, memory_gib)
    return max(1, int(budget / (token_bytes * max_length)) - 1)  # one holds the common prefix


def memory_budget(device: torch.device, memory_gib: float | None) -> float:
    """Bytes for keys and values: `memory_gib`, else 80 % of what is free on a GPU, else 2 GiB."""
    if memory_gib is None and device.type == "cuda":
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(device)
        return 0.8 * free
    return (memory_gib or CPU_GIB) * 2**30
