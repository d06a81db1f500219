"""Table 1 and Fig. 2: what a training row may be trained on, and how likely the base model finds each.

No model is run here. `score(x, responses)` asks the base model. A response is (its text, the tokens that were
generated, or None), and the score is (log p in nats, number of tokens).
"""

import random
from pathlib import Path

from data import Example, Task
from results.run_files import BRANCHES, KINDS, branch_of, read_answers
from support.cli import InputError

FIGURE_ROWS = 84  # of Fig. 2, at most (the paper's number)
LARGEST_GAP = "largest gap to the gold"


class TrainingTexts:
    """The training rows of a run, each with its gold and the base model's responses."""

    def __init__(self, task: Task, rows: list[Example], run: Path, keep_unfinished: bool):
        self.task = task
        self.rows = {x.id: x for x in rows}
        self.answers = {kind: read_answers(run, kind, keep_unfinished) for kind in KINDS}

    def figure_2(self, score) -> dict | None:
        """Scores of accepted responses and accepted paraphrases, each beside the gold of the same row.

        Over at most 84 random rows where both were accepted, as in the paper (so it needs a method that
        paraphrases every row, SDFT). Without such rows, "rows" says so and each kind stands for the rows that
        have it. None: nothing was accepted.
        """
        both, either = [], []
        for id in self.rows:
            kinds = self._usable_kinds(id)
            if kinds:
                either.append(id)
            if len(kinds) == len(KINDS):
                both.append(id)
        if not either:
            return None

        ids = both or either
        chosen = random.Random(0).sample(ids, min(FIGURE_ROWS, len(ids)))
        scores = {"rows": "both accepted" if both else "either accepted", "n": len(chosen)}
        scores |= {"predictions": [], "paraphrases": [], "golds": [], "beside_gold": []}
        for id in chosen:
            x = self.rows[id]
            kinds = self._usable_kinds(id)
            responses = [(y.text, y.tokens) for y in (self.answers[kind][id] for kind in kinds)]
            *found, gold = score(x, [*responses, (self.task.gold(x), None)])
            scores["golds"].append(gold[0])
            for kind, response in zip(kinds, found, strict=True):
                scores[kind].append(response[0])
                scores["beside_gold"].append({"id": id, "kind": kind, "response": response, "gold": gold})
        return scores

    def _usable_kinds(self, id: str) -> list[str]:
        return [kind for kind in KINDS if id in self.answers[kind] and self.answers[kind][id].usable]

    def examples(self, score, figure: dict | None) -> list[dict]:
        """The first row of each branch, and the row of Fig. 2 that is likelier than its gold by most."""
        chosen = {}
        for id in self.rows:
            y_hat = self.answers["predictions"].get(id)
            y_tilde = self.answers["paraphrases"].get(id)
            if y_hat or y_tilde:
                chosen.setdefault(branch_of(y_hat, y_tilde), id)

        found = [self.example(chosen[branch], score) for branch in BRANCHES if branch in chosen]
        if figure:
            widest = max(figure["beside_gold"], key=lambda row: row["response"][0] - row["gold"][0])
            found.append(self.example(widest["id"], score) | {"why": LARGEST_GAP})
        return found

    def example(self, id: str, score) -> dict:
        """A row's way through the three branches. InputError: an unknown id, or no response was made."""
        if id not in self.rows:
            raise InputError(f"--show {id}: no training row has this id; {next(iter(self.rows))} is one")
        y_hat = self.answers["predictions"].get(id)
        y_tilde = self.answers["paraphrases"].get(id)
        if not (y_hat or y_tilde):
            raise InputError(
                f"--show {id}: the run has no response to it; s3ft.py --method s3ft makes them")

        x = self.rows[id]
        texts = {"gold": self.task.gold(x)}
        responses = [(texts["gold"], None)]
        verdicts = {}
        for name, y in (("prediction", y_hat), ("paraphrase", y_tilde)):
            if y:
                texts[name] = y.text
                responses.append((y.text, y.tokens))
                verdicts[name] = verdict_of(y)
        log_p = dict(zip(texts, score(x, responses), strict=True))
        target = branch_of(y_hat, y_tilde)
        return {"id": id, "question": x.question, "context": x.context, "texts": texts, "verdicts": verdicts,
                "log_p": log_p, "target": target}


def verdict_of(y) -> str:
    """The judge's verdict in words, and why a response that it accepts is not trained on."""
    if y.verdict is None:
        return "no readable verdict"
    if not y.verdict:
        return "rejected"
    if y.usable:
        return "accepted"
    return "accepted, but it was cut off" if not y.finished else "accepted, but it leaks its prompt"


# ------------------------------------------------------------------------------ as text

SIGNS = {
    "gold": "y, the gold",
    "prediction": "ŷ, the model's own response",
    "paraphrase": "ỹ, its paraphrase of the gold",
}


def describe(example: dict) -> str:
    """A row's way through the three branches as Markdown, every text in full."""
    why = f" ({example['why']})" if "why" in example else ""
    parts = [f"**Row {example['id']}, target: {SIGNS[example['target']]}**{why}"]
    parts.append(quoted("x, the question", example["question"]))
    if example["context"]:
        parts.append(quoted("its context", example["context"]))
    for name in ("gold", "prediction", "paraphrase"):
        if name in example["texts"]:
            total, tokens = example["log_p"][name]
            verdict = f", {example['verdicts'][name]}" if name in example["verdicts"] else ""
            likelihood = f"log p = {total:.2f} ({total / tokens:.3f} a token, {tokens} tokens)"
            parts.append(quoted(f"{SIGNS[name]}{verdict}: {likelihood}", example["texts"][name]))
    return "\n\n".join(parts)


def quoted(label: str, text: str) -> str:
    """A label above a text, which is shown as it is. The fence is longer than any in the text."""
    longest = 2
    for line in text.split("\n"):
        fence = len(line) - len(line.lstrip().lstrip("`")) if line.lstrip().startswith("```") else 0
        longest = max(longest, fence)
    fence = "`" * (longest + 1)
    return f"{label}\n\n{fence}text\n{text}\n{fence}"
