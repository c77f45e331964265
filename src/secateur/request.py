"""What a user asks for, as a strict schema: every field known, typed and in range, or one clear line.

The same schema reads the command line's flags and a run's `recipe.yaml`. Words are looked up in tables
written here; nothing that a file says becomes code.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from secateur.errors import UsageError, nearest

if TYPE_CHECKING:
    from secateur.recipes import Recipe

__all__ = [
    "METHOD_NAMES",
    "PruneRequest",
    "build_recipe",
    "check_target",
    "checked",
    "fault",
    "parse_count",
    "request",
    "with_method",
]

# the methods of recipes.METHODS, the two that decide how much is cut and the one that tries several; listed so that
# --help needs no torch
METHOD_NAMES = (
    "best",
    "magnitude",
    "global-magnitude",
    "wanda",
    "wanda-l1",
    "ria",
    "activation",
    "random",
    "snip",
    "taylor",
    "fisher",
    "wanda-mended",
    "sparsegpt",
    "admm",
    "alps",
    "threshold",
    "percentile",
)
# methods that decide how much is cut, and the setting that they decide by
_DECISIVE = {"threshold": "tau", "percentile": "percentile"}
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9}


def parse_count(text: str | int) -> int:
    """A whole number of parameters, written out or with k, M or B.

    Example:
        >>> parse_count("104.69M"), parse_count("1,000"), parse_count(12)
        (104690000, 1000, 12)
    """
    found = re.fullmatch(
        r"(\d+)(?:\.(\d+))?\s*([kKmMbBgG]?)", str(text).replace(",", "").replace("_", "").strip()
    )
    if found is None:
        raise UsageError(f"{text!r} is no number of parameters; expected for example 104690000 or 104.69M")
    whole, fraction, unit = found[1], found[2] or "", _UNITS[found[3].lower()]
    value, rest = divmod(int(whole + fraction) * unit, 10 ** len(fraction))
    if rest:
        raise UsageError(
            f"{text!r} is no whole number of parameters; expected for example 104690000 or 104.69M"
        )
    return value


def _count(value: Any) -> Any:
    return value if value is None or isinstance(value, int) else parse_count(value)


def _words(value: Any) -> Any:
    """One word or a list of them; YAML knows no tuples."""
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


def _fraction(value: Any) -> Any:
    if isinstance(value, int | float) and not isinstance(value, bool) and 1 < value <= 100:
        raise ValueError(f"{value:g} is not in [0, 1]. Did you mean {value / 100:g}?")
    return value


def _method(value: Any) -> Any:
    if value is None:
        return None
    name = str(value).replace("_", "-")
    if name not in METHOD_NAMES:
        raise ValueError(f"{value!r} is no method; {nearest(name, METHOD_NAMES)}")
    return name


def _pattern(value: Any) -> Any:
    text = str(value)
    if text in ("weights", "rows", "columns") or re.fullmatch(r"\d+:\d+|blocks:\d+x\d+", text):
        return text
    raise ValueError(
        f"{text!r} is no pattern; expected weights, rows, columns, 2:4 (n kept of m) or blocks:4x1"
    )


Schema = TypeVar("Schema", bound=BaseModel)


class PruneRequest(BaseModel):
    """Everything that decides the result of `secateur prune`."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    model: Annotated[str, Field(min_length=1)]
    method: Annotated[str | None, BeforeValidator(_method)] = (
        None  # best for causal language models, or magnitude
    )
    sparsity: Annotated[float | None, BeforeValidator(_fraction), Field(ge=0, le=1)] = None
    nonzero: Annotated[int | None, BeforeValidator(_count), Field(ge=0)] = None
    tau: Annotated[float | None, Field(ge=0, allow_inf_nan=False)] = None
    percentile: Annotated[float | None, Field(ge=0, le=100)] = None
    pattern: Annotated[str, BeforeValidator(_pattern)] = "weights"
    allocate: Literal["per-row", "per-layer", "global"] | None = None
    only: Annotated[tuple[str, ...], BeforeValidator(_words)] = ()
    skip: Annotated[tuple[str, ...], BeforeValidator(_words)] = ()
    data: str | None = None
    samples: Annotated[int, Field(ge=1)] = 128
    context: Annotated[int | None, Field(ge=2)] = None
    evaluate: str | None = None
    labelled: str | None = None
    evaluate_tokens: Annotated[int, Field(ge=2)] = 32_768
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    dtype: str | None = None  # float32 for a checkpoint, as it is built for a function
    device: str = "cpu"
    stream: bool = False  # from file to file
    max_ram: str | None = None


def request(given: dict[str, Any]) -> PruneRequest:
    """Check what was asked for.

    Raises:
        UsageError: an unknown key, a wrong type, a value out of range, naming the field, what was expected
            and, for words, the nearest known one.
    """
    return checked(PruneRequest, given)


def checked(kind: type[Schema], given: dict[str, Any]) -> Schema:
    """A request of any kind; see `request`."""
    try:
        return kind(**given)
    except ValidationError as error:
        raise UsageError("; ".join(fault(problem, kind.model_fields) for problem in error.errors())) from None


def fault(problem: Any, known: Iterable[str]) -> str:
    """One of pydantic's findings in our words: the setting, what was expected, what was found.

    Args:
        problem: an entry of `ValidationError.errors()`.
        known: names of settings, for the nearest one.
    """
    name = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"{name} is no setting; {nearest(name, known)}"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"{name}: {message}" if not message.startswith(name) else message
    return f"{name}: {message}, got {problem['input']!r}"


def with_method(asked: PruneRequest, *, language: bool) -> PruneRequest:
    """The request with its method settled: where none was named, `best` for a causal language model, else magnitude.

    What was typed stays what was typed: a method that is filled in does not count as set.
    """
    if asked.method is not None:
        return asked
    settled = asked.model_copy(update={"method": "best" if language else "magnitude"})
    settled.model_fields_set.discard("method")
    return settled


def check_target(asked: PruneRequest) -> None:
    """Settings that do not belong together, told before the model is loaded.

    Raises:
        UsageError: no statement of how much is pruned, more than one, or a setting of another method.
    """
    if asked.max_ram is not None and not asked.stream:
        raise UsageError("--max-ram belongs to --stream; give both or neither")
    method = asked.method or "best or magnitude, as no --method is given"
    for decisive, setting in _DECISIVE.items():
        value = getattr(asked, setting)
        if asked.method == decisive and value is None:
            raise UsageError(f"method {decisive} needs --{setting}")
        if asked.method != decisive and value is not None:
            raise UsageError(f"--{setting} belongs to method {decisive}, got method {method}")
    given = [name for name in ("sparsity", "nonzero") if getattr(asked, name) is not None]
    if asked.method in _DECISIVE:
        if given:
            raise UsageError(
                f"method {asked.method} decides by --{_DECISIVE[asked.method]} how much is cut; leave --{given[0]} out"
            )
        if asked.allocate is not None:
            raise UsageError(
                f"method {asked.method} decides for itself how much each layer pays; leave --allocate out"
            )
    elif len(given) > 1:
        raise UsageError("--sparsity and --nonzero both say how much is cut; leave one of them out")
    elif not given and not re.fullmatch(r"\d+:\d+", asked.pattern):
        raise UsageError(
            "how much is to be cut? Give --sparsity 0.5 (half of the chosen weights become zero), --nonzero 104.69M, "
            "or a pattern that fixes it, as --pattern 2:4"
        )


def build_recipe(asked: PruneRequest) -> Recipe:
    """The recipe that a request names; that of `best` is where its search starts.

    Raises:
        UsageError: settings that do not belong together.
    """
    from secateur import recipes
    from secateur.allocate import globally, per_layer, per_row

    check_target(asked)
    if asked.method == "threshold":
        recipe = recipes.threshold(asked.tau)  # type: ignore[arg-type]
    elif asked.method == "percentile":
        recipe = recipes.percentile(asked.percentile)  # type: ignore[arg-type]
    elif asked.method == "best":
        if asked.allocate is not None:
            raise UsageError(
                "method best tries allocations and picks one itself; leave --allocate out, or name another --method"
            )
        recipe = recipes.alps
    else:
        recipe = recipes.METHODS[asked.method or "magnitude"]
    if asked.allocate is not None:
        shares = {"per-row": per_row, "per-layer": per_layer, "global": globally}
        recipe = replace(recipe, allocate=shares[asked.allocate])
    return replace(recipe, pattern=_pattern_of(asked.pattern))


def _pattern_of(text: str) -> Any:
    from secateur.pattern import NM, Blocks, Columns, Rows, Weights

    if text.startswith("blocks:"):
        rows, columns = text.removeprefix("blocks:").split("x")
        return Blocks(int(rows), int(columns))
    if ":" in text:
        n, m = text.split(":")
        return NM(int(n), int(m))
    return {"weights": Weights(), "rows": Rows(), "columns": Columns()}[text]


def spec_name(spec: str) -> str:
    """What a model or data source is called in results: its last path component, never a path of this machine.

    A name on the Hugging Face hub keeps its owner. Characters that do not print, which would break a line or a
    table, become question marks.

    Example:
        >>> spec_name("/home/me/models/gpt2/"), spec_name("lib/net.py:build@/home/me/weights.safetensors")
        ('gpt2', 'net.py:build@weights.safetensors')
    """
    from secateur.own import is_own, split

    if is_own(spec):
        path, function, weights = split(spec)
        name = f"{path.name}:{function}" + (f"@{Path(weights).name}" if weights else "")
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", spec) and not Path(spec).exists():
        name = spec
    else:
        name = Path(spec).name if Path(spec).name not in ("", "..") else Path(spec).resolve().name
    return "".join(letter if letter.isprintable() else "?" for letter in name) or "?"
