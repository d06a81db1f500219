"""Files survive a dying process: whole or not at all, torn lines cut, one run a folder."""

import multiprocessing
import os
from pathlib import Path

import pytest

from support import cli, files
from support.cli import InputError


def test_a_torn_last_line_is_cut_and_the_rest_kept(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"id": "1"}\n{"id": "2"}\n{"id": "3", "resp')
    assert files.resume_jsonl(path) == [{"id": "1"}, {"id": "2"}]
    files.append_jsonl(path, {"id": "3"})
    assert files.read_jsonl(path) == [{"id": "1"}, {"id": "2"}, {"id": "3"}]


def test_a_whole_last_line_without_a_newline_is_kept(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"id": "1"}\n{"id": "2"}')
    assert [row["id"] for row in files.resume_jsonl(path)] == ["1", "2"]
    files.append_jsonl(path, {"id": "3"})
    assert [row["id"] for row in files.read_jsonl(path)] == ["1", "2", "3"]


def test_a_broken_line_in_the_middle_is_named_not_dropped(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"id": "1"}\n{"id": \n{"id": "3"}\n')
    with pytest.raises(InputError, match="line 2"):
        files.resume_jsonl(path)


@pytest.mark.parametrize("text", ["\ud800 lone", "line\u2028separator\u0085", "nul \x00 tab \t", 'quote " \\', "日本 🦀"])
def test_any_text_survives_a_round_trip(tmp_path, text):
    files.write_jsonl(tmp_path / "a", [{"t": text}])
    assert files.read_jsonl(tmp_path / "a") == [{"t": text}]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    files.write_text(path, "old")

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        files.write_text(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.json"]


def hold(folder: str, entered, leave):
    with files.locked(Path(folder)):
        entered.set()
        leave.wait(30)


def test_the_second_run_on_a_folder_is_refused_and_a_killed_one_leaves_no_lock(tmp_path):
    context = multiprocessing.get_context("spawn")
    entered, leave = context.Event(), context.Event()
    first = context.Process(target=hold, args=(str(tmp_path), entered, leave))
    first.start()
    assert entered.wait(60)
    with pytest.raises(InputError, match="another run is using it"), files.locked(tmp_path):
        pass
    first.kill()
    first.join()
    with files.locked(tmp_path):
        pass


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"), files.locked(tmp_path / "file" / "run"):
        pass


def test_a_users_mistake_is_one_line_and_status_2(capsys):
    def main():
        raise InputError("rows.jsonl, line 3: bad")

    with pytest.raises(SystemExit) as end:
        cli.exit_cleanly(main)
    assert end.value.code == 2 and capsys.readouterr().err == "error: rows.jsonl, line 3: bad\n"


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        cli.exit_cleanly(lambda: 1 / 0)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's always-full device")
def test_a_row_that_a_full_disk_did_not_take_is_an_error(capsys):
    with pytest.raises(SystemExit) as end:
        cli.exit_cleanly(lambda: files.append_jsonl("/dev/full", {"id": "a", "response": "x" * 9000}))
    assert end.value.code == 1 and "No space left on device" in capsys.readouterr().err
