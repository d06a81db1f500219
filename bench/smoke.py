"""Does everything run on this machine? Every stage of every method with a small real model, in minutes.

    python -m bench.smoke --model models/SmolLM2-135M-Instruct --out runs/gpu-smoke

On a GPU this takes about 5 minutes in bfloat16, and is what to run before `make gsm8k`. Without one it does
the same with less, in bfloat16 where the CPU is faster so, else in float32. The seconds of every command, and
what it was, are in OUT/smoke.json. A command that fails ends it, with the command's own message.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

import torch

from engine.model import best_device
from engine.precision import fastest_dtype
from s3ft import METHODS
from support.cli import InputError, exit_cleanly
from support.files import write_json

LARGE = {"rows": 96, "steps": 40, "documents": 20}  # on a GPU
SMALL = {"rows": 8, "steps": 2, "documents": 1}


def commands(model: str, out: Path, data: str, sizes: dict[str, int], dtype: str) -> dict[str, list[str]]:
    """What is run, by a name for each: a training of every method, and then their evaluation."""
    found = {}
    for method in METHODS:
        found[f"train {method}"] = [
            "s3ft.py",
            "--task=reading",
            f"--method={method}",
            f"--model={model}",
            f"--out={out}",
            f"--dtype={dtype}",
            f"--limit={sizes['rows']}",
            f"--steps={sizes['steps']}",
            f"--eval-every={sizes['steps']}",
            "--max-new-tokens=32",
            "--keep-unfinished",
        ]
    found["evaluate"] = ["evaluate.py", f"--out={out}"]
    for name in ("hellaswag", "winogrande"):
        if (Path(data) / name / "validation.jsonl").exists():  # nothing is downloaded for a smoke test
            benchmark = [f"--data={data}", f"--benchmarks={name}", f"--limit={sizes['documents']}"]
            found[name] = ["evaluate.py", f"--out={out}", *benchmark]
    return found


def run(command: list[str]) -> float:
    """Run one command of ours -> its seconds. InputError: it failed."""
    print("$ python", *command, flush=True)
    started = time.monotonic()
    done = subprocess.run([sys.executable, *command])
    if done.returncode:
        raise InputError(f"python {' '.join(command)} ended with status {done.returncode}")
    return round(time.monotonic() - started, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct", help="(%(default)s)")
    parser.add_argument("--data", default="data", help="(%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu-smoke"), help="(%(default)s)")
    args = parser.parse_args()

    on_gpu = best_device().startswith("cuda")
    device = torch.cuda.get_device_name() if on_gpu else f"no GPU ({torch.get_num_threads()} CPU threads)"
    sizes = LARGE if on_gpu else SMALL
    dtype = fastest_dtype(best_device(), args.model)
    seconds = {}
    for name, command in commands(args.model, args.out, args.data, sizes, dtype).items():
        seconds[name] = run(command)
        figures = {"device": device, "dtype": dtype, "sizes": sizes, "seconds": seconds}
        write_json(args.out / "smoke.json", figures)
    print(f"all {len(seconds)} commands ended well on {device}: {args.out / 'smoke.json'}")


if __name__ == "__main__":
    exit_cleanly(main)
