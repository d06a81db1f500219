"""Attention for packed rows, and for rows under a mask. Its name in transformers is "rows"."""

import torch
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

# Arguments that change the scores. transformers' own attention knows these, or refuses them.
CHANGES_SCORES = ("softcap", "position_bias", "s_aux")


def packed_attention(module, query, key, value, attention_mask, row_lengths=None, shared=0, **kwargs):
    """Causal attention inside each packed row, in layers with a sliding window too.

    Query, key and value are `[1, heads, sum of lengths, head_dim]`. Where `shared` > 0, the first row holds
    that many tokens. Every other row begins with them and attends to them. Rows that are not packed come from
    generate.py, with a mask.
    """
    packed = row_lengths is not None
    changes_scores = any(name in kwargs for name in CHANGES_SCORES)
    if not packed and attention_mask is not None and not changes_scores:
        return masked_attention(query, key, value, attention_mask, **kwargs)
    if not packed:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    reach = reach_of(attention_mask, row_lengths, shared, kwargs.get("sliding_window"))
    if reach is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    queries = query.split(row_lengths, dim=2)
    keys = key.split(row_lengths, dim=2)
    values = value.split(row_lengths, dim=2)
    outputs = []
    for number, (q, k, v) in enumerate(zip(queries, keys, values, strict=True)):
        before = shared if number > 0 else 0
        if before:
            k = torch.cat([keys[0], k], dim=2)
            v = torch.cat([values[0], v], dim=2)
        mask = row_mask(q.shape[2], before, reach, q.device)
        output, _ = sdpa_attention_forward(module, q, k, v, mask, **kwargs)
        outputs.append(output)
    return torch.cat(outputs, dim=1), None


def reach_of(mask, row_lengths: list[int], shared: int, window: int | None) -> int | None:
    """How many tokens, itself the last, a token sees under a mask `[1, 1, length, length]`, True where seen.

    None: the mask hides something else than later tokens, other rows, and what lies before the layer's
    `window`. A chunk does, and the mask may be the only place that says so. A model that does not tell its
    mask where rows begin shows those before it: they are told apart here. The answer is kept with the mask,
    because all layers of a kind get the same one.
    """
    everything = sum(row_lengths)
    if mask is None:
        return everything
    if not hasattr(mask, "reach"):
        lengths = list(row_lengths)
        if shared:  # positions do not start again between the prefix and the row after it
            lengths[:2] = [sum(lengths[:2])]
        mask.reach = None
        # A mask of short rows fits both. The window then holds: behind a shared prefix a row can be longer.
        for reach in (window, everything):
            if reach and (shows(mask, lengths, reach) or shows(mask, [everything], reach)):
                mask.reach = reach
                break
    return mask.reach


def shows(mask, lengths: list[int], reach: int) -> bool:
    """Does a mask show, in rows of these lengths, every token the last `reach` of its row up to itself?"""
    row = torch.repeat_interleave(torch.tensor(lengths, device=mask.device))  # of every token
    query = torch.arange(len(row), device=mask.device)[:, None]
    key = query.T
    expected = (key <= query) & (key > query - reach) & (row[:, None] == row)
    return mask.dtype == torch.bool and torch.equal(mask, expected[None, None])


def row_mask(length: int, before: int, reach: int, device) -> torch.Tensor | None:
    """What the last `length` tokens of a row see, `[length, before + length]`. None: all that came before."""
    if not before and length <= reach:
        return None
    mask = torch.ones(length, before + length, dtype=torch.bool, device=device).tril(before)
    return mask.triu(before - reach + 1)


def masked_attention(query, key, value, mask, scaling=None, dropout=0.0, **_):
    """Attention of queries `[rows, heads, width, head_dim]` under a mask `[rows, 1, width, length]`.

    The heads that share a key head ask it as one head with so many more queries. So no key is copied.
    """
    rows, heads, width, _ = query.shape
    kv_heads = key.shape[1]
    sharing = heads // kv_heads

    grouped = query.reshape(rows, kv_heads, sharing * width, -1)
    mask = mask.repeat(1, 1, sharing, 1)
    output = F.scaled_dot_product_attention(grouped, key, value, mask, dropout_p=dropout, scale=scaling)
    return output.reshape(rows, heads, width, -1).transpose(1, 2).contiguous(), None


AttentionInterface.register("rows", packed_attention)
AttentionMaskInterface.register("rows", sdpa_mask)
