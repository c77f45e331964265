"""A sweep is carried out: nothing twice, the same table however often it is stopped, failures that stop nothing."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from secateur.errors import FolderInUseError, UsageError
from secateur.folder import is_run_folder, new_folder
from secateur.sweep import carry_out, lines, sweep, work, write_table
from secateur.sweep.pages import write_report
from secateur.sweep.table import groups
from secateur.sweep.work import Allowed, folder_of

from ..tiny import Secateur, digests

OWN = Path(__file__).parents[1] / "pipeline" / "own.py"
CODE = Allowed(code=True)


def asked(**axes):
    return sweep(
        {
            "model": f"{OWN}:build",
            "train": f"{OWN}:train",
            "labelled": f"{OWN}:test",
            "stages": [{"prune": {}}, {"fine-tune": {"lr": 1e-2}}],
            "sweep": axes
            or {"method": ["magnitude", "random"], "sparsity": [0.5], "epochs": [1], "seed": [0, 1]},
        }
    )


def table(given, out: Path) -> str:
    write_table(given, lines(given, out), out)
    return (out / "results.csv").read_text()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    given, out = asked(), tmp_path_factory.mktemp("sweep") / "out"
    carry_out(given.points, out, allowed=CODE)
    return given, out, table(given, out)


def test_each_point_is_a_runs_folder_and_a_row(whole):
    given, out, text = whole
    rows = list(csv.DictReader(text.splitlines()))
    assert [row["status"] for row in rows] == ["done"] * 4
    for point, row in zip(given.points, rows, strict=True):
        assert is_run_folder(folder_of(out, point))
        assert {axis: row[axis] for axis in given.axes} == {axis: str(v) for axis, v in point.at.items()}
        stages = json.loads((out / "points" / row["folder"] / "run" / "results.json").read_text())["stages"]
        last = {m["name"]: m["value"] for m in stages[-1]["measurements"]}
        assert float(row["accuracy"]) == last["accuracy"]
        assert row["sparsity"] == "0.5"  # asked
        assert float(row["sparsity reached"]) == last["sparsity"] == pytest.approx(0.5, abs=0.01)
    assert "latency" not in rows[0]


class Stop(BaseException):
    """What a Ctrl-C is."""


def test_stopped_and_called_again_it_repeats_nothing_and_gives_the_same_table(whole, tmp_path, monkeypatch):
    given, _, expected = whole
    out, began = tmp_path / "out", []
    attempt = work._attempt

    def stopping(plain, folder, *more):
        if len(began) in (1, 3):
            began.append("stop")
            raise Stop
        began.append(folder)
        return attempt(plain, folder, *more)

    monkeypatch.setattr(work, "_attempt", stopping)
    for _ in range(2):
        with pytest.raises(Stop):
            carry_out(given.points, out, allowed=CODE)
        assert table(given, out) != expected
    carry_out(given.points, out, allowed=CODE)
    assert table(given, out) == expected
    folders = [each for each in began if each != "stop"]
    assert len(folders) == len(set(folders)) == 4
    before = digests(out)
    carry_out(given.points, out, allowed=CODE)
    assert table(given, out) == expected
    assert digests(out) == before


@pytest.mark.slow
def test_killed_in_the_middle_of_several_processes(tmp_path):
    axes = {"sparsity": [0.5], "epochs": [0], "seed": [0, 1, 2, 3]}
    given, out, other = asked(**axes), tmp_path / "out", tmp_path / "other"
    script = tmp_path / "go.py"
    script.write_text(
        f"import sys; from pathlib import Path; sys.path.insert(0, {str(Path(__file__).parents[2])!r})\n"
        "from tests.sweep.test_work import asked, CODE; from secateur.sweep import carry_out\n"
        f"if __name__ == '__main__': carry_out(asked(**{axes}).points, Path({str(out)!r}), workers=2, allowed=CODE)\n"
    )
    process = subprocess.Popen([sys.executable, str(script)])
    while not (out / "points").is_dir() or not any(map(is_run_folder, (out / "points").iterdir())):
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()  # its children see that it is gone, and end
    process.wait()
    finished = {path.name: path.stat().st_mtime_ns for path in (out / "points").glob("[!.]*")}
    assert 0 < len(finished) < 4
    for _ in range(100):
        try:
            carry_out(given.points, out, allowed=CODE)
            break
        except FolderInUseError:
            time.sleep(0.1)
    carry_out(given.points, other, allowed=CODE)
    assert table(given, out) == table(given, other)
    for name, when in finished.items():
        assert (out / "points" / name).stat().st_mtime_ns == when


def test_a_point_that_fails_stops_no_other_and_is_shown(tmp_path):
    pytest.importorskip("plotly")
    given = asked(sparsity=[0.5], only=["all", "no</script>such"], epochs=[0])
    carry_out(given.points, tmp_path, allowed=CODE)
    done, failed = lines(given, tmp_path)
    assert (done.status, failed.status) == ("done", "failed")
    assert "matches none of" in failed.error
    write_report("a </script> sweep", given, [done, failed], tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "1 of 2 points are done, 1 failed." in page
    assert "What failed" in page
    assert "no</script>such" not in page
    rows = list(csv.DictReader(table(given, tmp_path).splitlines()))
    assert [row["status"] for row in rows] == ["done", "failed"]
    assert "matches none of" in rows[1]["error"]


def test_a_killed_process_is_a_failed_point(tmp_path, monkeypatch):
    given = asked(sparsity=[0.5], epochs=[0])
    context = work.multiprocessing.get_context("fork")
    monkeypatch.setattr(work.multiprocessing, "get_context", lambda kind: context)
    monkeypatch.setattr(work, "_attempt", lambda *job: os.kill(os.getpid(), signal.SIGKILL))
    carry_out(given.points, tmp_path, workers=2, allowed=CODE)
    (line,) = lines(given, tmp_path)
    assert line.status == "failed"
    assert "killed by signal 9" in line.error


def test_a_folder_that_another_process_works_in(tmp_path):
    given = asked(sparsity=[0.5], epochs=[0], seed=[0, 1])
    with pytest.raises(FolderInUseError), new_folder(folder_of(tmp_path, given.points[0])):
        carry_out(given.points, tmp_path, allowed=CODE)
    assert [line.status for line in lines(given, tmp_path)] == ["waiting", "done"]


def test_the_reference_is_the_model_right_before_it_is_pruned(tmp_path):
    plain = asked(sparsity=[0.5], epochs=[0]).points[0].experiment.plain()
    del plain["stages"][0]["prune"]["sparsity"]
    given = sweep(
        {**plain, "stages": [{"train": {"epochs": 1}}, *plain["stages"]], "sweep": {"sparsity": [0.5]}}
    )
    carry_out(given.points, tmp_path, allowed=CODE)
    (line,) = lines(given, tmp_path)
    told = json.loads((tmp_path / "points" / line.folder / "run" / "results.json").read_text())["stages"]
    assert [stage["name"] for stage in told] == ["load", "train", "prune"]
    assert line.dense["nonzeros"].to_dict() in told[1]["measurements"]
    assert line.dense["accuracy"].to_dict() in told[1]["measurements"]
    assert line.found["accuracy"].to_dict() in told[2]["measurements"]


def test_means_and_spreads_are_over_seeds(whole):
    given, out, _ = whole
    found = lines(given, out)
    same = groups(given, found)
    assert [dict(group.at) for group in same] == [
        {"method": m, "sparsity": 0.5, "epochs": e} for m in ("magnitude", "random") for e in (1,)
    ]
    values = [line.found["accuracy"].value for line in found[:2]]
    assert same[0].values["accuracy"] == values
    assert same[0].mean("accuracy") == sum(values) / 2
    assert same[0].std("accuracy") == pytest.approx(abs(values[0] - values[1]) / 2**0.5)


def test_the_command(whole, tmp_path, monkeypatch, capsys):
    pytest.importorskip("plotly")
    given, out, expected = whole
    secateur = Secateur(monkeypatch, capsys)
    plain = {"model": f"{OWN}:build", "train": f"{OWN}:train", "labelled": f"{OWN}:test"}
    plain |= {
        "stages": [{"prune": {}}, {"fine-tune": {"lr": 1e-2}}],
        "sweep": {k: list(v) for k, v in given.axes.items()},
    }
    file, mine = tmp_path / "s.yaml", tmp_path / "out"
    file.write_text(json.dumps(plain))  # JSON is YAML
    shutil.copytree(out, mine)
    parquet = find_spec("pyarrow") is not None
    said = secateur("sweep", file, "--out", mine, "--allow-code", "--json", *(["--parquet"] if parquet else []))
    assert said.code == 0, said
    assert [row["status"] for row in said.json["points"]] == ["done"] * 4
    assert (mine / "results.csv").read_text() == expected
    assert "Pareto" in (mine / "report.html").read_text()
    if parquet:
        import pyarrow.parquet

        read = pyarrow.parquet.read_table(mine / "results.parquet").to_pylist()
        assert [str(row["accuracy"]) for row in read] == [
            row["accuracy"] for row in csv.DictReader(expected.splitlines())
        ]
    said = secateur("sweep", file, "--out", mine, "--dry-run", "--sparsity", "0.1,0.2")
    assert len(said.out.splitlines()) == 8
    assert "4 of 4" not in said.out
    lone = (
        "sweep",
        "--out",
        tmp_path / "b",
        "--model",
        f"{OWN}:build",
        "--labelled",
        f"{OWN}:test",
        "--allow-code",
    )
    said = secateur(*lone, "--sparsity", 0.5, "--only", "all,nosuch")
    assert said.code == 5
    assert "1 of 2 points failed; the same command tries them again" in said.err
    assert "matches none of" in said.out
    (tmp_path / "file").touch()
    taken = secateur.refused(2, *lone[:1], *lone[3:], "--sparsity", 0.5, "--out", tmp_path / "file" / "b")
    assert "cannot be written here (Not a directory: " in taken
    assert "give a sweep.yaml, or --model" in secateur.refused(2, "sweep", "--out", tmp_path / "c")


def test_missing_packages_name_the_extra(monkeypatch, capsys, tmp_path):
    secateur = Secateur(monkeypatch, capsys)
    base = ("sweep", "--out", tmp_path / "a", "--model", "x.py:y", "--sparsity", 0.5)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "secateur[parquet]" in secateur.refused(2, *base, "--parquet")
    monkeypatch.setitem(sys.modules, "ray", None)
    assert "secateur[ray]" in secateur.refused(2, *base, "--ray", "local")
    with pytest.raises(UsageError, match="workers is 0"):
        carry_out((), tmp_path, workers=0)


@pytest.mark.slow
def test_a_local_ray(whole, tmp_path):
    pytest.importorskip("ray")
    given, _, expected = whole
    carry_out(given.points, tmp_path, ray="local", allowed=CODE)
    assert table(given, tmp_path) == expected


def test_labels_fit_along_an_axis():
    from secateur.sweep.pages import QUALITY, axis_label

    assert axis_label("kl_divergence", "lower") == "KL divergence (lower is better)"
    assert max(len(axis_label(name, "higher")) for name in QUALITY) <= 32
