"""Linear layers: which of them compute W x + b and nothing else, and a dropout that a CPU draws quickly."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@torch.no_grad()
def is_plain_linear(module: nn.Module) -> bool:
    """Is the module an `nn.Linear` that computes W x + b and nothing else? One of another class is tried."""
    if not isinstance(module, nn.Linear):
        return False
    if type(module).forward is nn.Linear.forward:
        return True
    if module.weight.is_meta:  # nothing can be tried
        return False

    # Rows of other sizes, and one with an outlier: what normalises, clips or quantises its input shows.
    x = torch.randn(4, module.in_features, generator=torch.Generator().manual_seed(0))
    x *= torch.tensor([[0.01], [1.0], [1.0], [100.0]])
    x[2, 0] = 30.0
    x = x.to(module.weight)
    try:
        found = module(x)
        expected = F.linear(x, module.weight, module.bias)
        tolerance = max(1e-3, torch.finfo(expected.dtype).eps / 2)  # of one rounding, as a share of the row
    except (RuntimeError, ValueError, TypeError, IndexError):
        return False
    if not isinstance(found, Tensor) or found.shape != expected.shape:
        return False
    error = (found.float() - expected.float()).norm(dim=-1)
    return bool((error <= tolerance * expected.float().norm(dim=-1)).all())


def dropout(x: Tensor, p: float) -> Tensor:
    """Each element of x is 0 with probability p, else divided by 1 - p. On a GPU it is torch's `F.dropout`.

    On the CPU torch takes longer to draw the mask of a LoRA layer than to run the layer's two products, and
    keeps it in x's dtype. Here an element gets 16 random bits, a fourth of an int64, and a byte is kept for
    it. p is rounded to 1/65536.
    """
    if p == 0 or x.device.type != "cpu":
        return F.dropout(x, p)
    below = min(round(p * 2**16), 2**16 - 1)  # so many of the 2**16 values drop an element
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    drop = bits.view(torch.int16)[: x.numel()] < below - 2**15
    return x.masked_fill(drop.view(x.shape), 0).mul_(2**16 / (2**16 - below))
