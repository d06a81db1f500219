"""Models behind a server: a real one of transformers serve, and a small one of our own that can fail on purpose."""

import contextlib
import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import answers
import evaluate
import s3ft
from answers import LocalModel, NamedModel, judge_answers, other_model, respond
from data import Example
from engine import server
from engine.chat import training_ids
from engine.decoding import Limits, Response, Sampling
from engine.model import load_model
from engine.server import ServedModel, with_name
from examples import reflect
from results.audit import audit
from results.report import answered_by_line
from results.request import read_command_line
from support.cli import InputError, exit_cleanly
from support.files import read_json, read_jsonl, write_jsonl
from tasks.custom import CUSTOM_TASK

ROOT = Path(__file__).parent.parent
SMOL = ROOT / "models" / "SmolLM2-135M-Instruct"
KEY = "sk-a-secret-of-the-test"


class Server:
    """An OpenAI-compatible server on loopback. `answer` makes the text of a reply from the user turn."""

    def __init__(self, models=("M",), answer=lambda user: f"You said: {user}"):
        self.models = list(models)
        self.answer = answer
        self.finish_reason = "stop"
        self.requests = []  # the bodies of all chat requests, in order
        self.keys = set()  # the keys that came with them
        self.faults = []  # (status, body) of the next requests, instead of an answer
        self.list_fault = None  # (status, body) instead of the list of models
        self.delay = 0.0  # seconds before an answer
        self.dead = False  # closes every connection without an answer
        self.lock = threading.Lock()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), handler_of(self))
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.server_address[1]}/v1"

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()

    def chat(self, body: dict) -> tuple[int, dict]:
        with self.lock:
            self.requests.append(body)
            fault = self.faults.pop(0) if self.faults else None
        time.sleep(self.delay)
        if fault:
            return fault
        if body["model"] not in self.models:
            return 404, {"error": {"message": f"The model `{body['model']}` does not exist."}}
        message = {"role": "assistant", "content": self.answer(body["messages"][-1]["content"])}
        choice = {"index": 0, "message": message, "finish_reason": self.finish_reason}
        usage = {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12}
        return 200, {"id": "1", "object": "chat.completion", "created": 0, "model": body["model"],
                     "choices": [choice], "usage": usage}


def handler_of(served: Server):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            if served.list_fault:
                self.reply(*served.list_fault)
                return
            found = [{"id": name, "object": "model", "created": 0, "owned_by": "x"} for name in served.models]
            self.reply(200 if self.path == "/v1/models" else 404, {"object": "list", "data": found})

        def do_POST(self):
            if served.dead:
                self.close_connection = True
                return
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            served.keys.add(self.headers["Authorization"])
            if self.path == "/v1/chat/completions":
                self.reply(*served.chat(body))
            else:
                self.reply(404, {"detail": "Not Found"})

        def reply(self, status: int, body: dict):
            content = json.dumps(body).encode()
            with contextlib.suppress(OSError):  # the client has given up
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        def log_message(self, *_):
            pass

    return Handler


@pytest.fixture
def served(monkeypatch):
    """A server of the model M. A client that meets an error tries once more, at once."""
    pytest.importorskip("openai")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(server, "RETRIES", 1)
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    one = Server()
    yield one
    one.close()


@pytest.fixture(scope="module")
def loaded(tiny):
    return load_model(str(tiny), "cpu")


PROMPTS = {f"q{i}": f"What is {i} + {i}?" for i in range(40)}
QUESTIONS = [{"id": f"q{i}", "question": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(8)]


def threads_of_requests() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if "ask_what_waits" in thread.name]


def ask(url: str, name: str = "M", prompts=PROMPTS, stop=None, sampling=None) -> dict:
    model = ServedModel(url, name)
    return dict(model.generate(model.encode(prompts), Limits(6, stop), sampling))


# ------------------------------------------------------------------------------ requests and replies


def test_every_prompt_is_asked_once_greedily_and_gets_its_own_reply(served):
    found = ask(served.url)
    assert {id: y.text for id, y in found.items()} == {id: f"You said: {text}" for id, text in PROMPTS.items()}
    assert len(served.requests) == 40 and served.keys == {f"Bearer {KEY}"}
    for body in served.requests:
        assert body["temperature"] == 0 and body["max_tokens"] == 6
        assert body.keys() == {"model", "messages", "temperature", "max_tokens"}
    assert {(y.tokens, y.finished, y.length) for y in found.values()} == {(None, True, 7)}


def test_requests_are_sent_side_by_side(served):
    served.delay = 0.2
    started = time.monotonic()
    ask(served.url, prompts=dict(list(PROMPTS.items())[:16]))
    assert time.monotonic() - started < 16 * 0.2 / 2


def test_samples_are_drawn_with_a_seed_of_their_own_that_does_not_depend_on_what_is_there(served):
    def seeds() -> dict:
        found = {body["messages"][0]["content"]: body["seed"] for body in served.requests}
        served.requests.clear()
        return found

    sampling = Sampling(temperature=0.7, top_p=0.9, seed=3)
    ask(served.url, sampling=sampling)
    assert {(body["temperature"], body["top_p"]) for body in served.requests} == {(0.7, 0.9)}
    whole = seeds()
    ask(served.url, prompts={"q7": PROMPTS["q7"]}, sampling=sampling)
    assert seeds().items() <= whole.items() and len(set(whole.values())) == 40
    ask(served.url, sampling=replace(sampling, seed=4))
    assert set(seeds().values()).isdisjoint(whole.values())


@pytest.mark.parametrize(("reply", "reason", "text", "finished"), [
    ("a [[DONE]] b [[DONE]]", "stop", "a [[DONE]]", True), ("a [[DONE]] b", "length", "a [[DONE]]", True),
    ("a", "stop", "a", True), ("a", "length", "a", False), (None, "stop", "", True),
    ("<think>so [[DONE]]</think>\n\nb", "stop", "b", True), ("<think>so", "length", "", False),
    ("so, or 5?</think>\n\nb", "stop", "b", True), ("so</seed:think>b", "stop", "b", True),
    ("so[/THINK]b", "stop", "b", True), ("so◁/think▷b", "stop", "b", True),  # the prompt has opened the block
    ("a <b>bold</b> word", "stop", "a <b>bold</b> word", True),
    ("x <think>y</think> z", "stop", "x <think>y</think> z", True),
    (" \n a ", "stop", "a ", True), ("a", "content_filter", "a", False), ("a", "abort", "a", False),
    ("a", None, "a", False), ("a [[DONE]] b", None, "a [[DONE]]", True),
])
def test_a_reply_ends_where_a_response_of_our_own_would(served, reply, reason, text, finished):
    served.answer, served.finish_reason = (lambda user: reply), reason
    y = ask(served.url, prompts={"a": "x"}, stop="[[DONE]]")["a"]
    assert (y.text, y.finished) == (text, finished) and "stop" not in served.requests[0]


def test_template_settings_travel_with_the_request(served):
    model = ServedModel.at(f"{served.url}#M", chat_template_kwargs={"enable_thinking": False})
    model.check()
    assert served.requests[0]["chat_template_kwargs"] == {"enable_thinking": False}


@pytest.mark.parametrize("models", [["only"], ["a", "b"], []])
def test_the_name_may_be_left_out_where_the_server_has_one_model(served, models):
    served.models = models
    if len(models) == 1:
        assert with_name(served.url) == f"{served.url}#only" == with_name(f"{served.url}#only")
    else:
        with pytest.raises(InputError, match="lists (a, b|no model): write http.*#MODEL"):
            with_name(served.url)


@pytest.mark.parametrize("address", [
    "localhost:8000/v1", "http://", "http://me:secret@h/v1", "https://h/v1?api_key=secret#M", "M", "http:///v1#M",
    "http://h:port/v1#M", "http://h:99999/v1#M", "http://me:secret@h:port/v1", "http://h:port/v1?key=secret", "http://[::1/v1#M"])
def test_an_address_that_is_none_or_holds_a_key_is_refused_without_repeating_the_key(address):
    with pytest.raises(InputError) as error:
        with_name(address)
    assert "secret" not in str(error.value)


# ------------------------------------------------------------------------------ faults


def test_an_error_of_the_server_is_tried_again(served, monkeypatch):
    monkeypatch.setattr(server, "RETRIES", 3)
    served.faults = [(500, {"error": "busy"}), (429, {}), (503, {})]
    assert len(ask(served.url)) == 40 and len(served.requests) == 43


@pytest.mark.parametrize(("fault", "line"), [
    ((401, {"error": {"message": f"bad key {KEY}"}}), r"refuses the key \(401\): set OPENAI_API_KEY"),
    ((403, {}), r"refuses the key \(403\)"),
    ((400, {"error": {"message": f"too long, {KEY}"}}), "answers row q0 with 400 .*too long"),
    ((500, {"error": {"message": KEY}}), "answers row q0 with 500"),
    ((200, {"hello": "world"}), "not that of an OpenAI-compatible server"),
    ((200, []), "not that of an OpenAI-compatible server"),
])
def test_a_refusal_is_one_line_without_the_key(served, fault, line):
    served.faults = [fault, fault]
    with pytest.raises(InputError, match=line) as error:
        ask(served.url, prompts={"q0": "x"})
    assert KEY not in str(error.value) and "\n" not in str(error.value)


def test_no_part_of_the_key_is_shown_where_the_message_is_cut(served):
    for padding in range(270, 301):
        served.faults = [(400, {"error": {"message": "x" * padding + KEY}})]
        with pytest.raises(InputError) as error:
            ask(served.url, prompts={"q0": "x"})
        assert KEY[:5] not in str(error.value)


def test_a_limited_rate_is_waited_for(served, monkeypatch):
    monkeypatch.setattr(server, "PAUSE", 0.01)
    served.faults = [(429, {"error": {"message": "slow down"}})] * 60
    assert len(ask(served.url)) == 40
    served.faults = [(429, {"error": {"message": "pay first", "code": "insufficient_quota"}})] * 60
    with pytest.raises(InputError, match="429 .*pay first.* The same command goes on from here"):
        ask(served.url)


def test_what_was_answered_before_an_error_is_given_first(served):
    """What lies ready beside the error is no longer asked for."""
    model = ServedModel(served.url, "M")
    made = server.SimpleQueue()
    for row in [("a", Response("1", None, True)), ("b", InputError("no")), ("c", Response("2", None, True))]:
        made.put(row)
    assert [id for id, _ in server.answered(made)] == ["a", "c"]
    served.faults = [(400, {"error": {"message": "no"}})]
    responses = model.generate(model.encode(PROMPTS), Limits(6))
    found = []
    with pytest.raises(InputError, match="with 400"):
        for id, _ in responses:
            found.append(id)
    assert len(set(found)) == len(found) < 40


@pytest.mark.parametrize(("name", "value"), [
    ("ALL_PROXY", "socks5://127.0.0.1:1"), ("HTTP_PROXY", "http://127.0.0.1:port"), ("SSL_CERT_FILE", "/nowhere.pem"),
])
def test_a_proxy_or_certificate_that_is_none_is_one_line(served, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    for call in (ask, with_name):
        with pytest.raises(InputError, match="no connection can be prepared|cannot be reached") as error:
            call(served.url)
        assert "\n" not in str(error.value)


def test_half_a_character_is_sent_and_taken(served, loaded):
    """JSON can hold a lone surrogate. UTF-8 cannot."""
    served.answer = lambda user: "so \ud83d"
    assert ask(served.url, prompts={"q0": "what \ud83d"})["q0"].text.startswith("so ")
    assert served.requests[0]["messages"][0]["content"] == "what \ufffd"
    ids, is_target = training_ids(loaded[1], "what \ud83d", "so \ud83d")
    assert len(ids) == len(is_target)


def test_a_count_of_tokens_that_is_none_counts_as_unknown(served, monkeypatch):
    chat = served.chat
    monkeypatch.setattr(served, "chat", lambda body: (200, chat(body)[1] | {"usage": {"completion_tokens": "7"}}))
    assert ask(served.url, prompts={"q0": "x"})["q0"].length == 0


def test_a_model_that_the_server_does_not_have_is_named_with_those_that_it_has(served):
    served.models = ["A", "B"]
    with pytest.raises(InputError, match="does not exist.*It does not list 'M', but A, B"):
        ask(served.url)


def test_an_address_without_the_route_is_said(served):
    with pytest.raises(InputError, match=r"404 .*Does the address end in /v1\?"):
        ask(served.url.removesuffix("/v1"))


def test_a_server_that_is_not_there_is_one_line(served):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for call in (lambda url: ask(url), with_name):
        with pytest.raises(InputError, match="the server cannot be reached .*refused"):
            call(f"http://127.0.0.1:{port}/v1")


def test_a_server_that_is_too_slow_is_one_line(served, monkeypatch):
    monkeypatch.setattr(server, "TIMEOUT", 0.2)
    served.delay = 2
    started = time.monotonic()
    with pytest.raises(InputError, match=r"no answer to row q\d+ in \d\.\d seconds and 2 tries") as error:
        ask(served.url)
    passed = time.monotonic() - started
    said = float(re.search(r"in (.*) seconds", str(error.value))[1])
    assert 0.4 <= said <= passed + 0.1 and passed < 2  # two timeouts, and the other requests are not waited for


def test_requests_under_way_are_not_waited_for_after_an_error_or_ctrl_c(served):
    served.answer = lambda user: time.sleep(0 if user == PROMPTS["q0"] else 3) or "4"
    model = ServedModel(served.url, "M")
    responses = model.generate(model.encode(PROMPTS), Limits(6))
    assert next(responses)[0] == "q0"
    started = time.monotonic()
    responses.close()  # as Ctrl-C does it
    assert time.monotonic() - started < 2 and len(served.requests) < 40
    assert threads_of_requests() and all(thread.daemon for thread in threads_of_requests())  # nor at the exit


def test_only_a_missing_route_means_that_a_server_lists_no_model(served):
    model = ServedModel(served.url, "M")
    assert model.lists("M") and not model.lists("N")
    assert not replace(model, url=f"{served.url}/elsewhere").lists("M")
    served.list_fault = 401, {"error": {"message": "no"}}
    with pytest.raises(InputError, match=r"refuses the key \(401\)"):
        model.lists("M")
    with pytest.raises(InputError, match="the server cannot be reached"):
        replace(model, url="http://127.0.0.1:1/v1").lists("M")


@pytest.mark.parametrize("key", ["sk-one\nsk-two", "sk-ü"])
def test_a_key_that_cannot_be_one_is_refused_without_repeating_it(served, monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(InputError, match="OPENAI_API_KEY holds a character that no key has, such as a line break$"):
        ask(served.url)


def test_without_a_key_one_that_means_nothing_is_sent(served, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    ask(served.url)
    assert served.keys == {"Bearer none"}


def test_a_missing_package_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(InputError, match="pip install openai$"):
        ask("http://127.0.0.1:1/v1")


# ------------------------------------------------------------------------------ kept rows


def test_a_server_that_dies_costs_no_row_and_only_missing_ones_are_asked_for_again(served, tmp_path):
    path = tmp_path / "predictions.jsonl"
    model = ServedModel(served.url, "M", weights="w")

    def dies_after_ten(user):
        served.dead = len(served.requests) > 10
        return "4"

    served.answer = dies_after_ten
    with pytest.raises(InputError, match="the server cannot be reached"):
        respond(model, PROMPTS, path, Limits(6))
    for thread in threads_of_requests():
        thread.join(10)
    kept = {row["id"] for part in tmp_path.glob("predictions*.jsonl") for row in read_jsonl(part)}
    assert 0 < len(kept) < 40

    served.dead, served.answer = False, lambda user: "4"
    served.requests.clear()
    rows = respond(model, PROMPTS, path, Limits(6))
    assert len(served.requests) == 40 - len(kept) and list(rows) == list(PROMPTS)
    assert rows["q0"].keys() == {"id", "response", "finished", "digest"}
    assert sum(row["tokens"] for row in read_jsonl(tmp_path / "costs.jsonl")) == 40 * 7

    served.requests.clear()
    moved = replace(model, url="http://127.0.0.1:1/v1")
    assert respond(moved, PROMPTS, path, Limits(6)) == rows and not served.requests
    for other in (replace(model, name="N"), replace(model, weights="v")):
        with pytest.raises(InputError, match="40 of its rows answer another model"):
            respond(other, PROMPTS, path, Limits(6))
    with pytest.raises(InputError, match="answer another limits or sampling"):
        respond(model, PROMPTS, path, Limits(7))
    with pytest.raises(InputError, match="another prompt"):
        respond(model, PROMPTS | {"q0": "x"}, path, Limits(6))


# ------------------------------------------------------------------------------ runs


@pytest.fixture
def command(tiny, tmp_path):
    """(flags of a short run on 8 questions, its folder)"""
    file = tmp_path / "rows.jsonl"
    write_jsonl(file, QUESTIONS)
    files = [f"--{split}-file={file}" for split in ("train", "val", "test")]
    sizes = ["--max-new-tokens=6", "--steps=1", "--device=cpu"]
    return ["--task=custom", f"--model={tiny}", f"--out={tmp_path / 'run'}", *files, *sizes], tmp_path / "run"


def refuse(main, argv, capsys) -> str:
    """The one line with which a command line is refused."""
    with pytest.raises(SystemExit) as end:
        exit_cleanly(lambda: main(argv))
    errors = capsys.readouterr().err.strip().split("\n")
    assert end.value.code == 2 and errors[-1].startswith("error: ") and "Traceback" not in "".join(errors)
    return errors[-1]


def doubled(user: str) -> str:
    """The right answer to small numbers, a wrong one to others, in the words of this server."""
    number = int(user.split()[2])
    return f"Surely {2 * number}." if number < 5 else "Surely -1."


def key_is_in_a_file(folder: Path) -> bool:
    return any(KEY.encode() in path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_a_run_trains_on_what_the_server_answered(served, command, capsys):
    argv, out = command
    served.answer = doubled
    argv = [*argv, "--judge=numeric", "--method=ssr"]
    s3ft.main([*argv, f"--engine={served.url}"])
    rows = read_jsonl(out / "ssr" / "train.jsonl")
    assert [row["source"] for row in rows] == ["prediction"] * 5 + ["gold"] * 3
    assert rows[1]["response"] == "Surely 2." and "tokens" not in rows[1]
    assert read_json(out / "config.json")["engine"] == f"{served.url}#M"
    assert f"the training rows' responses come from {served.url}#M" in capsys.readouterr().out
    assert not key_is_in_a_file(out.parent)

def measure_of(out: Path, loaded, *flags: str):
    """(what evaluate.py asks of a run's models with these flags, the run's task)"""
    asked = read_command_line([f"--out={out}", "--device=cpu", *flags])
    config = evaluate.config_of(asked)
    task, (_, _, rows) = evaluate.task_of(config, "data")
    return evaluate.Measure(*loaded, task, rows, asked, config), task


def test_test_answers_come_from_the_server_where_it_has_the_model(served, command, loaded, capsys):
    argv, out = command
    served.answer, served.models = doubled, ["M", "listed"]
    s3ft.main([*argv, "--judge=numeric", "--method=sft", "--name=listed"])
    measure, task = measure_of(out, loaded, f"--engine={served.url}#M")
    for name in ("base", "listed"):
        assert measure.answers(task.train, out / name, name)["accuracy"] == 5 / 8
    assert [body["model"] for body in served.requests] == ["M"] * 8 + ["listed"] * 8
    assert "lists no model" not in capsys.readouterr().err
    measure.answers(task.train, out / "other", "other")
    assert "tokens" in read_jsonl(out / "other" / "test.jsonl")[0] and len(served.requests) == 16
    models = {name: measure.answers(task.train, out / name, name) for name in ("base", "other")}
    assert [model["answered_by"] for model in models.values()] == ["M", None]
    (line,) = answered_by_line(models)
    assert "base M, other here" in line and "different engines are compared" in line
    assert not answered_by_line({"other": models["other"]})
    assert "other: the server lists no model of this name, so the model answers here" in capsys.readouterr().err
    refused = refuse(evaluate.main, [f"--out={out}", "--engine=M"], capsys)
    assert "the address of a server is http://HOST:PORT/v1 or" in refused and refused.endswith(", not M")


@pytest.mark.parametrize("limit", [6, 20])
def test_a_server_that_does_not_answer_as_the_model_is_pointed_out(served, loaded, tmp_path, capsys, limit):
    local = LocalModel(*loaded)
    limits = Limits(limit)
    own = {PROMPTS[id]: y.text for id, y in local.generate(local.encode(PROMPTS), limits)}
    served.answer = lambda user: own[user]
    model = ServedModel(served.url, "M")
    answers.check_first_response(model, local, PROMPTS, tmp_path / "same.jsonl", limits)
    assert len(served.requests) == 1 and capsys.readouterr().err.count("answers") == 0
    served.answer = lambda user: "Surely."
    answers.check_first_response(model, local, PROMPTS, tmp_path / "other.jsonl", limits)
    assert f"row q0: M at {served.url} answers 'Surely.', the model itself" in capsys.readouterr().err


def test_the_first_response_is_compared_without_white_space_at_its_start(served, loaded, tmp_path, capsys, monkeypatch):
    local, model = LocalModel(*loaded), ServedModel(served.url, "M")
    monkeypatch.setattr(local, "generate", lambda *_: [("q0", Response(" \n It is", None, False, 3))])
    served.answer = lambda user: "It is 4."
    answers.check_first_response(model, local, PROMPTS, tmp_path / "a.jsonl", Limits(6))
    write_jsonl(tmp_path / "b.jsonl", [{"id": "q0", "response": " It is 4."}])
    answers.check_first_response(model, local, PROMPTS, tmp_path / "b.jsonl", Limits(6))
    assert "answers" not in capsys.readouterr().err


def test_a_first_response_that_was_made_elsewhere_is_not_compared(served, loaded, tmp_path, capsys):
    write_jsonl(tmp_path / "a.jsonl", [{"id": "q0", "response": "Surely."}])
    answers.check_first_response(ServedModel(served.url, "M"), LocalModel(*loaded), PROMPTS, tmp_path / "a.jsonl", Limits(6))
    assert "the model itself" not in capsys.readouterr().err and not served.requests


def test_the_same_model_may_move_to_another_server_and_no_other_model_may(served, command, capsys):
    argv, out = command
    argv = [*argv, "--judge=numeric", "--method=ssr"]
    s3ft.main([*argv, f"--engine={served.url}#M"])
    s3ft.main([*argv, "--name=second", "--engine=http://127.0.0.1:1/v1#M"])
    assert read_json(out / "config.json")["engine"] == "http://127.0.0.1:1/v1#M"
    for other in ([f"--engine={served.url}#N"], []):
        assert "was begun with --engine" in refuse(s3ft.main, [*argv, "--name=third", *other], capsys)
    refused = refuse(s3ft.main, [*argv, "--engine=M", f"--out={out}2"], capsys)
    assert "the address of a server is http://HOST:PORT/v1 or" in refused and refused.endswith(", not M")


def test_a_finished_run_needs_neither_its_server_nor_the_name_again(served, command, capsys):
    argv, out = command
    argv = [*argv, "--method=ssr", "--judge=llm", f"--engine={served.url}", f"--judge-model={served.url}"]
    served.answer = lambda user: "True"
    s3ft.main(argv)

    served.models = ["M", "ssr"]  # vLLM lists an adapter that it has loaded, too
    s3ft.main([*argv, "--name=second"])
    asked = read_command_line([f"--out={out}", "--device=cpu", f"--engine={served.url}"])
    assert asked.engine == f"{served.url}#M"
    served.close()
    s3ft.main(argv)
    assert "finished already" in capsys.readouterr().out
    s3ft.main([*argv, "--dry-run"])
    assert f"the training rows' responses come from {served.url}#M" in capsys.readouterr().out


def test_a_served_judge_decides_and_its_verdicts_say_so(served, command, loaded, capsys):
    argv, out = command
    write_jsonl(out / "predictions.jsonl", [{"id": row["id"], "response": "It is 4."} for row in QUESTIONS])
    served.answer = lambda user: "True" if "2 + 2" in user else "False"
    argv = [*argv, "--method=ssr"]
    refused = refuse(s3ft.main, [*argv, "--judge=numeric", f"--judge-model={served.url}"], capsys)
    assert "--judge-model: the judge of this run is numeric" in refused

    argv.append("--judge=llm")
    s3ft.main([*argv, f"--judge-model={served.url}"])
    verdicts = read_jsonl(out / "predictions.judged.jsonl")
    assert [row["accepted"] for row in verdicts] == [i == 2 for i in range(8)]
    assert {row["judge"] for row in verdicts} == {"M"}
    assert {body["max_tokens"] for body in served.requests} == {1, 8}
    assert read_json(out / "config.json")["judge_model"] == f"{served.url}#M"
    assert not key_is_in_a_file(out.parent)
    assert "was begun with --judge-model" in refuse(s3ft.main, [*argv, "--name=second"], capsys)

    measure, task = measure_of(out, loaded)
    served.answer = lambda user: "True"
    assert measure.answers(task.train, out / "ssr", "ssr")["accuracy"] == 1  # the run's judge, from config.json


TOO_LONG = (400, {"error": {"message": "This model's maximum context length is 64 tokens. You requested 99."}})


def test_a_prompt_that_does_not_fit_the_judge_gets_no_verdict(served, loaded, tmp_path, capsys):
    """A local judge counts the tokens, a server says so. The other rows are judged."""
    x = Example("a", "What?", "4")
    pairs = [(replace(x, id=str(i)), "It is 4." if i != 2 else "It is 4. " * 2000) for i in range(5)]
    task = replace(CUSTOM_TASK, judge="llm")
    local = judge_answers(LocalModel(*loaded), task, pairs, tmp_path / "local.judged.jsonl")
    assert len(local) == 5 and local["2"] is None
    assert "the model's context holds 2048: no verdict" in capsys.readouterr().err

    chat = served.chat
    served.answer = lambda user: "True"
    served.chat = lambda body: TOO_LONG if len(str(body)) > 9000 else chat(body)
    judge = ServedModel(served.url, "M")
    assert judge_answers(judge, task, pairs, tmp_path / "served.judged.jsonl") == {
        "0": True, "1": True, "2": None, "3": True, "4": True}
    assert "maximum context length is 64 tokens" in capsys.readouterr().err


def test_a_judge_that_fails_at_validation_costs_no_step(served, command, capsys):
    """The steps before it are in a checkpoint, and the next run begins with the validation."""
    argv, out = command
    write_jsonl(out / "predictions.jsonl", [{"id": row["id"], "response": "It is 4."} for row in QUESTIONS])
    served.answer = lambda user: "True"
    argv = [*argv, "--method=ssr", "--judge=llm", f"--judge-model={served.url}", "--steps=4", "--eval-every=2"]
    failing = True

    def chat(body):
        validates = len(read_jsonl(out / "ssr" / "log.jsonl")) >= 2 if (out / "ssr" / "log.jsonl").exists() else False
        return (503, {}) if failing and validates else Server.chat(served, body)

    served.chat = chat
    assert "with 503" in refuse(s3ft.main, argv, capsys)
    assert [row["step"] for row in read_jsonl(out / "ssr" / "log.jsonl")] == [1, 2]
    failing = False
    s3ft.main(argv)
    rows = read_jsonl(out / "ssr" / "log.jsonl")
    assert [(row["step"], "validation" in row) for row in rows] == [
        (1, False), (2, False), (2, True), (3, False), (4, False), (4, True)]


def test_a_judge_that_cannot_be_asked_is_known_before_anything_is_made(served, command, capsys, tmp_path):
    argv, out = command
    argv = [*argv, "--method=ssr", "--judge=llm"]
    assert "does not list 'N', but M" in refuse(s3ft.main, [*argv, f"--judge-model={served.url}#N"], capsys)
    nowhere = f"--judge-model={tmp_path / 'nowhere'}"
    assert f"--judge-model {tmp_path / 'nowhere'}: cannot" in refuse(s3ft.main, [*argv, nowhere], capsys)
    assert not (out / "predictions.jsonl").exists()


def changed_copy(tiny: Path, folder: Path) -> Path:
    """Another model: the tiny one with other weights."""
    model, tokenizer = load_model(str(tiny), "cpu")
    model.lm_head.weight.data.mul_(-1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_another_local_judge_is_in_memory_only_while_it_is_asked(tiny, tmp_path, monkeypatch):
    other = changed_copy(tiny, tmp_path / "other")
    loads, real = [], answers.load_model
    monkeypatch.setattr(answers, "load_model", lambda *args, **kwargs: loads.append(args) or real(*args, **kwargs))
    judge = other_model(str(other), "--judge-model", device="cpu")
    assert isinstance(judge, NamedModel) and not loads
    task = replace(CUSTOM_TASK, judge="llm")
    pairs = [(Example("a", "q", "4"), "4")]
    judge_answers(judge, task, pairs, tmp_path / "a.judged.jsonl")
    assert loads == [(str(other),)] and judge.local is None
    (row,) = read_jsonl(tmp_path / "a.judged.jsonl")
    assert row["judge"] == str(other)
    judge_answers(judge, task, pairs, tmp_path / "a.judged.jsonl")  # all there: not loaded again
    assert len(loads) == 1

    own = LocalModel(*real(str(tiny), "cpu"))
    monkeypatch.setattr(own, "generate", lambda encoded, _: [(id, Response("True", None, True, 1)) for id in encoded])
    judge_answers(own, task, pairs, tmp_path / "b.judged.jsonl")
    assert read_jsonl(tmp_path / "b.judged.jsonl")[0]["judge"] == "base"
    monkeypatch.undo()
    loaded = LocalModel(*real(str(other), "cpu"))
    prompts = ["Is it?", "Decision:"]
    assert answers.replies_of(judge)(prompts) == answers.replies_of(loaded)(prompts) != answers.replies_of(own)(prompts)
    assert judge.identity() == loaded.identity() != own.identity()


def test_a_local_judge_may_move_and_no_other_judge_may_take_its_place(tiny, command, tmp_path, capsys, monkeypatch):
    argv, out = command
    monkeypatch.setattr("judges.FIRST_REPLIES", 1000)  # a random model says neither True nor False
    argv = [*argv, "--method=sft", "--judge=llm"]
    first = changed_copy(tiny, tmp_path / "first")
    s3ft.main([*argv, f"--judge-model={first}"])
    moved = first.rename(tmp_path / "moved")
    s3ft.main([*argv, f"--judge-model={moved}", "--name=second"])
    assert read_json(out / "config.json")["judge_model"] == str(moved)
    line = refuse(s3ft.main, [*argv, f"--judge-model={tiny}", "--name=third"], capsys)
    assert f"was begun with other weights than those of --judge-model {tiny}" in line


def test_two_judges_of_one_run_are_compared_with_each_other_and_with_people(served, command, capsys):
    argv, out = command
    # The run's judge (numeric) accepts rows 0 to 3. The other one accepts rows 2 to 6.
    write_jsonl(out / "predictions.jsonl", [
        row | {"response": f"It is {row['answer'] if i < 4 else -1}."} for i, row in enumerate(QUESTIONS)])
    s3ft.main([*argv, "--method=ssr", "--judge=numeric"])
    served.answer = lambda user: str(any(f"{i} + {i}" in user for i in range(2, 7)))
    flags = [f"--out={out}", "--device=cpu", f"--compare-judge={served.url}"]
    evaluate.main(flags)
    result = read_json(out / "judges" / "M.json")
    cells = [result[name] for name in ("both_accept", "only_the_runs_accepts", "only_the_other_accepts", "both_reject")]
    assert cells == [2, 2, 3, 1] and result["n"] == 8 and result["people"] is None
    assert result["agreement"]["rate"] == 3 / 8 and result["kappa"] == -0.25  # by hand: chance is 1/2
    assert "agree on 3 of 8" in (out / "judges" / "M.md").read_text()

    # People agree with the other judge on all rows, and so on 3 of the run's verdicts.
    examples = [Example(row["id"], row["question"], row["answer"]) for row in QUESTIONS]
    audit(out, examples, 8)
    lines = (out / "audit.csv").read_text().splitlines()
    filled = [line + ("yes" if any(f"{i} + {i}" in line for i in range(2, 7)) else "no") for line in lines[1:]]
    (out / "audit.csv").write_text("\n".join([lines[0], *filled]) + "\n")
    asked = len(served.requests)
    evaluate.main(flags)
    people = read_json(out / "judges" / "M.json")["people"]
    assert people["M"]["agreement"]["rate"] == people["M"]["kappa"] == 1
    assert people["the run's judge"]["agreement"] == people["the run's judge"]["agreement"] | {"count": 3, "n": 8}
    assert len(served.requests) == asked + 1  # all verdicts are there: only the trial of the server
    assert "| M | 8 of 8" in capsys.readouterr().out
    assert "stands alone" in refuse(evaluate.main, [*flags, "--audit=5"], capsys)


REPLY = """[New Instruction] Which number is it? [End]
[New Answer] It is the number 4. [End] [Better Answer] It is 4, that is 2 + 2. [End]"""


def test_a_teacher_behind_a_server_rewrites(served, command, capsys):
    argv, out = command
    served.answer = lambda user: REPLY
    argv = [*argv, "--judge=numeric", f"--teacher={served.url}", "--max-ifd=1e9", "--max-r-ifd=1e9"]
    with contextlib.suppress(InputError):  # the tiny model's scores may drop every row
        reflect.main(argv)
    instructions = read_jsonl(out / "reflect_instructions.jsonl")
    assert [row["response"] for row in instructions] == [REPLY] * 8
    served.list_fault = 500, {}
    try:
        reflect.main(argv)  # goes on without the list
    except InputError as error:
        assert "the list of models" not in str(error)
    served.list_fault = None
    assert read_json(out / "reflect_teacher.json") == {"teacher": "M"}
    trace = read_jsonl(out / "reflect" / "reflect.jsonl")
    assert {row["phase_2"] for row in trace} <= {"accepted", "rejected"}
    assert not key_is_in_a_file(out)

    # The base model is its own teacher, and answers from its server.
    argv = [flag for flag in argv if not flag.startswith(("--teacher", "--out"))]
    with contextlib.suppress(InputError):
        reflect.main([*argv, f"--out={out}-own", f"--engine={served.url}"])
    path = out.with_name("run-own") / "reflect_instructions.jsonl"
    assert [row["response"] for row in read_jsonl(path)] == [REPLY] * 8


# ------------------------------------------------------------------------------ a real server


@pytest.fixture(scope="module")
def transformers_serve():
    """transformers serve with SmolLM2 on loopback."""
    for package in ("openai", "fastapi", "uvicorn"):
        if not importlib.util.find_spec(package):
            pytest.skip(f"needs pip install 'transformers[serving]': {package} is not installed")
    if not SMOL.exists():
        pytest.skip(f"needs {SMOL.relative_to(ROOT)} (make demo)")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = Path(sys.executable).with_name("transformers")
    argv = [program, "serve", SMOL, "--host", "127.0.0.1", "--port", port, "--device", "cpu", "--dtype", "float32"]
    process = subprocess.Popen(list(map(str, argv)), env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(f"http://127.0.0.1:{port}/health", process)
        yield f"http://127.0.0.1:{port}/v1#{SMOL}"
    finally:
        process.kill()
        process.wait()


def wait_for(url: str, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        assert process.poll() is None, "transformers serve ended"
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5):
            return
        time.sleep(0.2)
    raise AssertionError("transformers serve did not begin to answer")


def test_a_real_server_of_the_same_model_answers_as_generate_does(transformers_serve, tmp_path, monkeypatch):
    """Greedily: one response that ends by itself, one at the limit, and one at a stop string."""
    monkeypatch.setattr(server, "AT_ONCE", 1)  # side by side, its threads only wait for each other on a small CPU
    monkeypatch.setattr(server, "RETRIES", 0)
    own = LocalModel(*load_model(str(SMOL), "cpu", "float32"))
    served = ServedModel.at(transformers_serve)
    prompts = {"ends": "Is the sky blue? Answer yes or no.", "is cut off": "Count: 1, 2, 3,"}
    for number, limits in enumerate((Limits(4), Limits(4, "No"), Limits(24))):
        expected = respond(own, prompts, tmp_path / f"{number}.own.jsonl", limits)
        found = respond(served, prompts, tmp_path / f"{number}.jsonl", limits)
        for id in prompts:
            same = ("response", "finished")
            assert [found[id][name] for name in same] == [expected[id][name] for name in same]
        assert expected["ends"]["finished"]
    assert not read_jsonl(tmp_path / "0.jsonl")[1]["finished"] and len(expected["is cut off"]["response"]) > 24
    with pytest.raises(InputError, match="pinned to"):
        ask(served.url, "other", prompts={"a": "x"})
