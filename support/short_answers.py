"""Short answers as texts: their words, how much of a gold they hold, and whether they abstain.

Where we differ from the published definitions:
1. Abstention. The phrases are those that Slobodkin et al. (2023) count, but as whole words ("n/a" is not
   found in "corn/apples"). Those that they count as the whole reply only, we take without the blanks and
   marks around it ("Unknown." is "unknown").
2. Token recall. The normalisation is SQuAD's (v1.1 script), the overlap that of multisets. A gold of which
   that leaves nothing ("A", "the") would be recalled by every response: there, the whole response must be the
   gold.
3. Marks. SQuAD drops ASCII punctuation only. We drop that of Unicode too, so that “Paris” is Paris. A decimal
   point stays, so that 4.5 is not 45.
"""

import re
import string
import unicodedata
from collections import Counter

ABSTENTIONS = (
    "unanswerable",
    "n/a",
    "idk",
    "i don't know",
    "not known",
    "answer not in context",
    "the answer is unknown",
)
WHOLE_ABSTENTIONS = ("nan", "unknown", "no answer", "none of the above")  # only as the whole reply
BEYOND_ASCII = [chr(code) for code in range(0x80, 0x10000)]
PUNCTUATION = string.punctuation + "".join(c for c in BEYOND_ASCII if unicodedata.category(c).startswith("P"))
NO_PUNCTUATION = str.maketrans("", "", PUNCTUATION)
APOSTROPHES = dict.fromkeys(map(ord, "’‘ʼ＇"), "'")
# A point or a comma inside a number, or a point before one: 4.5, 4,5, .5, but not the comma of 4,500.
DECIMAL_POINT = re.compile(r"(?<=\d)\.(?=\d)|(?<=\d),(?!\d{3}(?!\d))(?=\d)|(?<![\w.])\.(?=\d)")
ABSTENTION = re.compile(r"(?<!\w)(?:" + "|".join(map(re.escape, ABSTENTIONS)) + r")(?!\w)")
SENTENCE_END = re.compile(r"[.!?;][\"'”’»)*_]*(?=\s|$)|\s/\s|\n")


def normalize(text: str) -> list[str]:
    """The words of a text after SQuAD's normalisation: lower case, no punctuation, no articles.

    Unlike SQuAD's, it drops the punctuation of Unicode too, and keeps a decimal point (or comma) as a point.
    An é is the same in one character and in two (NFC).
    """
    parts = DECIMAL_POINT.split(unicodedata.normalize("NFC", text).lower())
    text = ".".join(part.translate(NO_PUNCTUATION) for part in parts)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def token_recall(response: str, gold: str) -> float:
    """The share of the gold's words (as a multiset) that the response has: |response ∩ gold| / |gold|."""
    wanted = Counter(normalize(gold))
    if not wanted:
        for form in (str.lower, bare):
            if form(response).strip() == form(gold).strip() != "":
                return 1.0
        return 0.0
    return (wanted & Counter(normalize(response))).total() / wanted.total()


def exact_match(response: str, gold: str) -> bool:
    """SQuAD's: are the words the same, in the same order?"""
    return normalize(response) == normalize(gold)


def token_f1(response: str, gold: str) -> float:
    """SQuAD's F1: the harmonic mean of the precision and recall of the response's words, as multisets."""
    said, wanted = Counter(normalize(response)), Counter(normalize(gold))
    if not said or not wanted:
        return float(said == wanted)
    return 2 * (said & wanted).total() / (said.total() + wanted.total())


def sentences(text: str) -> list[str]:
    """The sentences of a text, lower-cased and without marks around them."""
    parts = [bare(part) for part in SENTENCE_END.split(text)]
    return [part for part in parts if part]


def bare(text: str) -> str:
    """Lower-cased, without marks and blanks around it."""
    return text.lower().translate(APOSTROPHES).strip(PUNCTUATION + string.whitespace)


def abstains(response: str) -> bool:
    """Does the response say that there is no answer: by a phrase in it, or by nothing else in it?"""
    if bare(response) in WHOLE_ABSTENTIONS:
        return True
    return any(ABSTENTION.search(sentence) for sentence in sentences(response))
