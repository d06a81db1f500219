"""What both command lines share: a user's mistake as one line, and the types of flags."""

import argparse
import sys


class InputError(ValueError):
    """A user's mistake. The command line prints it as one line and exits with status 2."""


def positive_int(text: str) -> int:
    """argparse type: a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def non_negative_float(text: str) -> float:
    """argparse type: a finite number of at least 0."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 0")
    return value


def one_line_error(message: str):
    """In place of ArgumentParser.error: one line, without the usage."""
    raise InputError(message)


def exit_cleanly(main) -> None:
    """Run a command line: a user's mistake, a full disk or Ctrl-C end in one line each instead of a traceback."""
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
            raise
        where = error.filename or "while writing"
        print(f"error: {where}: {error.strerror}; the same command goes on from here", file=sys.stderr)
        sys.exit(1)
