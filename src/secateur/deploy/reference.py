"""What a shrunk model has to compute: the masked model on fresh inputs, also of other shapes."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from secateur.core.example import Example
from secateur.core.units import analyse, masked_program
from secateur.deploy.compare import Output, answer, difference
from secateur.deploy.example import fresh, other_shapes, vocabularies
from secateur.deploy.masking import Masking
from secateur.deploy.parts import Counts, Parts
from secateur.errors import UsageError

__all__ = ["Reference"]


@dataclass
class Reference:
    """The masked model's answers, computed once.

    Attributes:
        cases: (words, inputs, the masked model's output).
    """

    cases: list[tuple[str, Example, list[Tensor]]] = field(default_factory=list)

    @staticmethod
    def of(
        model: nn.Module, parts: Parts, counts: Counts, example: Example, output: Output, *, seed: int = 0
    ) -> Reference:
        """Run the masked model on fresh numbers in the example's shape, and in other shapes where it can.

        Axes that are exact are masked in the eager model itself; where norms run over the survivors, the
        exported graph of each shape is masked.

        Cost: a forward for each shape, and an export for each other one if an axis is not exact.
        """
        generator = torch.Generator().manual_seed(seed)
        whole = parts.whole
        rows = vocabularies(whole.program) if whole is not None else {}
        exact = all(units.exact for _, units in parts.axes() if units.leaf in counts)
        if not exact and whole is None:
            names = [name for name, units in parts.axes() if units.leaf in counts and not units.exact]
            raise UsageError(
                f"{names[0]}: a norm or mean runs over it, and the whole model cannot be exported; leave it whole."
            )
        index = parts.index(counts)
        found = Reference()
        given = fresh(example, rows, generator)
        program = None
        if whole is not None:
            program = masked_program(whole, parts.by_name("", counts), lazy=True)
            found.cases.append(("fresh inputs", given, answer(program, given)))
        else:
            with Masking(model, index):
                found.cases.append(("fresh inputs", given, answer(model, given, output)))
        found._refuse_constant(model, answer(program, example) if program is not None else None)
        for other in other_shapes(example):
            if found._add_shape(model, parts, counts, fresh(other, rows, generator), output, exact):
                break
        return found

    def _refuse_constant(self, model: nn.Module, other: list[Tensor] | None) -> None:
        """Equal answers to different inputs prove nothing."""
        if other is not None and difference(self.cases[0][2], other) < 1e-6:
            raise UsageError(
                f"{type(model).__name__}: the masked model's output does not depend on its inputs, so that nothing "
                "can be checked by it. Expected trained weights, an example of real inputs and an output= that "
                "depends on them."
            )

    def _add_shape(
        self, model: nn.Module, parts: Parts, counts: Counts, given: Example, output: Output, exact: bool
    ) -> bool:
        words = f"inputs of shape {' and '.join(str(tuple(x.shape)) for x in given.tensors()[:2])}"
        try:
            if exact:
                with Masking(model, parts.index(counts)):
                    wanted = answer(model, given, output)
            else:
                again = analyse(model, given.args, given.kwargs, output=output)
                wanted = answer(masked_program(again, parts.by_name("", counts), lazy=True), given)
        except Exception:  # whatever the model raises: it takes no inputs of this shape
            return False
        self.cases.append((words, given, wanted))
        return True

    def difference(self, model: nn.Module, output: Output, *, until: float) -> float:
        """Largest relative difference over all cases, or the first above `until`."""
        worst = 0.0
        for _, given, wanted in self.cases:
            worst = max(worst, difference(wanted, answer(model, given, output)))
            if worst > until:
                break
        return worst
