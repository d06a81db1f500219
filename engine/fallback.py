"""transformers' own generate, for models whose keys and values slots do not cover."""

from collections.abc import Iterator

import torch
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria

from engine.decoding import Ending, Response, Row, Sampling, _choose

FALLBACK_BATCH = 32


def _fallback(model, rows, ending, sample) -> Iterator[tuple[int, Response]]:
    """transformers' generate, in padded batches sorted by length, with its own defaults in place of the model's."""
    rows = sorted(rows, key=lambda row: -row.start)
    for batch in (rows[i : i + FALLBACK_BATCH] for i in range(0, len(rows), FALLBACK_BATCH)):
        width, watch, pad = batch[0].start, _Watch(batch, ending), min(ending.eos, default=0)
        tokens = [[pad] * (width - row.start) + row.tokens for row in batch]
        mask = [[0] * (width - row.start) + [1] * row.start for row in batch]
        own, model.generation_config = model.generation_config, GenerationConfig(pad_token_id=pad)
        try:
            model.generate(
                torch.tensor(tokens, device=model.device),
                attention_mask=torch.tensor(mask, device=model.device),
                max_new_tokens=max(row.limit - row.start for row in batch),
                do_sample=False,
                stopping_criteria=[watch],
                logits_processor=[_Draw(batch, sample)] if sample else [],
            )
        finally:
            model.generation_config = own
        yield from zip((row.index for row in batch), watch.responses, strict=True)


class _Watch(StoppingCriteria):
    """Follows a batch inside transformers' generate: each row's tokens, and its response once it has ended."""

    def __init__(self, rows: list[Row], ending: Ending):
        self.rows, self.ending, self.responses = rows, ending, [None] * len(rows)

    def __call__(self, input_ids, scores, **kwargs):
        for i, token in enumerate(input_ids[:, -1].tolist()):
            if self.responses[i] is None:
                self.rows[i].tokens.append(token)
                self.responses[i] = self.ending(self.rows[i])
        return torch.tensor([response is not None for response in self.responses], device=input_ids.device)


class _Draw(LogitsProcessor):
    """Leaves to greedy decoding only the token that `sample` draws."""

    def __init__(self, rows: list[Row], sample: Sampling):
        self.rows, self.sample = rows, sample

    def __call__(self, input_ids, scores):
        drawn = torch.tensor(_choose(scores, self.rows, self.sample), device=scores.device)[:, None]
        return torch.full_like(scores, float("-inf")).scatter(1, drawn, 0.0)
