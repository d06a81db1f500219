"""What a model is asked: an example (x, y), the splits of a data set, a task, and the prompt of an example.

A kind of task is a file of tasks/. Prompts are the user turn only, to the letter of the paper's figures. The
figures print `<s>[INST] ... [/INST]` around them. That is Mistral's chat template, which the tokenizer of
whatever model is used adds itself.
"""

import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from support.cli import InputError

EXAMPLES = Path(__file__).parent / "examples"
SPLIT_SEED = 0  # splits never depend on --seed: seeds of a study share their test rows
ABSTAIN = "unanswerable"  # the gold of a question without an answer


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


def plain_gold(example: Example) -> str:
    """The gold as a response: the answer as the data has it."""
    return example.answer


@dataclass(frozen=True)
class Task:
    """All that sets one task apart.

    The templates are user turns. `steps` and `eval_every` are the paper's (A.3). `metrics` are scores of a
    response. The report has the mean of each over the test rows.
    """

    load: Callable[[Path], Splits] | None  # from the data folder. None: the rows are a person's own
    judge: str
    predict: str
    train: str
    paraphrase: str
    gold: Callable[[Example], str] = plain_gold
    max_new_tokens: int = 512
    stop: str | None = None  # a response ends with this text, where it has it
    steps: int = 5000
    eval_every: int = 500
    metrics: dict[str, Callable[[Example, str], float]] = field(default_factory=dict)
    note: str = ""  # one line for the person who runs it: what was recognised in their files


# -------------------------------------------------------------------------------- prompts

# Fig. 6 is this frame around MBPP's instruction. Tasks without a printed paraphrase prompt use it too.
PARAPHRASE_FRAME = """\
Below are an instruction that describes a task along with a reference answer. Using the reference \
answer as a guide, write your own response.

### Instruction:
%s

Reference Answer:
{{gold_response}},

Response:"""

VARIABLE = re.compile(r"\{\{\s*(\w+)\s*\}\}")
SECTION = re.compile(r"\{\{([#^])context\}\}(.*?)\{\{/context\}\}", re.DOTALL)


def fill(template: str, **values: str) -> str:
    """Replace every {{name}} in one pass, so that braces inside a value are never read as a variable."""
    return VARIABLE.sub(lambda match: values[match[1]], template)


def prompt(template: str, example: Example, gold_response: str = "") -> str:
    """The user turn for one example. InputError: the template asks for what the row does not have.

    As in Mustache, {{#context}}...{{/context}} is shown only for a row with a context,
    {{^context}}...{{/context}} only for a row without one.
    """
    values = {
        "question": example.question,
        "task": example.question,
        "context": example.context,
        "gold_response": gold_response,
        "tests": "\n".join(example.tests),
    }
    for number, test in enumerate(example.tests, 1):
        values[f"testcase_{number}"] = test

    wanted = "#" if example.context else "^"
    template = SECTION.sub(lambda section: section[2] if section[1] == wanted else "", template)
    for name in VARIABLE.findall(template):
        if name not in values:
            variable = "{{" + name + "}}"
            raise InputError(f"row {example.id}: the prompt asks for {variable}, which the row lacks")
    return fill(template, **values)


# -------------------------------------------------------------------------------- splits


def hold_out(
    rows: list[Example], group: Callable[[Example], str], limit: int = 150
) -> tuple[list[Example], list[Example]]:
    """(train, validation). Whole groups drawn at random validate, up to `limit` rows or a tenth of all."""
    sizes = Counter(map(group, rows))
    names = random.Random(SPLIT_SEED).sample(list(sizes), len(sizes))
    wanted = min(limit, len(rows) / 10)

    drawn = set()
    drawn_rows = 0
    for name in names:
        if drawn_rows >= wanted:
            break
        drawn.add(name)
        drawn_rows += sizes[name]

    train = [row for row in rows if group(row) not in drawn]
    validation = [row for row in rows if group(row) in drawn]
    return train, validation
