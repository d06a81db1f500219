"""The code judge on MBPP's 974 gold programs: verdicts, and programs a second.

First one after the other on one core, timed in CPU seconds (ours and the children's, so that a busy machine
changes nothing), then all of them through `judge_all` on all cores, where every verdict must be the same and
in its place. Every program should pass. One that does not is named, and the exit status is 1.

    python -m bench.judge --data data --out runs/bench
"""

import argparse
import os
import platform
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from tqdm import tqdm

from data import Example
from judges import judge_all
from support import sandbox
from support.cli import exit_cleanly
from support.files import download, read_jsonl, write_json, write_text
from tasks.mbpp import HOME, SHA256, mbpp_example

SLOW = 0.5  # CPU seconds from which a program is counted apart


def cpu_seconds() -> float:
    return sum(os.times()[:4])  # user and system time, of this process and of its children


def timed(verdicts: Iterable[bool]) -> Iterator[tuple[bool, float]]:
    """Each verdict with the CPU seconds that it took."""
    start = cpu_seconds()
    for verdict in verdicts:
        now = cpu_seconds()
        yield verdict, now - start
        start = now


def measure(pairs: list[tuple[Example, str]]) -> dict:
    one_core = (verdict for pair in pairs for verdict in judge_all("code", [pair]))
    verdicts, seconds = zip(*timed(tqdm(one_core, "one core", len(pairs), unit="program")), strict=True)
    start = time.monotonic()
    parallel = list(tqdm(judge_all("code", pairs), "all cores", len(pairs), unit="program"))
    names = [x.id for x, _ in pairs]
    fast, slow, failed = [], {}, []
    for name, verdict, second in zip(names, verdicts, seconds, strict=True):
        if not verdict:
            failed.append(name)
        if second < SLOW:
            fast.append(second)
        else:
            slow[name] = round(second, 2)
    return {
        "programs": len(pairs),
        "accepted": sum(verdicts),
        "failed": failed,
        "same verdicts in parallel": parallel == list(verdicts),
        "programs per CPU second": round(len(fast) / sum(fast), 1),
        "slow": slow,
        "programs per second, all cores": round(len(pairs) / (time.monotonic() - start), 1),
        "cores": os.cpu_count(),
        "machine": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "sandbox": sandbox.describe(),
    }


def table(results: dict) -> str:
    rows = "\n".join(f"| {name} | {value} |" for name, value in results.items())
    return f"| code judge on MBPP's gold programs | |\n|---|---|\n{rows}\n"


def main() -> None:
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("--data", type=Path, default=Path("data"), help="holds mbpp/mbpp.jsonl (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="results go there (%(default)s)")
    args = parser.parse_args()
    fields = ("task_id", "text", "code", "test_list", "test_setup_code")
    file = args.data / "mbpp" / "mbpp.jsonl"
    download(HOME, file, SHA256)
    rows = read_jsonl(file, fields)
    results = measure([(mbpp_example(row), f"[[BEGIN]]\n{row['code']}\n[[DONE]]") for row in rows])
    write_json(args.out / "judge.json", results)
    write_text(args.out / "judge.md", table(results))
    print(table(results))
    sys.exit(bool(results["failed"]) or not results["same verdicts in parallel"])


if __name__ == "__main__":
    exit_cleanly(main)
