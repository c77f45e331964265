"""What all tests share: shapes checked at run time, the folder of real data, small models."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Generator, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

from .shapes import check

if TYPE_CHECKING:
    from .tiny import Folders, Secateur

# One thread and no network, whatever the machine: the same bytes everywhere.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

# before anything imports torch, which is left to the tests: the process that hands them out needs none
check(["secateur.core", "secateur.score", "secateur.pattern", "secateur.allocate"])
settings.register_profile(
    "secateur",
    deadline=None,
    max_examples=int(os.environ.get("SECATEUR_EXAMPLES", "30")),  # of a law; make test-slow looks at more
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("secateur")

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What is imported stays: no collection of garbage need look at it, then or later."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and models beside the repository."""
    if not SHARED.is_dir():
        pytest.skip("the folder of real data and models (../shared) is not beside this repository")
    return SHARED


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Tiny models in folders, each made when a test asks for it; no test changes them."""
    from .tiny import Folders

    return Folders(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four models in Hugging Face format with values of every size; GPT-2 with a tokenizer."""
    from secateur.model import save

    from .loading import make, tokenizer

    root = tmp_path_factory.mktemp("made")
    for kind in ("gpt2", "bert", "t5", "mixtral"):
        (root / kind).mkdir()
        save(make(kind), tokenizer() if kind == "gpt2" else None, root / kind)
    return root


@pytest.fixture(scope="session")
def story(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of sixty sentences."""
    from .tiny import text

    path = tmp_path_factory.mktemp("text") / "story.txt"
    path.write_text(text())
    return path


@pytest.fixture(scope="session")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's own file of functions that give models and data."""
    from .tiny import OWN

    path = tmp_path_factory.mktemp("own") / "own.py"
    path.write_text(OWN)
    return path


@pytest.fixture
def secateur(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Secateur:
    """The command line, called in this process."""
    from .tiny import Secateur

    return Secateur(monkeypatch, capsys)


@pytest.fixture
def prune(tmp_path: Path) -> Callable[..., Path]:
    """Prune to a fresh folder with few tokens, by magnitude unless said otherwise, and return the folder."""
    from secateur.request import request
    from secateur.run import prepare, prune_to

    def run(model: object, **asked: object) -> Path:
        asked = {"method": "magnitude", "samples": 4, "evaluate_tokens": 300, **asked}
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        prune_to(prepare(request({"model": str(model), **asked}), offline=True), out)
        return out

    return run


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def one_command_line() -> Iterator[None]:
    """typer makes the same commands anew, from all their options, whenever it is called."""
    import typer.main
    import typer.testing

    made = cache(typer.main.get_command)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(typer.main, "get_command", made)
        patch.setattr(typer.testing, "_get_command", made)
        yield


@pytest.fixture(autouse=True)
def seeded(one_thread: None) -> None:
    import torch

    torch.default_generator.manual_seed(
        0
    )  # torch.manual_seed notes for CUDA, slowly, what it is to do once it is there
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(0)
