"""What all tests share: shapes checked at run time, the folder of real data, small models."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from jaxtyping import install_import_hook

# One thread and no network, whatever the machine: the same bytes everywhere.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

CHECKED = ["secateur.core", "secateur.score", "secateur.pattern", "secateur.allocate"]
install_import_hook(CHECKED, "beartype.beartype")

import torch  # noqa: E402

torch.set_num_threads(1)
settings.register_profile(
    "secateur",
    deadline=None,
    max_examples=int(os.environ.get("SECATEUR_EXAMPLES", "30")),  # of a law; make test-slow looks at more
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("secateur")

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and models beside the repository."""
    if not SHARED.is_dir():
        pytest.skip("the folder of real data and models (../shared) is not beside this repository")
    return SHARED


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
