"""Chat templates: a user turn and its response as token ids, and generated tokens as the text that is judged.

    prompt                                          target
    <|user|>What is 6 times 3?<|end|><|assistant|>  It is 18.<|end|>

What a model generated is trained on as its own tokens. A gold is text, so it is put where the template itself
puts an assistant's words, and closed as the template closes a turn: turn_format.py reads both off the
template.

Special tokens inside a question or a gold are encoded as plain text, and so are added tokens that the
template writes around a turn. Any other added token that the tokenizer does not call special, such as Qwen's
<think>, stays a token there. So a gold may hold reasoning of its own.

Channels (`response_text`): a template that writes special tokens before an answer names its final channel
(gpt-oss, Command R7B). Blocks in <name>, </name> or [NAME], [/NAME] or <|begin_name|>, <|end_name|> are left
out if both are added tokens (Qwen3, Magistral) or the template writes them, and so is thinking with which a
response begins. Otherwise special tokens cut a response into parts, and the last part is the answer. Not
covered: channels told apart by words alone in a template that shows no answer, and tokenizers without a
Hugging Face chat template.
"""

import re

from engine.turn_format import (
    ANSWER,
    CLOSING_TAG,
    OPEN_TAG,
    QUESTION,
    THINKING,
    TurnFormat,
    closing_tags,
    message,
    render,
    special_tokens,
    turn_format,
)
from support.cli import InputError

# Characters of private use that enclose a special token in a text, from rendering to encoding.
MARK_START = "\U000f0000"
MARK_END = "\U000f0001"


# --- Token ids ----------------------------------------------------------------------------------------------


def chat_ids(tokenizer, user: str) -> list[int]:
    """Token ids `[length]` of one user turn in the chat template, ready for the response to begin."""
    return _encode(tokenizer, _prompt_text(tokenizer, user))


def plain_ids(tokenizer, text: str) -> list[int]:
    """Token ids `[length]` of a text that the model goes on with, without a chat template.

    BOS comes where the tokenizer itself puts it before a text.
    """
    ids = tokenizer.encode(whole_characters(text))
    if ids[-1:] == [tokenizer.eos_token_id]:
        ids.pop()  # some tokenizers close every text
    return ids


def training_ids(
    tokenizer, user: str, response: str, tokens: list[int] | None = None
) -> tuple[list[int], list[bool]]:
    """(ids, is_target), both `[length]`: prompt, response and end of turn. Only the last two are trained on.

    `tokens` are what the model itself generated, its end of turn included. They are the targets as they are,
    and `response` is not read. Without them the response is encoded, and closed as the template closes a
    turn. The mask goes by position: where a tokenizer pads with its EOS, a mask by token id would never teach
    to stop.
    """
    before = chat_ids(tokenizer, user)
    target = list(tokens) if tokens else _gold_ids(tokenizer, user, response, before)
    return before + target, [False] * len(before) + [True] * len(target)


def end_of_turn(tokenizer) -> int:
    """The token with which the chat template closes an assistant turn (Gemma: <end_of_turn>), else EOS.

    InputError: there is neither.
    """
    return turn_format(tokenizer).end


def end_tokens(tokenizer, model=None) -> set[int]:
    """All tokens that end a response: the template's, the tokenizer's, and the generation config's."""
    ends = {tokenizer.eos_token_id}
    if getattr(tokenizer, "chat_template", None):
        ends.add(end_of_turn(tokenizer))
    if model is not None and getattr(model, "generation_config", None) is not None:
        configured = model.generation_config.eos_token_id
        ends.update(configured if isinstance(configured, list) else [configured])
    return ends - {None}


def _prompt_text(tokenizer, user: str) -> str:
    as_parts = turn_format(tokenizer).as_parts
    marked = _mark_special_tokens(tokenizer, user)
    return render(tokenizer, [message("user", marked, as_parts)], add_generation_prompt=True)


def _gold_ids(tokenizer, user: str, response: str, before: list[int]) -> list[int]:
    """The targets of a text: what the template writes before an answer, the text, and the end of the turn."""
    turn = turn_format(tokenizer)
    if turn.strips:
        response = response.strip()
    marked = _mark_special_tokens(tokenizer, response)
    answer = marked + turn.closing
    if marked != response or not _closes_a_block_of(turn, response):
        answer = turn.opening + answer

    whole = _encode(tokenizer, _prompt_text(tokenizer, user) + answer)
    if whole[: len(before)] == before:
        target = whole[len(before) :]
    else:  # the end of the prompt and the beginning of the answer would make one token
        target = _encode(tokenizer, answer, continued=True)

    if target[-1:] != [turn.end]:
        target.append(turn.end)
    return target


def _closes_a_block_of(turn: TurnFormat, response: str) -> bool:
    """Does the response hold the end of the thinking that the template would write before it?"""
    for _, close in turn.blocks:
        if close in turn.opening and close in response:
            return True
    return False


def _mark_special_tokens(tokenizer, text: str) -> str:
    """Enclose each special token in the text, so that `_encode` can tell it from the template's own."""
    return special_tokens(tokenizer).pattern.sub(rf"{MARK_START}\g<0>{MARK_END}", text)


def _encode(tokenizer, text: str, continued: bool = False) -> list[int]:
    """Token ids of a rendered text, whose enclosed special tokens become plain text.

    `continued`: the text goes on from another one, so that no tokenizer may put a blank before it.
    """
    ids = []
    plain = False
    text = whole_characters(text)
    for piece in re.split(f"{MARK_START}(.*?){MARK_END}", text):
        if plain:
            ids += _encode_plainly(tokenizer, piece)
        elif piece and (ids or continued):
            ids += _encode_continued(tokenizer, piece)
        else:
            ids += tokenizer.encode(piece, add_special_tokens=False)
        plain = not plain
    return ids


def whole_characters(text: str) -> str:
    """U+FFFD in place of half a character (a lone surrogate), which JSON can hold and no tokenizer takes."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _encode_plainly(tokenizer, special: str) -> list[int]:
    """A special token's text as plain text."""
    ids = _encode_continued(tokenizer, special, split_special_tokens=True)
    if tokenizer.convert_tokens_to_ids(special) in ids:  # added, but not called special: cut it in two
        return _encode_continued(tokenizer, special[:1]) + _encode_continued(tokenizer, special[1:])
    return ids


def _encode_continued(tokenizer, text: str, **options) -> list[int]:
    """Token ids of a text that goes on from another, where some tokenizers would put a blank first."""
    newline = tokenizer.encode("\n", add_special_tokens=False)
    ids = tokenizer.encode("\n" + text, add_special_tokens=False, **options)
    if ids[: len(newline)] == newline:
        return ids[len(newline) :]
    return tokenizer.encode(text, add_special_tokens=False, **options)


# --- The text of a response ---------------------------------------------------------------------------------


def plain_text(tokenizer, tokens: list[int]) -> str:
    """A continuation as it stands, without special tokens."""
    return tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def response_text(tokenizer, tokens: list[int]) -> str:
    """What judges and people see of a response: its final part, without special tokens and thinking.

    "" where a response never came to its answer. The head of this file says which channels are recognised.
    """
    if not getattr(tokenizer, "chat_template", None):
        return plain_text(tokenizer, tokens)
    turn = turn_format(tokenizer)
    special = special_tokens(tokenizer).ids

    # 1. What ends the response.
    ids = list(tokens)
    closing = _encode(tokenizer, turn.closing, continued=True)
    if closing and ids[-len(closing) :] == closing:
        ids = ids[: -len(closing)]
    block_ends = {close for _, close in turn.blocks}
    while ids and ids[-1] in special and tokenizer.convert_ids_to_tokens(ids[-1]) not in block_ends:
        ids.pop()

    # 2. Where special tokens cut it: the channel in which the template writes an answer, else the last part.
    last_part = _last_part(tokenizer, turn, ids, special)
    text = plain_text(tokenizer, last_part)

    # 3. Blocks whose tags are text, at the beginning of the response or begun by the prompt.
    for tag, close in (*turn.blocks, *_thinking_at_the_beginning(text)):
        begun = tag == turn.open_block and last_part == ids
        if begun or text.lstrip().startswith(tag):
            text = _after_block(turn, text, tag, close).lstrip()
    if last_part == ids:
        return text
    return text.lstrip()


def without_thoughts(text: str) -> str:
    """A response of which the text alone is known, without a block of thinking at its beginning.

    "" where the block has no end: the response never came to its answer. Where the prompt has opened the
    block, the text has its end alone.
    """
    for _, close in _thinking_at_the_beginning(text):
        return text.partition(close)[2].lstrip()
    for end in CLOSING_TAG.finditer(text):
        before = text[: end.start()]
        if THINKING.search(end[0]) and not any(THINKING.search(tag) for tag in OPEN_TAG.findall(before)):
            return text[end.end() :].lstrip()
    return text


def _thinking_at_the_beginning(text: str) -> list[tuple[str, str]]:
    """The tags of a block of thinking with which the text begins, though the template may know no such."""
    tag = OPEN_TAG.match(text.lstrip())
    if not tag or not THINKING.search(tag[0]):
        return []
    closings = closing_tags(tag[0])
    return [(tag[0], next((close for close in closings if close in text), closings[0]))]


def _after_block(turn: TurnFormat, text: str, tag: str, close: str) -> str:
    """What follows a block. A closed one that nothing follows is the answer, except a model's thinking."""
    _, closed, rest = text.partition(close)
    of_model = (tag, close) in turn.blocks
    thinking = turn.open_block or close in turn.opening or of_model and THINKING.search(tag)
    if closed and not rest.strip() and not thinking:
        return text
    return rest


def _last_part(tokenizer, turn: TurnFormat, ids: list[int], special: frozenset[int]) -> list[int]:
    """The tokens behind the last special one. [] if that begins a block, or another channel than the
    answer's."""
    channel = _encode(tokenizer, turn.opening.strip(), continued=True)
    if special.intersection(channel):
        start = _last_place(ids, channel)
        if start is None and special.intersection(ids):
            return []
        ids = ids[start:]

    for place in reversed(range(len(ids))):
        if ids[place] in special:
            begins_block = tokenizer.convert_ids_to_tokens(ids[place]) in dict(turn.blocks)
            return [] if begins_block else ids[place + 1 :]
    return ids


def _last_place(ids: list[int], part: list[int]) -> int | None:
    """The index behind the last occurrence of `part` in `ids`. None: it has none."""
    for start in reversed(range(len(ids) - len(part) + 1)):
        if part and ids[start : start + len(part)] == part:
            return start + len(part)
    return None


# --- Before anything is generated ---------------------------------------------------------------------------


def check_template(model, tokenizer) -> list[str]:
    """What in this model's chat differs from the plain case, and what is done about it, one line each.

    InputError: the template raises, nothing would end a response, or the model has no embedding for a token.
    """
    turn = turn_format(tokenizer)
    ids, _ = training_ids(tokenizer, QUESTION, ANSWER)
    _check_embedding(model, tokenizer, {*ids, *end_tokens(tokenizer)})
    if turn.note:
        return [turn.note]

    messages = [message("user", QUESTION, turn.as_parts), message("assistant", ANSWER, turn.as_parts)]
    own_text = render(tokenizer, messages)
    end = own_text.rindex(ANSWER) + len(ANSWER + turn.closing)
    if ids != _encode(tokenizer, own_text[:end]):
        return ["in the template's own text prompt and answer run into one token: a gold begins with its own"]
    return []


def _check_embedding(model, tokenizer, used: set[int]) -> None:
    """InputError: a token of the template, or one that a text can hold, has no embedding.

    A special token that the template does not write may lack one (Gemma 3 1B: the mark of an image).
    """
    rows = model.get_input_embeddings().weight.shape[0]
    never_in_text = special_tokens(tokenizer).ids - used
    missing = [id for id in tokenizer.get_vocab().values() if id >= rows and id not in never_in_text]
    if missing:
        token = tokenizer.convert_ids_to_tokens(min(missing))
        raise InputError(
            f"the model has {rows} embeddings, and the tokenizer {len(missing)} tokens beyond them, such as "
            f"{token}: they belong to different models, or the embedding must be resized first"
        )
