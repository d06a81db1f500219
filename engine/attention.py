"""Attention for packed rows, and for rows under a mask. Its name in transformers is "rows"."""

import torch
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

# Arguments that change the scores. transformers' own attention knows these, or refuses them.
CHANGES_SCORES = ("softcap", "position_bias", "s_aux")


def packed_attention(module, query, key, value, attention_mask, row_lengths=None, shared=0, **kwargs):
    """Causal attention inside each packed row.

    Query, key and value are `[1, heads, sum of lengths, head_dim]`. Where `shared` > 0, the first row holds
    that many tokens. Every other row begins with them and attends to them. Rows that are not packed come from
    generate.py, with a mask.
    """
    packed = row_lengths is not None
    changes_scores = any(name in kwargs for name in CHANGES_SCORES)
    if not packed and attention_mask is not None and not changes_scores:
        return masked_attention(query, key, value, attention_mask, **kwargs)
    if not packed or not is_causal(attention_mask, row_lengths, shared):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    queries = query.split(row_lengths, dim=2)
    keys = key.split(row_lengths, dim=2)
    values = value.split(row_lengths, dim=2)
    outputs = []
    for number, (q, k, v) in enumerate(zip(queries, keys, values, strict=True)):
        mask = None  # causal
        if shared and number > 0:
            length = q.shape[2]
            k = torch.cat([keys[0], k], dim=2)
            v = torch.cat([values[0], v], dim=2)
            mask = torch.ones(length, shared + length, dtype=torch.bool, device=key.device).tril(shared)
        output, _ = sdpa_attention_forward(module, q, k, v, mask, **kwargs)
        outputs.append(output)
    return torch.cat(outputs, dim=1), None


def is_causal(mask, row_lengths: list[int], shared: int) -> bool:
    """Does a mask `[1, 1, length, length]`, True where seen, hide only later tokens and other rows?

    A sliding window or a chunk hides more, and the mask may be the only place that says so. So what it shows
    is counted. A model that does not tell its mask where rows begin shows all earlier tokens: causal as well.
    The answer is kept with the mask, because all layers of a kind get the same one.
    """
    if mask is None:
        return True
    if not hasattr(mask, "is_causal"):
        lengths = list(row_lengths)
        if shared:  # positions do not start again between the prefix and the row after it
            lengths[:2] = [sum(lengths[:2])]
        inside_rows = sum(length * (length + 1) // 2 for length in lengths)
        everything = sum(lengths) * (sum(lengths) + 1) // 2
        mask.is_causal = int(mask.sum()) in (inside_rows, everything)
    return mask.is_causal


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
