"""What the command lines share: a user's mistake as one line, notes, and the types of flags."""

import argparse
import json
import math
import sys

from support import ranks


class InputError(ValueError):
    """A user's mistake. The command line prints it as one line and exits with status 2."""


def positive_int(text: str) -> int:
    """argparse type: a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def random_seed(text: str) -> int:
    """argparse type: a whole number that every random generator takes."""
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to {2**32 - 1}")
    return int(text)


def positive_float(text: str) -> float:
    """argparse type: a finite number above 0."""
    value = _number(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0: nothing would be trained")
    return value


def share(text: str) -> float:
    """argparse type: a number from 0 up to, but not including, 1."""
    value = _number(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share: a number of at least 0 and below 1")
    return value


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        return math.nan
    return value if math.isfinite(value) else math.nan


def json_object(text: str) -> dict:
    """argparse type: a JSON object, such as {"enable_thinking": false}."""
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a JSON object such as '{{\"enable_thinking\": false}}'")
    return value


def note(line: str) -> None:
    """Say something that a user should know, once and not by every process."""
    if ranks.RANK == 0:
        print(line, file=sys.stderr, flush=True)


def one_line_error(message: str):
    """In place of ArgumentParser.error: one line, without the usage."""
    raise InputError(message)


def exit_cleanly(main) -> None:
    """Run a command line.

    A user's mistake, a full disk or Ctrl-C end in one line each instead of a traceback.
    """
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        if error.filename is None and error.errno is None:
            raise  # not the operating system's: a library's own error, which its traceback explains
        where = error.filename or "while writing"
        advice = "When that is mended, give the same command again"
        print(f"error: {where}: {error.strerror}. {advice}", file=sys.stderr)
        sys.exit(1)
