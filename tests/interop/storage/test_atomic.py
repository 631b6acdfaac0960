"""Replacing a directory: at any moment, also of a kill, there is the old one or the new one, whole."""

import errno
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from interop.storage import atomic
from interop.storage.atomic import replacing

FILES = 20


def fill(directory, content):
    for number in range(FILES):
        (directory / f"{number}.txt").write_text(content)


def content_of(directory):
    texts = [(directory / f"{number}.txt").read_text() for number in range(FILES)]
    assert len(list(directory.iterdir())) == FILES
    return "".join(sorted(set(texts)))


@pytest.fixture(params=["exchange", "two renames"])
def way(request, monkeypatch):
    """Both ways of taking a full directory's place."""
    if request.param == "two renames":
        monkeypatch.setattr(atomic, "_exchange", lambda first, second: False)
    return request.param


def save(directory, content, owned=("*.txt",)):
    with replacing(directory, owned=owned) as partial:
        fill(partial, content)


def test_new(tmp_path):
    save(tmp_path / "a" / "b", "new")
    assert content_of(tmp_path / "a" / "b") == "new"
    assert os.listdir(tmp_path / "a") == ["b"]


def test_permissions_are_those_of_any_new_directory(tmp_path):
    (tmp_path / "plain").mkdir()
    save(tmp_path / "saved", "new")
    assert (tmp_path / "saved").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_over_an_empty_directory(tmp_path):
    (tmp_path / "x").mkdir()
    save(tmp_path / "x", "new")
    assert content_of(tmp_path / "x") == "new"


@pytest.mark.usefixtures("way")
def test_over_an_old_one(tmp_path):
    save(tmp_path / "x", "old")
    (tmp_path / "x" / "gone.txt").write_text("old")
    save(tmp_path / "x", "new")
    assert content_of(tmp_path / "x") == "new"
    assert os.listdir(tmp_path) == ["x"]


def test_the_exchange_works_here():
    """Else the tests of a kill would be of the fallback."""
    assert hasattr(__import__("ctypes").CDLL(None), "renameat2")


@pytest.mark.usefixtures("way")
def test_what_raises_leaves_the_old_one(tmp_path):
    def half_way():
        with replacing(tmp_path / "x", owned=["*.txt"]) as partial:
            (partial / "0.txt").write_text("new")
            raise RuntimeError("half way")

    save(tmp_path / "x", "old")
    with pytest.raises(RuntimeError, match="half way"):
        half_way()
    assert content_of(tmp_path / "x") == "old"
    assert os.listdir(tmp_path) == ["x"]


def test_a_rename_that_fails_puts_the_old_one_back(tmp_path, monkeypatch):
    save(tmp_path / "x", "old")
    monkeypatch.setattr(atomic, "_exchange", lambda first, second: False)
    rename, calls = os.rename, []

    def failing(source, target):
        calls.append(source)
        if len(calls) == 3:  # 1: straight, refused by the system; 2: the old one aside; 3: the new one in place
            raise OSError(errno.EIO, "disk on fire")
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OSError, match="disk on fire"):
        save(tmp_path / "x", "new")
    assert content_of(tmp_path / "x") == "old"


def test_what_is_not_ours_is_not_removed(tmp_path):
    (tmp_path / "thesis.tex").write_text("ten years of work")
    (tmp_path / "1.txt").write_text("old")
    with pytest.raises(FileExistsError, match=r"holds what this save doesn't write: thesis\.tex"):
        save(tmp_path, "new")
    assert sorted(os.listdir(tmp_path)) == ["1.txt", "thesis.tex"]


def test_nor_what_appears_meanwhile(tmp_path):
    save(tmp_path / "x", "old")
    with pytest.raises(FileExistsError, match="notes"), replacing(tmp_path / "x", owned=["*.txt"]):
        (tmp_path / "x" / "notes").write_text("mine")
    assert (tmp_path / "x" / "notes").read_text() == "mine"


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "x").write_text("a file")
    with pytest.raises(FileExistsError, match="a file stands there"):
        save(tmp_path / "x", "new")


def test_through_a_link(tmp_path):
    save(tmp_path / "real", "old")
    (tmp_path / "link").symlink_to("real")
    save(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert content_of(tmp_path / "real") == "new"


SAVER = """
    import itertools, sys
    from pathlib import Path
    from interop.storage.atomic import replacing

    print("ready", flush=True)
    for number in itertools.count():
        with replacing(sys.argv[1], owned=["*.txt"]) as partial:
            for file in range({files}):
                (partial / f"{{file}}.txt").write_text(str(number))
"""


def test_killed_at_any_moment(tmp_path):
    """Savers that run for ever are killed after different times: the directory is always there, whole, of one save."""
    target, seen = tmp_path / "x", set()
    save(target, "start")
    for attempt in range(12):
        command = [sys.executable, "-c", textwrap.dedent(SAVER.format(files=FILES)), str(target)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout.readline() == "ready\n"
            # Looked at while it is replaced again and again, it is there at every moment.
            until = time.monotonic() + 0.05 + attempt * 0.0137
            while time.monotonic() < until:
                assert target.is_dir()
                os.stat(target / "0.txt")
            process.send_signal(signal.SIGKILL)
        content = content_of(target)
        assert content == "start" or content.isdigit()
        seen.add(content)
    assert len(seen) > 1
    leftover = [name for name in os.listdir(tmp_path) if name != "x"]
    assert all(name.startswith(".x.") and name.endswith(".partial") for name in leftover)
