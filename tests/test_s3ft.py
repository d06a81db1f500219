"""Algorithm 1 and its relatives, the training loop, and runs that are broken off."""

import contextlib
import copy
import itertools
import json
import os
import random
import re
import select
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import answers
import evaluate
import lora
import s3ft
import train
from answers import Answer
from data import Example
from engine.chat import training_ids
from engine.model import load_model
from examples import reflect
from judges import leaks
from support.cli import InputError, exit_cleanly
from support.files import read_json, read_jsonl, write_json, write_jsonl
from tasks.custom import CUSTOM_TASK
from train import TrainingSettings

ROOT = Path(__file__).parent.parent


# ------------------------------------------------------------------------------------------------ the methods


class FakeBase:
    """Answers from a table, and records what it was asked."""

    def __init__(self, predictions="", paraphrases="", samples=None):
        self.accepted = {"predict": predictions, "paraphrase": paraphrases}
        self.samples, self.asked = samples, {}

    def gold(self, x):
        return f"gold {x.id}"

    def predict(self, D):
        return self._answer("predict", D)

    def paraphrase(self, D):
        return self._answer("paraphrase", D)

    def sample(self, D, k):
        return self.samples

    def _answer(self, kind, D):
        self.asked[kind] = "".join(x.id for x in D)
        return {x.id: Answer(f"{kind} {x.id}", x.id in self.accepted[kind]) for x in D}


D = [Example(id, "q", "a") for id in "abcd"]


def targets(method, base):
    """(id, text of the target, source) of every row of D'."""
    rows = []
    for x, target, source in method(D, base):
        text = target.text if isinstance(target, Answer) else target
        rows.append((x.id, text, source))
    return rows


def test_s3ft_takes_prediction_then_paraphrase_then_gold():
    base = FakeBase(predictions="ac", paraphrases="bc")
    assert targets(s3ft.s3ft, base) == [
        ("a", "predict a", "prediction"), ("b", "paraphrase b", "paraphrase"),
        ("c", "predict c", "prediction"), ("d", "gold d", "gold")]
    assert base.asked == {"predict": "abcd", "paraphrase": "bd"}  # Algorithm 1 paraphrases the rejected only


def test_sft_asks_the_base_model_nothing():
    base = FakeBase(predictions="abcd", paraphrases="abcd")
    assert targets(s3ft.sft, base) == [(id, f"gold {id}", "gold") for id in "abcd"] and base.asked == {}


def test_sdft_paraphrases_every_row_and_keeps_the_gold_otherwise():
    base = FakeBase(predictions="abcd", paraphrases="a")
    assert [source for *_, source in targets(s3ft.sdft, base)] == ["paraphrase", "gold", "gold", "gold"]
    assert base.asked == {"paraphrase": "abcd"}


def test_ssr_never_paraphrases():
    base = FakeBase(predictions="ab", paraphrases="abcd")
    assert [source for *_, source in targets(s3ft.ssr, base)] == ["prediction", "prediction", "gold", "gold"]
    assert base.asked == {"predict": "abcd"}


def test_rft_takes_the_likeliest_accepted_sample_and_drops_the_rest():
    samples = {"a": [Answer("likely but wrong", False, -1), Answer("second", True, -3), Answer("best", True, -2)],
               "b": [Answer("wrong", False, -1)], "c": [Answer("only", True, -9)], "d": []}
    assert targets(s3ft.rft, FakeBase(samples=samples)) == [("a", "best", "prediction"), ("c", "only", "prediction")]


@pytest.mark.parametrize(("text", "leaking"), [
    ("The Reference Answer says 7.", True), ("Your turn: 7", True), ("It's your turn", False),
    ("Now it's your turn", True), ("In my response, 7", True), ("7 apples, as he was responsive.", False)])
def test_leaks(text, leaking):
    assert leaks(text) is leaking


# ------------------------------------------------------------------------------------------------ the training step


def settings(**changes):
    return TrainingSettings(**({"steps": 8, "eval_every": 8, "warmup": 0.25, "lr": 0.01} | changes))


@pytest.fixture(scope="module")
def loaded(tiny):
    return load_model(str(tiny), "cpu")


@pytest.fixture(scope="module")
def rows(loaded):
    texts = [("question " * i, "an answer " * (1 + i % 3)) for i in range(8)]
    return [training_ids(loaded[1], *text) for text in texts]


def trained(model, rows, micro_batch):
    model = copy.deepcopy(model)
    lora.inject(model, dropout=0.0, seed=0)
    optimizer = torch.optim.AdamW(lora.parameters(model), lr=0.01)
    losses = [train.training_step(model, optimizer, rows, settings(micro_batch=micro_batch))[0] for _ in range(3)]
    return lora.state_dict(model), losses


@pytest.mark.parametrize("micro_batch", [1, 2, 3])
def test_accumulation_gives_the_weights_of_one_batch(loaded, rows, micro_batch):
    whole, losses = trained(loaded[0], rows, 8)
    parts, part_losses = trained(loaded[0], rows, micro_batch)
    assert losses == pytest.approx(part_losses, abs=1e-5)
    for name, weight in whole.items():
        torch.testing.assert_close(parts[name], weight, atol=1e-5, rtol=0)
    assert any(weight.abs().max() > 1e-3 for name, weight in whole.items() if "lora_B" in name)


def test_loss_is_the_mean_over_all_target_tokens_of_the_step(loaded, rows):
    """By hand: every row alone through transformers, all token losses pooled, prompt tokens left out."""
    model = copy.deepcopy(loaded[0])
    pooled = []
    for ids, is_target in rows:
        logits = model(torch.tensor([ids])).logits[0, :-1]
        losses = F.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")
        pooled += [loss.item() for loss, target in zip(losses, is_target[1:], strict=True) if target]
    lora.inject(model, seed=0)
    model.eval()
    optimizer = torch.optim.AdamW(lora.parameters(model), lr=0.0)
    loss, count = train.training_step(model, optimizer, rows, settings(micro_batch=3))
    assert count == len(pooled) and loss == pytest.approx(sum(pooled) / len(pooled), abs=1e-5)


def test_out_of_memory_says_what_to_do(loaded, rows, monkeypatch):
    def small_device(*_):
        raise torch.OutOfMemoryError("simulated")

    monkeypatch.setattr(train, "target_loss", small_device)
    with pytest.raises(InputError, match="out of memory with --micro-batch 8: the same command with --micro-batch 4"):
        trained(loaded[0], rows, 8)


def test_learning_rate_warms_up_and_decays_to_zero():
    rates = [train.learning_rate(step, settings()) for step in range(8)]
    assert rates == pytest.approx([0.005, 0.01, 0.01, 0.05 / 6, 0.04 / 6, 0.03 / 6, 0.02 / 6, 0.01 / 6])


def step_rows(n, batch_size, steps, seed):
    return [train.rows_of_step(step, n, batch_size, seed) for step in range(steps)]


def test_every_epoch_sees_every_row_once_in_a_new_order():
    steps = step_rows(n=10, batch_size=5, steps=6, seed=1)
    epochs = [sorted(steps[i] + steps[i + 1]) for i in (0, 2, 4)]
    assert epochs == [list(range(10))] * 3
    assert len({tuple(steps[i] + steps[i + 1]) for i in (0, 2, 4)}) == 3
    assert steps[:3] == step_rows(10, 5, 3, seed=1) != step_rows(10, 5, 3, seed=2)


def test_a_batch_larger_than_the_data_goes_round():
    assert [len(batch) for batch in step_rows(n=3, batch_size=8, steps=2, seed=0)] == [8, 8]


def test_a_cosine_falls_slowly_first_and_ends_near_zero():
    rates = [train.learning_rate(step, settings(schedule="cosine", warmup=0.01, steps=100)) for step in range(100)]
    assert rates[0] == 0.01 and rates[50] == pytest.approx(0.005, abs=1e-4) and 0 < rates[-1] < 1e-5
    assert rates[10] > train.learning_rate(10, settings(warmup=0.01, steps=100))


# ------------------------------------------------------------------------------------------------ runs

QUESTIONS = [{"id": f"q{i}", "question": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(12)]


@pytest.fixture
def command(tiny, tmp_path):
    """Arguments of a run on 12 questions; a user's own predictions make the tiny random model right now and then."""
    file = tmp_path / "rows.jsonl"
    write_jsonl(file, QUESTIONS)
    out = tmp_path / "run"
    files = [f"--{split}-file={file}" for split in ("train", "val", "test")]
    sizes = ["--judge=numeric", "--limit=12", "--max-new-tokens=6", "--steps=6", "--eval-every=2", "--lr=0.01", "--device=cpu"]
    return ["--task=custom", f"--model={tiny}", f"--out={out}", *files, *sizes], out


def give_answers(out: Path, kind: str, right):
    out.mkdir(exist_ok=True)
    answers = [row["answer"] if i in right else "unclear" for i, row in enumerate(QUESTIONS)]
    rows = [{"id": row["id"], "response": f"It is {answer}."} for row, answer in zip(QUESTIONS, answers, strict=True)]
    write_jsonl(out / f"{kind}.jsonl", rows)


def test_a_run_from_responses_made_elsewhere_uses_all_three_branches(command, capsys):
    argv, out = command
    give_answers(out, "predictions", right=range(0, 6))
    give_answers(out, "paraphrases", right=range(4, 9))
    before = (out / "predictions.jsonl").read_bytes()
    s3ft.main([*argv, "--method=s3ft"])
    rows = read_jsonl(out / "s3ft" / "train.jsonl")
    assert [row["source"] for row in rows] == ["prediction"] * 6 + ["paraphrase"] * 3 + ["gold"] * 3
    assert rows[0] == {"id": "q0", "prompt": "What is 0 + 0?", "response": "It is 0.", "source": "prediction"}
    assert (out / "predictions.jsonl").read_bytes() == before
    assert "50.0% prediction, 25.0% paraphrase, 25.0% gold" in capsys.readouterr().out
    assert sorted(p.name for p in (out / "s3ft").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "config.json", "log.jsonl", "train.jsonl", "training.json"]


def test_responses_that_are_there_already_are_not_made_again(command, monkeypatch):
    argv, out = command
    give_answers(out, "predictions", right=range(12))
    rows = read_jsonl(out / "predictions.jsonl")
    write_jsonl(out / "predictions.jsonl", rows[:9])
    made = []
    generate = answers.respond.__globals__["generate"]

    def counting(model, tokenizer, prompts, *args, **kwargs):
        made.append(len(prompts))
        return generate(model, tokenizer, prompts, *args, **kwargs)

    monkeypatch.setitem(answers.respond.__globals__, "generate", counting)
    s3ft.main([*argv, "--method=ssr", "--steps=2"])
    assert made[0] == 3
    assert [row["id"] for row in read_jsonl(out / "predictions.jsonl")] == [row["id"] for row in QUESTIONS]


def test_a_replaced_response_is_judged_anew(command):
    argv, out = command
    give_answers(out, "predictions", right=range(12))
    s3ft.main([*argv, "--method=ssr", "--name=one", "--steps=2"])
    give_answers(out, "predictions", right=range(6))
    s3ft.main([*argv, "--method=ssr", "--name=two", "--steps=2"])
    sources = [[row["source"] for row in read_jsonl(out / name / "train.jsonl")] for name in ("one", "two")]
    assert sources == [["prediction"] * 12, ["prediction"] * 6 + ["gold"] * 6]


def test_samples_do_not_depend_on_what_was_made_before(loaded, tmp_path):
    task = replace(CUSTOM_TASK, judge="numeric", max_new_tokens=6)
    examples = [Example(row["id"], row["question"], row["answer"]) for row in QUESTIONS]
    whole = answers.BaseLM(*loaded, task, tmp_path / "whole").sample(examples, 2)
    write_jsonl(tmp_path / "part" / "samples.jsonl", read_jsonl(tmp_path / "whole" / "samples.jsonl")[::2])
    assert answers.BaseLM(*loaded, task, tmp_path / "part").sample(examples, 2) == whole
    assert len({y.text for samples in whole.values() for y in samples}) > 12
    files = [tmp_path / name / "samples.jsonl" for name in ("whole", "part")]
    assert files[0].read_bytes() == files[1].read_bytes()


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every result of a run. Left out: the clock's readings, and the lock."""
    skip = {".lock", "training.json", "costs.jsonl"}
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file() and p.name not in skip}


def stamps(folder: Path) -> set:
    """When every file of rows was last written. A file of new rows may be put together with the real one meanwhile."""
    found = set()
    for path in folder.glob("**/*.jsonl"):
        with contextlib.suppress(FileNotFoundError):
            found.add((path.name, path.stat().st_mtime_ns))
    return found


# Runs s3ft.py in a process of its own for every command line that it reads, and says its id and how it ended.
# Only the packages are loaded before: to import torch for every run would take longer than all that is tested.
NURSERY = """
import json, os, signal, sys
import s3ft
from support.cli import exit_cleanly
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

for line in sys.stdin:
    child = os.fork()
    if child == 0:
        os.dup2(2, 1)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # the background is deaf to Ctrl-C otherwise
        exit_cleanly(lambda: s3ft.main(json.loads(line)))
        sys.exit()
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture
def nursery(tmp_path):
    """A process that starts runs, and the file that gets what they say."""
    errors = tmp_path / "errors.txt"
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    with errors.open("w") as file:
        process = subprocess.Popen([sys.executable, "-c", NURSERY], cwd=ROOT, env=env, text=True, bufsize=1,
                                   stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file)
    yield process, errors
    process.kill()
    process.communicate()


def number_from(process: subprocess.Popen, seconds: float) -> int:
    ready, _, _ = select.select([process.stdout], [], [], seconds)
    assert ready, f"nothing was said in {seconds} seconds"
    return int(process.stdout.readline())


def test_a_run_killed_again_and_again_ends_with_the_same_files(command, nursery):
    """20 seeded moments, mostly SIGKILL, also SIGTERM and Ctrl-C; the reference run is never disturbed."""
    argv, out = command
    process, errors = nursery
    argv = [*argv, "--method=s3ft", "--steps=400", "--eval-every=3"]
    s3ft.main(argv)
    expected = snapshot(out)
    moved = out.with_name("reference")
    out.rename(moved)
    rng = random.Random(0)
    kinds = [signal.SIGKILL] * 16 + [signal.SIGTERM] * 2 + [signal.SIGINT] * 2
    signals = itertools.chain(rng.sample(kinds, len(kinds)), itertools.repeat(None))
    for end in signals:
        before = stamps(out)
        process.stdin.write(json.dumps(argv) + "\n")
        child = number_from(process, seconds=120)
        if end is None:
            assert number_from(process, seconds=300) == 0, errors.read_text()
            break
        deadline = time.monotonic() + 120
        while stamps(out) == before and time.monotonic() < deadline:
            time.sleep(0.01)  # until it is at work
        time.sleep(rng.uniform(0, 0.5))
        os.kill(child, end)
        code = number_from(process, seconds=60)
        assert code in (-end, 130), "the run had ended before the signal came: make it longer"
    assert snapshot(out) == expected


# ------------------------------------------------------------------------------------------------ bad input


def refuse(argv, capsys) -> str:
    with pytest.raises(SystemExit) as end:
        exit_cleanly(lambda: s3ft.main(argv))
    errors = capsys.readouterr().err.strip().split("\n")
    assert end.value.code == 2 and errors[-1].startswith("error: ") and "Traceback" not in "".join(errors)
    return errors[-1]


@pytest.mark.parametrize(("flags", "message"), [
    (["--method=sftt"], "unknown method 'sftt': choose from sft"),
    (["--method=sft", "--target-modules=attn"], "attn"),
    (["--method=sft", "--model=/nowhere"], "--model /nowhere: cannot be loaded"),
    (["--method=sft", "--rank=0"], "rank"),
    (["--method=sft", "--steps=-1"], "--steps"),
    (["--method=sft", "--lr=nan"], "--lr"),
    (["--method=sft", "--limit=0"], "--limit"),
    (["--method=sft", "--batch-size=0"], "--batch-size"),
    (["--method=sft", "--train-file=nowhere.jsonl"], "cannot read nowhere.jsonl"),
    (["--method=sft", "--device=gpu9"], "--device gpu9"),
])
def test_bad_flags(command, capsys, flags, message):
    assert message in refuse([*command[0], *flags], capsys)


def test_a_response_made_elsewhere_that_leaves_the_context_is_named(command, capsys):
    argv, out = command
    give_answers(out, "predictions", right=range(12))
    rows = read_jsonl(out / "predictions.jsonl")
    rows[3]["response"] = "x" * 3000 + " 6"
    write_jsonl(out / "predictions.jsonl", rows)
    assert re.search(r"train.jsonl, row q3: 30\d\d tokens, .* holds 2048: shorten", refuse([*argv, "--method=s3ft"], capsys))


def test_unknown_task(command, capsys):
    argv = ["--task=gsm9k", "--method=sft", f"--out={command[1]}"]
    assert "unknown task 'gsm9k'" in refuse(argv, capsys)


def test_custom_without_its_files(command, capsys):
    assert "--train-file" in refuse(["--task=custom", "--method=sft", f"--out={command[1]}"], capsys)


def test_a_prompt_longer_than_the_context(command, capsys, tmp_path):
    argv, _ = command
    write_jsonl(tmp_path / "long.jsonl", [{"id": "huge", "question": "x" * 3000, "answer": "1"}])
    long = [f"--train-file={tmp_path / 'long.jsonl'}"]
    assert "row huge (training): its prompt has 30" in refuse([*argv, *long, "--method=s3ft"], capsys)
    assert "row huge (training): its prompt has 30" in refuse([*argv, *long, "--method=sft"], capsys)
    write_jsonl(tmp_path / "long.jsonl", [{"id": "huge", "question": "x" * 1200, "answer": "1" * 900}])
    assert "training data with gold, row huge: 2" in refuse([*argv, *long, "--method=sft"], capsys)
    assert "row huge (paraphrase): its prompt has 2" in refuse([*argv, *long, "--method=sdft"], capsys)


def test_a_long_validation_row_behind_a_short_test_row_of_the_same_id(command, capsys, tmp_path):
    argv, _ = command
    write_jsonl(tmp_path / "long.jsonl", [{"question": "x" * 3000, "answer": "1"}])
    write_jsonl(tmp_path / "short.jsonl", [{"question": "x", "answer": "1"}])
    files = [f"--val-file={tmp_path / 'long.jsonl'}", f"--test-file={tmp_path / 'short.jsonl'}"]
    assert "row 1 (validation): its prompt has 30" in refuse([*argv, *files, "--method=s3ft"], capsys)


def test_an_unwritable_folder(command, capsys, tmp_path):
    assert "cannot be written" in refuse([*command[0], "--method=sft", f"--out={tmp_path / 'rows.jsonl' / 'run'}"], capsys)


@pytest.mark.parametrize(("wrong", "message"), [
    ("--target-modules=attn", "attn"), ("--model=no/such-model", "cannot be loaded")])
def test_a_mistake_does_not_mark_the_folder(command, capsys, wrong, message):
    """Refused, then given rightly with the same --out."""
    argv, out = command
    assert message in refuse([*argv, "--method=sft", wrong], capsys)
    assert not list(out.rglob("config.json"))
    s3ft.main([*argv, "--method=sft", "--steps=2"])
    assert (out / "sft" / "training.json").exists()


def test_a_run_may_go_on_with_smaller_micro_batches(command):
    argv, out = command
    s3ft.main([*argv, "--method=sft", "--steps=2"])
    (out / "sft" / "training.json").unlink()
    s3ft.main([*argv, "--method=sft", "--steps=2", "--micro-batch=1", "--gradient-checkpointing"])
    assert (out / "sft" / "training.json").exists()


def test_a_validation_prompt_that_does_not_fit_is_named_before_anything_is_made(command, capsys, tmp_path):
    argv, out = command
    write_jsonl(tmp_path / "long.jsonl", [{"id": "v7", "question": "x" * 3000, "answer": "1"}])
    error = refuse([*argv, "--method=s3ft", f"--val-file={tmp_path / 'long.jsonl'}"], capsys)
    assert "v7" in error and not out.joinpath("predictions.jsonl").exists()


def test_a_file_flag_beside_a_built_in_task_is_refused(command, capsys):
    argv = ["--task=reading", "--method=sft", "--train-file=mine.jsonl", f"--out={command[1]}"]
    assert "reading has its own rows" in refuse(argv, capsys)


def test_what_a_killed_run_was_writing_is_swept_away(command):
    argv, out = command
    (out / "sft").mkdir(parents=True)
    (out / "sft" / ".checkpoint.pt.1234.tmp").write_bytes(b"half")
    s3ft.main([*argv, "--method=sft", "--steps=2"])
    (out / "sft" / "checkpoint.pt").write_bytes(b"left by a kill after training.json")
    s3ft.main([*argv, "--method=sft", "--steps=2"])
    assert {p.name for p in (out / "sft").iterdir()} == {"config.json", "train.jsonl", "log.jsonl", "training.json",
                                                         "adapter_config.json", "adapter_model.safetensors"}


def test_other_rows_in_the_same_files(command, capsys, tmp_path):
    """A row put in at the top would give every cached answer to the next question."""
    argv, out = command
    path = Path(next(flag for flag in argv if flag.startswith("--train-file=")).partition("=")[2])
    s3ft.main([*argv, "--method=sft", "--steps=2"])
    path.write_text('{"question": "new", "answer": "1"}\n' + path.read_text())
    assert "was begun with files with the digests" in refuse([*argv, "--method=s3ft", "--steps=2"], capsys)
    with pytest.raises(InputError, match="not the rows that the run was begun with"):
        evaluate.main([f"--out={out}", "--device=cpu"])


@pytest.mark.parametrize("name", ["base", "figures", "a/b", ".hidden", ".."])
def test_names_that_evaluation_would_not_find(command, capsys, name):
    assert "must be the name of one new folder" in refuse([*command[0], "--method=sft", f"--name={name}"], capsys)


def test_other_settings_on_the_same_folder(command, capsys):
    argv, out = command
    s3ft.main([*argv, "--method=sft", "--steps=2"])
    assert "was begun with --steps 2, not 3" in refuse([*argv, "--method=sft", "--steps=3"], capsys)
    assert "was begun with --limit 12, not 6" in refuse([*argv, "--method=s3ft", "--limit=6"], capsys)


def test_a_run_goes_on_in_the_precision_that_it_was_begun_in(command, capsys):
    argv, out = command
    s3ft.main([*argv, "--method=sft", "--steps=1", "--dtype=bfloat16"])
    s3ft.main([*argv, "--method=sft", "--steps=1", "--name=again"])
    assert read_json(out / "config.json")["dtype"] == "bfloat16"
    assert "GiB in bfloat16" in capsys.readouterr().out
    other = [*argv, "--method=sft", "--steps=1", "--name=other", "--dtype=float32"]
    assert "was begun with --dtype bfloat16, not float32" in refuse(other, capsys)

    write_json(out / "config.json", read_json(out / "config.json") | {"dtype": "float99"})
    assert "'dtype' must be float32 or bfloat16" in refuse([*argv, "--method=sft", "--name=other"], capsys)


@pytest.mark.parametrize(("content", "message"), [
    ('{"id": "q0"}\n', "predictions.jsonl, row 1: needs the text fields 'id' and 'response'"),
    ('{"id": "q0", "response": "1"}\n{"id": "q0", "response": "2"}\n', "the id 'q0' comes twice"),
    ('{"id": "q0", "response": "1"\n{"id": "q1", "response": "2"}\n', "line 1: not valid JSON"),
])
def test_bad_predictions_from_elsewhere(command, capsys, content, message):
    argv, out = command
    out.mkdir()
    (out / "predictions.jsonl").write_text(content)
    assert message in refuse([*argv, "--method=ssr"], capsys)


def test_rft_without_an_accepted_sample_says_so(command, capsys):
    assert "nothing was accepted" in refuse([*command[0], "--method=rft"], capsys)


def test_reflect_is_a_method_like_the_others(command, loaded):
    """The teacher's replies are given here; the tiny model's scores decide which of them stay."""
    argv, out = command
    for kind, tags in (("instructions", ("New Instruction", "New Answer")), ("responses", ("Better Answer",))):
        replies = {x["id"]: " ".join(f"[{tag}] {chr(97 + len(tags) * i) * (i + 9)} [End]" for tag in tags)
                   for i, x in enumerate(QUESTIONS)}
        write_jsonl(out / f"reflect_{kind}.jsonl", [{"id": name, "response": reply} for name, reply in replies.items()])
    reflect.main([*argv, "--method=reflect"])
    trace = {row["id"]: row for row in read_jsonl(out / "reflect" / "reflect.jsonl")}
    kept = read_jsonl(out / "reflect" / "train.jsonl")
    assert kept and {row["id"] for row in kept} == {name for name, row in trace.items() if row["emitted"]}
    for row in kept:
        assert row["source"] == "reflection" and row["response"] == trace[row["id"]]["response"]
        assert trace[row["id"]]["scores"]["phase_2"]["ifd"] < 1
