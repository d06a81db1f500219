"""GSM8K (Cobbe et al., 2021): math word problems whose answer is a number. Prompts: Figs. 3, 5 and 7.

A row: {"question": "Ann has 3 apples and buys 2. How many has she?", "answer": "3 + 2 = <<3+2=5>>5\n#### 5"}

Decided here, the paper being silent: in the gold the calculator marks <<...>> are removed, and the line `####
N` becomes `The answer is N.`, the ending that the prompts ask for. So gold and model responses end alike.
"""

import random
import re
from pathlib import Path

from data import SPLIT_SEED, Example, Splits, Task
from support.files import download
from tasks.rows import read_counted, text_of

TRAIN = """\
You are an expert in math. Below is a math question. Write a response that appropriately answers the \
question. Your final answer should be an integer at the end of your response, formatted as: The answer is \
{answer}.
Question: {{question}}"""  # Fig. 3
PREDICT = TRAIN + "\nGreat! Let's think step by step."  # Fig. 5
PARAPHRASE = """\
You are an expert in math. Below are a reference answer and its corresponding math question. Refer to the \
reference answer and write a response that appropriately answers the question. Your final answer should be \
an integer at the end of your response, formatted as: The answer is {answer}.

Reference Answer:
{{gold_response}},

Question:
{{question}},

Response:
Great! Let's think step by step."""  # Fig. 7

HOME = "https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data/"
SHA256 = {
    "train": "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",
    "test": "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
}
COUNTS = {"train": 7473, "test": 1319}


def load_gsm8k(folder: Path) -> Splits:
    """7473 train rows, of which 150 drawn at random validate, and 1319 test rows (A.2)."""
    rows = _read_split(folder / "gsm8k", "train")
    test = _read_split(folder / "gsm8k", "test")

    held_out = set(random.Random(SPLIT_SEED).sample(range(len(rows)), 150))
    train = [row for i, row in enumerate(rows) if i not in held_out]
    validation = [row for i, row in enumerate(rows) if i in held_out]
    return train, validation, test


def _read_split(folder: Path, name: str) -> list[Example]:
    path = folder / f"{name}.jsonl"
    download(f"{HOME}{name}.jsonl", path, SHA256[name])
    examples = []
    for i, row in enumerate(read_counted(path, COUNTS[name], ("question", "answer"))):
        where = f"{path}, row {i + 1}"
        question = text_of(row, "question", where)
        answer = text_of(row, "answer", where)
        examples.append(Example(f"{name}-{i}", question, answer))
    return examples


def gsm8k_gold(example: Example) -> str:
    """The solution without calculator marks, and with the ending that the prompts ask for."""
    solution = re.sub(r"<<.*?>>", "", example.answer)
    steps, _, number = solution.rpartition("####")
    number = number.strip().replace(",", "")
    return f"{steps.strip()}\nThe answer is {number}."


# -------------------------------------------------------------------------------- read as lm-eval does


def gsm8k_strict(response: str) -> str:
    """The first number after `####`, or "[invalid]"."""
    found = re.search(r"#### (\-?[0-9\.\,]+)", response)
    return found[1] if found else "[invalid]"


def gsm8k_flexible(response: str) -> str:
    """The last thing that looks like a number, or "[invalid]"."""
    found = re.findall(r"-?[$0-9.,]{2,}|-?[0-9]+", response)
    return found[-1] if found else "[invalid]"


def gsm8k_match(extracted: str, gold: str) -> bool:
    """Equal as text after the harness's clean-up: `1,000` is `1000`, but `18.00` is not `18`.

    `gold`: the row's answer.
    """
    return _clean(extracted) == _clean(gold)


def _clean(text: str) -> str:
    for ignored in (",", r"\$", "(?s).*#### ", r"\.$"):
        text = re.sub(ignored, "", text)
    return text.lower()


def strict_match(x: Example, response: str) -> float:
    """Is the number after `####` right? The paper's prompts do not ask for that form."""
    return float(gsm8k_match(gsm8k_strict(response), x.answer))


def flexible_match(x: Example, response: str) -> float:
    """Is the last thing that looks like a number right?"""
    return float(gsm8k_match(gsm8k_flexible(response), x.answer))


# -------------------------------------------------------------------------------- the task

GSM8K = Task(
    load_gsm8k,
    judge="numeric",
    predict=PREDICT,
    train=TRAIN,
    paraphrase=PARAPHRASE,
    gold=gsm8k_gold,
    metrics={"lm-eval, after ####": strict_match, "lm-eval, last number": flexible_match},
)
