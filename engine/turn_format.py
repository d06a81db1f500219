"""How a tokenizer's chat template writes an assistant's turn, read off a rendered conversation.

    <|user|>4815162342<|end|><|assistant|>              prompt
    <|user|>4815162342<|end|><|assistant|> 2718281828<|end|>   the whole turn: opening " ", closing "<|end|>"

Nothing is believed that can be tried: not the names that a tokenizer gives its tokens, and not which of its
tokens it calls special. Covered: templates that want a list of parts, that write a blank before an answer,
that strip it, that close a turn with EOS behind another token or not at all, and generation prompts that
leave <think> open.
"""

import functools
import re
from dataclasses import dataclass

from support.cli import InputError

# Words that stand in for a question and an answer. Digits survive templates that strip or change the case.
QUESTION = "4815162342"
ANSWER = "2718281828"

# Two letters at least: <s> and </s> are no block.
OPEN_TAG = re.compile(r"<\w\w+>|\[\w\w+\]")


@dataclass(frozen=True)
class TurnFormat:
    """How a chat template writes an assistant's turn, read off a rendered conversation."""

    as_parts: bool  # the content of a message is a list of parts, not a string
    opening: str  # between generation prompt and answer: often nothing, a blank, or an empty thinking block
    closing: str  # from the answer to the token that ends the turn; nothing where the template closes no turn
    end: int  # the last token of a response
    strips: bool  # the template strips the answer
    open_block: str  # the tag with which the generation prompt ends, such as <think>, or nothing
    blocks: tuple[str, ...]  # the opening tags of what is not part of an answer, such as <think>
    note: str  # what differs from the template's own text, and what is done


def turn_format(tokenizer) -> TurnFormat:
    """How this tokenizer's chat template writes a turn. InputError: it raises, or nothing ends a turn."""
    template = str(tokenizer.chat_template)
    known_by = (tokenizer.apply_chat_template, tokenizer.eos_token, len(tokenizer))
    return _turn_format(tokenizer, template, known_by)


@functools.lru_cache(maxsize=8)
def _turn_format(tokenizer, template: str, known_by: tuple) -> TurnFormat:
    # 1. A question as a prompt, and with its answer.
    as_parts, prompt, whole = _render_sample(tokenizer)
    if ANSWER not in whole:
        end = _eos(tokenizer)
        note = "the chat template writes no assistant's turn: a gold follows the prompt and ends with EOS"
        return TurnFormat(as_parts, "", "", end, False, "", (), note)
    before, _, after = whole.rpartition(ANSWER)

    # 2. What stands before an answer. A block that the generation prompt leaves open is closed first.
    open_block = _open_block(tokenizer, template, prompt, before, after)
    note = ""
    if before.startswith(prompt) and (not open_block or closing_tag(open_block) in before[len(prompt) :]):
        opening = before[len(prompt) :]
    elif open_block:
        line = "\n" if prompt.endswith("\n") else ""
        opening = line + closing_tag(open_block) + 2 * line
        note = f"the generation prompt leaves {open_block} open: a gold closes it first"
    else:
        opening = ""
        note = "the chat template writes an answer elsewhere than after its prompt: a gold follows the prompt"

    # 3. What stands after it.
    closing, end = _closing(tokenizer, after)
    if not closing and not note:
        note = f"the chat template closes no turn: a gold ends with {tokenizer.convert_ids_to_tokens(end)}"

    # 4. What it does to the answer itself.
    messages = [message("user", QUESTION, as_parts), message("assistant", f" {ANSWER} Ab ", as_parts)]
    written = render(tokenizer, messages)
    strips = not written.startswith(f" {ANSWER}", len(before))
    if f"{ANSWER} Ab" not in written and not note:
        note = "the chat template changes the words of an answer: a gold keeps its own"

    blocks = _blocks(tokenizer, prompt.rpartition(QUESTION)[2] + opening)
    return TurnFormat(as_parts, opening, closing, end, strips, open_block, blocks, note)


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


def closing_tag(tag: str) -> str:
    """<think> -> </think>, [THINK] -> [/THINK]."""
    return f"{tag[0]}/{tag[1:]}"


def _open_block(tokenizer, template: str, prompt: str, before: str, after: str) -> str:
    """The tag of the thinking block that the generation prompt leaves open, else "".

    A prompt may also end in a tag that names the role (<assistant>). Such a tag is closed after the answer or
    never.
    """
    tags = OPEN_TAG.findall(prompt.rpartition(QUESTION)[2])
    if not tags or not prompt.rstrip().endswith(tags[-1]):
        return ""
    close = closing_tag(tags[-1])
    if close in after:
        return ""
    differs = not before.startswith(prompt)
    known = close in template or close in tokenizer.get_added_vocab()
    return tags[-1] if differs or known else ""


def _blocks(tokenizer, written: str) -> tuple[str, ...]:
    """The opening tags of blocks: pairs of added tokens, and pairs that stand before an answer."""
    found = []
    added = tokenizer.get_added_vocab()
    for tag in [*added, *OPEN_TAG.findall(written)]:
        close = closing_tag(tag)
        if OPEN_TAG.fullmatch(tag) and (close in added or close in written):
            found.append(tag)
    return tuple(dict.fromkeys(found))


def _closing(tokenizer, after: str) -> tuple[str, int]:
    """(what closes a turn, its last token), given what the template writes after an answer.

    The first token that is no plain text ends a turn. Where EOS follows at once, as in Command R7B, both do.
    Whether the tokenizer calls it special does not matter.
    """
    marks = [token for token in tokenizer.get_added_vocab() if not token.isspace()]
    marks += [word for word in re.findall(r"<[^<>\s]+>", after) if _is_one_token(tokenizer, word)]
    if tokenizer.eos_token:
        marks.append(tokenizer.eos_token)
    mark = re.search("|".join(map(re.escape, sorted(marks, key=len, reverse=True))), after) if marks else None
    if not mark:
        return "", _eos(tokenizer)

    closing = after[: mark.end()]
    if tokenizer.eos_token and after[mark.end() :].startswith(tokenizer.eos_token):
        return closing + tokenizer.eos_token, tokenizer.eos_token_id
    return closing, tokenizer.convert_tokens_to_ids(mark[0])


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
    """The added tokens that the tokenizer calls special, named or not, and those that end a turn."""
    return _find_special_tokens(tokenizer, len(tokenizer), turn_format(tokenizer).end)


@functools.lru_cache(maxsize=8)
def _find_special_tokens(tokenizer, size: int, end: int) -> SpecialTokens:
    texts = {end: tokenizer.convert_ids_to_tokens(end)}
    for id, token in tokenizer.added_tokens_decoder.items():
        if token.special and not token.content.isspace():
            texts[id] = token.content
    longest_first = sorted(texts.values(), key=len, reverse=True)
    ids = frozenset(texts) - {tokenizer.unk_token_id}  # an unknown word ends nothing
    return SpecialTokens(ids, re.compile("|".join(map(re.escape, longest_first))))
