"""What every data set becomes: rows (x, y) of D, in three splits."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

EXAMPLES = Path(__file__).parent / "examples"
SPLIT_SEED = 0  # splits never depend on --seed: seeds of a study share their test rows
ABSTAIN = "unanswerable"


@dataclass(frozen=True)
class Example:
    """One row (x, y) of D. `answer` is the gold as the data has it, which is what the judge compares with."""

    id: str
    question: str
    answer: str
    context: str = ""
    tests: tuple[str, ...] = ()
    setup: str = ""  # code to run after the program and before its tests (MBPP 367 and 927 need it)
    unanswerable: bool = False
    aliases: tuple[str, ...] = ()  # further golds that are right too


Splits = tuple[list[Example], list[Example], list[Example]]  # train, validation, test


def hold_out(rows: list[Example], group: Callable[[Example], str], most: int = 150) -> tuple[list[Example], list[Example]]:
    """(train, validation): whole groups drawn at random validate, until they hold `most` rows or a tenth of all."""
    sizes: dict[str, int] = {}
    for row in rows:
        sizes[group(row)] = sizes.get(group(row), 0) + 1
    wanted, drawn, names = min(most, len(rows) / 10), set(), list(sizes)
    for name in random.Random(SPLIT_SEED).sample(names, len(names)):
        if sum(sizes[name] for name in drawn) >= wanted:
            break
        drawn.add(name)
    return [row for row in rows if group(row) not in drawn], [row for row in rows if group(row) in drawn]
