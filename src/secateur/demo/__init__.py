"""The demonstration: a small real language model pruned and measured, and the life cycle of a classifier's weights.

Everything it needs is in the package: the language model (3.5 million parameters, trained by
`scripts/train_demo_model.py`), Python's own documentation as text, scikit-learn's digits.
"""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from secateur import report
from secateur.demo.digits import Stage as DigitsStage
from secateur.demo.digits import life_cycle
from secateur.demo.language import Variant, variants
from secateur.folder import new_folder, write_json, write_text
from secateur.measure import Tell
from secateur.model import save

__all__ = ["run_demo"]


def run_demo(
    out: str | Path, *, texts: Sequence[str], if_exists: str, tell: Tell, say: Callable[[str], Any]
) -> Path:
    """Run the demonstration and write its folder; returns the path of the report.

    Args:
        out: folder to write.
        texts: texts to measure on beside Python's documentation, as for `secateur prune --evaluate`.
        if_exists: "fail" or "overwrite".
        tell: progress.
        say: prints a line.

    Cost: about a minute on two cores.
    """
    began = time.perf_counter()
    with new_folder(out, if_exists) as folder:
        say("A GPT-2 of 3.5 million parameters, pruned in one shot; perplexity on text it has not seen:")
        found = variants(texts, tell)
        say(_table(found))
        say("A classifier of handwritten digits through the life of its weights:")
        stages = life_cycle(tell)
        say(_digits_table(stages))
        _write(folder, found, stages, time.perf_counter() - began)
    return Path(out) / "report.html"


def _table(found: Sequence[Variant]) -> str:
    names = list(found[0].perplexity)
    head = f"{'':16}{'sparsity':>9}" + "".join(f"{name[:22]:>24}" for name in names) + f"{'same token':>12}"
    lines = [head]
    for one in found:
        values = "".join(f"{one.perplexity[name].value:24.2f}" for name in names)
        agreement = f"{one.agreement.value:12.1%}" if one.agreement else f"{'':12}"
        lines.append(f"{one.name:16}{one.sparsity:9.2f}{values}{agreement}")
    return "\n".join(lines)


def _digits_table(stages: Sequence[DigitsStage]) -> str:
    head = f"{'':36}{'zeros':>8}{'of':>8}{'accuracy':>10}"
    rows = [f"{s.name:36}{s.zeros:8,}{s.size:8,}{s.accuracy.value:10.1%}" for s in stages]
    return "\n".join([head, *rows])


def _write(folder: Path, found: Sequence[Variant], stages: Sequence[DigitsStage], seconds: float) -> None:
    plain = {one.name: [m.to_dict() for m in one.measurements] for one in found}
    write_json(folder / "metrics.json", plain | {stage.name: [stage.accuracy.to_dict()] for stage in stages})
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["variant", "measurement", "value", "unit"])
    for name, measured in plain.items():
        writer.writerows([name, m["name"], m["value"], m["unit"]] for m in measured)
    write_text(folder / "results.csv", text.getvalue())
    best = next(one for one in found if one.name == "Wanda 50 %")
    (folder / "wanda-50").mkdir()
    save(best.model, best.tokenizer, folder / "wanda-50")
    assert best.masks is not None
    best.masks.save(folder / "wanda-50" / "masks.safetensors")
    report.write(folder / "report.html", _page(found, stages, plain, seconds))


def _page(
    found: Sequence[Variant], stages: Sequence[DigitsStage], plain: dict[str, Any], seconds: float
) -> str:
    shown = [one for one in found if one.name in ("dense", "magnitude 50 %", "Wanda 50 %")]
    life = [report.Stage(stage.name, stage.histograms) for stage in stages]
    digits = report.Table(
        "A classifier of digits through the life of its weights",
        ["stage", "weights", "zeros", "sparsity", "test accuracy"],
        [[s.name, s.size, s.zeros, round(s.zeros / s.size, 4), round(s.accuracy.value, 4)] for s in stages],
        "Two convolutions, a hidden layer and a classification head on scikit-learn's digits. In the loop, every "
        "step of training sets the weights of magnitude at most tau to zero; they may grow again.",
    )
    return report.page(
        "The secateur demonstration",
        summary="A GPT-2 of 3.5 million parameters pruned in one shot by magnitude and by Wanda, and the life cycle "
        "of a digit classifier's weights.",
        measurements=plain,
        tradeoffs=[_tradeoff(found, name) for name in found[0].perplexity],
        layers=shown[-1].layers,
        stages=[report.Stage(one.name, one.histograms) for one in shown],
        tables=[digits],
        sections=[report.histogram_section(life, heading="The classifier's weights", anchor="life-cycle")],
        notes=[
            "The per-layer sparsity and the histograms of the language model show 50 %.",
            "Wanda's input norms come from text that the model itself wrote, so no calibration data were needed.",
            "The zeros are stored as ordinary numbers here: files and speed are those of the dense model.",
            f"The whole demonstration took {seconds:.0f} s on this machine.",
        ],
    )


def _tradeoff(found: Sequence[Variant], text: str) -> report.Tradeoff:
    lines: dict[str, list[report.Point]] = {}
    for one in found[1:]:
        point = report.Point(one.sparsity, one.perplexity[text].value, name=one.name)
        lines.setdefault(one.method, []).append(point)
    return report.Tradeoff(
        f"Perplexity on {text} against sparsity",
        "sparsity of attention and feed-forward layers",
        "perplexity (lower is better)",
        lines,
        reference=found[0].perplexity[text].value,
        log_y=True,
    )
