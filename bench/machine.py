"""What this machine does at most, measured: a model's matrix products and the reading of memory.

With one thread on a CPU, CPU seconds are counted, because a busy machine changes them little. Otherwise it is
wall time, with everything finished on the GPU.
"""

import time

import torch

PASSES = 10  # of every measurement. The best one counts


def counts_cpu_time() -> bool:
    return torch.get_num_threads() == 1 and not torch.cuda.is_available()


def clock() -> float:
    """Seconds since some moment, with all work on the GPU finished."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.process_time() if counts_cpu_time() else time.perf_counter()


def seconds(work) -> tuple[float, object]:
    """(the time that `work()` took, what it returned)"""
    start = clock()
    result = work()
    return clock() - start, result


def device_name(device) -> str:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name()
    return f"{torch.get_num_threads()} CPU threads"


def linear_layers(model, head: bool) -> list[torch.nn.Linear]:
    """The model's matrix products, with the output head or without it."""
    layers = []
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings():
            layers.append(module)
    if head:
        layers.append(model.get_output_embeddings())
    return layers


def flops(model, head: bool) -> int:
    """Operations of one token's matrix products: a multiplication and an addition for every weight."""
    return 2 * sum(layer.weight.numel() for layer in linear_layers(model, head))


@torch.no_grad()
def seconds_a_row(model, rows: int, head: bool) -> float:
    """Seconds of one row's matrix products when `rows` rows go through at once."""
    layers = linear_layers(model, head)
    inputs = {}
    for layer in layers:
        width = layer.in_features
        inputs[width] = torch.randn(rows, width, device=model.device, dtype=model.dtype)

    best = float("inf")
    for _ in range(PASSES):
        start = clock()
        for layer in layers:
            layer(inputs[layer.in_features])
        best = min(best, clock() - start)
    return best / rows


def bandwidth(device) -> float:
    """Bytes a second at which 1 GiB is read."""
    numbers = torch.ones(2**28, device=device)  # of 4 bytes each
    best = float("inf")
    for _ in range(PASSES):
        start = clock()
        numbers.sum().item()
        best = min(best, clock() - start)
    return 2**30 / best


def measured_rates(model) -> dict[str, float]:
    """What limits are made of: products without the head (prompts) and with it (decoding), reading memory."""
    body, whole = flops(model, head=False), flops(model, head=True)
    return {
        "GFLOP/s at 512 rows": body / seconds_a_row(model, 512, head=False) / 1e9,
        "GFLOP/s at 64 rows": whole / seconds_a_row(model, 64, head=True) / 1e9,
        "GB/s": bandwidth(model.device) / 1e9,
    }
