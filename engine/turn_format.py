"""How a tokenizer's chat template writes an assistant's turn, read off a rendered conversation.

    <|user|>4815162342<|end|>assistant:                     the prompt
    <|user|>4815162342<|end|>assistant: 2718281828<|end|>   the whole turn: opening " ", closing "<|end|>"

Nothing is believed that can be tried: not the names that a tokenizer gives its tokens, and not which of them
it calls special. Covered: templates that want a list of parts, that write a blank before an answer, that
strip it, that close a turn with several tokens, only when another turn follows or not at all, and prompts
that leave <think> open. A prompt that leaves something open that nothing known closes is refused.
"""

import functools
import os
import re
from dataclasses import dataclass

from support.cli import InputError

# Words that stand in for a question and an answer. Digits survive templates that strip or change the case.
QUESTION = "4815162342"
ANSWER = "2718281828"
NEXT_QUESTION = "1414213562"

# <think>, <seed:think>, [THINK], ◁think▷ and <|think|>. Two letters at least: <s> and </s> are no block.
OPEN_TAG = re.compile(r"<[\w:.-]{2,}>|\[\w\w+\]|◁\w\w+▷|<[|｜][\w:.-]+[|｜]>")
BARS = ("<|", "<｜")  # such a tag names many things, so that its closing must be known, not guessed
# </think>, [/THINK], ◁/think▷, <|/think|>, </|think|> and <|end_of_thought|>.
CLOSING_TAG = re.compile(
    r"</[\w:.-]{2,}>|\[/\w+\]|◁/\w+▷|<[|｜]/[\w:.-]+[|｜]>|</[|｜][\w:.-]+[|｜]>|<[|｜]end[\w:.-]+[|｜]>"
)

# How the name of a tag changes from its beginning to its end: <|begin_of_thought|>, <|end_of_thought|>.
BEGIN_AND_END = (("begin", "end"), ("start", "end"), ("open", "close"), ("prefix", "suffix"))
THINKING = re.compile("think|thought|reason|reflect", re.IGNORECASE)


@dataclass(frozen=True)
class TurnFormat:
    """How a chat template writes an assistant's turn, read off a rendered conversation."""

    as_parts: bool  # the content of a message is a list of parts, not a string
    opening: str  # between generation prompt and answer: often nothing, a blank, or an empty thinking block
    closing: str  # from the answer to the token that ends the turn; nothing where the template closes no turn
    end: int  # the last token of a response
    strips: bool  # the template strips the answer
    open_block: str  # the tag that the generation prompt leaves open, such as <think>, or nothing
    blocks: tuple[tuple[str, str], ...]  # (opening, closing) tag of what is no part of an answer
    marks: frozenset[str]  # the added tokens that the template itself writes, special or not, without blocks
    note: str  # what differs from the template's own text, and what is done


def turn_format(tokenizer) -> TurnFormat:
    """How this tokenizer's chat template writes a turn.

    InputError: the template raises, nothing ends a turn, or its prompt leaves open what nothing known closes.
    """
    template = str(tokenizer.chat_template)
    ends = getattr(tokenizer, "ends_of_generation", frozenset())
    known_by = (tokenizer.apply_chat_template, tokenizer.eos_token, len(tokenizer))
    return _turn_format(tokenizer, template, ends, known_by)


@functools.lru_cache(maxsize=8)
def _turn_format(tokenizer, template: str, ends: frozenset[int], known_by: tuple) -> TurnFormat:
    # 1. A question as a prompt, with its answer, and with the head of the user's next turn.
    as_parts, prompt, whole = _render_sample(tokenizer)
    if ANSWER not in whole:
        end = _eos(tokenizer)
        marks = _marks(tokenizer, prompt, ())
        note = "the chat template writes no assistant's turn: a gold follows the prompt and ends with EOS"
        return TurnFormat(as_parts, "", "", end, False, "", (), marks, note)
    before, _, after = whole.rpartition(ANSWER)
    prompt_tail = prompt.rpartition(QUESTION)[2]
    tail = before.rpartition(QUESTION)[2]
    between = _next_head(tokenizer, as_parts)

    # 2. What stands before an answer. A block that the generation prompt leaves open is closed first.
    open_block, close, instead = _open_block(tokenizer, template, prompt_tail, tail, after + between)
    note = ""
    if before.startswith(prompt) and (not open_block or close in before[len(prompt) :]):
        opening = before[len(prompt) :]
    elif open_block:
        line = "\n" if prompt.endswith("\n") else ""
        opening = line + close + 2 * line + instead
        note = f"the generation prompt leaves {open_block} open: a gold closes it first"
    else:
        opening = ""
        note = "the chat template writes an answer elsewhere than after its prompt: a gold follows the prompt"

    # 3. What stands after it.
    begin = _begin_of_turn(tokenizer, prompt)
    followed = _closing_before(tokenizer, prompt, between, begin)
    closing, end, said = _closing(tokenizer, after, followed, between, begin, ends)
    note = note or said

    # 4. What it does to the answer itself.
    messages = [message("user", QUESTION, as_parts), message("assistant", f" {ANSWER} Ab ", as_parts)]
    written = render(tokenizer, messages)
    strips = not written.startswith(f" {ANSWER}", len(before))
    if f"{ANSWER} Ab" not in written and not note:
        note = "the chat template changes the words of an answer: a gold keeps its own"

    # 5. What is no part of an answer, and what only the template may write.
    frame = after + (between or prompt.partition(QUESTION)[0])
    blocks = _blocks(tokenizer, prompt_tail + opening, frame)
    if open_block:
        blocks = tuple(dict.fromkeys([(open_block, close), *blocks]))
    marks = _marks(tokenizer, prompt + whole + between, blocks)
    return TurnFormat(as_parts, opening, closing, end, strips, open_block, blocks, marks, note)


def _render_sample(tokenizer) -> tuple[bool, str, str]:
    """(whether content is a list of parts, the prompt, the whole turn) of a sample question and answer.

    The whole turn is "" where the template writes no answer, in whichever form it is given.
    """
    problem = None
    prompts = {}
    for as_parts in (False, True):
        user = message("user", QUESTION, as_parts)
        assistant = message("assistant", ANSWER, as_parts)
        try:
            prompt = render(tokenizer, [user], add_generation_prompt=True)
            if QUESTION not in prompt:
                raise InputError("the model's chat template leaves out what the user says")
            prompts[as_parts] = prompt
            whole = render(tokenizer, [user, assistant])
        except InputError as error:
            problem = problem or error
            continue
        if ANSWER in whole:
            return as_parts, prompt, whole

    if not prompts:
        raise problem
    as_parts, prompt = next(iter(prompts.items()))
    return as_parts, prompt, ""


def message(role: str, text: str, as_parts: bool) -> dict:
    if as_parts:
        return {"role": role, "content": [{"type": "text", "text": text}]}
    return {"role": role, "content": text}


def render(tokenizer, messages: list[dict], add_generation_prompt: bool = False) -> str:
    """The conversation as text. InputError: the template raises."""
    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except Exception as error:  # whatever a template raises
        one_line = " ".join(str(error).split())[:200]
        raise InputError(f"the model's chat template fails ({type(error).__name__}: {one_line})") from None


def _next_head(tokenizer, as_parts: bool) -> str:
    """What the template writes between an answer and the user's next words, "" if it takes no such turn."""
    messages = [message("user", QUESTION, as_parts), message("assistant", ANSWER, as_parts)]
    try:
        written = render(tokenizer, [*messages, message("user", NEXT_QUESTION, as_parts)])
    except InputError:
        return ""
    between, found, _ = written.rpartition(ANSWER)[2].partition(NEXT_QUESTION)
    return between if found else ""


def closing_tags(tag: str) -> list[str]:
    """What may close a tag: </think>, [/THINK], <|/think|>, </|think|> or <|end_of_thought|>."""
    length = 2 if tag.startswith(BARS) else 1
    found = [f"{tag[:length]}/{tag[length:]}"]
    if length == 2:
        found.append(f"<|/{tag[2:]}" if tag[1] != "|" else f"</{tag[1:]}")
    for begin, end in BEGIN_AND_END:
        for first, last in ((begin, end), (begin.title(), end.title()), (begin.upper(), end.upper())):
            if first in tag:
                found.append(tag.replace(first, last))
    return found


def _open_block(tokenizer, template: str, prompt_tail: str, tail: str, after: str) -> tuple[str, str, str]:
    """(tag of the block that the generation prompt leaves open, its closing, what follows), else three "".

    What follows is what a conversation has instead of the block, such as the mark of a final channel.
    `prompt_tail` follows the question in the prompt, `tail` in a conversation with an answer. A prompt may
    also end in a tag that names the role (<assistant>), closed after the answer or never. InputError: the
    prompt holds more than the conversation has there, and nothing known closes it.
    """
    # 1. What the prompt has more than the conversation, without the blocks that it closes itself.
    of_prompt = " ".join(prompt_tail.split())  # blanks leave nothing open
    of_conversation = " ".join(tail.split())
    differs = not of_conversation.startswith(of_prompt)
    start = len(os.path.commonprefix([prompt_tail, tail])) if differs else 0
    for tag in OPEN_TAG.finditer(prompt_tail):
        if tag.start() < start < tag.end():
            start = tag.start()
    more = prompt_tail[start:]
    instead = tail[start:].lstrip() if differs else ""
    for tag in OPEN_TAG.findall(more):
        for close in closing_tags(tag):
            if tag in more and close in more.partition(tag)[2]:
                more = more.partition(tag)[2].partition(close)[2]

    # 2. The tag that stays open, if there is a closing for it.
    tags = OPEN_TAG.findall(more)
    if tags and (differs or more.rstrip().endswith(tags[-1])):
        added = tokenizer.get_added_vocab()
        candidates = closing_tags(tags[-1])
        if any(close in after for close in candidates):
            return "", "", ""
        known = [close for close in candidates if close in template or close in added]
        if known or differs and not tags[-1].startswith(BARS):
            close = known[0] if known else candidates[0]
            return tags[-1], close, instead.rpartition(close)[2].lstrip()

    # 3. Anything else that stays open, except words about the question and a role under another name.
    ends_alike = tail.strip() and prompt_tail.rstrip().endswith(tail.strip())
    shared = len(os.path.commonprefix([of_prompt, of_conversation]))
    name = re.compile(r"\w+\W*")
    renamed = name.fullmatch(of_prompt, shared) and name.fullmatch(of_conversation, shared)
    if differs and re.search(r"\w", more) and not ends_alike and not renamed:
        raise InputError(
            f"the model's generation prompt ends in {more.strip()[-80:]!r}. No conversation of its template "
            "has that there, and nothing known closes it, so a gold would stand inside. A setting of the "
            "template may leave it out, such as --chat-template-kwargs '{\"enable_thinking\": false}'"
        )
    return "", "", ""


def _blocks(tokenizer, written: str, frame: str) -> tuple[tuple[str, str], ...]:
    """(opening, closing) tag of blocks: pairs of added tokens, and pairs that stand before an answer.

    A tag that the template writes between turns, in the `frame`, marks no block.
    """
    found = []
    added = tokenizer.get_added_vocab()
    for tag in [*added, *OPEN_TAG.findall(written)]:
        if not OPEN_TAG.fullmatch(tag):
            continue
        for close in closing_tags(tag):
            known = close in added or close in written
            if known and tag not in frame and close not in frame:
                found.append((tag, close))
    return tuple(dict.fromkeys(found))


def _marks(tokenizer, written: str, blocks: tuple[tuple[str, str], ...]) -> frozenset[str]:
    """The added tokens that stand in what the template writes, without words, blanks and blocks."""
    tags = {tag for block in blocks for tag in block}
    found = set()
    for token in tokenizer.get_added_vocab():
        enclosed = not token[:1].isalnum() and not token[-1:].isalnum() and re.search(r"\w", token)
        if enclosed and token in written and token not in tags:
            found.add(token)
    return frozenset(found)


def _mark_pattern(tokenizer, text: str) -> re.Pattern:
    """Matches what may end or begin a turn in a text of the template: tokens that are no plain text."""
    marks = [token for token in tokenizer.get_added_vocab() if not token.isspace()]
    marks += [word for word in re.findall(r"<[^<>\s]+>", text) if _is_one_token(tokenizer, word)]
    if tokenizer.eos_token:
        marks.append(tokenizer.eos_token)
    if not marks:
        return re.compile(r"(?!)")  # matches nothing
    return re.compile("|".join(map(re.escape, sorted(marks, key=len, reverse=True))))


def _begin_of_turn(tokenizer, prompt: str) -> str:
    """The first mark of the prompt, which ends no turn: <|im_start|>. "" if there is none, or it is EOS.

    A BOS that stands there only once is passed over. In SmolLM2 BOS is <|im_start|> itself.
    """
    first_head, _, prompt_tail = prompt.partition(QUESTION)
    if tokenizer.bos_token and tokenizer.bos_token not in prompt_tail:
        first_head = first_head.removeprefix(tokenizer.bos_token)
    mark = _mark_pattern(tokenizer, first_head).search(first_head)
    return mark[0] if mark and mark[0] != tokenizer.eos_token else ""


def _closing_before(tokenizer, prompt: str, between: str, begin: str) -> str:
    """What closes an answer that another turn follows: what stands `between` them, without the user's head.

    The head is what also stands before the first question. Where a system's turn is closed in the same way,
    that is too much: then a mark that closes the user's turn as well closes the answer.
    """
    first_head, _, prompt_tail = prompt.partition(QUESTION)
    pattern = _mark_pattern(tokenizer, between)
    shared = len(os.path.commonprefix([first_head[::-1], between[::-1]]))
    cut = len(between) - shared
    for mark in pattern.finditer(between):
        if mark.start() < cut < mark.end():
            cut = mark.end()
    mark = pattern.search(between)
    if not mark or mark[0] == begin:
        return ""

    if between[:cut].strip():
        return between[:cut]
    ends_user = prompt_tail.lstrip().startswith(mark[0])
    return between[: mark.end()] if begin and ends_user else ""


def _closing(
    tokenizer, after: str, followed: str, between: str, begin: str, ends: frozenset[int]
) -> tuple[str, int, str]:
    """(what closes a turn, its last token, a note), given what the template writes after an answer.

    `after` is that at the end of a conversation, `followed` where another turn follows, `between` with that
    turn's head. The first token that is no plain text ends a turn, with those that follow at once, as in
    Command R7B. Whether the tokenizer calls it special does not matter. Where nothing closes a turn, it ends
    with the token that begins the next one if the model's own generation stops there (GLM), else with EOS.
    """
    pattern = _mark_pattern(tokenizer, after + between)
    note = ""
    mark = pattern.search(after)
    if not mark or mark[0] == begin:  # nothing, or a generation prompt that is not asked for
        after = followed
        mark = pattern.search(after)
        note = "the chat template closes a turn only if another follows: a gold is closed so"
    if mark:
        end = mark.end()
        while more := pattern.match(after, end):
            of_head = more[0] == begin if not between else not followed.startswith(after[: more.end()])
            if of_head and more[0] != tokenizer.eos_token:
                break
            mark, end = more, more.end()
        return after[:end], tokenizer.convert_tokens_to_ids(mark[0]), note

    head = pattern.search(between)
    if head and not between[: head.start()].strip() and tokenizer.convert_tokens_to_ids(head[0]) in ends:
        closing, end = between[: head.end()], tokenizer.convert_tokens_to_ids(head[0])
    else:
        closing, end = "", _eos(tokenizer)
    token = tokenizer.convert_ids_to_tokens(end)
    return closing, end, f"the chat template closes no turn: a gold ends with {token}"


def _is_one_token(tokenizer, word: str) -> bool:
    id = tokenizer.convert_tokens_to_ids(word)
    return id != tokenizer.unk_token_id and tokenizer.encode(word, add_special_tokens=False) == [id]


def _eos(tokenizer) -> int:
    if tokenizer.eos_token_id is None:
        raise InputError(
            "the model's chat template closes no turn and its tokenizer has no EOS token, so that nothing "
            "would end a response; set eos_token in tokenizer_config.json"
        )
    return tokenizer.eos_token_id


@dataclass(frozen=True)
class SpecialTokens:
    """The tokens of a tokenizer that are no text."""

    ids: frozenset[int]  # without the unknown token
    pattern: re.Pattern  # matches any of them in a text


def special_tokens(tokenizer) -> SpecialTokens:
    """The added tokens that the tokenizer calls special, named or not, and those that the template writes."""
    turn = turn_format(tokenizer)
    return _find_special_tokens(tokenizer, len(tokenizer), turn.end, turn.marks)


@functools.lru_cache(maxsize=8)
def _find_special_tokens(tokenizer, size: int, end: int, marks: frozenset[str]) -> SpecialTokens:
    texts = {end: tokenizer.convert_ids_to_tokens(end)}
    for id, token in tokenizer.added_tokens_decoder.items():
        if token.content in marks or token.special and not token.content.isspace():
            texts[id] = token.content
    longest_first = sorted(texts.values(), key=len, reverse=True)
    ids = frozenset(texts) - {tokenizer.unk_token_id}  # an unknown word ends nothing
    return SpecialTokens(ids, re.compile("|".join(map(re.escape, longest_first))))
