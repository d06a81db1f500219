"""GSM8K (Cobbe et al., 2021): math word problems whose answer is a number. Prompts: Figs. 3, 5 and 7.

A row: {"question": "Ann has 3 apples and buys 2. How many has she?", "answer": "3 + 2 = <<3+2=5>>5\n#### 5"}

Decided here, the paper being silent: in the gold the calculator marks <<...>> are removed and the line `#### N` becomes
`The answer is N.`, the ending that the prompts ask for. So gold and model responses end alike.
"""

import random
import re
from pathlib import Path

from data import SPLIT_SEED, Example, Splits
from support.files import download
from tasks.rows import read_counted

GSM8K_TRAIN = """\
You are an expert in math. Below is a math question. Write a response that appropriately answers the question. \
Your final answer should be an integer at the end of your response, formatted as: The answer is {answer}.
Question: {{question}}"""  # Fig. 3
GSM8K_PREDICT = GSM8K_TRAIN + "\nGreat! Let's think step by step."  # Fig. 5
GSM8K_PARAPHRASE = """\
You are an expert in math. Below are a reference answer and its corresponding math question. Refer to the reference answer \
and write a response that appropriately answers the question. Your final answer should be an integer at the end of your \
response, formatted as: The answer is {answer}.

Reference Answer:
{{gold_response}},

Question:
{{question}},

Response:
Great! Let's think step by step."""  # Fig. 7
GSM8K_HOME = "https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data/"
GSM8K_FILES = {
    "train": ("17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465", 7473),
    "test": ("3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14", 1319),
}


def load_gsm8k(folder: Path) -> Splits:
    """7473 train rows, of which 150 drawn at random validate, and 1319 test rows (A.2)."""
    train, test = (_gsm8k_split(folder / "gsm8k" / f"{name}.jsonl", name) for name in ("train", "test"))
    held_out = set(random.Random(SPLIT_SEED).sample(range(len(train)), 150))
    validation = [row for i, row in enumerate(train) if i in held_out]
    return [row for i, row in enumerate(train) if i not in held_out], validation, test


def _gsm8k_split(path: Path, name: str) -> list[Example]:
    sha256, count = GSM8K_FILES[name]
    download(f"{GSM8K_HOME}{name}.jsonl", path, sha256)
    rows = read_counted(path, count, ("question", "answer"))
    return [Example(f"{name}-{i}", row["question"], row["answer"]) for i, row in enumerate(rows)]


def gsm8k_gold(example: Example) -> str:
    steps, _, number = re.sub(r"<<.*?>>", "", example.answer).rpartition("####")
    return f"{steps.strip()}\nThe answer is {number.strip().replace(',', '')}."


def gsm8k_strict(response: str) -> str:
    """The first number after `####`, or "[invalid]"."""
    found = re.search(r"#### (\-?[0-9\.\,]+)", response)
    return found[1] if found else "[invalid]"


def gsm8k_flexible(response: str) -> str:
    """The last thing that looks like a number, or "[invalid]"."""
    found = re.findall(r"-?[$0-9.,]{2,}|-?[0-9]+", response)
    return found[-1] if found else "[invalid]"


def gsm8k_match(extracted: str, gold: str) -> bool:
    """Equal as text after the harness's clean-up: `1,000` is `1000`, but `18.00` is not `18`. `gold`: the row's answer."""
    return gsm8k_clean(extracted) == gsm8k_clean(gold)


def gsm8k_clean(text: str) -> str:
    for ignored in (",", r"\$", "(?s).*#### ", r"\.$"):
        text = re.sub(ignored, "", text)
    return text.lower()
