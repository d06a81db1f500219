"""transformers' own generate, for models whose keys and values slots do not cover."""

from collections.abc import Iterator

import torch
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria

from engine.decoding import Ending, Response, Row, Sampling, choose_tokens

BATCH = 32


def generate_padded(
    model, rows: list[Row], ending: Ending, sample: Sampling | None
) -> Iterator[tuple[int, Response]]:
    """(index of the prompt, response) of every row: padded batches, the longest prompts first."""
    rows = sorted(rows, key=lambda row: row.start, reverse=True)
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        responses = generate_batch(model, batch, ending, sample)
        for row, response in zip(batch, responses, strict=True):
            yield row.index, response


def generate_batch(model, rows: list[Row], ending: Ending, sample: Sampling | None) -> list[Response]:
    """The responses of one batch, padded on the left, with transformers' defaults in place of the model's own."""
    pad = min(ending.eos, default=0)
    width = max(row.start for row in rows)
    tokens, mask = [], []
    for row in rows:
        padding = width - row.start
        tokens.append([pad] * padding + row.tokens)
        mask.append([0] * padding + [1] * row.start)

    follower = FollowRows(rows, ending)
    processors = [KeepDrawnToken(rows, sample)] if sample else []
    models_own_config = model.generation_config
    model.generation_config = GenerationConfig(pad_token_id=pad)
    try:
        model.generate(
            torch.tensor(tokens, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            max_new_tokens=max(row.limit - row.start for row in rows),
            do_sample=False,
            stopping_criteria=[follower],
            logits_processor=processors,
        )
    finally:
        model.generation_config = models_own_config
    return follower.responses


class FollowRows(StoppingCriteria):
    """Follows a batch inside transformers' generate: each row's tokens, and its response once it ended."""

    def __init__(self, rows: list[Row], ending: Ending):
        self.rows = rows
        self.ending = ending
        self.responses: list[Response | None] = [None] * len(rows)

    def __call__(self, input_ids, scores, **kwargs):
        """`input_ids` `[rows, length]` -> `[rows]`: has it ended?"""
        for i, token in enumerate(input_ids[:, -1].tolist()):
            if self.responses[i] is None:
                self.rows[i].tokens.append(token)
                self.responses[i] = self.ending(self.rows[i])
        ended = [response is not None for response in self.responses]
        return torch.tensor(ended, device=input_ids.device)


class KeepDrawnToken(LogitsProcessor):
    """Leaves to greedy decoding only the token that `sample` draws."""

    def __init__(self, rows: list[Row], sample: Sampling):
        self.rows = rows
        self.sample = sample

    def __call__(self, input_ids, scores):
        """`scores` `[rows, vocabulary]` -> the same shape, -inf everywhere except at the drawn token."""
        drawn = choose_tokens(scores, self.rows, self.sample)
        drawn = torch.tensor(drawn, device=scores.device)[:, None]
        return torch.full_like(scores, float("-inf")).scatter(1, drawn, 0.0)
