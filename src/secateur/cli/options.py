"""The command line's program and the options that mean the same for every verb."""

from __future__ import annotations

from typing import Annotated

import typer

from secateur import __version__
from secateur.errors import UsageError

__all__ = [
    "Device",
    "Dtype",
    "Json",
    "MaxRam",
    "Model",
    "Offline",
    "Only",
    "Pickle",
    "Skip",
    "Threads",
    "Trust",
    "app",
    "fraction",
    "listed",
    "read_block",
    "use_threads",
]

app = typer.Typer(
    name="secateur",
    help="Prune a neural network and keep the gain.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Model = Annotated[
    str, typer.Argument(help="Hugging Face folder or name, or file.py:function[@weights.safetensors]")
]
Only = Annotated[
    list[str] | None,
    typer.Option("--only", help="layers: all, attention, ffn, encoder, decoder, head, or globs; repeatable"),
]
Skip = Annotated[list[str] | None, typer.Option("--skip", help="layers to leave as they are; like --only")]
Offline = Annotated[bool, typer.Option("--offline", help="use no network")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="run Python files that a checkpoint brings")]
Pickle = Annotated[bool, typer.Option("--allow-pickle", help="accept weights in pickle (opened weights-only)")]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads")]
MaxRam = Annotated[str | None, typer.Option("--max-ram", help='memory that --stream may use, as "16 GB"')]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object instead of text")]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda, ...")]
Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype", help="float32, bfloat16, float16 or auto (as stored); default: float32, own code as built"
    ),
]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"secateur {__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    """Prune a neural network and keep the gain."""


def listed(words: list[str] | None) -> tuple[str, ...]:
    """Words of a repeatable option, which may also be separated by commas."""
    return tuple(word for text in words or () for word in (part.strip() for part in text.split(",")) if word)


def read_block(text: str) -> tuple[int, int]:
    """Rows and columns of `--block`: a number of rows, or both, as in 4x4."""
    parts = text.split("x")
    if len(parts) > 2 or not all(part.isdigit() for part in parts):
        raise UsageError(f"--block {text!r} is no block; expected a number of rows, 1, 4 or 16, or 4x4")
    return int(parts[0]), int(parts[-1]) if len(parts) == 2 else 1


def use_threads(threads: int | None) -> None:
    """Set torch's thread count, if one was asked for."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def fraction(text: str) -> float:
    """A number in the words of a command line; what people write instead is told in those of the number meant."""
    try:
        return float(text)
    except ValueError:
        plain = text.strip().replace(",", ".")
        try:
            meant = float(plain.removesuffix("%")) / (100 if plain.endswith("%") else 1)
        except ValueError:
            hint = ""
        else:
            hint = f" Did you mean {meant:g}?"
        raise typer.BadParameter(f"{text!r} is no number; a fraction is expected, as 0.5.{hint}") from None
