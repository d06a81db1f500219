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
from bench import shapes
from bench import train as bench_train
from bench.shapes import MISTRAL_7B, TINY, memory_table, memory_terms
from data import Example
from support.files import read_json

ROOT = Path(__file__).resolve().parent.parent


def script(name: str, *flags: str) -> None:
    """Run a benchmark on one thread: two threads crawl where another job has a core."""
    command = [sys.executable, "-m", f"bench.{name}", *flags]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("deciles", [shapes.PROMPT, shapes.RESPONSE])
def test_lengths_follow_the_deciles(deciles):
    found = shapes.lengths(deciles, 2000, seed=0)
    assert np.allclose(np.quantile(found, np.linspace(0, 1, 11)), deciles, atol=1)


def test_rows_share_their_instruction_and_end_at_their_own_length():
    rows = shapes.random_rows(512, 40)
    assert len({tuple(row.tokens[: shapes.COMMON]) for row in rows}) == 1
    assert len({tuple(row.tokens[: shapes.COMMON + 2]) for row in rows}) > 1
    assert all(row.start == len(row.tokens) < row.limit for row in rows)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize(("name", "run"), [
    ("generate", lambda out: bench_generate.run_shape("mistral-7b", prompts=6, peer_prompts=3, out=out)),
    ("train", lambda out: bench_train.run_shape("mistral-7b", steps=1, out=out)),
])
def test_without_a_gpu_a_shape_runs_tiny_and_claims_nothing(tmp_path, name, run):
    run(tmp_path)
    lines = (tmp_path / f"{name}-mistral-7b.md").read_text().splitlines()
    rows = [line.split("|")[2].strip() for line in lines if line.startswith("| ")]
    assert set(rows[1:]) == {"not measured"}
    assert read_json(tmp_path / f"{name}-mistral-7b.json")["gpu"] is False


def test_a_figure_of_a_gpu_stands_in_its_own_column():
    results = {"machine": "H100", "shape": "mistral-7b", "gpu": True}
    table = shapes.shape_table(results, figures={"ms": "5.3"}, projected={"job": "7"})
    assert table.splitlines()[-2:] == ["| ms | 5.3 |  |", "| job | 7 |  |"]


def test_the_forced_lengths_are_generated():
    model = shapes.random_model("mistral-7b", "cpu")
    rows = shapes.random_rows(model.config.vocab_size, 3)
    wanted = [row.limit - row.start for row in rows]
    assert bench_generate.peer_rows(model, rows, 2) == sum(wanted)
    assert bench_generate.our_rows(model, rows) == sum(wanted)
    assert [len(row.tokens) for row in rows] == [row.limit for row in rows]


def test_weights_keys_and_values_of_mistral_7b():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(MistralConfig(**MISTRAL_7B))
    assert sum(p.numel() for p in model.parameters()) == 7_241_732_096  # as its card says: 7.24B
    assert shapes.weights_of(model) == 7_241_732_096 - 32000 * 4096


def test_the_memory_formula_on_a_shape_that_can_be_counted_by_hand():
    terms = memory_terms(MistralConfig(**TINY), ["q_proj"], 16)
    layer = 64 * (64 + 32 + 32 + 64) + 3 * 64 * 128 + 2 * 64  # attention, MLP, two norms
    assert terms["weights"] == 2 * (2 * layer + 2 * 512 * 64 + 64)
    assert terms["adapter"] == 16 * 2 * 8 * (64 + 64)
    assert terms["keys and values a token"] == 2 * 2 * 2 * 32  # layers, keys and values, bytes, 2 heads of 16
    assert 0 < terms["activations a token, checkpointing"] < terms["activations a token"] * 2


TABLES = {"generate": bench_generate.table, "train": bench_train.table, "memory": memory_table}


@pytest.mark.parametrize(("name", "table"), TABLES.items())
def test_a_table_in_docs_holds_what_its_figures_hold(name, table):
    assert table(read_json(ROOT / "docs" / f"{name}.json")) == (ROOT / "docs" / f"{name}.md").read_text()


def test_distinct_counts_what_prompts_share_once():
    assert bench_generate.distinct([[1, 2, 3], [1, 2, 4, 5], [7]]) == 3 + 2 + 1
    assert bench_generate.distinct([[1, 2], [1, 2]]) == 2


def test_the_limit_of_decoding_on_two_rows_counted_by_hand():
    """Rows of 10 and 20 prompt tokens make 3 and 2: a step of both with 11 + 21 keys, then one with 12."""
    limit = bench_generate.decode_limit
    assert limit([(10, 3), (20, 2)], row=1.0, weights=0.5, key_values=0.01) == pytest.approx(2 + 1)
    assert limit([(10, 3), (20, 2)], row=1.0, weights=1.5, key_values=0.1) == pytest.approx(4.7 + 2.7)
    assert limit([(10, 1)], row=1.0, weights=1.0, key_values=1.0) == 0  # its only token comes with the prompt


def test_one_question_of_every_passage():
    rows = [Example(str(i), f"q{i}", "a", context=f"c{i // 3}", unanswerable=i == 0) for i in range(9)]
    assert [row.id for row in bench_generate.one_a_passage(rows)] == ["1", "3", "6"]


def test_generation_beside_transformers_gives_the_same_answers(tiny, tmp_path):
    """The model with windows gets a quarter of the tokens."""
    sizes = ["--reading=4", "--reading-tokens=12", "--rounds=1", "--windowed=tiny"]
    script("generate", f"--model={tiny}", *sizes, f"--out={tmp_path}")
    results = read_json(tmp_path / "generate.json")
    for name, case in results["workloads"].items():
        tokens = 3 if name.startswith("Gemma") else 12
        assert case["prompts"] == 4 and case["generated"] == 4 * tokens
        assert case["answers that differ"][bench_generate.PEER] == 0
    names = [name.removeprefix("Gemma 3's shape: ") for name in results["workloads"]]
    assert len(names) == 4 and names[:2] == names[2:]
    text = (tmp_path / "generate.md").read_text()
    assert text == bench_generate.table(results)
    assert "Gemma 3's shape: random weights, 6 layers, 1 of them full, the others with a window of 32 tokens" in text


def test_gemma_3s_shape_is_that_of_its_card():
    """google/gemma-3-270m: 100 million weights in its layers, 168 million in an embedding of 262,144 tokens."""
    with torch.device("meta"):
        model = shapes.windowed_model("gemma-3", 262144, 1, torch.float32, "meta")
    assert round(shapes.weights_of(model) / 1e6) == 100
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == 268
    assert model.config.layer_types.count("sliding_attention") == 15


def test_training_beside_peft(tiny, tmp_path):
    """The script from end to end. What is not installed is skipped by name."""
    script("train", f"--model={tiny}", "--steps=1", "--rounds=1", "--targets=q,v", f"--out={tmp_path}")
    results = read_json(tmp_path / "train.json")
    assert {"ours", "ours, prefix shared", "peft, plain loop"} <= set(results["cases"]["q,v"])
    assert set(results["cases"]["q,v"]) | set(results["skipped"]) == set(bench_train.SIDES)
