"""Two processes under torchrun (gloo): the files and weights of one, and a rank that dies."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import s3ft
from support.files import RowFile, read_jsonl, write_jsonl

ROOT = Path(__file__).parent.parent
QUESTIONS = [{"id": f"q{i}", "question": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(12)]


@pytest.fixture
def flags(tiny, tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", QUESTIONS)
    for run in ("one", "two"):
        write_jsonl(tmp_path / run / "predictions.jsonl",
                    [{"id": row["id"], "response": row["answer"]} for row in QUESTIONS[:5]])
    return ["--task=custom", "--judge=numeric", "--method=s3ft", f"--model={tiny}", "--max-new-tokens=6", "--steps=4",
            "--eval-every=2", "--lr=0.01", "--dropout=0", "--device=cpu", "--micro-batch=3",
            *(f"--{split}-file={tmp_path / 'rows.jsonl'}" for split in ("train", "val", "test"))]


def torchrun(script: str, *flags) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script, *flags]
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen) -> str:
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return output


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_two_processes_end_with_the_files_and_weights_of_one(flags, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    s3ft.main([*flags, f"--out={one}"])
    output = finish(torchrun("s3ft.py", *flags, f"--out={two}"))
    assert output.count("s3ft: 12 rows") == 1  # only rank 0 speaks
    assert files(one) == files(two)
    for name in ("predictions.jsonl", "predictions.judged.jsonl", "paraphrases.jsonl", "s3ft/train.jsonl"):
        assert (one / name).read_bytes() == (two / name).read_bytes()
    for alone, both in zip(*(read_jsonl(run / "s3ft" / "log.jsonl") for run in (one, two)), strict=True):
        assert both == pytest.approx(alone, abs=1e-5)
    weights, shared = (load_file(run / "s3ft" / "adapter_model.safetensors") for run in (one, two))
    for name, weight in weights.items():
        torch.testing.assert_close(shared[name], weight, atol=1e-5, rtol=0)

    finish(torchrun("s3ft.py", *flags, "--method=sft", f"--out={two}"))  # nothing to generate: no rank waits in vain
    output = finish(torchrun("evaluate.py", "--device=cpu", f"--out={two}"))
    assert output.count("## In-domain accuracy") == 1
    assert [row["id"] for row in read_jsonl(two / "s3ft" / "test.jsonl")] == [row["id"] for row in QUESTIONS]


def test_a_killed_rank_ends_the_run_and_the_rerun_goes_on(flags, tmp_path):
    out = tmp_path / "two"
    process = torchrun("s3ft.py", *flags, f"--out={out}", "--steps=120", "--eval-every=2")
    deadline = time.monotonic() + 120
    while not (out / "s3ft" / "checkpoint.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0 and "SIGKILL" in errors
    before = {name: (out / name).read_bytes() for name in ("predictions.jsonl", "s3ft/train.jsonl")}
    finish(torchrun("s3ft.py", *flags, f"--out={out}", "--steps=120", "--eval-every=2"))
    assert before == {name: (out / name).read_bytes() for name in before}
    steps = [row["step"] for row in read_jsonl(out / "s3ft" / "log.jsonl") if "loss" in row]
    assert steps == list(range(1, 121)) and not (out / "s3ft" / "checkpoint.pt").exists()


def ids(rows) -> list[str]:
    return [row["id"] for row in rows]


def test_rows_are_put_in_order_where_a_run_died_before_it(tmp_path):
    """All rows were made, but the file stands as they finished, and a part still lies beside it."""
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, [{"id": "b"}, {"id": "a"}])
    assert list(RowFile(path).finish("ab")) == ids(read_jsonl(path)) == ["a", "b"]
    write_jsonl(tmp_path / "rows.rank1.jsonl", [{"id": "0"}])
    RowFile(path).finish("0ab")
    assert ids(read_jsonl(path)) == ["0", "a", "b"] and len(list(tmp_path.iterdir())) == 1


def test_rows_of_ranks_that_died_are_taken_over(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, [{"id": "a"}])
    write_jsonl(tmp_path / "rows.rank0.jsonl", [{"id": "c"}])
    (tmp_path / "rows.rank1.jsonl").write_text('{"id": "a"}\n{"id": "b"}\n{"id": "d')  # written already; new; torn
    write_jsonl(tmp_path / "rows.judged.rank0.jsonl", [{"id": "not ours"}])
    file = RowFile(path)
    assert list(file.rows) == ["a", "c", "b"] and file.missing("abcd") == ["d"]
    file.append({"id": "d"})
    rows = file.finish("abcd")
    assert list(rows) == list("abcd") and read_jsonl(path) == list(rows.values())
    assert {file.name for file in tmp_path.iterdir()} == {"rows.jsonl", "rows.judged.rank0.jsonl"}
