"""Points are carried out: one after the other here, several at once in processes of their own, or on a Ray cluster.

A finished point is a run's folder and is never done again. A point that fails leaves a file that says why, and the
others go on; the next call tries it again.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from secateur.errors import FolderInUseError, SecateurError, UsageError
from secateur.folder import is_run_folder, told, write_json
from secateur.measure import Tell
from secateur.sweep.points import Point
from secateur.sweep.shared import Shared, shared_stages, start_of

__all__ = ["Allowed", "carry_out", "failure_of", "folder_of"]


Problem = dict[str, Any]


@dataclass(frozen=True)
class Allowed:
    """What every point may do; see the options of `secateur run`."""

    code: bool = False
    offline: bool = False
    trust_remote_code: bool = False
    allow_pickle: bool = False


# an experiment, its folder, threads, what is allowed, the folder it starts from, whether others start from it
Job = tuple[Any, str, int | None, Allowed, str | None, bool]


def folder_of(out: Path, point: Point) -> Path:
    """Where the folder of a point lies."""
    return out / "points" / point.name


def failure_of(out: Path, point: Point) -> Path:
    """The file that says why a point failed."""
    return out / "failed" / f"{point.name}.json"


def carry_out(
    points: Sequence[Point],
    out: Path,
    *,
    workers: int = 1,
    threads: int | None = None,
    ray: str | None = None,
    allowed: Allowed | None = None,
    tell: Tell = lambda label, done, total: None,
    done: Callable[[], Any] = lambda: None,
) -> None:
    """Carry out every point that is not finished.

    Args:
        points: of the sweep.
        out: the sweep's folder.
        workers: points at once on this machine; one runs in this process.
        threads: of each point; None leaves torch's own number to one worker, and shares the cores among several.
        ray: address of a Ray cluster, "local" for one started here; all of it must see `out` under the same path.
        allowed: what points may do.
        tell: progress.
        done: called after every point.

    Raises:
        UsageError: workers or threads below 1, or ray is not installed or not there.
        FolderInUseError: another process works on a point.
    """
    for name, value in (("workers", workers), ("threads", threads)):
        if value is not None and value < 1:
            raise UsageError(f"{name} is {value}; expected at least 1")
    left = [point for point in points if not is_run_folder(folder_of(out, point))]
    with told(out):
        (out / "points").mkdir(parents=True, exist_ok=True)
        (out / "failed").mkdir(exist_ok=True)
    allowed = allowed or Allowed()
    if ray is None and workers > 1 and threads is None:
        threads = max(1, _cores() // workers)
    way = _Way(workers, threads, ray, allowed)
    in_use = ""
    tell("points", len(points) - len(left), len(points))
    shared = shared_stages(points)
    broken = _share(shared, {points.index(point) for point in left}, out, way, tell)
    jobs, known = [], {}
    for number, point in enumerate(left):
        start = start_of(points.index(point), shared)
        if start is not None and start.name in broken:
            known[number] = broken[start.name]
        jobs.append(way.job(point.experiment.plain(), folder_of(out, point), _shared_folder(out, start)))
    for count, (number, problem) in enumerate(way.carry_out(jobs, known), 1):
        place = failure_of(out, left[number])
        if problem is None:
            place.unlink(missing_ok=True)
        elif problem["kind"] == "FolderInUseError":
            in_use = problem["error"]
        else:
            write_json(place, {"at": dict(left[number].at), **problem})
        done()
        tell("points", len(points) - len(left) + count, len(points))
    if in_use:
        raise FolderInUseError(in_use)


@dataclass(frozen=True)
class _Way:
    """How jobs are carried out."""

    workers: int
    threads: int | None
    ray: str | None
    allowed: Allowed

    def job(self, plain: Any, folder: Path, start: Path | None, shared: bool = False) -> Job:
        """One experiment to be carried out."""
        return plain, str(folder), self.threads, self.allowed, None if start is None else str(start), shared

    def carry_out(
        self, jobs: Sequence[Job], known: Mapping[int, Problem]
    ) -> Iterator[tuple[int, Problem | None]]:
        """Numbers of jobs with what went wrong, as they end; those of which that is known are not tried."""
        yield from known.items()
        numbers = [number for number in range(len(jobs)) if number not in known]
        left = [jobs[number] for number in numbers]
        if self.ray is not None:
            finished = _on_ray(left, self.ray) if left else iter(())
        elif self.workers == 1:
            finished = ((number, _attempt(*job)) for number, job in enumerate(left))
        else:
            finished = _in_processes(left, self.workers)
        for number, problem in finished:
            yield numbers[number], problem


def _shared_folder(out: Path, shared: Shared | None) -> Path | None:
    return None if shared is None else out / "shared" / shared.name


def _share(shared: Sequence[Shared], wanted: set[int], out: Path, way: _Way, tell: Tell) -> dict[str, Problem]:
    """Carry out the stages that points which are left begin with, each once; what went wrong, by name."""
    todo = [each for each in shared if wanted & set(each.points)]
    todo = [each for each in todo if not is_run_folder(out / "shared" / each.name)]
    broken: dict[str, Problem] = {}
    for length in sorted({each.length for each in todo}):
        same = [each for each in todo if each.length == length]
        starts = [start_of(each.points[0], shared, below=length) for each in same]
        known = {n: broken[s.name] for n, s in enumerate(starts) if s is not None and s.name in broken}
        jobs = [
            way.job(each.plain, out / "shared" / each.name, _shared_folder(out, start), True)
            for each, start in zip(same, starts, strict=True)
        ]
        tell(f"shared stages ({length})", 0, len(same))
        for count, (number, problem) in enumerate(way.carry_out(jobs, known), 1):
            if problem is not None:
                broken[same[number].name] = problem
            tell(f"shared stages ({length})", count, len(same))
    return broken


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _attempt(
    plain: Any,
    folder: str,
    threads: int | None,
    allowed: Allowed,
    start: str | None = None,
    shared: bool = False,
) -> Problem | None:
    """One experiment; None where it succeeded, else what went wrong."""
    from secateur.pipeline import Loading, experiment, experiment_to

    loading = Loading(allowed.offline, allowed.trust_remote_code, allowed.allow_pickle)
    try:
        with _threads(threads):
            experiment_to(
                experiment(plain),
                folder,
                if_exists="resume",
                allow_code=allowed.code,
                loading=loading,
                start=None if start is None else Path(start),
                shared=shared,
            )
    except Exception as error:
        known = isinstance(error, SecateurError | MemoryError)
        said = " ".join(str(error).split())[:500] or "no more is known"
        return {"kind": type(error).__name__, "error": said if known else f"{type(error).__name__}: {said}"}
    return None


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    if number is not None:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _in_processes(jobs: Sequence[Job], workers: int) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """At most so many at once, each in a process of its own: one that is killed takes no other along."""
    context = multiprocessing.get_context("spawn")
    running: dict[Any, tuple[int, Any, Any]] = {}
    waiting = list(enumerate(jobs))[::-1]
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                number, job = waiting.pop()
                mine, theirs = context.Pipe(duplex=False)
                process = context.Process(target=_child, args=(theirs, job), daemon=True)
                process.start()
                theirs.close()
                running[process.sentinel] = (number, process, mine)
            for sentinel in wait(list(running)):
                number, process, mine = running.pop(sentinel)
                yield number, _heard(process, mine)
    finally:
        for _, process, mine in running.values():
            process.terminate()
            process.join()
            mine.close()


def _heard(process: Any, mine: Any) -> dict[str, Any] | None:
    """What a process that has ended said, or how it died."""
    process.join()
    try:
        return json.loads(mine.recv_bytes()) if mine.poll() else _died(process.exitcode)
    except EOFError:
        return _died(process.exitcode)
    finally:
        mine.close()
        process.close()


def _died(code: int | None) -> dict[str, Any]:
    how = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with code {code}"
    return {"kind": "Killed", "error": f"the process {how}; too little memory kills by signal 9"}


def _child(pipe: Any, job: Job) -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:  # one whose parent was killed would hold the folders of points against the next call
        threading.Thread(target=lambda: (wait([parent.sentinel]), os._exit(1)), daemon=True).start()
    problem = _attempt(*job)
    pipe.send_bytes(json.dumps(problem).encode())
    pipe.close()


def _on_ray(jobs: Sequence[Job], address: str) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """Every point as a task of a Ray cluster."""
    try:
        import ray
    except ImportError as error:
        raise UsageError("--ray needs Ray: pip install 'secateur[ray]'") from error
    try:
        ray.init(
            address=address,
            ignore_reinit_error=True,
            log_to_driver=False,
            runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(_paths())}},
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        said = " ".join(str(error).split())[:300]
        raise UsageError(f"--ray {address}: no cluster answers ({said})") from error
    task = ray.remote(_there)
    here = str(Path.cwd())
    try:
        running = {
            task.options(num_cpus=job[2] or 1, max_retries=0).remote(here, *job): number
            for number, job in enumerate(jobs)
        }
        while running:
            (first,), _ = ray.wait(list(running), num_returns=1)
            number = running.pop(first)
            try:
                yield number, ray.get(first)
            except ray.exceptions.RayError as error:
                said = " ".join(str(error).split())[:500]
                yield number, {"kind": type(error).__name__, "error": f"Ray: {said}"}
    finally:
        ray.shutdown()


def _paths() -> list[str]:
    """Where this process finds the package, for workers that would not."""
    return [str(Path(__file__).resolve().parents[2])]


def _there(here: str, plain: Any, folder: str, threads: int | None, *more: Any) -> Problem | None:
    """`_attempt` on another machine, in the same directory, so that relative names mean the same."""
    os.chdir(here)
    return _attempt(plain, folder, threads or 1, *more)
