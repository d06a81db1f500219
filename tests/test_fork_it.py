"""The diffs under "Fork it" in the README, applied to a copy of the project and run."""

import json
import re
import shutil
import subprocess
import sys

from conftest import ROOT

from support.files import write_jsonl

FILES = ("s3ft.py", "judges.py", "tasks/svamp.py", "tasks/__init__.py", "tasks/reading.py")  # in the README's order
RUN = """
import evaluate, s3ft, tasks
s3ft.main(["--task=svamp", "--judge=verbatim", "--method=shortest", "--model=" + {model!r}, "--data=.", "--limit=2", "--steps=1",
           "--max-new-tokens=4", "--device=cpu", "--out=run"])
reading, (rows, _, _) = tasks.load_task("reading", ".")
print("metrics", evaluate.metric_means(reading, [(rows[0], "It is red."), (rows[1], "Red")]))
"""


def readme_diffs() -> list[list[str]]:
    """The lines of every block of a diff under "Fork it"."""
    section = (ROOT / "README.md").read_text().partition("## Fork it")[2].partition("\n## ")[0]
    return [block.splitlines(keepends=True) for block in re.findall(r"```diff\n(.*?)```", section, re.DOTALL)]


def apply(diff: list[str], path) -> None:
    """Replace what the lines without + say, which must be there exactly once, by what those without - say."""
    old = new = ""
    for line in diff:
        mark = " " if line == "\n" else line[0]  # an editor drops the blank before an empty line
        content = line if line == "\n" else line[1:]
        if mark != "+":
            old += content
        if mark != "-":
            new += content
    if not old:
        path.write_text(new)
        return
    text = path.read_text()
    assert text.count(old) == 1, f"{path.name} does not hold once: {old}"
    path.write_text(text.replace(old, new))


def test_the_diffs_of_the_readme_run(tiny, tmp_path):
    copy = tmp_path / "fork"
    unwanted = shutil.ignore_patterns(".*", "models", "data", "runs", "docs", "tests", "bench", "__pycache__")
    shutil.copytree(ROOT, copy, ignore=unwanted)
    for diff, name in zip(readme_diffs(), FILES, strict=True):
        apply(diff, copy / name)
    rows = [{"question": f"What is {i} and 1?", "answer": i + 1} for i in range(203)]
    write_jsonl(copy / "svamp.jsonl", rows)

    run = subprocess.run([sys.executable, "-c", RUN.format(model=str(tiny))], cwd=copy, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    config = json.loads((copy / "run" / "config.json").read_text())
    assert (config["task"], config["judge"]) == ("svamp", "verbatim")
    assert (copy / "run" / "shortest" / "adapter_model.safetensors").exists()
    assert "metrics {'words': 2.0}" in run.stdout
