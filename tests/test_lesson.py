"""The lesson: its cells run in order, its exercises wait for an answer and take the right one. No output is committed."""

import json
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

from support.files import write_jsonl
from tasks import load_task

LESSON = ROOT / "examples" / "s3ft_in_an_hour.ipynb"
# Cells as a kernel runs them, in one namespace, without jupyter.
RUN = """
import json, sys
for source in json.load(open(sys.argv[1])):
    exec(compile(source, "cell", "exec"), globals())
"""
WRONG = "print('the wrong answer')\ndef lora_size(outputs, inputs, r):\n    return r * inputs\n"


def cells(kind: str) -> list[str]:
    found = json.loads(LESSON.read_text())["cells"]
    return ["".join(cell["source"]) for cell in found if cell["cell_type"] == kind]


def solutions() -> list[str]:
    """The code that is folded away below each exercise."""
    return re.findall(r"<summary>Solution</summary>\n\n```python\n(.*?)```", "\n".join(cells("markdown")), re.DOTALL)


def answer_cells() -> list[int]:
    """Which code cells wait for an answer. The next one checks it."""
    return [i for i, source in enumerate(cells("code")) if source.endswith("    ...")]


def put_answers(folder):
    """Answers made elsewhere, as a random model has no accepted ones: the first four rows take all three branches."""
    _, (rows, _, _) = load_task("reading", "")
    ludo = next(x for x in rows if x.id == "ludo-the-red-panda-2")
    first, second, third, fourth = rows[:4]
    right = [{"id": x.id, "response": f"It is {x.answer}."} for x in (first, second, fourth, ludo)]
    wrong = [{"id": x.id, "response": "Nobody can say."} for x in (second, third, ludo)]
    folder.mkdir()
    write_jsonl(folder / "predictions.jsonl", [right[0], *wrong, right[2]])
    write_jsonl(folder / "paraphrases.jsonl", [right[1], right[3], wrong[1]])


def test_no_output_is_committed():
    notebook = json.loads(LESSON.read_text())
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)


def test_the_lesson_runs_and_its_checks_take_the_solutions(tiny, tmp_path):
    """First all cells as they are committed, then the exercises solved, and at last one answered wrongly."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    code, places = cells("code"), answer_cells()
    assert len(places) == len(solutions()) == 6
    script = list(code)
    for place, solution in zip(places, solutions(), strict=True):
        assert solution.partition("\n")[0] == code[place].partition("\n")[0]  # the same signature
        script += [solution, code[place + 1]]
    script += [WRONG, code[places[3] + 1]]

    put_answers(tmp_path / "run")
    path = tmp_path / "cells.json"
    path.write_text(json.dumps(script))
    small = {"S3FT_LESSON_ROWS": "4", "S3FT_LESSON_MODEL": str(tiny), "S3FT_LESSON_OUT": str(tmp_path / "run")}
    run = subprocess.run([sys.executable, "-c", RUN, str(path)], cwd=LESSON.parent, capture_output=True, text=True,
                         env=os.environ | small | {"MPLBACKEND": "agg"})
    done, _, after_wrong = run.stdout.partition("the wrong answer")
    assert all(done.count(f"exercise {n}: not yet") == 1 for n in (1, 2, 4, 5, 6)), run.stderr
    assert all(f"exercise {n}: right" in done for n in range(1, 7)), run.stderr
    assert "right" not in after_wrong and "AssertionError: exercise 4" in run.stderr
    for source in ("prediction", "paraphrase", "gold"):  # section 2 shows a row of each
        assert f"\n{source:11} " in done
