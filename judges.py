r"""Judges: is a response equivalent to the gold? They are `=` in lines 5 and 9 of Algorithm 1 (paper, A.3 and A.5).

numeric, for GSM8K: the last number of the response equals the last number of the gold (A.3).
code, for MBPP: the program in the response passes every test of its row. support/sandbox.py runs it and says what that covers.
llm, for NQ: a language model reads the prompt of Fig. 8. True or False is read off its reply.
recall, for short golds: every word of the gold is in the response. Where there is no answer, the response abstains (ours).

A new judge is one function (example, response) -> bool and one entry of JUDGES, at the end of this file.

What `numeric` counts as a number. Skip this on first reading: it says what each line of the pattern below is for.

    written                                   read as         because
    18   +18   18.   18!   **18**   _18_      18              marks around digits are not part of a number
    18.00   018                               18              it is compared by value, exactly, however long
    1,234   1,234,567.5                       1234, 1234567.5 groups of exactly three digits
    1{,}234   1\,234   1'234   1_234   1 234  1234            so written too (the last: thin, no-break blank),
    1,\!234                                   1234            as MATH does it
    118 000   1 200 300                       118000, 1200300 a plain blank does so too, unless
    3 4   5 12 100   12 100 5   0 500         4, 100, 5, 500  more digits stand beside it, or a zero before
    1,23   3, 4   1,2345                      23, 4, 2345     any other comma ends a number
    .5   0.5                                  0.5             but ...5 is 5, and 1.2.3 ends in 3
    $18   £18   18 %   18kg   18 km/h         18              currency, percent and units are not read
    \boxed{18}   \$18   \(18\)   #### 18      18              nor is markup
    m^2   m^{2}   cm²                         nothing         an exponent is no number of its own,
    10^6   2^{5}   1.2 x 10^3   10⁶           10, 2, 10, 10   nor is a power worked out: the base is read
    -18   −18   ‐18   ‑18   ‒18   –18   (-18) -18             a minus is any of these, and touches its number
    -$18   $-18   -€ 18   -₩18   -US$18       -18             or the number's currency,
    5-18   day-18   ) -18                     18, 18, -18     and nothing that it could subtract from,
    10%-18%   5°-18°   20€-18€   $20$-$18$    18              a sign that ends a number among them;
    - 18   10 - 18   —18                      18              a bullet, a subtraction, a dash is no sign
    1.8e1   1E3                               18, 1000        an exponent of up to three digits
    ３   १८                                    3, 18           the decimal digits of any script
    8/3   -1/2   \frac{8}{3}                  8/3, -1/2, 8/3  a fraction is one number, with its exact value,
    2 2/3   2\frac{2}{3}                      8/3             so is a mixed one,
    3/4/2020   5-8/3   m2/3   8/0   8/3kg     2020, 3, 3, 0, 3 but only where nothing else hangs on it
    3:45   7-9   2x4   m2   9 km/h            45, 9, 4, 2, 9  no times, ranges, products: the last number
    ½   ²   eighteen   ∞   nan                nothing         not written in digits

    Two answers without a number are not equal.

Where `recall` differs from the published definitions:
1. Abstention. The phrases are those that Slobodkin et al. (2023) count, but as whole words ("n/a" is not found in
   "corn/apples"). Those that they count as the whole reply only, we take without the blanks and marks around it
   ("Unknown." is "unknown").
2. Token recall. The normalisation is SQuAD's (v1.1 script), the overlap that of multisets. A gold of which that leaves
   nothing ("A", "the") would be recalled by every response: there, the whole response must be the gold.
"""

import os
import re
import string
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from fractions import Fraction

from data import Example, fill
from support import ranks, sandbox

# Hyphens, the figure dash and the en dash, the minus sign, the small and the wide hyphen.
MINUS = r"-\u2010-\u2013\u2212\ufe63\uff0d"
CURRENCY = r"¢-¥֏؋৲৳৻૱௹฿៛₠-⃀﷼﹩＄￠￡￥￦"  # besides $, which is also a mark of LaTeX
NUMBER = re.compile(
    r"""
    \^ \{? [MINUS]? [\d.]+                                  # an exponent: passed over
  | (?: (?<! [^\W_] ) (?<! [MINUS)\]}%°] )                   # a minus, with nothing to subtract from: no letter or digit,
        (?<! \d [$CURRENCY] ) (?<! \d \\ \$ )                # bracket or minus, no 5%, 5°, 5€, 5\$ and
        (?<! \d \s [CURRENCY] )                              # no 5 € (but 5 $-3$ is two numbers)
        (?P<minus> [MINUS] )
        (?: [A-Z]{0,3} \\? \$ | [A-Z]{0,3} [CURRENCY] \ ? | \\ [cdt]? frac \{ )? )?
    (?P<digits> \d{1,3} (?: (?: [,，'’_\u00a0\u2009\u202f] | \{,\} | \\[,\ ] | ,\\! ) \d{3} )+ (?! \d )   # 1,234,567
              | (?<! \d \s ) (?! 0 ) \d{1,3} (?: \  \d{3} )+ (?! \d | \  \d )                            # 1 234 567
              | \d+
              | (?<! [\w.] ) (?= \. \d ) )                   # .5
    (?P<rest> (?: \. \d+ )? (?: [eE] [+-]? \d{1,3} (?! \w ) )? )
    """.replace("MINUS", MINUS).replace("CURRENCY", CURRENCY),
    re.VERBOSE,
)
FRACTION_START = re.compile(r"(?<![^\W_])(?<![/^.,])(?<!\d[-+*×·:])")  # no m2/3, no 1/2/3, no 5-2/3
FRACTION_END = re.compile(r"(?![^\W_])(?![/^])")
FRACTION_DIGITS = 40  # longer ones are no fractions: their value would take long to work out
MIXED = re.compile(r" | ?\\[cdt]?frac\{")  # between the 2 and the 1 of `2 1/3`


def read_numbers(text: str) -> list[Decimal | Fraction]:
    """The numbers of a text in their order, by the table above."""
    matches = [match for match in NUMBER.finditer(text) if match["digits"] is not None]  # else an exponent
    values = []
    i = 0
    while i < len(matches):
        value, taken = read_number(text, matches[i : i + 3])
        values.append(value)
        i += taken
    return values


def read_number(text: str, matches: list[re.Match]) -> tuple[Decimal | Fraction, int]:
    """(the number that begins with the first of three neighbours, how many of them it takes)."""
    if len(matches) == 3:
        whole, fraction = matches[0], read_fraction(text, *matches[1:])
        gap = text[whole.end() : matches[1].start()]
        if fraction is not None and 0 < fraction < 1 and MIXED.fullmatch(gap) and not whole["rest"]:
            sign = -1 if whole["minus"] else 1
            return Fraction(value(whole)) + sign * fraction, 3
    if len(matches) >= 2:
        fraction = read_fraction(text, *matches[:2])
        if fraction is not None:
            return fraction, 2
    return value(matches[0]), 1


def read_fraction(text: str, top: re.Match, bottom: re.Match) -> Fraction | None:
    r"""The value of `8/3` or `\frac{8}{3}`. None: the two numbers are no fraction, or more hangs on it."""
    between = text[top.end() : bottom.start()]
    if between in ("/", "⁄", "∕"):
        alone = FRACTION_START.match(text, top.start()) and FRACTION_END.match(text, bottom.end())
    else:
        before = text[max(0, top.start() - 5) : top.start("digits")]
        alone = between == "}{" and "frac{" in before and text.startswith("}", bottom.end())
    if not alone or len(top[0]) + len(bottom[0]) > FRACTION_DIGITS or value(bottom) == 0:
        return None
    return Fraction(value(top)) / Fraction(value(bottom))


def value(match: re.Match) -> Decimal:
    sign = "-" if match["minus"] else ""
    digits = re.sub(r"\D", "", match["digits"]) or "0"
    return Decimal(sign + digits + match["rest"])


def last_number(text: str) -> Decimal | Fraction | None:
    """The last number of a text by the table above, None if it has none."""
    numbers = read_numbers(text)
    return numbers[-1] if numbers else None


def same_number(a: Decimal | Fraction | None, b: Decimal | Fraction | None) -> bool:
    """Are both the same number, exactly? Two answers without a number (None) are not."""
    if a is None or b is None:
        return False
    if isinstance(a, Decimal) and isinstance(b, Decimal):
        return a == b
    return Fraction(a) == Fraction(b)


def numeric(response: str, gold: str) -> bool:
    """Do both end in the same number (A.3)? False where either has none."""
    return same_number(last_number(response), last_number(gold))


ANSWER_MARK = re.compile(r"\\boxed\s*\{|####|\banswer\s+is\b", re.IGNORECASE)
END_OF_MARKED = re.compile(r"[.!?](?=\s|$)|\n")


def marked_number(text: str) -> Decimal | Fraction | None:
    r"""The number that a response marks as its answer, by `\boxed{...}`, `####` or "the answer is". None without one.

    It is for the report, which counts where it is not the last number. The judge reads the last number, as the paper
    does. The last mark with a number counts, and of it the first number, after an equals sign if there is one.
    """
    for mark in reversed(list(ANSWER_MARK.finditer(text))):
        rest = text[mark.end() :]
        if mark[0].endswith("{"):
            marked = rest[: closing_brace(rest)]
        else:
            marked = END_OF_MARKED.split(rest.lstrip(" :*\n"), maxsplit=1)[0]
        numbers = read_numbers(marked.rpartition("=")[2])
        if numbers:
            return numbers[0]
    return None


def closing_brace(text: str) -> int:
    """Where the brace closes that was open before the text. Its length, where none does."""
    depth = 1
    for i, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return i
    return len(text)


def mark_differs(text: str) -> bool:
    """Does a response mark a number as its answer and end in another?"""
    marked = marked_number(text)
    return marked is not None and not same_number(marked, last_number(text))


BEGIN, DONE = "[[BEGIN]]", "[[DONE]]"
FENCE = re.compile(r"^ {0,3}```+[^\n`]*\n(.*?)(?:^ {0,3}```|```\s*\Z|\Z)", re.MULTILINE | re.DOTALL)


def extract_code(response: str) -> str:
    """The program of a response: between the tags, else in a code fence, else all of it. Never an exception.

    The first [[DONE]] after a [[BEGIN]] ends the program, as it ends a generation that stops there. Of several
    [[BEGIN]] before it the last counts. Without [[DONE]] the program goes on to the end, without [[BEGIN]] it begins at
    the start. A fence inside the tags is taken off. Of several fences the first counts, and an open one goes on to the
    end. A byte order mark, blank ends and a common indentation are removed. All other characters stay.
    """
    text = response.removeprefix("\ufeff")

    # 1. The tags.
    before, begin, after = text.partition(BEGIN)
    text = after if begin else before
    text = text.partition(DONE)[0]
    text = text.rpartition(BEGIN)[2]

    # 2. A code fence. One that holds nothing is the stray end of one: what stands before it counts.
    fence = FENCE.search(text)
    if fence:
        text = fence[1] if fence[1].strip() else text[: fence.start()]

    # 3. Blank ends and the common indentation.
    text = text.strip("\r\n\ufeff")
    if text.startswith((" ", "\t")):
        text = textwrap.dedent(text)
    return text.strip()


def run_tests(code: str, tests: Sequence[str], setup: str = "", timeout: float = sandbox.CPU_SECONDS) -> bool:
    """Does the program pass every test? False where there is no test.

    `setup` runs after the program and before the tests. `timeout` is in CPU seconds.
    """
    return sandbox.passes(code, tests, setup, timeout)


def code(response: str, tests: Sequence[str], setup: str = "", timeout: float = sandbox.CPU_SECONDS) -> bool:
    """Does the program in the response pass every test (section 3 of the paper)?"""
    return run_tests(extract_code(response), tests, setup, timeout)


LLM_JUDGE = """\
You are a helpful assistant acting as an impartial judge. You will be given a Question, a Reference Answer, and a \
Provided Answer. Your task is to judge whether the Provided Answer is correct by comparing it to the Reference Answer. \
If the Provided Answer is correct, choose only 'True', otherwise choose only 'False'. Question: {{question}}
Provided Answer:
{{predicted_response}}
Reference Answer:
{{gold_response}}
Decision: [True/False]"""  # Fig. 8
VERDICT = re.compile(
    r"""
    \b (?: true|false ) \s* (?: / | \| | \b or \b ) \s* (?: true|false ) \b        # the choice, echoed: skipped
  | (?P<no> (?: \b (?: not|never|neither|cannot ) | n['’]t ) (?: \s+ \w+ ){0,3}? \s+ )?   # not true, isn't quite true
    (?<! [^\W_] ) (?P<word> true|false ) (?! [^\W_] )
    """,
    re.VERBOSE | re.IGNORECASE,
)


def parse_verdict(text: str) -> bool | None:
    """The first word true or false of a reply, "not true" being False. None: it has neither, or says "not false"."""
    for match in VERDICT.finditer(text):
        if not match["word"]:
            continue  # "True/False": the choice, repeated
        verdict = match["word"].lower() == "true"
        negated = match["no"] is not None
        if not negated:
            return verdict
        return False if verdict else None
    return None


class LLMJudge:
    """A language model as the judge (A.5).

    `generate` gives a list of replies for a list of prompts. `unparsed` counts the replies without a verdict.
    """

    def __init__(self, generate: Callable[[list[str]], list[str]]):
        self.generate = generate
        self.unparsed = 0

    def verdicts(self, pairs: Sequence[tuple[Example, str]]) -> list[bool | None]:
        """The verdict on each (example, response), None where the reply holds none."""
        prompts = []
        for x, response in pairs:
            prompts.append(fill(LLM_JUDGE, question=x.question, predicted_response=response, gold_response=x.answer))
        verdicts = [parse_verdict(reply) for reply in self.generate(prompts)]
        self.unparsed += verdicts.count(None)
        return verdicts

    def __call__(self, pairs: Sequence[tuple[Example, str]]) -> list[bool]:
        return [verdict is True for verdict in self.verdicts(pairs)]


MAX_WORDS = 50  # so that reciting the context is no answer
ABSTENTIONS = ("unanswerable", "n/a", "idk", "i don't know", "not known", "answer not in context",
               "the answer is unknown")
WHOLE_ABSTENTIONS = ("nan", "unknown", "no answer", "none of the above")  # these count only as the whole reply
ABSTENTION = re.compile(r"(?<!\w)(?:" + "|".join(map(re.escape, ABSTENTIONS)) + r")(?!\w)")
SENTENCE_END = re.compile(r"[.!?;](?=\s|$)|\s/\s|\n")


def normalize(text: str) -> list[str]:
    """The words of a text after SQuAD's normalisation: lower case, no ASCII punctuation, no articles."""
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def token_recall(response: str, gold: str) -> float:
    """The share of the gold's words (as a multiset) that the response has: |response ∩ gold| / |gold|."""
    wanted = Counter(normalize(gold))
    if not wanted:
        return float(response.strip().lower() == gold.strip().lower() != "")
    return (wanted & Counter(normalize(response))).total() / wanted.total()


def sentences(text: str) -> list[str]:
    """The sentences of a text, lower-cased and without marks around them."""
    parts = [bare(part) for part in SENTENCE_END.split(text)]
    return [part for part in parts if part]


def bare(text: str) -> str:
    """Lower-cased, without marks and blanks around it."""
    return text.lower().replace("’", "'").strip(string.punctuation + string.whitespace)


def abstains(response: str) -> bool:
    """Does the response say that there is no answer: by a phrase in it, or by nothing else in it?"""
    if bare(response) in WHOLE_ABSTENTIONS:
        return True
    return any(ABSTENTION.search(sentence) for sentence in sentences(response))


def recall(response: str, gold: str, unanswerable: bool = False, aliases: Sequence[str] = ()) -> bool:
    """Does a response of at most 50 words hold every word of a gold? Where there is no answer: does it abstain at once?

    Longer ones are rejected, because whoever recites the context has every word. So is an answer that abstains later.
    """
    if len(response.split()) > MAX_WORDS:
        return False
    if unanswerable:
        first_sentence = next(iter(sentences(response)), "")
        return abstains(response) and abstains(first_sentence)
    if abstains(response):
        return False
    return any(token_recall(response, answer) == 1 for answer in (gold, *aliases))


LEAKS = ("reference answer", "your response", "my response", "your own response", "now it's your turn")


def leaks(paraphrase: str) -> bool:
    """Does a paraphrase speak of its prompt instead of to the question? (The list is SDFT's.)"""
    text = paraphrase.lower()
    return text.startswith("your turn") or any(leak in text for leak in LEAKS)


JUDGES: dict[str, Callable[[Example, str], bool]] = {
    "numeric": lambda x, response: numeric(response, x.answer),
    "code": lambda x, response: code(response, x.tests, x.setup),
    "recall": lambda x, response: recall(response, x.answer, x.unanswerable, x.aliases),
}
LLM_BATCH = 256  # pairs a call of the LLM judge: enough for the generator to group prompts of like length


def workers() -> int:
    """How many programs this process runs at a time: its share of the cores that it may use."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    return max(1, cores // ranks.LOCAL_WORLD)


def judge_all(name: str, pairs: Sequence[tuple[Example, str]], generate=None) -> Iterator[bool | None]:
    """Verdicts on (example, response) pairs, in their order, as they come. None: the LLM judge's reply holds none.

    "llm" asks `generate` (see LLMJudge). Programs run in parallel, one a core. Their limit is CPU time, so that a busy
    machine changes no verdict.
    """
    if name == "llm":
        judge = LLMJudge(generate)
        for start in range(0, len(pairs), LLM_BATCH):
            yield from judge.verdicts(pairs[start : start + LLM_BATCH])
    elif name == "code":
        with ThreadPoolExecutor(workers()) as pool:
            yield from pool.map(lambda pair: JUDGES["code"](*pair), pairs)
    else:
        for x, response in pairs:
            yield JUDGES[name](x, response)
