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
    1{,}234   1\,234   1'234   1_234   1 234  1234            so written too (the last with a thin or no-break blank),
    1,\!234                                   1234            as MATH does it
    1,23   3, 4   1,2345                      23, 4, 2345     any other comma ends a number
    .5   0.5                                  0.5             but ...5 is 5, and 1.2.3 ends in 3
    $18   £18   18 %   18kg   18 km/h         18              currency, percent and units are not read
    \boxed{18}   \$18   \(18\)   #### 18      18              nor is markup
    m^2   m^{2}   cm²                         nothing         an exponent is no number of its own,
    10^6   2^{5}   1.2 x 10^3   10⁶           10, 2, 10, 10   nor is a power worked out: the base is the number
    -18   −18   –18   -$18   (-18)   $-18     -18             a minus touches its number, or the number's currency,
    5-18   day-18   ) -18                     18, 18, -18     and nothing that it could subtract from touches it,
    10%-18%   5°-18°   20€-18€   $20$-$18$    18              a sign that ends a number among them;
    - 18   10 - 18                            18              a bullet or a subtraction is no sign
    1.8e1   1E3                               18, 1000        an exponent of up to three digits
    ３   १८                                    3, 18           the decimal digits of any script
    3/4   3:45   7-9   2x4   m2               4, 45, 9, 4, 2  no fractions, times, ranges: the last number alone
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

from data import Example, fill
from support import ranks, sandbox

NUMBER = re.compile(
    r"""
    \^ \{? [-−]? [\d.]+                                          # an exponent: passed over
  | (?: (?<! [^\W_] ) (?<! [)\]}\-−–%°] )                         # a minus, with nothing to subtract from: no letter or
        (?<! \d [$€£¥₹] ) (?<! \d \\ \$ ) (?<! \d \s [€£¥₹] )     # digit, bracket, 5%, 5°, 5€, 5\$, 5 € (5 $-3$ is two)
        (?P<minus> [-−–－] )
        (?: \\? [$€£¥₹] )? )?
    (?P<digits> \d{1,3} (?: (?: [,，'’_\u00a0\u2009\u202f] | \{,\} | \\, | ,\\! ) \d{3} )+ (?! \d )   # 1,234,567
              | \d+
              | (?<! [\w.] ) (?= \. \d ) )                         # .5
    (?P<rest> (?: \. \d+ )? (?: [eE] [+-]? \d{1,3} (?! \w ) )? )
    """,
    re.VERBOSE,
)


def last_number(text: str) -> Decimal | None:
    """The last number of a text by the table above, None if it has none."""
    last = None
    for match in NUMBER.finditer(text):
        is_exponent = match["digits"] is None
        if not is_exponent:
            last = match
    if last is None:
        return None

    sign = "-" if last["minus"] else ""
    digits = re.sub(r"\D", "", last["digits"]) or "0"
    return Decimal(sign + digits + last["rest"])


def numeric(response: str, gold: str) -> bool:
    """Do both end in the same number (A.3)? False where either has none."""
    answer = last_number(response)
    return answer is not None and answer == last_number(gold)


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
