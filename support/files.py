"""Files that outlive a dying process.

JSONL is read with every bad row named, written whole or not at all, and resumed after a kill.

Covered:
- a process killed at any moment
- two runs on one folder: the second is refused
- text that UTF-8 cannot hold
- files that are not ours: they are refused, and no byte of them is changed
Not covered: a machine that loses power. Appended rows are not synced one by one. Files written whole are.
"""

import contextlib
import hashlib
import json
import os
import re
import urllib.request
from collections.abc import Callable, Iterable
from pathlib import Path

from support import ranks
from support.cli import InputError

try:
    import fcntl
except ImportError:  # Windows: no lock, all else works
    fcntl = None

# ------------------------------------------------------------------------------ reading


def read_jsonl(path: Path | str, fields: tuple[str, ...] = ()) -> list[dict]:
    """The objects of a JSONL file. Blank lines are skipped.

    InputError: a row is no object, or has not all of `fields`. It is named by its line.
    """
    return _parse_lines(read_bytes(path), path, fields)


def read_json(path: Path | str):
    """The value in a JSON file. InputError: it cannot be read, or is no JSON."""
    try:
        return json.loads(read_bytes(path))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({error})") from None


def read_bytes(path: Path | str) -> bytes:
    """The bytes of a file. InputError: it cannot be read."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None


def line_numbers(path: Path | str) -> list[int]:
    """The line of each row of a JSONL file: blank lines are no rows."""
    lines = read_bytes(path).split(b"\n")
    return [number for number, line in enumerate(lines, 1) if line.strip()]


def digest(*parts) -> str:
    """16 hexadecimal digits that tell these values from others: texts, numbers, lists and dictionaries."""
    text = json.dumps(parts, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_digests(paths) -> list[str]:
    """A digest of each file's bytes: the same names may hold other rows tomorrow."""
    return [hashlib.sha256(read_bytes(path)).hexdigest()[:16] for path in paths]


def _parse_lines(content: bytes, path: Path | str, fields: tuple[str, ...] = ()) -> list[dict]:
    rows = []
    for number, line in enumerate(content.split(b"\n"), 1):
        if line.strip():
            rows.append(_parse(line, f"{path}, line {number}", fields))
    return rows


def _parse(line: bytes, where: str, fields: tuple[str, ...] = ()) -> dict:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not valid JSON ({str(error) or 'nested too deeply'})") from None
    if isinstance(row, list):
        raise InputError(f"{where}: a JSON array is no JSONL: write one row a line, each a JSON object")
    if not isinstance(row, dict):
        raise InputError(f"{where}: expected a JSON object, found {type(row).__name__}")
    for field in fields:
        if field not in row:
            raise InputError(f"{where}: the field {field!r} is missing (found: {', '.join(row) or 'none'})")
    return row


# ------------------------------------------------------------------------------ writing


def to_line(row: dict) -> bytes:
    """One JSONL line. A lone surrogate, which UTF-8 cannot hold, is written as its JSON escape."""
    return json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def write_bytes(path: Path | str, content: bytes) -> None:
    """Write a file whole or not at all. Only rank 0 writes.

    It is written under a temporary name on the same disk, and then renamed.
    """
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
    with open(path, "ab") as file:  # buffered: a full disk ends in an error, never in half a row unnoticed
        file.write(to_line(row))


# ------------------------------------------------------------------------------ going on after a kill


def resume_jsonl(path: Path | str) -> list[dict]:
    """The rows that an earlier run appended, [] if there are none.

    A last line torn by its death is cut off the file. Rows that other processes of a killed run left in
    files beside it count too, each once. InputError: the file is not one of rows that we append. It is left
    as it is.
    """
    path = Path(path)
    rows = _resume(path)
    known = set(map(to_line, rows))
    for part in _parts(path):
        for row in _resume(part):
            if to_line(row) not in known:
                rows.append(row)
    return rows


def _resume(path: Path) -> list[dict]:
    if not path.exists():
        return []
    content = read_bytes(path)
    whole, tail = _split_last_line(content)
    rows = _parse_lines(whole, path)

    if not tail:
        return rows
    if not _is_torn(tail):  # a file made elsewhere may lack only its last newline
        number = whole.count(b"\n") + 1
        rows.append(_parse(tail, f"{path}, line {number}"))
        whole = content + b"\n"
    write_bytes(path, whole)
    return rows


def _split_last_line(content: bytes) -> tuple[bytes, bytes]:
    """(the lines that end in a newline, what comes after them)"""
    end = content.rfind(b"\n") + 1
    return content[:end], content[end:].strip()


def _is_torn(line: bytes) -> bool:
    """Is this the beginning of a row that we were appending?

    An array, CSV or packed bytes begin in another way.
    """
    if not line.startswith(b'{"'):
        return False
    try:
        _parse(line, "")
    except InputError:
        return True
    return False


def _refuse_what_is_broken_off_elsewhere(path: Path) -> None:
    """InputError where the last line is broken off and no row carries the digest that ours do."""
    whole, tail = _split_last_line(read_bytes(path))
    rows = _parse_lines(whole, path)
    ours = any("digest" in row for row in rows)
    if tail and not ours and _is_torn(tail):
        raise InputError(
            f"{path}: its last line is broken off, and the file was made elsewhere: mend or remove that line")


def _parts(path: Path) -> list[Path]:
    return sorted(path.parent.glob(f"{path.stem}.rank*.jsonl"))


class RowFile:
    """Rows of a JSONL file by their key, each on the disk as soon as it is made.

    New rows go to a file of this process beside the real one, which is only ever replaced whole, by `finish`.
    So a file that a person put there is neither appended to nor cut. With torchrun every process makes its
    share of the rows.
    """

    def __init__(self, path: Path, key: Callable[[dict], object] = lambda row: row["id"]):
        """InputError: the file is no JSONL of objects, or was made elsewhere and is broken off.

        It is left as it is.
        """
        self.path = path
        self.key = key
        self.part = path.with_suffix(f".rank{ranks.RANK}.jsonl")
        if path.exists():
            _refuse_what_is_broken_off_elsewhere(path)
            self._refuse_double_keys(_resume(path))
        self.rows = self._read()

    def _refuse_double_keys(self, rows: list[dict]) -> None:
        seen = set()
        for number, row in enumerate(rows, 1):
            try:
                key = self.key(row)
                twice = key in seen
                seen.add(key)
            except (KeyError, TypeError):
                raise InputError(f"{self.path}, row {number}: it has no id that is a text") from None
            if twice:
                raise InputError(f"{self.path}, row {number}: the id {key!r} comes twice")

    def _read(self) -> dict:
        """All rows by key, those of the real file first. Of several with one key the last counts."""
        return {self.key(row): row for row in resume_jsonl(self.path)}

    def missing(self, keys: Iterable) -> list:
        """The keys without a row. With torchrun, this process's share of them."""
        missing = [key for key in keys if key not in self.rows]
        ranks.barrier()  # every process has read what was there, before one of them appends
        return ranks.share(missing)

    def append(self, row: dict) -> None:
        self.part.parent.mkdir(parents=True, exist_ok=True)
        append_jsonl(self.part, row)

    def finish(self, keys: Iterable) -> dict:
        """The rows of `keys` by key, in that order. They come first in the file, the others after them."""
        ranks.barrier()  # every process has appended its share
        found = self._read()
        keys = list(keys)
        first = [found[key] for key in keys if key in found]
        wanted = set(keys)
        others = [row for key, row in found.items() if key not in wanted]
        self.rows = {self.key(row): row for row in first + others}
        ranks.barrier()  # every process has read all parts, before rank 0 removes them

        content = b"".join(map(to_line, self.rows.values()))
        if content and (not self.path.exists() or self.path.read_bytes() != content):
            write_bytes(self.path, content)  # the same bytes, however often the run was broken off
        if ranks.RANK == 0:
            for part in _parts(self.path):
                part.unlink()
        ranks.barrier()
        return {self.key(row): row for row in first}


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
            raise InputError(
                f"--out {folder}: another run is using it; wait for it or take another folder") from None
        for scratch in folder.rglob(".*.tmp"):  # a killed run was writing it
            if re.fullmatch(r"\..+\.\d+\.tmp", scratch.name):
                scratch.unlink()
        yield


# ------------------------------------------------------------------------------ the network


def download(url: str, path: Path | str, sha256: str | None = None) -> None:
    """Fetch a public file once. What is there already is used as it is."""
    path = Path(path)
    if path.exists():
        return
    try:
        with urllib.request.urlopen(url, timeout=60) as response:
            content = response.read()
    except OSError as error:
        raise InputError(
            f"{path} is missing and cannot be fetched ({error}): download {url} and put it there") from None
    if sha256 and hashlib.sha256(content).hexdigest() != sha256:
        raise InputError(
            f"{url} is not the file we know (its sha256 differs): get the original and put it at {path}")
    write_bytes(path, content)
