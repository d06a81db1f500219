"""Summaries of the embedded passages, an open-ended task: many responses are right, and none word by word.

A row of examples/summaries.jsonl, whose id is that of a passage of examples/reading.json:

    {"id": "copper-street-clock", "summary": "Aldery's clock, finished in 1903, stood still for years ..."}

The judge accepts a summary that is near enough to ours by ROUGE-L. `--judge llm` asks a language model
instead. The instruction is part of the question, so that this judge, too, sees the passage.
"""

from pathlib import Path

from data import EXAMPLES, PARAPHRASE_FRAME, Example, Splits, Task
from support.files import read_jsonl
from support.rouge import rouge_l
from tasks.reading import PARTS, read_squad

INSTRUCTION = "Summarize the following passage in one or two short sentences.\n\n"
QUESTION = "{{question}}"


def load_summaries(folder: Path) -> Splits:
    """One row a passage, in the split of the task `reading`: 36 train, 6 validate, 18 test."""
    rows = read_jsonl(EXAMPLES / "summaries.jsonl", ("id", "summary"))
    summaries = {row["id"]: row["summary"] for row in rows}
    examples = []
    for article in read_squad(EXAMPLES / "reading.json"):
        question = article[0]
        id = question.id.rpartition("-")[0]  # of copper-street-clock-4
        examples.append(Example(id, INSTRUCTION + question.context, summaries[id]))
    train, validation, test = [examples[part] for part in PARTS]
    return train, validation, test


def rouge_of(x: Example, response: str) -> float:
    return rouge_l(response, x.answer)


def words_of(x: Example, response: str) -> float:
    return float(len(response.split()))


SUMMARIES = Task(
    load_summaries,
    judge="rouge",
    predict=QUESTION,
    train=QUESTION,
    paraphrase=PARAPHRASE_FRAME % QUESTION,
    max_new_tokens=160,
    steps=12,
    eval_every=6,
    metrics={"ROUGE-L": rouge_of, "words": words_of},
)
