"""config.json: what a run folder, and each method in it, was asked for.

What is asked when a run goes on is compared with it.
A run can be moved and copied. So files and models are told by digests, and their paths may change.
"""

from collections.abc import Collection
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path

from engine.server import is_url, served_name, with_name
from results.checks import check_config
from support.cli import InputError
from support.files import file_digests, read_json, write_json
from train import AdapterSettings, TrainingSettings


@dataclass(frozen=True)
class Comparison:
    """What all methods of one run folder share, so that they can be compared."""

    task: str
    model: str  # a Hugging Face name or a folder
    dtype: str = "float32"  # of the weights
    judge: str | None = None  # None: the task's own
    limit: int | None = None  # only the first rows of every split
    max_new_tokens: int | None = None  # None: the task's own
    files: list[str] | None = None  # of a custom task: train, validation, test
    contents: list[str] | None = None  # a digest of each file that a person brought
    question_field: str | None = None  # of a custom task's rows; None: the usual names are tried
    answer_field: str | None = None
    prompt: str | None = None  # a built-in prompt for a custom task
    prompt_file: str | None = None  # a person's own prompts
    numpy: bool = False  # programs that the code judge runs may import it
    keep_unfinished: bool = False  # responses that the length limit cut off are judged like any other
    chat_template_kwargs: dict | None = None
    date: str | None = None  # of the day on which the run was begun: some templates show it
    weights: str | None = None  # a digest of the model's
    engine: str | None = None  # URL#NAME of the served model that answers; None: this process does
    judge_model: str | None = None  # that the LLM judge asks; None: the base model
    judge_weights: str | None = None  # a digest of its weights, or of a served one's name


@dataclass(frozen=True)
class Machine:
    """Where a run is made. All of this may differ when it goes on."""

    data: str = "data"
    device: str = "cpu"
    trust_remote_code: bool = False
    sandbox: str = "best"
    gradient_checkpointing: bool = False


@dataclass(frozen=True)
class Job:
    """One method, from its training data to its adapter."""

    method: str
    folder: Path  # of the method, in the run folder
    shared: Comparison  # with the other methods of the run folder
    adapter: AdapterSettings
    training: TrainingSettings
    machine: Machine

    @property
    def run(self) -> Path:
        """The run folder, which all methods of a comparison share."""
        return self.folder.parent

    def recorded(self) -> dict:
        """What the method's config.json says. The size of micro-batches changes no result."""
        settings = {"method": self.method} | asdict(self.adapter) | asdict(self.training)
        return {name: value for name, value in settings.items() if name not in ("micro_batch", "bf16")}


def plain_name(model: str | None, known: str = "") -> str | None:
    """The same name for the same model: a folder without a trailing slash, a served one as URL#NAME.

    `known` is the NAME of a served one, where that is known already.
    """
    if model is None:
        return None
    if not model.strip():
        raise InputError("the name of a model is empty")
    if is_url(model):
        return with_name(model, known)
    return str(Path(model)) if Path(model).is_dir() else model


def loading_of(shared: dict, machine: Machine) -> dict:
    """What load_model takes beside a name, from a run's settings."""
    found = {name: shared[name] for name in ("dtype", "chat_template_kwargs", "date")}
    return found | {"device": machine.device, "trust_remote_code": machine.trust_remote_code}


FLAGS = {"contents": "files with the digests", "files": "the files", "weights": "weights with the digest"}


def continued(job: Job) -> Job:
    """What is asked, with the date and the weights of the run that goes on.

    InputError: it was begun with something else.
    """
    shared = job.shared
    path = job.run / "config.json"
    if path.exists():
        before = read_settings(path, Comparison)
        kept = {name: before[name] for name in ("date", "weights", "judge_weights")}
        shared = replace(shared, **kept)
        may_move = ["files", "prompt_file"]
        if shared.weights:
            may_move.append("model")
        judges = before["judge_model"], shared.judge_model
        if shared.judge_weights and all(name and not is_url(name) for name in judges):
            may_move.append("judge_model")
        for name in ("engine", "judge_model"):
            if before[name] and served_name(before[name]) == served_name(getattr(shared, name) or "") != "":
                may_move.append(name)  # the same model on another machine
        refuse_changes(path, before, asdict(shared), may_move, "--out")

    path = job.folder / "config.json"
    if path.exists():
        before = read_settings(path, AdapterSettings) | read_settings(path, TrainingSettings)
        refuse_changes(path, {"method": job.method} | before, job.recorded(), (), "--name")
    return replace(job, shared=shared)


def begun_with(run: Path, setting: str) -> str | None:
    """A setting of a run that goes on. None: it has not begun. InputError: its config.json is damaged."""
    path = run / "config.json"
    if not path.exists():
        return None
    check_config(read_json(path), str(path))
    return read_settings(path, Comparison)[setting]


def served_name_begun_with(run: Path, setting: str) -> str:
    """NAME of the served model that a run has as its `engine` or `judge_model`, "" where it has none.

    So a run that goes on does not ask the server for it, which may list more models by now, or be gone.
    """
    return served_name(begun_with(run, setting) or "")


def read_settings(path: Path, kind: type) -> dict:
    """The settings in a config.json. One that is younger than the file has its default.

    InputError: one is missing.
    """
    found = read_json(path)
    if not isinstance(found, dict):
        raise InputError(f"{path}: expected a JSON object of settings; put it back, or take another --out")
    for field in fields(kind):
        if field.name in found:
            continue
        if field.default is MISSING:
            raise InputError(
                f"{path}: the setting {field.name!r} is missing; put it back, or take another --out")
        found[field.name] = field.default
    return found


def refuse_changes(path: Path, before: dict, asked: dict, may_change: Collection[str], flag: str) -> None:
    """InputError: a setting is not the one with which the run was begun."""
    for name, value in asked.items():
        value = list(value) if isinstance(value, tuple) else value  # as JSON has it
        if name not in may_change and before[name] != value:
            setting = FLAGS.get(name, f"--{name.replace('_', '-')}")
            raise InputError(f"{path.parent} was begun with {setting} {before[name]}, not {value}: give the "
                             f"same again, or another {flag}")


def refuse_other_weights(job: Job, weights: str) -> None:
    """InputError: the run was begun with other weights than those, whatever the model is called."""
    if job.shared.weights not in (None, weights):
        raise InputError(f"{job.run} was begun with other weights than those of --model {job.shared.model}: "
                         "give that model again, or another --out")


def refuse_another_judge(job: Job, weights: str | None) -> None:
    """InputError: the judge of the run has other weights than those."""
    if job.shared.judge_weights not in (None, weights):
        raise InputError(f"{job.run} was begun with other weights than those of --judge-model "
                         f"{job.shared.judge_model}: give that model again, or another --out")


def keep_config(job: Job, weights: str, judge_weights: str | None, made_by: str) -> None:
    """Write both config.json. InputError: the method's D' is there, and was made by something else.

    `weights` is a digest of the model's, `judge_weights` of the judge's where it is another model, and
    `made_by` one of the method, the prompts and the judge.
    """
    path = job.folder / "config.json"
    before = read_json(path).get("made_by") if path.exists() else None
    if before not in (None, made_by) and (job.folder / "train.jsonl").exists():
        raise InputError(f"{job.folder}: its train.jsonl was made by another method, prompt or judge than "
                         "now: take another --name, or remove that folder")
    shared = replace(job.shared, weights=weights, judge_weights=judge_weights)
    _write_if_other(job.run / "config.json", asdict(shared))
    _write_if_other(path, job.recorded() | {"made_by": made_by})


def keep_moved_paths(job: Job) -> None:
    """A finished run may have moved, with its files."""
    _write_if_other(job.run / "config.json", asdict(job.shared))


def _write_if_other(path: Path, settings: dict) -> None:
    if not path.exists() or read_json(path) != settings:
        write_json(path, settings)


def read_comparison(run: Path) -> Comparison:
    """What a run was asked for.

    InputError: the folder is no run's, or a custom task's files are not the same any more.
    """
    path = run / "config.json"
    if not path.exists():
        raise InputError(f"--out {run}: no config.json there; run s3ft.py with this --out first")
    settings = read_settings(path, Comparison)
    names = {field.name for field in fields(Comparison)}
    shared = Comparison(**{name: value for name, value in settings.items() if name in names})
    files = brought_by_a_person(shared.files, shared.prompt_file)
    if files and shared.contents and shared.contents != file_digests(files):  # an older run kept no digests
        raise InputError(f"--out {run}: {', '.join(files)}: not the rows that the run was begun with; put "
                         "those back, or train anew with another --out")
    return shared


def brought_by_a_person(files: list[str] | None, prompt_file: str | None) -> list[str]:
    """The files whose contents a run belongs to."""
    return [*(files or []), *([prompt_file] if prompt_file else [])]
