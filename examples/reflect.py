"""Selective Reflection-Tuning (Li et al., 2402.10110): a teacher rewrites rows, the student's scores select.

    python -m examples.reflect --task T --teacher M --out RUN      M: a name, a folder or a server's URL
    python -m examples.reflect --score FILE --model M --out F      both scores of any rows

Other flags are as s3ft.py has them. This is a method in a file of its own: it registers itself in
s3ft.METHODS and then calls s3ft.main. The student is the base model, and so is the teacher where --teacher
names no other. The scores are in ifd.py.

1. Phase 1. The teacher criticises a pair (x, y) and writes a new instruction with a new answer. They stay if
   and only if their IFD is higher: the student then needs the instruction more to see the answer coming.
2. Phase 2. The teacher writes a better answer to what phase 1 left. It stays if and only if its r-IFD is
   lower: the instruction is then easier to guess from it.
3. Selection. D' gets the rows whose answer phase 2 replaced and whose two scores are below 1 (--max-ifd,
   --max-r-ifd). With --top K only the K rows of them with the highest IFD. The others are dropped.

The run folder keeps the teacher's replies (reflect_instructions.jsonl and reflect_responses.jsonl, with a
.retry.jsonl each), so that nothing is generated twice. The method's own folder gets reflect.jsonl, which has
every row, dropped or not, with its phases and scores, and note.md, which the report shows: the share of rows
that were kept, and histograms of both scores.

Covered: any task. A row with tests (code) keeps its question and skips phase 1, since the tests would not fit
another one. The teacher is shown them. Not covered: a check of the new answers by the task's judge where the
question is a new one, since there is no gold for it. Where the question stayed, the judge is asked for the
note only. It selects nothing.

Where we deviate from the authors' code, or they are silent:
1. The teacher is any chat model, which decodes greedily. Theirs is gpt-3.5-turbo at temperature 0, which goes
   in as --teacher https://api.openai.com/v1#gpt-3.5-turbo. The prompts are our words.
2. x in IFD is the user turn that training will show (the task's train prompt around the question). x in
   r-IFD is the question.
3. Where a field is missing, the teacher is asked once more, with a reminder. Where one is empty, "N/A" or the
   placeholder of the prompt, the pair stays as it is. So a new instruction never meets the old answer.
4. The authors train on fewer than 1,000 rows at best, and say "top" without a rule that we could find. Ours
   is the highest IFD.
5. A rewrite that does not fit the student's context is rejected. Nothing scores 0 because it could not be
   scored.
"""

import argparse
import functools
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import s3ft
from answers import judge_answers, other_model, respond
from data import Example, fill, prompt
from engine.decoding import Limits
from engine.server import served_name
from examples.ifd import ScoredPair, Scores, as_instruction, histograms, score, score_all, score_command
from results.config import plain_name
from support.cli import InputError, exit_cleanly, one_line_error, positive_float, positive_int
from support.files import read_json, write_json, write_jsonl, write_text

Pairs = dict[str, tuple[Example, str]]  # id -> (x, y)


@dataclass(frozen=True)
class Settings:
    """What this method takes from the command line, beside all that every method takes."""

    teacher: str | None = None  # a name, folder or URL#NAME. None: the base model is its own teacher
    trust_remote_code: bool = False  # of the teacher, as of the model
    name: str = "reflect"  # the method's folder in the run folder
    max_ifd: float = 1.0  # a row is kept if its IFD is below this ...
    max_r_ifd: float = 1.0  # ... and its r-IFD below this
    top: int | None = None  # so many rows at most, those with the highest IFD

    def recorded(self) -> dict:
        """Those that a run which goes on must have again. A served teacher may move to another address."""
        teacher = self.teacher and (served_name(self.teacher) or self.teacher)
        return {"teacher": teacher, "max_ifd": self.max_ifd, "max_r_ifd": self.max_r_ifd,
                "top": self.top}


SETTINGS_FILE = "reflect_settings.json"  # in the method's folder


# --------------------------------------------------------------------------------------- the method


def reflect(D, base, settings=Settings()):
    """Selective Reflection-Tuning: yields (x with its new question, its new answer, "reflection")."""
    if base.model is None:
        return  # a rehearsal (results/preview.py): what is asked depends on the teacher's replies
    folder = base.run / settings.name
    teacher = Teacher(base, settings)
    write_json(folder / SETTINGS_FILE, settings.recorded())
    pairs = {x.id: (x, base.gold(x)) for x in D}
    scores = score_all(base.model, base.tokenizer, scored_pairs(base, pairs), "reflect", "original/scores")
    trace = {x.id: new_trace(x, base.gold(x), scores[x.id]) for x in D}

    # Phase 1: a new question with an answer of its own, if the student needs it more than the old one.
    proposed = teacher.rewrite_pairs(pairs)
    new_scores = score(base.model, base.tokenizer, scored_pairs(base, proposed), "phase 1/scores")
    for id in proposed:
        better = id in new_scores and new_scores[id]["ifd"] > scores[id]["ifd"]  # IFD(x', y') > IFD(x, y)
        record(trace[id], "phase_1", new_scores.get(id), better)
        if better:
            pairs[id], scores[id] = proposed[id], new_scores[id]

    # Phase 2: a new answer to what phase 1 left, if the question is easier to guess from it.
    proposed = teacher.rewrite_answers(pairs)
    teacher.release()
    new_scores = score(base.model, base.tokenizer, scored_pairs(base, proposed), "phase 2/scores")
    for id in proposed:
        better = id in new_scores and new_scores[id]["r_ifd"] < scores[id]["r_ifd"]  # r-IFD of y'' and of y'
        record(trace[id], "phase_2", new_scores.get(id), better)
        if better:
            pairs[id], scores[id] = proposed[id], new_scores[id]

    # Selection: the rows with a new answer, if neither score says that the pair does not belong together.
    improved = {id: scores[id] for id, row in trace.items() if row["phase_2"] == "accepted"}
    selected = select(improved, settings)
    for id in selected:
        trace[id]["emitted"] = True

    judge_old_questions(base, pairs, trace, folder)
    write_trace(pairs, trace, folder)
    for id in selected:
        yield *pairs[id], "reflection"


def select(scores: Scores, settings: Settings) -> list[str]:
    """The ids of the rows to train on, in the given order: both scores are low enough.

    With `top`, those of them with the highest IFD, where the student needs the instruction most.
    """
    fitting = []
    for id, found in scores.items():
        if found["ifd"] < settings.max_ifd and found["r_ifd"] < settings.max_r_ifd:
            fitting.append(id)
    ranked = sorted(fitting, key=lambda id: -scores[id]["ifd"])
    chosen = set(ranked[: settings.top])
    return [id for id in fitting if id in chosen]


def scored_pairs(base, pairs: Pairs) -> dict[str, ScoredPair]:
    """The pairs as they are scored: the user turn is the one that training shows."""
    return {id: ScoredPair(prompt(base.task.train, x), x.question, y) for id, (x, y) in pairs.items()}


def new_trace(x: Example, gold: str, scores: dict[str, float]) -> dict:
    """A row of reflect.jsonl before the phases."""
    return {
        "id": x.id,
        "question": x.question,
        "response": gold,
        "gold": gold,
        "phase_1": "skipped: the row has tests" if x.tests else "no rewrite",
        "phase_2": "no rewrite",
        "emitted": False,
        "judged": None,
        "scores": {"original": scores, "phase_1": None, "phase_2": None},
    }


def record(row: dict, phase: str, scores: dict[str, float] | None, better: bool) -> None:
    """Note in a trace row what became of a rewrite. It has no scores where it does not fit the context."""
    row["scores"][phase] = scores
    if scores is None:
        row[phase] = "too long"
    elif better:
        row[phase] = "accepted"
    else:
        row[phase] = "rejected"


def judge_old_questions(base, pairs: Pairs, trace: dict[str, dict], folder: Path) -> None:
    """Note the judge's verdict on new answers to old questions. It selects nothing.

    A new question has no verdict, nor has one whose verdict could not be read.
    """
    checked = []
    for id, row in trace.items():
        if row["emitted"] and row["phase_1"] != "accepted":
            checked.append(pairs[id])
    verdicts = judge_answers(base.judge, base.task, checked, folder / "reflect.judged.jsonl")
    for id, accepted in verdicts.items():
        trace[id]["judged"] = accepted


def write_trace(pairs: Pairs, trace: dict[str, dict], folder: Path) -> None:
    """reflect.jsonl has every row with its last question and answer, note.md what came of them all."""
    for id, (x, y) in pairs.items():
        trace[id] |= {"question": x.question, "response": y}
    write_jsonl(folder / "reflect.jsonl", trace.values())
    rows = list(trace.values())
    write_text(folder / "note.md", f"{note(rows)}\n\n{histograms(rows)}\n")


def note(trace: list[dict]) -> str:
    """What the method kept, and what of it nobody checked."""
    phase_1 = [row["phase_1"] for row in trace]
    phase_2 = [row["phase_2"] for row in trace]
    new_questions, new_answers = phase_1.count("accepted"), phase_2.count("accepted")
    emitted = [row for row in trace if row["emitted"]]
    old_question = [row for row in emitted if row["phase_1"] != "accepted"]
    right = [row["judged"] for row in old_question].count(True)
    share = 100 * len(emitted) / len(trace)
    return (
        f"Selective Reflection-Tuning kept {len(emitted)} of {len(trace)} rows, {share:.1f} % (new question "
        f"taken: {new_questions}, new answer taken: {new_answers}). "
        f"Not checked: {len(emitted) - len(old_question)} with a new question, for which there is no gold. "
        f"Checked, without effect: of the {len(old_question)} with their own question the judge accepts "
        f"{right}."
    )


# --------------------------------------------------------------------------------------- the teacher


REWRITE_BOTH = """\
Below are an instruction and an answer to it. Your task is to make both better.

### Instruction
{{instruction}}

### Answer
{{answer}}

1. Criticise the instruction: how complex is its topic, how detailed is it, how much knowledge does it take, \
is it ambiguous, does it take reasoning?
2. Criticise the answer: is it helpful, relevant, accurate, detailed?
3. Write a better instruction on the same subject that can be answered as it stands; a context, if there is \
one, stays as it is and is not repeated. Then write a full answer to it. If the answer above ends in a fixed \
form, keep that form.

Write the result of step 3 exactly so:
[New Instruction] the new instruction [End]
[New Answer] the new answer [End]"""
REWRITE_ANSWER = """\
Below are an instruction and an answer to it. Your task is to make the answer better.

### Instruction
{{instruction}}

### Answer
{{answer}}

1. Criticise the answer: is it helpful, relevant, accurate, detailed?
2. Write a better answer to the same instruction. If the answer above ends in a fixed form, keep that form.

Write the result of step 2 exactly so:
[Better Answer] the better answer [End]"""
REMINDER = "\n\nYour last reply was not in this form. Leave out the criticism and write only {{tags}}."
TAGS = {REWRITE_BOTH: ("New Instruction", "New Answer"), REWRITE_ANSWER: ("Better Answer",)}
ANY_TAG = r"\[(?:New Instruction|New Answer|Better Answer|End)\]"
LEFT_OUT = {"", "n/a", "na", "none", "the new instruction", "the new answer", "the better answer"}
REPLY_TOKENS = 1024  # of a teacher's reply, at most


def parse_fields(reply: str, tags: tuple[str, ...]) -> list[str] | None:
    """The texts between [Tag] and [End], the last of each tag. None: one is missing. []: one says nothing."""
    texts = []
    for tag in tags:
        found = re.findall(rf"\[{tag}\]((?:(?!{ANY_TAG}).)*)\[End\]", reply, re.DOTALL | re.IGNORECASE)
        if not found:
            return None
        texts.append(found[-1].strip())

    for text in texts:
        if text.lower().strip("[]<>{}().\"' ") in LEFT_OUT:
            return []
    return texts


class Teacher:
    """Who rewrites: the base model (from its server with --engine), or another one, here or behind a server.

    The run folder keeps the replies. InputError: those that it has were made by another teacher.
    """

    def __init__(self, base, settings: Settings):
        self.base = base
        self.responder = base.responder
        name = {"teacher": settings.recorded()["teacher"] or "the base model"}
        path = base.run / "reflect_teacher.json"
        if not path.exists():
            write_json(path, name)
        elif read_json(path) != name:
            before = read_json(path)["teacher"]
            raise InputError(f"--teacher: the rewrites in {base.run} were made by {before}, not by "
                             f"{name['teacher']}: give that one again, or another --out")
        if settings.teacher:
            self.responder = other_model(settings.teacher, "--teacher", **loading_of_teacher(base, settings))

    def rewrite_pairs(self, pairs: Pairs) -> Pairs:
        """A new question with a new answer. Rows with tests are left out: tests belong to their question."""
        without_tests = {id: (x, y) for id, (x, y) in pairs.items() if not x.tests}
        texts = self._rewrite(without_tests, REWRITE_BOTH, "reflect_instructions")
        rewritten = {}
        for id, (question, answer) in texts.items():
            x, _ = pairs[id]
            rewritten[id] = (replace(x, question=question), answer)
        return rewritten

    def rewrite_answers(self, pairs: Pairs) -> Pairs:
        """A new answer to the same question."""
        texts = self._rewrite(pairs, REWRITE_ANSWER, "reflect_responses")
        rewritten = {}
        for id, (answer,) in texts.items():
            x, _ = pairs[id]
            rewritten[id] = (x, answer)
        return rewritten

    def _rewrite(self, pairs: Pairs, template: str, kind: str) -> dict[str, list[str]]:
        """id -> the new texts, for every pair that the teacher rewrote."""
        # 1. Ask for all.
        tags = TAGS[template]
        prompts = {}
        for id, (x, y) in pairs.items():
            prompts[id] = fill(template, instruction=as_instruction(x), answer=y)
        texts = {id: parse_fields(reply, tags) for id, reply in self._ask(prompts, kind).items()}

        # 2. Ask once more where the reply could not be read.
        reminder = fill(REMINDER, tags=" and ".join(f"[{tag}] ... [End]" for tag in tags))
        again = {id: prompts[id] + reminder for id in texts if texts[id] is None}
        if again:
            for id, reply in self._ask(again, f"{kind}.retry").items():
                texts[id] = parse_fields(reply, tags)
        return {id: found for id, found in texts.items() if found}

    def _ask(self, prompts: dict[str, str], kind: str) -> dict[str, str]:
        """The replies, id -> text. Those that the run folder has are not made again."""
        rows = respond(self.responder, prompts, self.base.run / f"{kind}.jsonl", Limits(REPLY_TOKENS))
        return {id: row["response"] for id, row in rows.items()}

    def release(self) -> None:
        """Give back the memory of another teacher: its last reply is there."""
        self.responder.release()


def loading_of_teacher(base, settings: Settings) -> dict:
    """What load_model takes for another teacher: the student's device, precision and template settings."""
    path = base.run / "config.json"
    shared = read_json(path) if path.exists() else {}
    return {
        "device": str(base.model.device),
        "dtype": str(base.model.dtype).removeprefix("torch."),
        "trust_remote_code": settings.trust_remote_code,
        "chat_template_kwargs": shared.get("chat_template_kwargs"),
        "date": shared.get("date"),
    }


# --------------------------------------------------------------------------------------- the commands


def run_command(argv: list[str]) -> None:
    """A run of s3ft.py with one more method. Its own flags are read here, and all others are passed on."""
    parser = argparse.ArgumentParser(usage="python -m examples.reflect --task T --out RUN [--teacher M] ...",
                                     description="Selective Reflection-Tuning. Its flags beside s3ft.py's:",
                                     allow_abbrev=False, add_help=False)
    parser.error = one_line_error
    parser.add_argument("--teacher", metavar="M", help="who rewrites: a name, folder or URL (the base model)")
    parser.add_argument("--max-ifd", type=positive_float, default=1.0, metavar="X",
                        help="keep rows with an IFD below this (%(default)s)")
    parser.add_argument("--max-r-ifd", type=positive_float, default=1.0, metavar="X",
                        help="keep rows with an r-IFD below this (%(default)s)")
    parser.add_argument("--top", type=positive_int, metavar="K", help="of them, the K with the highest IFD")
    parser.add_argument("--method", choices=("reflect",), default="reflect", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--name", default="reflect", help=argparse.SUPPRESS)
    parser.add_argument("--trust-remote-code", action="store_true", help=argparse.SUPPRESS)
    if "-h" in argv or "--help" in argv:
        parser.print_help()
    own, rest = parser.parse_known_args(argv)

    path = own.out / own.name / SETTINGS_FILE if own.out else None
    before = read_json(path) if path and path.exists() else {}
    teacher = plain_name(own.teacher, known=before.get("teacher") or "")
    settings = Settings(teacher, own.trust_remote_code, own.name, own.max_ifd, own.max_r_ifd, own.top)
    passed_on = ["--method=reflect", f"--name={own.name}"]
    if own.out:
        refuse_other_settings(path, before, settings)
        passed_on.append(f"--out={own.out}")
    if own.trust_remote_code:
        passed_on.append("--trust-remote-code")
    s3ft.METHODS["reflect"] = functools.partial(reflect, settings=settings)
    s3ft.main([*passed_on, *rest])


def refuse_other_settings(path: Path, before: dict, settings: Settings) -> None:
    """InputError: the run that goes on here was begun with another setting. (It may have its D' already.)

    `before` is what `path` says, {} where the run has not begun.
    """
    for name, value in settings.recorded().items():
        if before and before.get(name) != value:
            flag = "--" + name.replace("_", "-")
            raise InputError(f"{path.parent} was begun with {flag} {before.get(name)}, not {value}: give the "
                             "same again, or another --name")


def main(argv=None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if any(flag.partition("=")[0] == "--score" for flag in argv):
        score_command(argv)
    else:
        run_command(argv)


if __name__ == "__main__":
    exit_cleanly(main)
