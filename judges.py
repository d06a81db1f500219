"""Judges: is a response equivalent to the gold? They are `=` in lines 5 and 9 of Algorithm 1 (A.3, A.5).

numeric, for GSM8K: response and gold end in the same number (A.3). The table in support/numerals.py says what
    counts as a number.
code, for MBPP: the program in the response passes every test of its row. support/sandbox.py runs
    it, and says what that covers.
llm, for NQ: a language model reads the prompt of Fig. 8. True or False is read off its reply.
recall, for short golds: every word of the gold is in the response. Where there is no answer, the
    response abstains. This judge is ours.
exact, f1, for short golds: SQuAD's exact match, and its F1 above a half. docs/study.md compares the three.
rouge, for open-ended tasks: the ROUGE-L of the response and a gold is ROUGE_THRESHOLD or more. This judge is
    ours.

support/short_answers.py says what recall, exact and f1 take for a word and for an abstention.

No judge accepts a blank response. A new judge is one function (example, response) -> bool and one entry of
JUDGES, below.
"""

import ast
import functools
import os
import re
import textwrap
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from data import Example, fill
from support import ranks, sandbox
from support.cli import InputError
from support.numerals import last_number, same_number
from support.rouge import rouge_l
from support.short_answers import abstains, exact_match, sentences, token_f1, token_recall

INVISIBLE = ("Cc", "Cf", "Zl", "Zp", "Zs")  # Unicode's categories of controls, formats and separators


def is_blank(text: str) -> bool:
    """Does a text hold nothing that can be seen? No judge accepts such a response."""
    return all(unicodedata.category(character) in INVISIBLE for character in text)


def numeric(response: str, gold: str) -> bool:
    """Do both end in the same number (A.3)? False where either has none. See support/numerals.py."""
    return same_number(last_number(response), last_number(gold))


BEGIN, DONE = "[[BEGIN]]", "[[DONE]]"
THOUGHTS_END = re.compile(r"</(?:think|thinking|thought|thoughts|reasoning)>", re.IGNORECASE)
FENCE = re.compile(
    r"^ {0,3}(?P<marks>```+|~~~+)[^\n`]*(?:\n|\Z)(?P<code>.*?)(?:^ {0,3}(?P=marks)|(?P=marks)\s*\Z|\Z)",
    re.MULTILINE | re.DOTALL,
)
CLOSING_FENCE = re.compile(r"```+\s*\Z")  # at the end of the last line
DEFINITION = re.compile(
    r"^[ \t]*(?:async[ \t]+)?(?:def[ \t]+(\w+)[ \t]*[(\[]|class[ \t]+(\w+)[ \t]*[(:\[])|^(\w+)[ \t]*=(?!=)",
    re.MULTILINE,
)
CODE_LINE = re.compile(  # what an unindented line of a program begins with
    r"\s|[#@)\]}]|[rbfu]?['\"]|(?:def|class|async|import|from|if|elif|else|for|while|try|except|finally|with|del|assert)\b"
    r"|[\w.\[\]]+[ \t]*(?:[-+*/|&]?=|\()"
)


def extract_code(response: str, tests: Sequence[str] = ()) -> str:
    """The program of a response: between the tags, else in a code fence, else all of it. Never an exception.

    What a model thinks before it answers, up to </think>, is left out. The first [[DONE]] after a [[BEGIN]]
    ends the program, as it ends a generation that stops there. Of several [[BEGIN]] before it the last
    counts. Without [[DONE]] the program goes on to the end, without [[BEGIN]] it begins at the start. Where
    there are no such tags, MBPP's own [BEGIN] and [DONE] count.

    A fence inside the tags is taken off, and an open one goes on to the end. Of several fences, and a program
    that stands before them, the first counts that defines a function which `tests` call. Where none does, the
    first counts. A byte order mark, blank ends and a common indentation are removed. All other characters
    stay.
    """
    text = between_tags(after_thoughts(response))
    parts = fenced_parts(text)
    wanted = tested_names(tuple(tests))
    for part in parts:
        if wanted & defined_names(part):
            return tidy(part)
    return tidy(parts[0])


def after_thoughts(text: str) -> str:
    """A text without the thoughts before it. All of it, where nothing comes after them."""
    answer = THOUGHTS_END.split(text)[-1]
    return answer if answer.strip() else text


def between_tags(text: str) -> str:
    text = text.removeprefix("\ufeff")
    if BEGIN not in text and DONE not in text:
        if "[BEGIN]" in text:
            text = text.replace("[BEGIN]", BEGIN).replace("[DONE]", DONE)
        else:  # [BEGIN] stood in the prompt: [DONE] counts at the start of a line
            text = re.sub(r"^[ \t]*\[DONE\]", DONE, text, flags=re.MULTILINE)

    before, begin, after = text.partition(BEGIN)
    if not begin:
        return before.partition(DONE)[0]
    text = after.partition(DONE)[0]
    return text.rpartition(BEGIN)[2].lstrip(" \t")  # on the line of the tag a blank is no indentation


def fenced_parts(text: str) -> list[str]:
    """The programs that a text may hold, at least one: that before the fences, then those inside."""
    fences = list(FENCE.finditer(text))
    if not fences:
        return [CLOSING_FENCE.sub("", text)]
    parts = [fence["code"] for fence in fences if fence["code"].strip()]
    before = text[: fences[0].start()]
    stray = not fences[0]["code"].strip()  # the end of a fence that was opened in the prompt
    if stray or is_program(before):
        parts.insert(0, before)
    return parts


def is_program(text: str) -> bool:
    """Does it define something, and look like code in every unindented line?

    A look must do: parsing what a model wrote can crash the interpreter, and this one must not.
    """
    lines = [line for line in text.splitlines() if line]
    return bool(defined_names(text)) and all(CODE_LINE.match(line) for line in lines)


def defined_names(text: str) -> set[str]:
    """The functions and classes that a program defines, and the names that it assigns without indentation."""
    names = set()
    for groups in DEFINITION.findall(text):
        names.update(groups)
    return names - {""}


@functools.cache
def tested_names(tests: tuple[str, ...]) -> set[str]:
    """The names in a row's tests that the program has to define. All builtins (MBPP 126: `sum`): those."""
    used, own = set(), set()
    for test in tests:
        try:
            nodes = list(ast.walk(ast.parse(test)))
        except sandbox.UNREADABLE:
            continue
        for node in nodes:
            match node:
                case ast.Name(name, ast.Load()):
                    used.add(name)
                case ast.alias(name, new_name):
                    own.add(new_name or name)
                case ast.Name(name) | ast.arg(name) | ast.FunctionDef(name):
                    own.add(name)
    return used - own - sandbox.CLEAN or used - own


def tidy(program: str) -> str:
    """Without blank ends, a byte order mark and a common indentation."""
    program = program.strip("\r\n\ufeff")
    if program.startswith((" ", "\t")):
        program = textwrap.dedent(program)
    return program.strip()


def run_tests(code: str, tests: Sequence[str], setup: str = "", timeout: float = sandbox.CPU_SECONDS) -> bool:
    """Does the program pass every test? False where there is no test.

    `setup` runs after the program and before the tests. `timeout` is in CPU seconds.
    """
    return sandbox.passes(code, tests, setup, timeout)


def code(response: str, tests: Sequence[str], setup: str = "", timeout: float = sandbox.CPU_SECONDS) -> bool:
    """Does the program in the response pass every test (section 3 of the paper)?"""
    if is_blank(response):
        return False
    return run_tests(extract_code(response, tests), tests, setup, timeout)


LLM_JUDGE = """\
You are a helpful assistant acting as an impartial judge. You will be given a Question, a Reference Answer, \
and a Provided Answer. Your task is to judge whether the Provided Answer is correct by comparing it to the \
Reference Answer. If the Provided Answer is correct, choose only 'True', otherwise choose only 'False'. \
Question: {{question}}
Provided Answer:
{{predicted_response}}
Reference Answer:
{{gold_response}}
Decision: [True/False]"""  # Fig. 8
VERDICT = re.compile(
    r"""
    # The choice, echoed, decides nothing: True/False, only 'True' or 'False'.
    (?: \b only \W+ )? \b (?: true|false ) ['"”’*`]* \s*
        (?: / | \| | , | \b or \b ) \s* ['"“‘*`]* (?: true|false ) \b
    # Nor does a question: true?
  | \b (?: true|false ) \s* \?
    # The instruction, repeated (only 'True'), or a condition: whether it is true.
  | (?P<condition> \b only \W+ (?: true|false ) \b
      | \b (?: if|whether|would\ be|could\ be|may\ be|must\ be ) \b [^.\n]{,80}? \b (?: true|false ) \b )
    # A verdict: true, not true, isn't quite true.
  | (?P<no> (?: \b (?: not|never|neither|cannot|hardly|far\ from ) | n['’]t ) (?: \s+ \w+ ){0,3}? \s+ )?
    (?<! [^\W_] ) (?P<word> true|false ) (?! [^\W_] )
    """,
    re.VERBOSE | re.IGNORECASE,
)
CALLS_WRONG = re.compile(
    r"""
    (?<! not\s ) (?<! n['’]t\s ) (?<! nothing\s )
        \b (?: wrong|incorrect|inaccurate|mistaken|erroneous|untrue ) \b
  | (?: \b not | n['’]t ) \s+ (?: \w+ \s+ )? (?: correct|right|accurate|match|equivalent ) \b
  | \b true \s+ that \b .* (?: \b not? \b | n['’]t \b | differ|fail|contradict|mismatch|lack|disagree )
    """,
    re.VERBOSE | re.IGNORECASE,
)
FIRST_REPLIES = 20  # if none of them holds a verdict, something is wrong with the judge


def parse_verdict(reply: str) -> bool | None:
    """The first word true or false of a reply, "not true" being False. None: the reply holds no verdict.

    That is so where the words are missing or stand in thoughts only, where the instruction is repeated or a
    condition named before them, and for "not false". A reply that says true and then false, or true of an
    answer that it calls wrong, holds no verdict either.
    """
    reply = THOUGHTS_END.split(reply)[-1]
    if "<think" in reply.lower():
        return None  # still thinking when it was cut off
    verdicts = []
    for match in VERDICT.finditer(reply):
        if match["condition"]:
            verdicts.append(None)
        if not match["word"]:
            continue
        says_true = match["word"].lower() == "true"
        negated = match["no"] is not None
        if negated:
            verdicts.append(False if says_true else None)
        else:
            verdicts.append(says_true)

    if not verdicts:
        return None
    contradicts_itself = False in verdicts or CALLS_WRONG.search(reply)
    if verdicts[0] is True and contradicts_itself:
        return None
    return verdicts[0]


class LLMJudge:
    """A language model as the judge (A.5).

    `generate` gives a list of replies for a list of prompts. `unparsed` counts the replies without a verdict.
    """

    def __init__(self, generate: Callable[[list[str]], list[str]]):
        self.generate = generate
        self.asked = 0
        self.unparsed = 0

    def verdicts(self, pairs: Sequence[tuple[Example, str]]) -> list[bool | None]:
        """The verdict on each (example, response), None where the reply holds none.

        A blank response is not asked about: its verdict is False.

        InputError: of the first 20 replies, none held a verdict.
        """
        prompts = [llm_prompt(x, response) for x, response in pairs if not is_blank(response)]
        replies = self.generate(prompts) if prompts else []
        read = [parse_verdict(reply) for reply in replies]
        self.asked += len(read)
        self.unparsed += read.count(None)
        if FIRST_REPLIES <= self.asked == self.unparsed:
            raise InputError(
                f"the LLM judge: none of its first {self.asked} replies says True or False (one is "
                f"{replies[-1][:60]!r}); a model that thinks first needs --chat-template-kwargs "
                "'{\"enable_thinking\": false}', another model may not be able to judge"
            )
        in_order = iter(read)
        return [False if is_blank(response) else next(in_order) for _, response in pairs]

    def __call__(self, pairs: Sequence[tuple[Example, str]]) -> list[bool]:
        return [verdict is True for verdict in self.verdicts(pairs)]


def llm_prompt(x: Example, response: str) -> str:
    """The prompt of Fig. 8. Where a row has several golds, the reference answer is "one or another"."""
    golds = dict.fromkeys((x.answer, *x.aliases))  # each once
    return fill(LLM_JUDGE, question=x.question, predicted_response=response, gold_response=" or ".join(golds))


MAX_WORDS = 50  # so that reciting the context is no answer


def recall(response: str, gold: str, unanswerable: bool = False, aliases: Sequence[str] = ()) -> bool:
    """Does a response of at most 50 words hold every word of a gold? Without one: does it abstain at once?

    Longer ones are rejected, because whoever recites the context has every word. So is an answer that
    abstains later.
    """
    if is_blank(response) or len(response.split()) > MAX_WORDS:
        return False
    if unanswerable:
        first_sentence = next(iter(sentences(response)), "")
        return abstains(response) and abstains(first_sentence)
    if abstains(response):
        return False
    return any(token_recall(response, answer) == 1 for answer in (gold, *aliases))


def exact(x: Example, response: str) -> bool:
    """Is the response a gold, after SQuAD's normalisation? Without one: does it abstain?"""
    if x.unanswerable or abstains(response):
        return x.unanswerable and abstains(response)
    golds = (x.answer, *x.aliases)
    return any(exact_match(response, gold) and token_recall(response, gold) == 1 for gold in golds)


def f1(x: Example, response: str) -> bool:
    """Is SQuAD's F1 with a gold above a half? Without one: does the response abstain?"""
    if x.unanswerable or abstains(response):
        return x.unanswerable and abstains(response)
    golds = (x.answer, *x.aliases)
    return any(token_f1(response, gold) > 0.5 and token_recall(response, gold) > 0 for gold in golds)


LEAKS = ("reference answer", "your response", "my response", "your own response", "now it's your turn")


def leaks(paraphrase: str) -> bool:
    """Does a paraphrase speak of its prompt instead of to the question? (The list is SDFT's.)"""
    text = paraphrase.lower()
    return text.startswith("your turn") or any(leak in text for leak in LEAKS)


ROUGE_THRESHOLD = 0.3


def rouge(response: str, gold: str, aliases: Sequence[str] = ()) -> bool:
    """Does a response come near enough to a gold, by ROUGE-L? See support/rouge.py."""
    return max(rouge_l(response, text) for text in (gold, *aliases)) >= ROUGE_THRESHOLD


JUDGES: dict[str, Callable[[Example, str], bool]] = {
    "numeric": lambda x, response: numeric(response, x.answer),
    "code": lambda x, response: code(response, x.tests, x.setup),
    "recall": lambda x, response: recall(response, x.answer, x.unanswerable, x.aliases),
    "exact": exact,
    "f1": f1,
    "rouge": lambda x, response: rouge(response, x.answer, x.aliases),
}
FOR_EVALUATION: dict[str, Callable[[Example, str], bool]] = {  # no choice of a run: see tasks/mbpp.py
    "bigcode": lambda x, program: run_tests(program, x.tests),
}


def judge_named(name: str) -> Callable[[Example, str], bool]:
    return JUDGES[name] if name in JUDGES else FOR_EVALUATION[name]


LLM_BATCH = 256  # pairs a call of the LLM judge: enough for the generator to group prompts of like length


def workers() -> int:
    """How many programs this process runs at a time: its share of the cores that it may use."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    return max(1, cores // ranks.LOCAL_WORLD)


def judge_all(name: str, pairs: Sequence[tuple[Example, str]], generate=None) -> Iterator[bool | None]:
    """Verdicts on (example, response) pairs, in their order, as they come. None: the LLM gave none.

    "llm" asks `generate` (see LLMJudge). Programs run in parallel, one a core. Their limit is CPU time, so
    that a busy machine changes no verdict.
    """
    if name == "llm":
        judge = LLMJudge(generate)
        yield from judge.verdicts(pairs[:FIRST_REPLIES])  # few at first: a judge that cannot judge ends here
        for start in range(FIRST_REPLIES, len(pairs), LLM_BATCH):
            yield from judge.verdicts(pairs[start : start + LLM_BATCH])
        return

    def verdict(pair: tuple[Example, str]) -> bool:
        x, response = pair
        return not is_blank(response) and judge_named(name)(x, response)

    if name in ("code", "bigcode"):
        with ThreadPoolExecutor(workers()) as pool:
            yield from pool.map(verdict, pairs)
    else:
        yield from map(verdict, pairs)
