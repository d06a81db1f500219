"""Files that outlive a dying process: JSONL read with every bad row named, written whole or not at all, resumed after a kill.

Covered: a process killed at any moment (the torn last line of an appended file is cut off on the next run), two runs on one
folder (the second is refused), text that UTF-8 cannot hold. Not covered: a machine that loses power (appended rows are not
synced one by one; files written whole are).
"""

import contextlib
import hashlib
import json
import os
import urllib.request
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from support import ranks
from support.cli import InputError

try:
    import fcntl
except ImportError:  # Windows: no lock, all else works
    fcntl = None


def read_jsonl(path: Path | str, fields: tuple[str, ...] = ()) -> list[dict]:
    """The objects of a JSONL file; blank lines are skipped. Every row must have `fields`; a bad one is named by its line."""
    rows = []
    for number, line in enumerate(_read_bytes(path).split(b"\n"), 1):
        if line.strip():
            rows.append(_parse(line, f"{path}, line {number}", fields))
    return rows


def _parse(line: bytes, where: str, fields: tuple[str, ...]) -> dict:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not valid JSON ({str(error) or 'nested too deeply'})") from None
    if not isinstance(row, dict):
        raise InputError(f"{where}: expected a JSON object, found {type(row).__name__}")
    for field in fields:
        if field not in row:
            raise InputError(f"{where}: the field {field!r} is missing (found: {', '.join(row) or 'none'})")
    return row


def _read_bytes(path: Path | str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None


def line_numbers(path: Path) -> list[int]:
    """The line of each row of a JSONL file: blank lines are no rows."""
    return [number for number, line in enumerate(path.read_bytes().split(b"\n"), 1) if line.strip()]


def digests(paths) -> list[str]:
    """A digest of each file's bytes: the same names may hold other rows tomorrow."""
    return [hashlib.sha256(_read_bytes(path)).hexdigest()[:16] for path in paths]


def to_line(row: dict) -> bytes:
    """One JSONL line. A lone surrogate, which UTF-8 cannot hold, is written as its JSON escape."""
    return json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def write_bytes(path: Path | str, content: bytes) -> None:
    """Write a file whole or not at all: to a temporary name on the same disk first, then renamed. Only rank 0 writes."""
    if ranks.RANK:
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(scratch, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def write_text(path: Path | str, text: str) -> None:
    write_bytes(path, text.encode())


def write_json(path: Path | str, value) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_jsonl(path: Path | str, rows) -> None:
    write_bytes(path, b"".join(map(to_line, rows)))


def append_jsonl(path: Path | str, row: dict) -> None:
    with open(path, "ab") as file:  # buffered: a disk that is full ends in an error, never in half a row unnoticed
        file.write(to_line(row))


def resume_jsonl(path: Path | str) -> list[dict]:
    """Rows that an earlier run appended, [] if there are none. A last line torn by its death is cut off the file.

    What other ranks of a run that died appended beside it counts too, once.
    """
    path = Path(path)
    rows = _resume(path)
    known = set(map(to_line, rows))
    for part in _parts(path):
        rows += [row for row in _resume(part) if to_line(row) not in known]
    return rows


def _parts(path: Path) -> list[Path]:
    return sorted(path.parent.glob(f"{path.stem}.rank*.jsonl"))


def _resume(path: Path) -> list[dict]:
    if not path.exists():
        return []
    content = _read_bytes(path)
    whole = content[: content.rfind(b"\n") + 1]
    try:  # a file made elsewhere may lack only its last newline
        if content[len(whole) :]:
            _parse(content[len(whole) :], str(path), ())
            whole = content + b"\n"
    except InputError:
        pass
    if whole != content:
        write_bytes(path, whole)
    return [_parse(line, f"{path}, line {i}", ()) for i, line in enumerate(whole.split(b"\n"), 1) if line.strip()]


def add_rows(path: Path, rows: list[dict], todo: Sequence, make: Callable[[list], Iterable[dict]],
             arrange: Callable[[list], list]) -> list[dict]:
    """Make the rows for `todo`, each appended as soon as it is there; then write arrange(all rows) -> what was written.

    `rows` is what resume_jsonl found. With several processes each makes its share, in a file of its own beside `path`.
    """
    if not todo and not _parts(path) and arrange(rows) == rows:
        return rows
    own = path if ranks.WORLD == 1 else path.with_suffix(f".rank{ranks.RANK}.jsonl")
    own.parent.mkdir(parents=True, exist_ok=True)
    ranks.barrier()  # all have read what was there
    for row in make(ranks.share(todo)):
        append_jsonl(own, row)
    ranks.barrier()
    rows = arrange(resume_jsonl(path))
    ranks.barrier()
    write_jsonl(path, rows)  # the same bytes, however often the run was broken off
    if ranks.RANK == 0:
        for part in _parts(path):
            part.unlink()
    ranks.barrier()
    return rows


def download(url: str, path: Path | str, sha256: str | None = None) -> None:
    """Fetch a public file once; what is there already is used as it is."""
    path = Path(path)
    if path.exists():
        return
    try:
        with urllib.request.urlopen(url, timeout=60) as response:
            content = response.read()
    except OSError as error:
        raise InputError(f"{path} is missing and cannot be fetched ({error}): download {url} and put it there") from None
    if sha256 and hashlib.sha256(content).hexdigest() != sha256:
        raise InputError(f"{url} is not the file we know (its sha256 differs): get the original and put it at {path}")
    write_bytes(path, content)


def read_json(path: Path | str):
    try:
        return json.loads(_read_bytes(path))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({error})") from None


@contextlib.contextmanager
def locked(folder: Path):
    """Hold a run folder alone. The kernel frees the lock when the process ends, however it ends."""
    if ranks.RANK:  # rank 0 holds it for all
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "w")
    except OSError as error:
        raise InputError(f"--out {folder}: cannot be written ({error.strerror})") from None
    with file:
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"--out {folder}: another run is using it; wait for it or take another folder") from None
        for scratch in folder.rglob(".*.tmp"):  # a killed run was writing it
            scratch.unlink()
        yield
