"""What evaluate.py is asked for: its command line, read into plain values."""

import argparse
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

from engine.model import usable_device
from engine.server import with_name
from results.checks import check_config
from results.config import Machine, read_comparison, served_name_begun_with
from results.run_files import trained_methods
from support.cli import InputError, one_line_error, positive_int
from support.files import file_digests, read_json
from tasks import CUSTOM_FLAGS
from tasks.benchmarks import ZERO_SHOT, Scoring
from tasks.general import GENERATED, NAMES, SHOWS_SHOTS

OF_THE_OWN_TASK = ("files", "contents", "judge", "max_new_tokens", *CUSTOM_FLAGS)  # settings of a run


@dataclass(frozen=True)
class Evaluation:
    """What is asked of a run's models."""

    run: Path  # the folder that s3ft.py wrote
    machine: Machine = field(default_factory=Machine)  # where it is done
    task: str | None = None  # another task than the run's own
    test_file: str | None = None  # another test file of a run on a person's own files
    benchmarks: tuple[str, ...] = ()  # general ones (Table 4)
    scoring: Scoring = ZERO_SHOT  # how they are asked
    audit: int | None = None  # instead of all that: how many judged rows a person marks
    show: str | None = None  # instead of all that: the training row that is shown
    compare_judge: str | None = None  # instead of all that: the model that judges the same answers
    engine: str | None = None  # URL#NAME of a served model that answers the test rows

    @cached_property
    def elsewhere(self) -> str:
        """The name of the folders for other test rows than the run's own, "" for its own.

        That of a test file tells its contents: two files may be of one name.
        """
        if self.task:
            return f"on_{self.task}"
        if self.test_file:
            (contents,) = file_digests([self.test_file])
            return f"on_{Path(self.test_file).stem}-{contents[:8]}"
        return ""

    @property
    def out(self) -> Path:
        """Where the report is."""
        return self.run / self.elsewhere

    def folder(self, name: str) -> Path:
        """Where a model's answers are: with it, and apart from those to other test rows."""
        return self.run / name / self.elsewhere


@dataclass(frozen=True)
class Alone:
    """What is asked of a model that belongs to no run."""

    model: str  # a Hugging Face name or a folder
    adapter: Path | None  # in PEFT's format
    dtype: str | None  # None: the device's own
    out: Path  # for the scores
    machine: Machine
    benchmarks: tuple[str, ...]
    scoring: Scoring


def zero_shot_in_words(asked: Evaluation | Alone) -> str:
    """The benchmarks that --num-fewshot does not reach, "" where it reaches all."""
    others = [name for name in asked.benchmarks if name != SHOWS_SHOTS]
    if not asked.scoring.num_fewshot or not others:
        return ""
    return f"--num-fewshot {asked.scoring.num_fewshot} is for {SHOWS_SHOTS}; 0-shot: {', '.join(others)}"


def config_of(evaluation: Evaluation) -> dict:
    """The run's settings, with the other test rows that are asked for."""
    path = evaluation.run / "config.json"
    if path.exists():
        check_config(read_json(path), str(path))
    config = asdict(read_comparison(evaluation.run))
    if evaluation.task:
        others = {"trained_on": config["task"], "task": evaluation.task}
        return config | dict.fromkeys(OF_THE_OWN_TASK) | others
    if evaluation.test_file:
        if not config["files"]:
            raise InputError(
                f"--test-file: {evaluation.run} was trained on {config['task']}, which has its own rows")
        config["files"] = [*config["files"][:2], evaluation.test_file]
        config["trained_on"] = config["task"]
    return config


# ------------------------------------------------------------------------------ the command line


def read_command_line(argv=None) -> Evaluation | Alone:
    """InputError: the flags do not fit together."""
    args = parse(argv)
    return alone_from(args) if args.model else evaluation_from(args)


def parse(argv) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Evaluate a run folder: base model and every trained one.", allow_abbrev=False)
    parser.error = one_line_error
    parser.add_argument("--out", required=True, type=Path, help="the run folder that s3ft.py wrote")
    parser.add_argument("--data", default="data", help="where the data sets are (%(default)s)")
    parser.add_argument("--task", help="measure on this task's test rows instead of the run's own")
    parser.add_argument("--test-file", metavar="FILE",
                        help="measure on this test file instead of a custom run's own")
    parser.add_argument("--audit", type=positive_int, metavar="N",
                        help="draw N judged rows for a person to mark, or read them back")
    parser.add_argument("--show", metavar="ID", help="show a training row's way through the three branches")
    parser.add_argument("--compare-judge", metavar="M",
                        help="a model (name, folder or URL) judges the same answers: how often both agree")
    parser.add_argument("--engine", metavar="URL",
                        help="a server answers the test rows: of the base model, and of adapters it lists")
    general = parser.add_argument_group("general benchmarks (Table 4), as lm-evaluation-harness scores them")
    general.add_argument("--benchmarks", type=benchmark_names, metavar="LIST",
                         help=f"of {','.join(NAMES)}")
    general.add_argument("--model", help="score this model; --out is then a folder of its own, not a run's")
    general.add_argument("--adapter", type=Path, metavar="FOLDER",
                         help="with --model: an adapter in PEFT's format")
    general.add_argument("--dtype", choices=("bfloat16", "float32"),
                         help="with --model (default: bfloat16 on cuda, else float32)")
    general.add_argument("--limit", type=positive_int, metavar="N",
                         help="only N documents, the first ones (of MMLU: of each subject)")
    general.add_argument("--sampled", action="store_true",
                         help="with --limit: N at random, the same for every model")
    general.add_argument("--max-new-tokens", type=positive_int, metavar="N",
                         help="of an IFEval response, for a small machine (1280, the harness's)")
    general.add_argument("--num-fewshot", type=int, choices=range(6), default=0, metavar="K",
                         help="solved MMLU questions shown, 0 to 5 (%(default)s); others are asked 0-shot")
    general.add_argument("--apply-chat-template", action="store_true",
                         help="ask in the model's chat template")
    general.add_argument("--add-bos", action="store_true", help="put one BOS token in front")
    parser.add_argument("--device", help="cuda, mps or cpu (default: the best there is)")
    parser.add_argument("--trust-remote-code", action="store_true",
                        help="run Python code that comes with the model")
    parser.add_argument("--sandbox", choices=("best", "strict"), default="best",
                        help="code judge: see s3ft.py (%(default)s)")
    return parser.parse_args(argv)


def benchmark_names(text: str) -> list[str]:
    """argparse type: names of general benchmarks, each once."""
    names = list(dict.fromkeys(text.split(",")))
    for name in names:
        if name not in NAMES:
            choices = ", ".join(NAMES)
            raise argparse.ArgumentTypeError(f"unknown benchmark {name!r}: choose from {choices}")
    return names


def machine_from(args) -> Machine:
    return Machine(args.data, usable_device(args.device), args.trust_remote_code, args.sandbox)


def scoring_from(args) -> Scoring:
    """InputError: a flag without the one that it goes with."""
    asked = (args.limit, args.sampled, args.max_new_tokens, args.num_fewshot, args.apply_chat_template,
             args.add_bos)
    if not args.benchmarks and any(asked):
        raise InputError("--limit, --sampled, --max-new-tokens, --num-fewshot, --apply-chat-template and "
                         "--add-bos go with --benchmarks")
    if args.sampled and not args.limit:
        raise InputError("--sampled goes with --limit")
    if args.max_new_tokens and GENERATED not in args.benchmarks:
        raise InputError(f"--max-new-tokens goes with --benchmarks {GENERATED}")
    return Scoring(
        args.num_fewshot, args.apply_chat_template, args.add_bos, args.limit, args.sampled,
        args.max_new_tokens)


def alone_from(args) -> Alone:
    """What the flags ask of a model that belongs to no run. InputError: they do not fit together."""
    if not args.benchmarks:
        raise InputError("--model goes with --benchmarks; the models of a run come from its folder")
    if args.task or args.test_file or args.audit or args.show or args.compare_judge or args.engine:
        raise InputError("--task, --test-file, --audit, --show, --compare-judge and --engine are for a run's "
                         "models: leave --model out")
    if (args.out / "config.json").exists() or trained_methods(args.out):
        raise InputError(
            f"--out {args.out}: a run's folder, whose results --model would overwrite; take another")
    names = tuple(args.benchmarks)
    scoring = scoring_from(args)
    return Alone(args.model, args.adapter, args.dtype, args.out, machine_from(args), names, scoring)


def evaluation_from(args) -> Evaluation:
    """What the flags ask of a run's models. InputError: they do not fit together."""
    if args.adapter or args.dtype:
        raise InputError("--adapter and --dtype go with --model; a run's own are in its folder")
    if args.task == "custom":
        raise InputError(
            "--task custom: only a built-in task can be measured on a run that was trained on another; "
            "another file of your own is --test-file FILE")
    if args.task and args.test_file:
        raise InputError("--task and --test-file: each takes other test rows; give one of them")
    alone = {"--audit": args.audit, "--show": args.show, "--compare-judge": args.compare_judge}
    given = [flag for flag, value in alone.items() if value]
    others = args.benchmarks or args.task or args.test_file or args.engine
    if len(given) > 1 or given and others:
        raise InputError(f"{given[0]} stands alone: leave --benchmarks, --task, --test-file, --engine (and "
                         f"{' and '.join(flag for flag in alone if flag != given[0])}) out")
    engine = args.engine
    if engine is not None:
        engine = with_name(engine, served_name_begun_with(args.out, "engine"))
    scoring = scoring_from(args)
    names = tuple(args.benchmarks or ())
    machine = machine_from(args)
    return Evaluation(
        args.out, machine, args.task, args.test_file, names, scoring, args.audit, args.show,
        args.compare_judge, engine)
