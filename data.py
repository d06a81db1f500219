"""Tasks: examples (x, y), their splits, and the paper's prompts.

A task is one entry of TASKS. Prompts are the user turn only, to the letter of the paper's figures; the `<s>[INST] ... [/INST]`
printed around them there is Mistral's chat template, which the tokenizer of whatever model is used puts there itself.

Not in the paper, and decided here:
1. GSM8K gold: the calculator marks <<...>> are removed and the line `#### N` becomes `The answer is N.`, the ending that the
   prompts ask for, so that gold and model responses end alike.
2. MBPP gold: the code between [[BEGIN]] and [[DONE]], as the prompt asks.
3. The reading prompts (NQ): the paper prints none. Ours ask to answer from the context, and to reply `unanswerable` otherwise.
4. MBPP train has 374 rows (ids 601 to 974, the data's own split); the paper says 372.
"""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from files import InputError, download, line_numbers, read_jsonl
from reading import (load_multidoc2dial, load_musique, load_nq, load_reading, load_squad, load_squad1, read_reading_json,
                     text_of)
from records import ABSTAIN, SPLIT_SEED, Example, Splits

# ------------------------------------------------------------------------------------------------ prompts, Figs. 3 to 7

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

MBPP_PREDICT = """\
You are an expert Python programmer, and here is your task: {{task}}. Your code should pass these tests:
{{testcase_1}}
{{testcase_2}}
{{testcase_3}}
Generate only the python code encapsulated between [[BEGIN]] and [[DONE]] tags. Do not generate any explanation."""  # Fig. 4

# Fig. 6 is this frame around MBPP's instruction; the tasks without a printed paraphrase prompt use the same frame.
PARAPHRASE_FRAME = """\
Below are an instruction that describes a task along with a reference answer. Using the reference answer as a guide, \
write your own response.

### Instruction:
%s

Reference Answer:
{{gold_response}},

Response:"""

MBPP_PARAPHRASE = PARAPHRASE_FRAME % """\
You are an expert Python programmer, and here is your task: {{task}}. Your code should pass these tests.

{{testcase_1}}
{{testcase_2}}
{{testcase_3}}

Generate only the python code encapsulated between [[BEGIN]] and [[DONE]] tags. Do not generate any explanation."""  # Fig. 6

READING = """\
Answer the question from the context only, in one short sentence. If the context does not hold the answer, reply with the \
single word: unanswerable.

Context:
{{context}}

Question:
{{question}}"""  # ours

PLAIN = "{{question}}"

CODE = """\
{{question}}
Your code should pass these tests:
{{tests}}
Generate only the python code encapsulated between [[BEGIN]] and [[DONE]] tags. Do not generate any explanation."""  # as Fig. 4


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


def chat_ids(tokenizer, user: str) -> list[int]:
    """Token ids of one user turn in the tokenizer's own chat template, ready for the response to begin. One BOS at most."""
    messages = [{"role": "user", "content": user}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)


def training_ids(tokenizer, user: str, response: str) -> tuple[list[int], list[bool]]:
    """(ids, is_target), both `[length]`: prompt, response and end of turn. Only the last two are trained on.

    The mask goes by position: where a tokenizer pads with its EOS, a mask by token id would never teach the model to stop.
    """
    before = chat_ids(tokenizer, user)
    target = tokenizer.encode(response, add_special_tokens=False) + [end_of_turn(tokenizer)]
    return before + target, [False] * len(before) + [True] * len(target)


def end_of_turn(tokenizer) -> int:
    """The token with which the chat template closes an assistant turn (Gemma: <end_of_turn>), else the EOS token."""
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "RESPONSE"}]
    after = tokenizer.apply_chat_template(turns, tokenize=False).rpartition("RESPONSE")[2].strip()
    ids = tokenizer.encode(after, add_special_tokens=False)
    return ids[0] if ids and ids[0] in tokenizer.all_special_ids else tokenizer.eos_token_id


# ------------------------------------------------------------------------------------------------ data sets

GSM8K_HOME = "https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data/"
GSM8K_FILES = {
    "train": ("17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465", 7473),
    "test": ("3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14", 1319),
}
MBPP_HOME = "https://raw.githubusercontent.com/google-research/google-research/master/mbpp/mbpp.jsonl"
MBPP_SHA256 = "ccf64ceae9c5403bf50a044cb6d505bfd2a2963ee58338ba268fd65beab92a9f"


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


def load_mbpp(folder: Path) -> Splits:
    """Ids 601-974 train, 511-600 validate, 11-510 test: the data's own split, as the paper uses it (A.2)."""
    path = folder / "mbpp" / "mbpp.jsonl"
    download(MBPP_HOME, path, MBPP_SHA256)
    rows = read_counted(path, 974, ("task_id", "text", "code", "test_list", "test_setup_code"))
    made = {row["task_id"]: mbpp_example(row) for row in rows}
    return tuple([made[i] for i in ids] for ids in (range(601, 975), range(511, 601), range(11, 511)))


def mbpp_example(row: dict) -> Example:
    tests, setup = tuple(row["test_list"]), row["test_setup_code"]
    return Example(str(row["task_id"]), row["text"], row["code"].replace("\r\n", "\n"), tests=tests, setup=setup)


def read_counted(path: Path, count: int, fields: tuple[str, ...]) -> list[dict]:
    rows = read_jsonl(path, fields)
    if len(rows) != count:
        raise InputError(f"{path} has {len(rows)} rows, the original has {count}: remove it to download it again")
    return rows


def load_custom(path: Path | str, judge: str) -> list[Example]:
    """A person's own file: JSONL rows with question and answer (and context, tests, setup, id), or .json as SQuAD has it.

    One answer a row, a text or a number; several golds a question are for the .json formats.
    """
    path = Path(path)
    if path.suffix == ".json":
        return read_reading_json(path)
    needed = ("question", "tests") if judge == "code" else ("question",)
    rows = read_jsonl(path, needed)
    numbered = enumerate(zip(line_numbers(path), rows, strict=True), 1)
    return [_custom_example(row, f"{path}, line {n}", str(i)) for i, (n, row) in numbered]


def _custom_example(row: dict, where: str, default_id: str) -> Example:
    unanswerable = row.get("unanswerable") is True
    tests = row.get("tests", [])
    if not isinstance(tests, list) or not all(isinstance(test, str) for test in tests):
        raise InputError(f"{where}: 'tests' must be a list of strings")
    row = {"id": default_id, "context": "", "setup": ""} | row  # what may be left out, but not be null
    texts = {field: text_of(row, field, where) for field in ("id", "question", "context", "setup")}
    answer = ABSTAIN if unanswerable else text_of(row, "answer", where)
    return Example(**texts, answer=answer, tests=tuple(tests), unanswerable=unanswerable)


# ------------------------------------------------------------------------------------------------ tasks


def gsm8k_gold(example: Example) -> str:
    steps, _, number = re.sub(r"<<.*?>>", "", example.answer).rpartition("####")
    return f"{steps.strip()}\nThe answer is {number.strip().replace(',', '')}."


def mbpp_gold(example: Example) -> str:
    return f"[[BEGIN]]\n{example.answer.strip()}\n[[DONE]]"


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


READING_TASK = Task(load_reading, "recall", READING, READING, PARAPHRASE_FRAME % READING, max_new_tokens=64)
CUSTOM_TASK = Task(load_custom, "", PLAIN, PLAIN, PARAPHRASE_FRAME % PLAIN, steps=1000, eval_every=100)
CODE_TASK = Task(load_custom, "code", CODE, CODE, PARAPHRASE_FRAME % CODE, mbpp_gold, stop="[[DONE]]")

TASKS = {
    "gsm8k": Task(load_gsm8k, "numeric", GSM8K_PREDICT, GSM8K_TRAIN, GSM8K_PARAPHRASE, gsm8k_gold),
    "mbpp": Task(load_mbpp, "code", MBPP_PREDICT, MBPP_PREDICT, MBPP_PARAPHRASE, mbpp_gold, stop="[[DONE]]",
                 steps=1000, eval_every=100),
    "nq": replace(READING_TASK, load=load_nq, judge="llm"),
    "squad": replace(READING_TASK, load=load_squad),
    "squad1": replace(READING_TASK, load=load_squad1),
    "musique": replace(READING_TASK, load=load_musique),
    "multidoc2dial": replace(READING_TASK, load=load_multidoc2dial, judge="llm", max_new_tokens=128),
    "reading": replace(READING_TASK, steps=12, eval_every=12),
}


def load_task(name: str, folder: Path | str, files: list[str] | None = None, judge: str | None = None,
              limit: int | None = None, max_new_tokens: int | None = None) -> tuple[Task, Splits]:
    """The task and its (train, validation, test) rows, each cut to the first `limit`.

    `files` are a custom task's three files. InputError: an unknown task, a bad or empty file, an id that comes twice.
    """
    if name == "custom":
        splits = tuple(load_custom(path, judge) for path in files)
        reading = any(row.context for row in splits[0])
        task = CODE_TASK if judge == "code" else READING_TASK if reading else CUSTOM_TASK
    elif name in TASKS:
        task = TASKS[name]
        splits = task.load(Path(folder))
    else:
        raise InputError(f"unknown task {name!r}: choose from {', '.join(TASKS)}, custom")
    for split, rows in zip(("train", "validation", "test"), splits, strict=True):
        _check(rows, f"{name}, {split}")
    task = replace(task, judge=judge or task.judge, max_new_tokens=max_new_tokens or task.max_new_tokens)
    return task, tuple(rows[:limit] for rows in splits)


def _check(rows: list[Example], where: str) -> None:
    if not rows:
        raise InputError(f"{where}: no rows")
    seen = set()
    for row in rows:
        if row.id in seen:
            raise InputError(f"{where}: the id {row.id!r} comes twice")
        seen.add(row.id)
