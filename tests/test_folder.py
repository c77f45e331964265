"""A run's folder appears whole or not at all, belongs to one process, and replaces nothing unasked."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import secateur.folder
from secateur.errors import FolderInUseError, ResourceError, UsageError
from secateur.folder import (
    interrupted,
    is_run_folder,
    new_folder,
    verify,
    write_json,
    write_manifest,
    write_text,
)

# The package's own __init__ loads torch, which eight children do not need: a bare package stands in for it.
CHILD = f"""
import sys, time, types
from pathlib import Path
package = types.ModuleType("secateur")
package.__path__ = [{str(Path(secateur.folder.__file__).parent)!r}]
sys.modules["secateur"] = package
from secateur.errors import FolderInUseError, SecateurError
from secateur.folder import new_folder, write_text
out, mark = Path(sys.argv[1]), Path(sys.argv[2])
"""


def child(program: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-I", "-c", CHILD + program, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.01)


def make_result(path: Path, text: str = "first") -> None:
    with new_folder(path) as folder:
        (folder / "run").mkdir()
        write_text(folder / "model.txt", text)
        write_json(folder / "run" / "run.json", {"text": text})


def run(path: Path, body: Callable[[Path], None], if_exists: str = "fail") -> None:
    with new_folder(path, if_exists) as folder:
        body(folder)


def failing(error: BaseException) -> Callable[[Path], None]:
    def body(folder: Path) -> None:
        (folder / "model.txt").write_text("half")
        raise error

    return body


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_who_may_read_the_folder_may_read_its_files(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        with new_folder(tmp_path / "out") as folder:
            os.close(os.open(folder / "model.safetensors", os.O_CREAT | os.O_WRONLY, 0o600))
    finally:
        os.umask(before)
    assert (tmp_path / "out" / "model.safetensors").stat().st_mode & 0o777 == mode


def test_a_folder_appears_only_on_success(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b" / "out"
    with new_folder(out) as folder:
        assert not out.exists()
        assert folder.parent == out.parent
        assert folder.name.startswith(".")
        write_text(folder / "model.txt", "weights")
        assert not out.exists()
    assert (out / "model.txt").read_text() == "weights"
    assert verify(out) == []
    assert is_run_folder(out)
    assert names(out.parent) == ["out"]


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt(), SystemExit(3)])
def test_a_run_that_raises_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)):
        run(tmp_path / "out", failing(error), "overwrite")
    assert names(tmp_path) == []


def test_a_finished_result_is_not_overwritten_unasked(tmp_path: Path) -> None:
    out = tmp_path / "out"
    make_result(out)
    with pytest.raises(UsageError, match=r"already holds a finished result.*if_exists=\"overwrite\""):
        make_result(out, "second")
    with pytest.raises(UsageError, match="already holds a finished result"), new_folder(out, "resume"):
        pass
    assert (out / "model.txt").read_text() == "first"
    with new_folder(out, "overwrite") as folder:
        (folder / "new.txt").write_text("second")
        assert (out / "model.txt").read_text() == "first"
    assert names(out) == ["MANIFEST.sha256", "new.txt"]
    assert names(tmp_path) == ["out"]


def test_an_overwriting_run_that_dies_leaves_the_old_result(tmp_path: Path) -> None:
    out = tmp_path / "out"
    make_result(out)
    with pytest.raises(RuntimeError, match="boom"):
        run(out, failing(RuntimeError("boom")), "overwrite")
    assert (out / "model.txt").read_text() == "first"
    assert verify(out) == []
    assert names(tmp_path) == ["out"]


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    make_result(tmp_path / "out")
    assert verify(tmp_path / "out") == []


@pytest.mark.parametrize("if_exists", ["fail", "overwrite", "resume"])
def test_a_folder_that_no_run_wrote_is_never_removed(tmp_path: Path, if_exists: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match=r"it is not the folder of a run \(MANIFEST.sha256 is missing\)"):
        new_folder(out, if_exists).__enter__()
    (out / "MANIFEST.sha256").write_text("00  thesis.txt\n")
    with pytest.raises(UsageError, match="does not begin with the line"):
        new_folder(out, if_exists).__enter__()
    assert (out / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("name", ["notes.txt", "run/notes.txt", ".git"])
def test_a_result_to_which_the_user_added_a_file_is_not_overwritten(tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    make_result(out)
    (out / name).write_text("mine")
    with (
        pytest.raises(UsageError, match=f"{name} in it is not a file that a run wrote"),
        new_folder(out, "overwrite"),
    ):
        pass
    assert (out / name).read_text() == "mine"


def test_what_appears_at_the_place_during_the_run_is_kept_and_so_is_the_result(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def body(folder: Path) -> None:
        (folder / "model.txt").write_text("result")
        out.mkdir()
        (out / "other.txt").write_text("other")

    with pytest.raises(UsageError, match="was taken while the run worked; the result is in") as caught:
        run(out, body)
    assert names(out) == ["other.txt"]
    spare = Path(str(caught.value).split("the result is in ")[1].removesuffix(" instead."))
    assert verify(spare) == []
    assert (spare / "model.txt").read_text() == "result"


def test_unknown_if_exists_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r'if_exists="overwrit" is not known; nearest: overwrite'):
        new_folder(tmp_path / "out", "overwrit").__enter__()


def test_files_links_and_the_current_folder_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="file is a file; give the name of a folder"):
        new_folder(tmp_path / "file").__enter__()
    with pytest.raises(UsageError, match="cannot be written here"):
        new_folder(tmp_path / "file" / "out").__enter__()
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there")
    (tmp_path / "dangling").symlink_to("nowhere")
    for link in ("link", "dangling"):
        with pytest.raises(UsageError, match=f"{link} is a symbolic link; give the folder itself"):
            new_folder(tmp_path / link).__enter__()
    monkeypatch.chdir(tmp_path / "there")
    for here in (".", "../there", "/"):
        with pytest.raises(UsageError, match="name a new folder inside this one"):
            new_folder(here).__enter__()
    make_result(Path("../link/out"))  # a link on the way is the user's own way of naming the place
    assert verify(tmp_path / "there" / "out") == []


def test_a_read_only_parent_gives_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def refuse(path: object, flags: int, *rest: int, **more: object) -> int:
        if flags & os.O_CREAT and str(path).startswith(str(tmp_path)):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return real(path, flags, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(UsageError, match=r"out: cannot be written here \(Read-only file system"):
        new_folder(tmp_path / "out").__enter__()
    monkeypatch.undo()
    assert names(tmp_path) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_parent_without_permission_gives_one_line(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UsageError, match="cannot be written here"):
        new_folder(tmp_path / "out").__enter__()


def test_a_very_long_name_works(tmp_path: Path) -> None:
    make_result(tmp_path / ("n" * 255))
    assert names(tmp_path) == ["n" * 255]
    with pytest.raises(UsageError, match="File name too long"):
        new_folder(tmp_path / ("n" * 256)).__enter__()


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_leaves_earlier_results_intact(tmp_path: Path, error: Exception) -> None:
    out = tmp_path / "out"
    make_result(out)
    with pytest.raises(ResourceError, match="no space left on the disk; earlier results are intact") as caught:
        run(out, failing(error), "overwrite")
    assert caught.value.exit_code == 4
    assert verify(out) == []
    assert (out / "model.txt").read_text() == "first"
    assert names(tmp_path) == ["out"]


def test_a_disk_that_fills_up_while_the_manifest_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    make_result(out)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(ResourceError):
        run(out, lambda folder: monkeypatch.setattr(os, "fsync", full), "overwrite")
    assert (out / "model.txt").read_text() == "first"
    assert names(tmp_path) == ["out"]


def test_a_full_disk_before_the_run_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, *args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(ResourceError):
        new_folder(tmp_path / "out").__enter__()


def test_one_process_at_a_time_also_within_one_process(tmp_path: Path) -> None:
    with new_folder(tmp_path / "out") as folder:
        with pytest.raises(FolderInUseError, match="another process works in this folder") as caught:
            new_folder(tmp_path / "out", "overwrite").__enter__()
        assert caught.value.exit_code == 7
        assert folder.is_dir()


def test_a_lock_whose_file_vanished_before_it_was_held_is_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The holder before us removes the file between our open and our lock; a third process makes a new one."""
    real, calls = fcntl.flock, []

    def flock(descriptor: int, operation: int) -> None:
        calls.append(descriptor)
        if len(calls) == 1:
            next(tmp_path.glob("*lock")).unlink()
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with new_folder(tmp_path / "out"):
        assert len(calls) == 2
        with pytest.raises(FolderInUseError):
            new_folder(tmp_path / "out").__enter__()


def test_of_eight_processes_one_wins(tmp_path: Path) -> None:
    program = """
try:
    with new_folder(out) as folder:
        write_text(folder / "winner.txt", sys.argv[3])
        mark.touch()
        while not mark.with_name("go").exists():
            time.sleep(0.01)
except SecateurError as error:
    print(type(error).__name__)
    sys.exit(error.exit_code)
"""
    mark = tmp_path / "marks" / "won"
    mark.parent.mkdir()
    children = [child(program, tmp_path / "out", mark, number) for number in range(8)]
    deadline = time.monotonic() + 60
    while sum(process.poll() is None for process in children) > 1 or not mark.exists():
        assert time.monotonic() < deadline, "more than one process works in the folder"
        time.sleep(0.01)
    mark.with_name("go").touch()
    said = [process.communicate(timeout=60)[0].strip() for process in children]
    assert sorted(process.returncode for process in children) == [0] + [7] * 7
    assert sorted(said) == [""] + ["FolderInUseError"] * 7
    winner = [process.returncode for process in children].index(0)
    assert (tmp_path / "out" / "winner.txt").read_text() == str(winner)
    assert names(tmp_path) == ["marks", "out"]


KILLED = """
with new_folder(out, sys.argv[3]) as folder:
    write_text(folder / "model.txt", "half")
    if len(sys.argv) > 4:
        (folder / "run/state").mkdir(parents=True)
        write_text(folder / "run/state/layer", "7")
    mark.touch()
    time.sleep(600)
"""


def kill_in_the_middle(out: Path, *arguments: str) -> None:
    mark = out.with_name("mark")
    process = child(KILLED, out, mark, *arguments)
    wait_for(mark, process)
    with pytest.raises(FolderInUseError):
        new_folder(out, "overwrite").__enter__()
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    mark.unlink()


def test_kill_9_leaves_no_folder_and_no_stale_lock(tmp_path: Path) -> None:
    out = tmp_path / "out"
    kill_in_the_middle(out, "fail")
    assert not out.exists()
    assert interrupted(out) is None
    make_result(out)
    assert (out / "model.txt").read_text() == "first"
    assert names(tmp_path) == ["out"]  # the dead run's leftovers are gone


def test_kill_9_with_state_is_kept_for_resume(tmp_path: Path) -> None:
    out = tmp_path / "out"
    kill_in_the_middle(out, "fail", "with state")
    assert not out.exists()
    assert interrupted(out) is not None
    with pytest.raises(UsageError, match="a run was interrupted here and left its state; continue it with"):
        make_result(out)
    with new_folder(out, "resume") as folder:
        assert folder == interrupted(out)
        assert (folder / "run/state/layer").read_text() == "7"
        write_text(folder / "model.txt", "whole")
    assert (out / "model.txt").read_text() == "whole"
    assert not (out / "run/state").exists()
    assert verify(out) == []
    assert names(tmp_path) == ["out"]


def test_overwrite_starts_anew_where_a_run_was_interrupted(tmp_path: Path) -> None:
    out = tmp_path / "out"
    kill_in_the_middle(out, "fail", "with state")
    with new_folder(out, "overwrite") as folder:
        assert list(folder.iterdir()) == []
    assert interrupted(out) is None


def test_resume_of_an_overwriting_run_may_replace_the_old_result(tmp_path: Path) -> None:
    out = tmp_path / "out"
    make_result(out)
    kill_in_the_middle(out, "overwrite", "with state")
    assert (out / "model.txt").read_text() == "first"
    with pytest.raises(UsageError, match="already holds a finished result"), new_folder(out):
        pass
    with new_folder(out, "resume") as folder:
        write_text(folder / "model.txt", "second")
    assert (out / "model.txt").read_text() == "second"
    assert names(tmp_path) == ["out"]


def test_an_exception_keeps_the_state_and_resume_with_nothing_to_resume_starts_anew(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def body(folder: Path) -> None:
        assert list(folder.iterdir()) == []
        (folder / "run/state").mkdir(parents=True)
        (folder / "run/state/layer").write_text("3")
        (folder / ".metrics.json.tmp").write_text("cut short")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(out, body, "resume")
    with new_folder(out, "resume") as folder:
        assert (folder / "run/state/layer").read_text() == "3"
    assert names(out) == ["MANIFEST.sha256", "run"]


@pytest.mark.parametrize("crash", ["before the swap", "after the swap", "between the renames"])
def test_a_run_that_dies_around_the_swap_leaves_one_whole_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, crash: str
) -> None:
    """The process's death is played by a copy of the files at that moment, put back after the context ends."""
    out = tmp_path / "place" / "out"
    out.parent.mkdir()
    make_result(out)
    seen = tmp_path / "seen"
    real_exchange, real_rename = secateur.folder._exchange, os.rename

    def exchange(new: Path, old: Path) -> None:
        if crash == "before the swap":
            shutil.copytree(out.parent, seen)
        if crash == "between the renames":
            monkeypatch.setattr(secateur.folder.ctypes, "CDLL", lambda name: object())
            monkeypatch.setattr(os, "rename", rename)
        real_exchange(new, old)
        if crash == "after the swap":
            shutil.copytree(out.parent, seen)

    def rename(source: Path, destination: Path) -> None:
        real_rename(source, destination)
        if source == out:
            shutil.copytree(out.parent, seen)

    monkeypatch.setattr(secateur.folder, "_exchange", exchange)
    with new_folder(out, "overwrite") as folder:
        (folder / "run/state").mkdir(parents=True)
        (folder / "run/state/layer").write_text("3")
        write_text(folder / "model.txt", "second")
    monkeypatch.undo()
    assert (out / "model.txt").read_text() == "second"
    assert names(out.parent) == ["out"]
    shutil.rmtree(out.parent)
    os.rename(seen, out.parent)
    if crash == "after the swap":
        assert (out / "model.txt").read_text() == "second"
        assert verify(out) == []
        with pytest.raises(UsageError, match="finished"):
            new_folder(out).__enter__()
        assert not (out / "run").exists() or names(out / "run") == []
    else:
        with new_folder(out, "resume") as folder:  # the new result was whole but for its name
            assert (folder / "model.txt").read_text() == "second"
            assert (out / "model.txt").read_text() == "first"
    assert (out / "model.txt").read_text() == "second"
    assert names(out.parent) == ["out"]


def test_a_link_in_the_new_folder_is_refused_before_the_swap(tmp_path: Path) -> None:
    with (
        pytest.raises(UsageError, match="symbolic link in a run's folder"),
        new_folder(tmp_path / "out") as folder,
    ):
        (folder / "link").symlink_to("/etc/passwd")
    assert names(tmp_path) == []


def test_a_manifest_rewritten_by_hand_makes_a_run_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    make_result(out)
    (out / "notes.txt").write_text("mine")
    assert not is_run_folder(out)
    write_manifest(out)
    assert is_run_folder(out)
    assert not is_run_folder(tmp_path / "nowhere")
