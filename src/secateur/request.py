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
from secateur.request_words import (
    METHOD_NAMES,
    parse_count,
    read_count,
    read_fraction,
    read_method,
    read_pattern,
    read_words,
)
from secateur.unit_words import says_units, units_of

if TYPE_CHECKING:
    from secateur.recipes import Recipe

__all__ = [
    "METHOD_NAMES",
    "PruneRequest",
    "build_recipe",
    "check_target",
    "checked",
    "cuts_units",
    "fault",
    "parse_count",
    "pattern_of",
    "request",
    "with_method",
]
# methods that decide how much is cut, and the setting that they decide by
_DECISIVE = {"threshold": "tau", "percentile": "percentile"}
# methods that are made for whole units alone
_OF_UNITS = ("l2", "gate", "flap", "active", "slimming")
UNITS_METHOD = "flap"  # for whole units where no method is named; see docs/results.md


Schema = TypeVar("Schema", bound=BaseModel)


class PruneRequest(BaseModel):
    """Everything that decides the result of `secateur prune`."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    model: Annotated[str, Field(min_length=1)]
    method: Annotated[str | None, BeforeValidator(read_method)] = (
        None  # best for causal language models, or magnitude
    )
    sparsity: Annotated[float | None, BeforeValidator(read_fraction), Field(ge=0, le=1)] = None
    nonzero: Annotated[int | None, BeforeValidator(read_count), Field(ge=0)] = None
    tau: Annotated[float | None, Field(ge=0, allow_inf_nan=False)] = None
    percentile: Annotated[float | None, Field(ge=0, le=100)] = None
    target: str | None = None  # in real units, of whole units
    pattern: Annotated[str | None, BeforeValidator(read_pattern)] = None  # weights, or the method's own
    minimum: Annotated[int, Field(ge=1)] = 1
    multiple: Annotated[int, Field(ge=1)] = 1
    homogeneous: bool = False
    shrink: bool = False  # write the model without the units that went
    decouple: Annotated[
        tuple[str, ...], BeforeValidator(read_words)
    ] = ()  # an index of their own for layers that share
    mend: Literal["none", "bias", "least-squares"] | None = None  # the method's own
    permute: bool = False  # input channels into the order in which N:M keeps most
    evolution: bool = False  # best also searches a share for each layer
    allocate: Literal["per-row", "per-layer", "global", "normalised", "per-cost"] | None = None
    only: Annotated[tuple[str, ...], BeforeValidator(read_words)] = ()
    skip: Annotated[tuple[str, ...], BeforeValidator(read_words)] = ()
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


def cuts_units(asked: PruneRequest) -> bool:
    """Whether whole units go, by the pattern or, where none is given, by the method."""
    if asked.pattern is not None:
        return says_units(asked.pattern)
    return asked.method in _OF_UNITS or (asked.method == "activation" and asked.tau is not None)


def with_method(asked: PruneRequest, *, language: bool) -> PruneRequest:
    """The request with its method settled.

    Where none was named: `flap` for whole units; else `best` for a causal language model, `magnitude` for all others.
    What was typed stays what was typed: a method that is filled in does not count as set.
    """
    if asked.method is not None:
        return asked
    method = UNITS_METHOD if cuts_units(asked) else "best" if language else "magnitude"
    settled = asked.model_copy(update={"method": method})
    settled.model_fields_set.discard("method")
    return settled


def pattern_of(asked: PruneRequest) -> str:
    """The pattern in words: as asked, single weights, or the units that the method is made for."""
    if asked.pattern is not None:
        return asked.pattern
    if not cuts_units(asked):
        return "weights"
    own = {"activation": "neurons", "active": "neurons", "slimming": "channels"}
    return own.get(str(asked.method), "heads,neurons")


def check_target(asked: PruneRequest) -> None:
    """Settings that do not belong together, told before the model is loaded.

    Raises:
        UsageError: no statement of how much is pruned, more than one, or a setting of another method.
    """
    if asked.max_ram is not None and not asked.stream:
        raise UsageError("--max-ram belongs to --stream; give both or neither")
    _check_units(asked)
    if asked.permute and not re.fullmatch(r"\d+:\d+", pattern_of(asked)):
        raise UsageError(
            f"--permute puts channels in order for N:M, as --pattern 2:4; got pattern {pattern_of(asked)}"
        )
    if asked.evolution and (asked.method not in (None, "best") or pattern_of(asked) != "weights"):
        raise UsageError(
            "--evolution searches a share for each layer; it belongs to method best and single weights"
        )
    method = asked.method or "best or magnitude, as no --method is given"
    decisive = {
        **_DECISIVE,
        **({"activation": "tau"} if asked.method == "activation" and asked.tau is not None else {}),
    }
    for name, setting in _DECISIVE.items():
        value = getattr(asked, setting)
        if asked.method == name and value is None:
            raise UsageError(f"method {name} needs --{setting}")
        if decisive.get(asked.method or "") != setting and value is not None:
            also = " (or to activation)" if setting == "tau" else ""
            raise UsageError(f"--{setting} belongs to method {name}{also}, got method {method}")
    given = [name for name in ("sparsity", "nonzero", "target") if getattr(asked, name) is not None]
    if asked.method in decisive:
        if given:
            raise UsageError(
                f"method {asked.method} decides by --{decisive[asked.method]} how much is cut; leave --{given[0]} out"
            )
        if asked.allocate is not None:
            raise UsageError(
                f"method {asked.method} decides for itself how much each layer pays; leave --allocate out"
            )
    elif len(given) > 1:
        raise UsageError(f"--{given[0]} and --{given[1]} both say how much is cut; leave one of them out")
    elif not given and not re.fullmatch(r"\d+:\d+", asked.pattern or ""):
        raise UsageError(
            "how much is to be cut? Give --sparsity 0.5 (half of the chosen weights become zero), --nonzero 104.69M, "
            "or a pattern that fixes it, as --pattern 2:4; for whole units also --target '2x fewer macs'"
        )


def _check_units(asked: PruneRequest) -> None:
    """What belongs to whole units, and what does not go with them."""
    if not cuts_units(asked):
        settings = {
            "target": None,
            "minimum": 1,
            "multiple": 1,
            "homogeneous": False,
            "shrink": False,
            "decouple": (),
            "mend": None,
        }
        for name, default in settings.items():
            if getattr(asked, name) != default:
                raise UsageError(
                    f"--{name} belongs to patterns of whole units, such as --pattern heads,neurons; "
                    f"got {asked.pattern or 'weights'}"
                )
        if asked.method in _OF_UNITS:
            raise UsageError(
                f"method {asked.method} is made for whole units, got --pattern {asked.pattern}; choose "
                f"--pattern {pattern_of(asked.model_copy(update={'pattern': None}))}, or another method"
            )
        return
    if asked.stream and not asked.shrink:
        raise UsageError("with --stream whole units are taken out of the files, not zeroed; add --shrink")
    if asked.decouple and (asked.stream or not asked.shrink):
        raise UsageError(
            "--decouple changes the model's modules, which only a compact folder can say; give --shrink, and leave "
            "--stream out"
        )
    if asked.nonzero is not None:
        raise UsageError(
            "--nonzero counts single weights; for whole units say --target '1.2M parameters' or --sparsity"
        )
    if asked.allocate == "per-row":
        raise UsageError(
            "--allocate per-row compares weights of one row; whole units have per-layer, global, normalised and "
            "per-cost"
        )


def build_recipe(asked: PruneRequest) -> Recipe:
    """The recipe that a request names; that of `best` is where its search starts.

    Raises:
        UsageError: settings that do not belong together.
    """
    from secateur import recipes
    from secateur.allocate import Normalised, PerCost, globally, per_layer, per_row

    check_target(asked)
    units = cuts_units(asked)
    if asked.method == "threshold":
        recipe = recipes.threshold(asked.tau)  # type: ignore[arg-type]
    elif asked.method == "activation" and asked.tau is not None:
        recipe = recipes.inactive(asked.tau)
    elif asked.method == "percentile":
        recipe = recipes.percentile(asked.percentile)  # type: ignore[arg-type]
    elif asked.method == "best":
        if asked.allocate is not None:
            raise UsageError(
                "method best tries allocations and picks one itself; leave --allocate out, or name another --method"
            )
        recipe = recipes.alps
    else:
        recipe = recipes.METHODS[asked.method or (UNITS_METHOD if units else "magnitude")]
    if asked.allocate is not None:
        shares: dict[str, Any] = {"per-row": per_row, "per-layer": per_layer, "global": globally}
        shares |= {"normalised": Normalised(), "per-cost": PerCost()}
        if asked.allocate == "per-cost" and not units:
            raise UsageError(
                "--allocate per-cost weighs whole units by what they cost, and single weights all cost the same; say "
                "normalised or global, or give a --pattern of units such as channels"
            )
        recipe = replace(recipe, allocate=shares[asked.allocate])
    text = pattern_of(asked)
    return _unit_recipe(asked, recipe, text) if units else replace(recipe, pattern=_pattern_of(text))


def _unit_recipe(asked: PruneRequest, recipe: Recipe, text: str) -> Recipe:
    """The recipe on whole units, mended as asked."""
    from secateur.recover import TakeOver

    update: Any = recipe.update
    if update is not None and not isinstance(update, TakeOver):
        raise UsageError(
            f"method {asked.method} mends single weights while it chooses, and whole units run through several "
            f"tensors; choose another --method, such as {UNITS_METHOD}, and mend with --mend least-squares"
        )
    if asked.mend is not None:
        update = None if asked.mend == "none" else TakeOver(asked.mend)
    shape = units_of(text, minimum=asked.minimum, multiple=asked.multiple, homogeneous=asked.homogeneous)
    return replace(recipe, pattern=shape, update=update)


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
