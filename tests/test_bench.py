"""What the benchmarks compute beside times: lengths, limits, tables. Times themselves are never tested."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, MistralConfig

from bench import generate as bench_generate
from bench import gpu
from bench import train as bench_train
from bench.memory import SHAPES, budget
from data import Example
from support.files import read_json

ROOT = Path(__file__).resolve().parent.parent


def script(name: str, *flags: str) -> None:
    """Run a benchmark on one thread: two threads crawl where another job has a core."""
    command = [sys.executable, "-m", f"bench.{name}", *flags]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("deciles", [gpu.PROMPT, gpu.RESPONSE])
def test_lengths_follow_the_deciles(deciles):
    found = gpu.lengths(deciles, 2000, seed=0)
    assert np.allclose(np.quantile(found, np.linspace(0, 1, 11)), deciles, atol=1)


def test_rows_share_their_instruction_and_end_at_their_own_length():
    rows = gpu.make_rows(512, 40)
    assert len({tuple(row.tokens[: gpu.COMMON]) for row in rows}) == 1
    assert len({tuple(row.tokens[: gpu.COMMON + 2]) for row in rows}) > 1
    assert all(row.start == len(row.tokens) < row.limit for row in rows)


def test_without_a_gpu_the_script_runs_a_tiny_shape_and_claims_nothing(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    script("gpu", "--prompts=6", "--peer-prompts=3", "--steps=1", f"--out={tmp_path}")
    rows = [line.split("|")[2].strip() for line in (tmp_path / "gpu.md").read_text().splitlines() if line.startswith("| ")]
    assert set(rows[1:]) == {"not measured"}
    assert read_json(tmp_path / "gpu.json")["gpu"] is False


def test_the_forced_lengths_are_generated():
    config = MistralConfig(**gpu.TINY)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="rows").eval()
    model.generation_config.eos_token_id = None
    made = []
    rows = gpu.make_rows(config.vocab_size, 5)
    ending = gpu.Ending(model, gpu.SimpleNamespace(eos_token_id=None, chat_template=None, decode=lambda *_, **__: ""), None)
    for index, response in gpu.generate_rows(model, rows, ending):
        made.append((index, len(response.tokens)))
    assert sorted(made) == [(row.index, row.limit - row.start) for row in gpu.make_rows(config.vocab_size, 5)]


def test_weights_keys_and_values_of_mistral_7b():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(MistralConfig(**SHAPES["mistral-7b"]))
    assert sum(p.numel() for p in model.parameters()) == 7_241_732_096  # as its card says: 7.24B
    assert gpu.weights_of(model) == 7_241_732_096 - 32000 * 4096


def test_the_memory_formula_on_a_shape_that_can_be_counted_by_hand():
    terms = budget(MistralConfig(**gpu.TINY), ["q_proj"], 16)
    layer = 64 * (64 + 32 + 32 + 64) + 3 * 64 * 128 + 2 * 64  # attention, MLP, two norms
    assert terms["weights"] == 2 * (2 * layer + 2 * 512 * 64 + 64)
    assert terms["adapter"] == 16 * 2 * 8 * (64 + 64)
    assert terms["keys and values a token"] == 2 * 2 * 2 * 32  # layers, keys and values, bytes, two heads of 16
    assert 0 < terms["activations a token, checkpointing"] < terms["activations a token"] * 2


def test_distinct_counts_what_prompts_share_once():
    assert bench_generate.distinct([[1, 2, 3], [1, 2, 4, 5], [7]]) == 3 + 2 + 1
    assert bench_generate.distinct([[1, 2], [1, 2]]) == 2


def test_the_limit_of_decoding_on_two_rows_counted_by_hand():
    """Rows of 10 and 20 prompt tokens make 3 and 2: a step of both with 11 + 21 keys, then one of the first with 12."""
    assert bench_generate.decode_limit([(10, 3), (20, 2)], row=1.0, weights=0.5, key_values=0.01) == pytest.approx(2 + 1)
    assert bench_generate.decode_limit([(10, 3), (20, 2)], row=1.0, weights=1.5, key_values=0.1) == pytest.approx(4.7 + 2.7)
    assert bench_generate.decode_limit([(10, 1)], row=1.0, weights=1.0, key_values=1.0) == 0  # its token comes with the prompt


def test_one_question_of_every_passage():
    rows = [Example(str(i), f"q{i}", "a", context=f"c{i // 3}", unanswerable=i == 0) for i in range(9)]
    assert [row.id for row in bench_generate.one_a_passage(rows)] == ["1", "3", "6"]


def test_generation_beside_transformers_gives_the_same_answers(tiny, tmp_path):
    script("generate", f"--model={tiny}", "--reading=4", "--reading-tokens=3", "--rounds=1", f"--out={tmp_path}")
    for case in read_json(tmp_path / "generate.json")["workloads"].values():
        assert case["prompts"] == 4
        assert case["answers that differ"][bench_generate.PEER] == 0


def test_training_beside_peft(tiny, tmp_path):
    """The script from end to end; what is not installed is skipped by name."""
    script("train", f"--model={tiny}", "--steps=1", "--rounds=1", "--targets=q,v", f"--out={tmp_path}")
    results = read_json(tmp_path / "train.json")
    assert {"ours", "ours, prefix shared", "peft, plain loop"} <= set(results["cases"]["q,v"])
    assert set(results["cases"]["q,v"]) | set(results["skipped"]) == set(bench_train.SIDES)
