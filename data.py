"""What a model is asked: an example (x, y), the splits of a data set, a task, and how an example becomes a prompt.

A data set is one file of tasks/. Prompts are the user turn only, to the letter of the paper's figures. The
`<s>[INST] ... [/INST]` printed around them there is Mistral's chat template, which the tokenizer of whatever model is used
puts there itself.
"""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from support.cli import InputError

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


# Fig. 6 is this frame around MBPP's instruction; the tasks without a printed paraphrase prompt use the same frame.
PARAPHRASE_FRAME = """\
Below are an instruction that describes a task along with a reference answer. Using the reference answer as a guide, \
write your own response.

### Instruction:
%s

Reference Answer:
{{gold_response}},

Response:"""


def fill(template: str, **values: str) -> str:
    """Replace every {{name}} in one pass, so that braces inside a value are never read as a variable."""
    return re.sub(r"\{\{\s*(\w+)\s*\}\}", lambda match: values[match[1]], template)


def prompt(template: str, example: Example, gold_response: str = "") -> str:
    """The user turn for one example."""
    tests = {f"testcase_{i}": test for i, test in enumerate(example.tests, 1)}
    tests["tests"] = "\n".join(example.tests)
    values = {"question": example.question, "task": example.question, "context": example.context, **tests}
    try:
        return fill(template, gold_response=gold_response, **values)
    except KeyError as missing:
        raise InputError(f"row {example.id}: the prompt asks for {{{{{missing.args[0]}}}}}, which the row lacks") from None


def plain_gold(example: Example) -> str:
    return example.answer


@dataclass(frozen=True)
class Task:
    """All that sets one task apart. The templates are user turns; steps and eval_every are the paper's (A.3)."""

    load: Callable[[Path], Splits]
    judge: str
    predict: str
    train: str
    paraphrase: str
    gold: Callable[[Example], str] = plain_gold
    max_new_tokens: int = 512
    stop: str | None = None
    steps: int = 5000
    eval_every: int = 500
