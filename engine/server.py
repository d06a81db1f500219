"""A model behind an OpenAI-compatible server: vLLM, SGLang, llama.cpp, transformers serve, or a paid one.

A served model is written URL#NAME, such as http://localhost:8000/v1#mistralai/Mistral-7B-Instruct-v0.2. The
URL alone will do where the server lists one model only.

The key is what the environment variable OPENAI_API_KEY holds. It is sent to the server and written nowhere.
A request that fails is sent again, twice, after a pause that grows. A server that limits the rate is asked
for ten minutes. The server puts the user turn into the chat template and decodes. Two things it does
differently are set right here:

1. Servers cut off the stop string, and do not say whether the response had it. So it is not sent: the
   response is cut here, behind the string, as generate.py does it.
2. Of a response that thinks first, the thoughts are left out (engine/chat.py), unless the server did that.
   White space at its start is left out too: some servers strip it and some do not.

Not covered: the tokens of a response. It is trained on as a text. A server also has defaults of its own for
what is not asked here (a repetition penalty, a system prompt): docs/scale.md has the flags against them.
"""

import contextlib
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from threading import Thread
from urllib.parse import urlsplit

from engine.chat import whole_characters, without_thoughts
from engine.decoding import Limits, PromptTooLong, Response, Sampling
from support.cli import InputError
from support.files import digest

AT_ONCE = 16  # requests under way, of each process
RETRIES = 2  # of a request that timed out or met an error of the server (429, 5xx)
TIMEOUT = 600  # seconds that one answer may take: 1,024 tokens of a slow server
CONNECT_TIMEOUT = 10  # seconds that a connection may take
PAUSE = 5  # seconds, after which a server that limits the rate is asked again
NO_ROOM = re.compile(r"context (length|size|window)|maximum context|longer than the model", re.IGNORECASE)
KEY = "OPENAI_API_KEY"
SHOWN = 10  # names of models in an error, at most


def is_url(name: str) -> bool:
    """Is this the address of a server, and no name of a model or a folder?"""
    return name.lower().startswith(("http://", "https://"))


def served_name(model: str) -> str:
    """NAME of URL#NAME. "" where it has none, or is no address."""
    return model.partition("#")[2] if is_url(model) else ""


def with_name(address: str, known: str = "") -> str:
    """URL#NAME of an address that a person gave.

    Where it has no NAME it gets the `known` one, or else a server that lists one model only is asked.

    InputError: it is no address, holds a key, or its server lists no model or several.
    """
    try:
        parts = urlsplit(address)
        complete = is_url(address) and parts.hostname and parts.port != 0
    except ValueError:  # of a port or an IPv6 address that is none
        complete = False
    if not complete:
        given = "..." if "@" in address or "?" in address else address  # a key may stand there
        raise InputError("the address of a server is http://HOST:PORT/v1 or http://HOST:PORT/v1#MODEL, not "
                         f"{given}")
    if parts.username or parts.password or parts.query:
        host = f"{parts.scheme}://{parts.hostname}"
        raise InputError(f"{host}: leave keys and names out of the address, and set {KEY} instead")
    if parts.fragment:
        return address

    url = address.rstrip("#")
    if known:
        return f"{url}#{known}"
    try:
        offered = ServedModel(url, name="").offered()
    except InputError as error:
        raise InputError(f"{error} (its list of models is not needed with {url}#MODEL)") from None
    if len(offered) != 1:
        raise InputError(f"{url}: its server lists {in_words(offered)}: write {url}#MODEL")
    return f"{url}#{offered[0]}"


def in_words(names: list[str]) -> str:
    """The names of models, as many as a line holds."""
    more = ", ..." if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more or "no model"


class NoSuchRoute(InputError):
    """The server was reached, and has nothing at the path that was asked for."""


@dataclass(frozen=True)
class ServedModel:
    """A model that answers user turns from behind a server."""

    url: str
    name: str  # the server's own for it
    weights: str = ""  # a digest of the local model that it stands for
    chat_template_kwargs: dict | None = None

    @classmethod
    def at(
        cls, address: str, weights: str = "", chat_template_kwargs: dict | None = None
    ) -> "ServedModel":
        """The model of URL#NAME. InputError: see with_name."""
        url, _, name = with_name(address).partition("#")
        return cls(url, name, weights, chat_template_kwargs)

    def identity(self) -> str:
        """16 digits that tell this model from others: its name, and the weights that it stands for.

        The address is not among them, since a server moves.
        """
        return digest("served", self.name, self.weights)

    def encode(self, prompts: dict[str, str]) -> dict[str, list[dict]]:
        """The messages of every prompt (id -> user turn)."""
        return {id: [{"role": "user", "content": whole_characters(text)}] for id, text in prompts.items()}

    def generate(
        self, encoded: dict[str, list[dict]], limits: Limits, sampling: Sampling | None = None
    ) -> Iterator[tuple[str, Response]]:
        """(id, response) of every prompt that `encode` gave, each as soon as it is finished.

        InputError: the server cannot be reached, refuses the key, has no such model, or fails. What was
        answered before that is given first. PromptTooLong: a prompt does not fit its context.
        """
        waiting, made = SimpleQueue(), SimpleQueue()
        for row in encoded.items():
            waiting.put(row)
        client = self._client()

        def ask_what_waits() -> None:
            with contextlib.suppress(Empty):
                while True:
                    id, messages = waiting.get_nowait()
                    try:
                        made.put((id, self._answer(client, id, messages, limits, sampling)))
                    except Exception as error:  # raised below, in the thread that reads the responses
                        made.put((id, error))

        # Python waits at its exit for the threads of a pool, but not for these.
        for _ in range(min(AT_ONCE, len(encoded))):
            Thread(target=ask_what_waits, daemon=True).start()
        try:
            for _ in encoded:
                id, response = made.get()
                if isinstance(response, Exception):
                    yield from answered(made)
                    raise response
                yield id, response
            client.close()  # not below: its connections may be in use there
        finally:  # after an error or Ctrl-C no further request is sent, and none under way is waited for
            with contextlib.suppress(Empty):
                while True:
                    waiting.get_nowait()

    def check(self) -> None:
        """Ask for one token. InputError: the server cannot answer. It is said before hours are spent."""
        trial = self.encode({"0 (a trial)": "Is 2 + 2 = 4?"})
        for _ in self.generate(trial, Limits(max_new_tokens=1)):
            pass

    def offered(self) -> list[str]:
        """The names of the models that the server lists. InputError: it cannot be reached, or has no list."""
        with self._client() as client, self._errors_in_one_line("the list of models"):
            return [model.id for model in client.models.list()]

    def lists(self, name: str) -> bool:
        """Does the server list a model of this name? One without a list does not.

        InputError: it cannot be reached, or refuses the key.
        """
        try:
            return name in self.offered()
        except NoSuchRoute:
            return False

    def release(self) -> None:
        """Nothing of it is in this process."""

    def _answer(
        self, client, id: str, messages: list[dict], limits: Limits, sampling: Sampling | None
    ) -> Response:
        request = {"model": self.name, "messages": messages, "max_tokens": limits.max_new_tokens}
        if sampling is None:
            request["temperature"] = 0.0
        else:
            seed = int(digest(sampling.seed, id)[:7], 16)  # another one for every row
            request |= {"temperature": sampling.temperature, "top_p": sampling.top_p, "seed": seed}
        if self.chat_template_kwargs:
            request["extra_body"] = {"chat_template_kwargs": self.chat_template_kwargs}
        with self._errors_in_one_line(f"row {id}"):
            return response_of(self._reply(client, request), limits.stop)

    def _reply(self, client, request: dict):
        """The server's reply. Where it limits the rate, or is too busy, it is asked until TIMEOUT is over."""
        openai = openai_package()
        started = time.monotonic()
        while True:
            try:
                return client.chat.completions.create(**request)
            except openai.RateLimitError as error:
                unpaid = error.code == "insufficient_quota"
                if unpaid or time.monotonic() - started > TIMEOUT:
                    raise
                time.sleep(PAUSE)

    def _client(self):
        """InputError: a proxy or certificate that the environment names is none."""
        openai = openai_package()
        timeout = openai.Timeout(TIMEOUT, connect=CONNECT_TIMEOUT)
        key = key_of_the_environment() or "none"
        try:
            return openai.OpenAI(api_key=key, base_url=self.url, max_retries=RETRIES, timeout=timeout)
        except Exception as error:  # of many kinds: the HTTP library reads the environment
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"{self.url}: no connection can be prepared ({reason}): see HTTP_PROXY, "
                             "HTTPS_PROXY, ALL_PROXY and SSL_CERT_FILE") from None

    @contextlib.contextmanager
    def _errors_in_one_line(self, asked: str):
        """Turn whatever a request can raise into an InputError."""
        openai = openai_package()
        started = time.monotonic()
        try:
            yield
        except openai.APITimeoutError:
            seconds = time.monotonic() - started
            raise InputError(f"{self.url}: no answer to {asked} in {seconds:.1f} seconds and {RETRIES + 1} "
                             "tries; is the server overloaded? The same command goes on from here") from None
        except openai.APIConnectionError as error:
            reason = error.__cause__ or error
            raise InputError(f"{self.url}: the server cannot be reached ({reason}): start it, or mend the "
                             "address. The same command goes on from here") from None
        except openai.APIStatusError as error:
            refusal = f"{self.url}: {self._refusal(error, asked)}"
            if error.status_code in (400, 413, 422) and NO_ROOM.search(error.response.text):
                raise PromptTooLong(asked.removeprefix("row "), refusal) from None
            if error.status_code in (404, 405):
                raise NoSuchRoute(refusal) from None
            raise InputError(refusal) from None
        except (openai.OpenAIError, AttributeError, IndexError, TypeError, ValueError):
            raise InputError(f"{self.url}: its answer to {asked} is not that of an OpenAI-compatible server; "
                             "does the address end in /v1?") from None

    def _refusal(self, error, asked: str) -> str:
        """Why a server that was reached gives no answer, in words."""
        status = error.status_code
        if status in (401, 403):
            return f"the server refuses the key ({status}): set {KEY} to one that it takes"
        key = key_of_the_environment() or "\0"
        said = " ".join(error.response.text.split()).replace(key, "...")[:300]
        refusal = f"the server answers {asked} with {status} ({said})"
        if self.name and status in (400, 404, 422):
            with contextlib.suppress(InputError):
                offered = ServedModel(self.url, name="").offered()
                if self.name not in offered:
                    return f"{refusal}. It does not list {self.name!r}, but {in_words(offered)}"
        if status in (404, 405):
            return f"{refusal}. Does the address end in /v1?"
        if status == 429 or status >= 500:
            return f"{refusal}. The same command goes on from here"
        return refusal


def response_of(reply, stop: str | None) -> Response:
    """A server's reply as generate.py would give it."""
    choice = reply.choices[0]
    text = without_thoughts(choice.message.content or "").lstrip()
    finished = choice.finish_reason == "stop"  # and not cut off by a limit, a filter or an abort
    if stop and stop in text:
        text = text[: text.index(stop) + len(stop)]
        finished = True
    counted = getattr(reply.usage, "completion_tokens", None)  # a server may leave it out
    return Response(text, None, finished, counted if isinstance(counted, int) else 0)


def answered(made: SimpleQueue) -> Iterator[tuple[str, Response]]:
    """What lies ready, without errors and without waiting."""
    with contextlib.suppress(Empty):
        while True:
            id, response = made.get_nowait()
            if isinstance(response, Response):
                yield id, response


def key_of_the_environment() -> str:
    """The key, "" where there is none. InputError: it cannot be one."""
    key = os.environ.get(KEY, "").strip()
    if not key.isascii() or not key.isprintable():
        raise InputError(f"{KEY} holds a character that no key has, such as a line break")
    return key


def openai_package():
    """The package openai. InputError: it is not installed."""
    try:
        import openai
    except ImportError:
        raise InputError("a model behind a server needs the package openai: pip install openai") from None
    return openai
