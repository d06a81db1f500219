"""A person's own files as a task: --task custom with three files, one for each split.

tasks/own_files.py says which files and rows are read. Here is how their prompts are chosen: by name
(--prompt), from a file of templates (--prompt-file), or by what the rows are.
"""

import json
import tomllib
from dataclasses import replace
from pathlib import Path

from data import PARAPHRASE_FRAME, SECTION, VARIABLE, Splits, Task
from support.cli import InputError
from tasks.mbpp import mbpp_gold
from tasks.own_files import OwnFile, read_own_file, read_text
from tasks.reading import READING
from tasks.rows import check_ids, shown, text_of

# -------------------------------------------------------------------------------- prompts

PLAIN = "{{#context}}{{context}}\n\n{{/context}}{{question}}"
READING_OR_PLAIN = "{{#context}}" + READING + "{{/context}}{{^context}}{{question}}{{/context}}"
CODE = PLAIN + """
Your code should pass these tests:
{{tests}}
Generate only the python code encapsulated between [[BEGIN]] and [[DONE]] tags. Do not generate any \
explanation."""  # as Fig. 4, for any number of tests

PROMPTS = {"plain": PLAIN, "reading": READING_OR_PLAIN, "code": CODE}  # of --prompt
TEMPLATES = ("predict", "train", "paraphrase")  # of --prompt-file
VARIABLES = ("question", "task", "context", "tests", "gold_response")  # that a template may show

CUSTOM_TASK = Task(
    None,
    judge="",
    predict=PLAIN,
    train=PLAIN,
    paraphrase=PARAPHRASE_FRAME % PLAIN,
    steps=1000,
    eval_every=100,
)


def load_custom_task(
    files: list[str],
    judge: str,
    *,
    question_field: str | None = None,
    answer_field: str | None = None,
    prompt: str | None = None,
    prompt_file: str | None = None,
) -> tuple[Task, Splits]:
    """The task and its (train, validation, test) rows. The task's `note` says in one line what was chosen.

    `prompt` is a name of PROMPTS, `prompt_file` a file of templates. Without both, rows with a context show
    it in front of their question, and only files that are reading comprehension by their format get its
    prompt. InputError: in one line, the file, the line, the field, and what to do.
    """
    # 1. The rows.
    found = [read_own_file(Path(path), judge, question_field, answer_field) for path in files]
    for path, file in zip(files, found, strict=True):
        check_ids(file.rows, str(path))
    train_file = found[0]

    # 2. The prompts.
    if prompt and prompt_file:
        raise InputError("--prompt and --prompt-file: give one of them")
    if prompt_file:
        templates = read_prompt_file(Path(prompt_file))
        chosen = prompt_file
    else:
        chosen = prompt or default_prompt(train_file, judge)
        templates = built_in_prompt(chosen)

    # 3. What goes with them.
    n = len(train_file.rows)
    with_context = sum(row.context != "" for row in train_file.rows)
    task = replace(CUSTOM_TASK, judge=judge, **templates)
    if "[[BEGIN]]" in task.predict and "[[DONE]]" in task.predict:
        task = replace(task, gold=mbpp_gold, stop="[[DONE]]")
    if chosen == "reading" and with_context == n:
        task = replace(task, max_new_tokens=64)

    note = f"custom: {train_file.shape}; {with_context} of {n} training rows have a context; prompt: {chosen}"
    if with_context and chosen == "plain":
        note += ", which shows it in front of the question (--prompt reading asks for answers from it only)"
    return replace(task, note=note), tuple(file.rows for file in found)


def default_prompt(file: OwnFile, judge: str) -> str:
    if judge == "code":
        return "code"
    return "reading" if file.is_reading else "plain"


def built_in_prompt(name: str) -> dict[str, str]:
    if name not in PROMPTS:
        known = ", ".join(PROMPTS)
        raise InputError(f"--prompt {name}: choose from {known}; your own templates go with --prompt-file")
    template = PROMPTS[name]
    return {"predict": template, "train": template, "paraphrase": PARAPHRASE_FRAME % template}


def read_prompt_file(path: Path) -> dict[str, str]:
    """The templates of a JSON or TOML file (by its name): predict, train, paraphrase.

    Without train it is as predict, without paraphrase it is PARAPHRASE_FRAME around predict. As TOML:

        predict = "Q: {{question}}"
        paraphrase = "Q: {{question}} A: {{gold_response}} The same in your own words:"
    """
    parse, kind = (tomllib.loads, "TOML") if path.suffix == ".toml" else (json.loads, "JSON")
    known = ", ".join(TEMPLATES)
    try:
        found = parse(read_text(path))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid {kind} ({error})") from None
    if not isinstance(found, dict):
        raise InputError(f"{path}: expected an object with the templates {known}, found {shown(found)}")
    for name in found:
        if name not in TEMPLATES:
            raise InputError(f"{path}: unknown template {name!r}: it may hold {known}")

    predict = text_of(found, "predict", str(path))
    templates = {"predict": predict, "train": predict, "paraphrase": PARAPHRASE_FRAME.replace("%s", predict)}
    templates |= found
    for name in TEMPLATES:
        check_template(text_of(templates, name, str(path)), name, f"{path}, {name}")
    return templates


def check_template(template: str, name: str, where: str) -> None:
    """InputError: it asks for what no row has, shows no question, or shows the gold too early."""
    known = ", ".join(map(braces, VARIABLES))
    shows = set(VARIABLE.findall(template))
    for variable in sorted(shows):
        if variable not in VARIABLES and not variable.startswith("testcase_"):
            raise InputError(f"{where}: no row has {braces(variable)}: use {known}")
    for mark in ("{{#", "{{^", "{{/"):
        if mark in SECTION.sub("", template):
            sections = "{{#context}}...{{/context}} and {{^context}}...{{/context}}"
            raise InputError(f"{where}: {mark} without its end: only {sections} are known")

    if not shows & {"question", "task"}:
        raise InputError(f"{where}: it never shows {braces('question')}: all rows would be asked the same")
    shows_gold = "gold_response" in shows
    if name == "paraphrase" and not shows_gold:
        raise InputError(f"{where}: it never shows {braces('gold_response')}, which is to be paraphrased")
    if name != "paraphrase" and shows_gold:
        raise InputError(f"{where}: it shows {braces('gold_response')}: the model would copy the answer")


def braces(variable: str) -> str:
    return "{{" + variable + "}}"
