"""Chat templates: user turns and responses as token ids."""




def chat_ids(tokenizer, user: str) -> list[int]:
    """Token ids of one user turn in the tokenizer's own chat template, ready for the response to begin. One BOS at most."""
    messages = [{"role": "user", "content": user}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)


def training_ids(tokenizer, user: str, response: str, tokens=None) -> tuple[list[int], list[bool]]:
    """(ids, is_target), both `[length]`: prompt, response and end of turn. Only the last two are trained on.

    The mask goes by position: where a tokenizer pads with its EOS, a mask by token id would never teach the model to stop.
    """
    before = chat_ids(tokenizer, user)
    target = list(tokens) if tokens else tokenizer.encode(response, add_special_tokens=False) + [end_of_turn(tokenizer)]
    return before + target, [False] * len(before) + [True] * len(target)


def end_of_turn(tokenizer) -> int:
    """The token with which the chat template closes an assistant turn (Gemma: <end_of_turn>), else the EOS token."""
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "RESPONSE"}]
    after = tokenizer.apply_chat_template(turns, tokenize=False).rpartition("RESPONSE")[2].strip()
    ids = tokenizer.encode(after, add_special_tokens=False)
    return ids[0] if ids and ids[0] in tokenizer.all_special_ids else tokenizer.eos_token_id


def end_tokens(tokenizer, model) -> set[int]:
    """Every token that ends a turn."""
    eos = model.generation_config.eos_token_id
    return {end_of_turn(tokenizer), tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None}
