"""What making a file cost: calls, tokens and seconds, in costs.jsonl beside it."""

import time
from pathlib import Path

from support import ranks
from support.files import append_jsonl, resume_jsonl


class CostMeter:
    """Adds to costs.jsonl, beside `path`, what this process makes for it.

    A row is written every 64 calls and at the end, so that a killed run loses little of the count.
    """

    def __init__(self, path: Path):
        self.file = path.parent / "costs.jsonl"
        self.stage = path.stem

    def __enter__(self):
        if ranks.RANK == 0:
            resume_jsonl(self.file)  # cuts what a killed run left torn
        self._start()
        return self

    def __exit__(self, *_):
        self._write()

    def add(self, calls: int = 0, tokens: int = 0) -> None:
        self.calls += calls
        self.tokens += tokens
        if self.calls >= 64:
            self._write()

    def _start(self) -> None:
        self.calls = self.tokens = 0
        self.started = time.monotonic()

    def _write(self) -> None:
        if self.calls:
            seconds = round(time.monotonic() - self.started, 2)
            row = {"stage": self.stage, "rank": ranks.RANK, "calls": self.calls, "tokens": self.tokens}
            append_jsonl(self.file, row | {"seconds": seconds})
        self._start()
