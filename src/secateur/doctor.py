"""`secateur doctor`: what this machine and this installation can do, and what is in the way."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch

from secateur import __version__, evaluate
from secateur.core import native
from secateur.errors import UsageError

__all__ = ["findings"]

EXTRAS = {
    "hf": ("transformers", "tokenizers"),
    "report": ("plotly",),
    "metrics": ("rouge-score", "scikit-learn"),
    "parquet": ("pyarrow",),
    "harness": ("lm-eval",),
}


def findings() -> dict[str, str]:
    """Versions, extras, instruction sets, threads, memory, known traps and which path is active, each as one line."""
    found = {"secateur": __version__, "python": platform.python_version()}
    for package in ("torch", "numpy", "safetensors", "pydantic"):
        found[package] = _version(package) or "missing"
    for extra, packages in EXTRAS.items():
        held = [f"{name} {_version(name)}" if _version(name) else f"{name} missing" for name in packages]
        lacking = any(_version(name) is None for name in packages)
        found[f"extra {extra}"] = ", ".join(held) + (f" (pip install 'secateur[{extra}]')" if lacking else "")
    found |= {str(key): str(value) for key, value in evaluate.hardware().items() if key not in found}
    found["cuda"] = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none"
    found["memory free"] = _memory()
    found["torchvision"] = _torchvision()
    found["selection"] = native.path()
    found["sparse kernels"] = _sparse()
    return found


def _sparse() -> str:
    from secateur.deploy.sparse import kernels

    try:
        used = kernels.LEVELS[kernels.level()]
    except UsageError as error:
        return str(error)
    if native.library() is None:
        return native.path()
    return f"{used} ({kernels.ENVIRONMENT} of {', '.join(kernels.LEVELS)} takes a lesser one)"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _memory() -> str:
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            fields = dict(line.split(":", 1) for line in file)
        free, whole = (int(fields[name].split()[0]) / 1e6 for name in ("MemAvailable", "MemTotal"))
        return f"{free:.1f} GB of {whole:.1f} GB"
    except (OSError, KeyError, ValueError):
        return "unknown"


def _torchvision() -> str:
    """The wheel on the package index is built for CUDA; beside a CPU torch it breaks transformers' imports."""
    if find_spec("torchvision") is None:
        return "not installed (not needed)"
    if "+cpu" in torch.__version__ and "+cpu" not in (_version("torchvision") or ""):
        return "a CUDA build beside a CPU torch: transformers may fail to import; pip uninstall torchvision"
    return _version("torchvision") or "installed"
