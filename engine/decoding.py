"""A prompt on its way to a response: its row, how its next token is chosen, and when it ends."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from engine.chat import end_tokens, plain_text, response_text
from support.cli import InputError


class PromptTooLong(InputError):
    """The prompt of the row `id` leaves no room for a response in the model's context."""

    def __init__(self, id: str, message: str):
        super().__init__(message)
        self.id = id


@dataclass(frozen=True)
class Limits:
    """Where a response ends, at the latest."""

    max_new_tokens: int
    stop: str | tuple[str, ...] | None = None  # a text that ends it, such as [[DONE]], or several


@dataclass(frozen=True)
class Response:
    """What a model answered."""

    text: str  # what judges and people see; ends right after the stop string where one was hit
    tokens: list[int] | None  # generated ids, with the end-of-turn token where there is one. None: not known
    finished: bool  # False: the length limit cut it off
    counted: int = 0  # tokens that were generated, where a server says no more of them

    @property
    def length(self) -> int:
        """In tokens."""
        return self.counted if self.tokens is None else len(self.tokens)


@dataclass(frozen=True)
class Sampling:
    """Draw tokens instead of taking the likeliest. A draw depends on seed, prompt and position."""

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    keys: Sequence[str] = ()  # a name for every prompt (default: its index): a part can be drawn again alone

    def __post_init__(self):
        if self.temperature <= 0 or not 0 < self.top_p <= 1:
            raise ValueError("sampling needs temperature > 0 and 0 < top_p <= 1 (greedy: sample=None)")

    def uniform(self, index: int, position: int) -> float:
        """A number in [0, 1) for the token at `position` of the response to prompt `index`."""
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


class Ending:
    """Tells whether a row has ended, and with what response.

    `stop` is a text that ends one, or several of which the first does. Without `chat` the prompts are no user
    turns, and a response is all that was generated.
    """

    def __init__(self, model, tokenizer, stop: str | Sequence[str] | None, chat: bool = True):
        self.eos = end_tokens(tokenizer, model)  # what training_ids teaches is among them
        self.tokenizer = tokenizer
        self.stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
        self.read = response_text if chat else plain_text
        self.can_close = {}  # token -> can it complete a stop string?

    def __call__(self, row: Row) -> Response | None:
        """The row's response if its last token ended it, else None."""
        last = row.tokens[-1]
        ended = last in self.eos
        full = len(row.tokens) >= row.limit
        if not (ended or full or self._may_close(last)):
            return None  # decoding is slow, and this token ends nothing

        tokens = row.tokens[row.start :]
        text = self.read(self.tokenizer, tokens)
        end = self._end_of_first_stop(text)
        if end is not None:
            return Response(text[:end], tokens, finished=True)
        if ended or full:
            return Response(text, tokens, finished=ended)
        return None

    def _end_of_first_stop(self, text: str) -> int | None:
        """Where the first stop string of a text ends. None: it has none."""
        found = [text.index(stop) + len(stop) for stop in self.stops if stop in text]
        return min(found, default=None)

    def _may_close(self, token: int) -> bool:
        """Can this token complete a stop string? Only then is the row decoded."""
        if not self.stops:
            return False
        if token not in self.can_close:
            piece = self.tokenizer.decode([token])
            # A token that is decoded alone can lose white space, and shows a part of a character as U+FFFD.
            last_ones = {stop[-1] for stop in self.stops}
            found = any(last in piece or last.isspace() for last in last_ones)
            self.can_close[token] = found or "\ufffd" in piece
        return self.can_close[token]


def choose_tokens(logits: torch.Tensor, rows: list[Row], sample: Sampling | None) -> list[int]:
    """The next token of each row, from logits `[rows, vocabulary]`, in one transfer off the device."""
    if sample is None:
        return logits.argmax(-1).tolist()

    # 1. The smallest set of tokens that holds `top_p` of the probability, likeliest first.
    probs, ids = torch.softmax(logits.float() / sample.temperature, -1).sort(descending=True, stable=True)
    mass_before = probs.cumsum(-1) - probs
    probs = probs.masked_fill(mass_before >= sample.top_p, 0)

    # 2. The token at which the cumulated probability passes a uniform number.
    uniforms = [[sample.uniform(row.index, position=len(row.tokens) - row.start)] for row in rows]
    mass = probs.cumsum(-1)
    threshold = torch.tensor(uniforms, device=mass.device) * mass[:, -1:]
    rank = (mass <= threshold).sum(-1, keepdim=True)
    last_rank = (probs > 0).sum(-1, keepdim=True) - 1
    rank = torch.minimum(rank, last_rank)  # rounding can point past the set
    return ids.gather(-1, rank).flatten().tolist()
