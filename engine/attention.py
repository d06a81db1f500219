"""Attention for rows that are packed end to end, and for rows under a mask: registered with transformers as "rows"."""

import torch
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask


def packed_attention(module, query, key, value, attention_mask, row_lengths=None, shared=0, **kwargs):
    """Causal attention inside each packed row; query, key, value `[1, heads, sum of lengths, head_dim]`.

    Where `shared` > 0, the first row holds that many tokens which every other row begins with, and attends to. Rows that are
    not packed come from generate.py, with a mask.
    """
    if row_lengths is None and attention_mask is not None and kwargs.keys().isdisjoint(CHANGES_SCORES):
        return masked_attention(query, key, value, attention_mask, **kwargs)
    if row_lengths is None or kwargs.get("sliding_window"):  # not packed, or the mask says more than "causal"
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    rows = list(zip(*(states.split(row_lengths, dim=2) for states in (query, key, value)), strict=True))
    masks = [None] * len(rows)
    if shared:
        _, prefix_key, prefix_value = rows[0]
        rows[1:] = [(q, torch.cat([prefix_key, k], 2), torch.cat([prefix_value, v], 2)) for q, k, v in rows[1:]]
        masks[1:] = [torch.ones(n, shared + n, dtype=torch.bool, device=key.device).tril(shared) for n in row_lengths[1:]]
    outputs = [sdpa_attention_forward(module, *row, mask, **kwargs)[0] for row, mask in zip(rows, masks, strict=True)]
    return torch.cat(outputs, dim=1), None


CHANGES_SCORES = ("softcap", "position_bias", "s_aux")  # what changes the scores: transformers' own attention knows, or refuses


def masked_attention(query, key, value, mask, scaling=None, dropout=0.0, **_):
    """Attention under `mask` `[rows, 1, width, length]`; query `[rows, heads, width, head_dim]`.

    The heads that share a key head ask as so many queries more of it, so that no key is copied for each of them.
    """
    (rows, heads, width, _), kv_heads = query.shape, key.shape[1]
    grouped = query.reshape(rows, kv_heads, heads // kv_heads * width, -1)
    mask = mask.repeat(1, 1, heads // kv_heads, 1)
    output = F.scaled_dot_product_attention(grouped, key, value, mask, dropout_p=dropout, scale=scaling)
    return output.reshape(rows, heads, width, -1).transpose(1, 2).contiguous(), None


AttentionInterface.register("rows", packed_attention)
AttentionMaskInterface.register("rows", sdpa_mask)
