"""ROUGE-L (Lin, 2004): how much of a reference text a response says, in the reference's order.

Words are runs of letters, their marks and digits, in lower case. On ASCII texts the scores are those of the
package rouge-score without stemming. That package drops every other letter, so that a Russian text has no
words there. Here the letters of all scripts count. A script that puts no blanks between words has one long
word.
"""

import unicodedata

IN_WORDS = "LMN"  # Unicode's letters, marks (a vowel sign of Tamil, an accent that stands alone) and numbers


def rouge_l(response: str, gold: str) -> float:
    """The F1 of the longest common subsequence of two texts' words, 0 to 1. 0 where a text has no words."""
    said = words(response)
    wanted = words(gold)
    common = longest_common_subsequence(said, wanted)
    if common == 0:
        return 0.0
    precision = common / len(said)
    recall = common / len(wanted)
    return 2 * precision * recall / (precision + recall)


def words(text: str) -> list[str]:
    """A text's words, each letter in its shortest form (NFC)."""
    letters = unicodedata.normalize("NFC", text.lower())
    return "".join(c if unicodedata.category(c)[0] in IN_WORDS else " " for c in letters).split()


def longest_common_subsequence(a: list[str], b: list[str]) -> int:
    """How many words two lists have in common, in the same order, with any others in between.

    `best[j]` is the answer for the words of a so far and the first j words of b.
    """
    best = [0] * (len(b) + 1)
    for word in a:
        before = best
        best = [0]
        for j, other in enumerate(b):
            if word == other:
                best.append(before[j] + 1)
            else:
                best.append(max(before[j + 1], best[j]))
    return best[-1]
