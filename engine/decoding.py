"""A prompt on its way to a response: its row, how its next token is chosen, and when it has ended."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from engine.chat import end_of_turn


@dataclass(frozen=True)
class Response:
    """What a model answered."""

    text: str  # without special tokens; ends right after the stop string where one was hit
    tokens: list[int]  # generated ids, with the end-of-turn token where there is one
    finished: bool  # False: the length limit cut it off


@dataclass(frozen=True)
class Sampling:
    """Draw tokens instead of taking the likeliest. A draw depends on seed, prompt and position, not on the batch."""

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    keys: Sequence[str] = ()  # a name for every prompt (default: its index), so that a part can be drawn again alone

    def __post_init__(self):
        if self.temperature <= 0 or not 0 < self.top_p <= 1:
            raise ValueError("sampling needs temperature > 0 and 0 < top_p <= 1 (for greedy decoding: sample=None)")

    def uniform(self, index: int, position: int) -> float:
        key = self.keys[index] if self.keys else index
        digest = hashlib.blake2b(f"{self.seed} {key} {position}".encode(), digest_size=6).digest()
        return int.from_bytes(digest, "big") / 2**48


@dataclass
class Row:
    """One prompt on its way to a response."""

    index: int
    tokens: list[int]  # the prompt, then what was generated so far
    start: int  # length of the prompt
    limit: int  # length at which the row must end
    family: int = -1  # rows of one family share their first `shared` tokens; -1: only what all prompts share
    shared: int = 0


class Ending:
    """Tells whether a row has ended, and with what response."""

    def __init__(self, model, tokenizer, stop: str | None):
        eos = model.generation_config.eos_token_id
        self.eos = {tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None}
        if getattr(tokenizer, "chat_template", None):
            self.eos.add(end_of_turn(tokenizer))  # what training_ids teaches the model to end with
        self.tokenizer, self.stop, self.closers = tokenizer, stop, {}

    def __call__(self, row: Row) -> Response | None:
        last, full = row.tokens[-1], len(row.tokens) >= row.limit
        if last not in self.eos and not full and not self._may_close(last):
            return None
        tokens = row.tokens[row.start :]
        text = self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if self.stop and self.stop in text:
            return Response(text[: text.index(self.stop) + len(self.stop)], tokens, True)
        return Response(text, tokens, last in self.eos) if full or last in self.eos else None

    def _may_close(self, token: int) -> bool:
        """Can this token complete the stop string? Only then is the row decoded, which keeps looking for it cheap."""
        if self.stop and token not in self.closers:
            piece = self.tokenizer.decode([token])
            # a token decoded alone can lose white space, and shows a part of a character as U+FFFD
            self.closers[token] = self.stop[-1] in piece or "\ufffd" in piece or self.stop[-1].isspace()
        return bool(self.stop) and self.closers[token]


def _choose(logits: torch.Tensor, rows: list[Row], sample: Sampling | None) -> list[int]:
    """The next token of each row, from logits `[rows, vocabulary]`, in one transfer off the device."""
    if sample is None:
        return logits.argmax(-1).tolist()
    probs, ids = torch.softmax(logits.float() / sample.temperature, -1).sort(descending=True, stable=True)
    probs = probs.masked_fill(probs.cumsum(-1) - probs >= sample.top_p, 0)  # the smallest set of mass top_p
    mass = probs.cumsum(-1)
    uniforms = [[sample.uniform(row.index, len(row.tokens) - row.start)] for row in rows]
    rank = (mass <= torch.tensor(uniforms, device=mass.device) * mass[:, -1:]).sum(-1, keepdim=True)
    rank = torch.minimum(rank, (probs > 0).sum(-1, keepdim=True) - 1)  # rounding can point past the set
    return ids.gather(-1, rank).flatten().tolist()
