"""Scores of answers to questions about a passage, beside the judge's verdict: exact match, F1, recall.

They judge nothing: no method trains on them. Texts come in, numbers go out.
"""

from collections.abc import Sequence

from data import Example
from support.short_answers import abstains, exact_match, token_f1, token_recall


def reading_row(x: Example, response: str) -> dict[str, float]:
    """Scores of one response, each 0 to 1 and the best over the golds. `words` is a count.

    exact, f1: SQuAD v2's. An abstaining response counts as its empty answer: 1 where there is no answer, else
    0. recall: token recall of the gold, which is the word `unanswerable` where there is no answer (SSR's
    token-level recall). modified_recall: ours, as SSR prints no formula. Where there is an answer, the recall
    of a response that gives one. Where there is none, 1 for a response that abstains. Else 0. answerability:
    does it abstain exactly where there is no answer?
    """
    abstained = abstains(response)
    exact = f1 = recall = 0.0
    for gold in (x.answer, *x.aliases):
        exact = max(exact, float(exact_match(response, gold)))
        f1 = max(f1, token_f1(response, gold))
        recall = max(recall, token_recall(response, gold))

    modified_recall = recall
    if x.unanswerable or abstained:
        exact = f1 = modified_recall = float(x.unanswerable and abstained)
    return {
        "exact": exact,
        "f1": f1,
        "recall": recall,
        "modified_recall": modified_recall,
        "answerability": float(abstained == x.unanswerable),
        "words": float(len(response.split())),
    }


def reading_scores(pairs: Sequence[tuple[Example, str]]) -> dict[str, dict]:
    """Means of reading_row over the rows "answerable", "unanswerable" and "all", each with its n.

    A group without a row is left out.
    """
    groups: dict[str, list[dict]] = {"answerable": [], "unanswerable": [], "all": []}
    for x, response in pairs:
        row = reading_row(x, response)
        groups["unanswerable" if x.unanswerable else "answerable"].append(row)
        groups["all"].append(row)

    scores = {}
    for name, rows in groups.items():
        if not rows:
            continue
        scores[name] = {"n": len(rows)}
        for key in rows[0]:
            scores[name][key] = sum(row[key] for row in rows) / len(rows)
    return scores
