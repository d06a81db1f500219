"""What `--dtype auto` stands for: bfloat16 or float32, whichever is faster on this machine.

A GPU computes in bfloat16. A CPU does where torch says that it multiplies bfloat16, and where products of the
model's own shapes, timed for a second, are faster so. Everything else computes in float32: a CPU that
only imitates bfloat16 needs several times as long.
"""

import time
from collections import Counter
from statistics import median

import torch
from torch.nn import functional as F

from engine.model import skeleton
from support import ranks

FASTER = 1.2  # times as fast at least: for less, nobody should bear the coarser rounding
ROWS = 64  # that go through a product at once, as in decoding and in a short training step
SECONDS = 1.0  # of the trial
FEWEST_PASSES = 5  # over all shapes, in either precision
SHAPES = 4  # the most frequent ones: attention's and the MLP's
FEW_WEIGHTS = 10_000_000  # with fewer, a trial would time little but the calls


def fastest_dtype(device: str, name: str, trust_remote_code: bool = False) -> str:
    """"bfloat16" or "float32" for a model, of which only the configuration is read."""
    if device.startswith("cuda"):
        return "bfloat16"
    if device != "cpu" or not multiplies_bfloat16():
        return "float32"
    if ranks.WORLD > 1:
        return "float32"  # the trials of several processes could differ

    model = skeleton(name, trust_remote_code)
    if sum(parameter.numel() for parameter in model.parameters()) < FEW_WEIGHTS:
        return "float32"
    seconds = seconds_of_products(product_shapes(model))
    return faster_dtype(seconds[torch.float32], seconds[torch.bfloat16])


def multiplies_bfloat16() -> bool:
    """Does torch say that this CPU has instructions for it? False where this version does not say."""
    capabilities = getattr(torch.cpu, "get_capabilities", None)
    if capabilities:  # avx512_bf16 and amx_bf16, on ARM bf16
        return any(has for name, has in capabilities().items() if "bf16" in name)
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):  # no public names: they may go
        supported = getattr(torch.cpu, name, None)
        if supported and supported():
            return True
    return False


def product_shapes(model) -> list[torch.Size]:
    """The shapes of the matrices with which a model multiplies most often."""
    counts = Counter(parameter.shape for parameter in model.parameters() if parameter.ndim == 2)
    return [shape for shape, _ in counts.most_common(SHAPES)]


@torch.no_grad()
def seconds_of_products(shapes: list[torch.Size]) -> dict[torch.dtype, float]:
    """Median seconds of a pass: one product of ROWS rows with a matrix of each shape, on the CPU.

    The passes in both precisions take turns, so that what else the machine does slows both.
    """
    factors = {torch.float32: [], torch.bfloat16: []}
    for dtype, pairs in factors.items():
        for outputs, inputs in shapes:
            rows = torch.full((ROWS, inputs), 0.5, dtype=dtype)
            weight = torch.full((outputs, inputs), 0.5, dtype=dtype)
            pairs.append((rows, weight))

    seconds = {dtype: [] for dtype in factors}
    ends = time.perf_counter() + SECONDS
    while time.perf_counter() < ends or len(seconds[torch.bfloat16]) < FEWEST_PASSES:
        for dtype, pairs in factors.items():
            started = time.perf_counter()
            for rows, weight in pairs:
                F.linear(rows, weight)
            seconds[dtype].append(time.perf_counter() - started)
    return {dtype: median(passes) for dtype, passes in seconds.items()}


def faster_dtype(seconds_in_float32: float, seconds_in_bfloat16: float) -> str:
    return "bfloat16" if seconds_in_float32 >= FASTER * seconds_in_bfloat16 else "float32"
