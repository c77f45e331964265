"""The public names, listed by hand: adding or losing one is a decision, not an accident."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
from pathlib import Path

import pytest

import secateur

NAMES = [
    "ADMM",
    "ALPS",
    "Adapters",
    "Best",
    "Blocks",
    "Columns",
    "Experiment",
    "Gradual",
    "IntoBias",
    "Layers",
    "LeastSquares",
    "LightningCallback",
    "Masks",
    "Measurement",
    "NM",
    "OWL",
    "Percentile",
    "Plan",
    "Quantized",
    "RIA",
    "Recipe",
    "RigL",
    "Rows",
    "Shares",
    "Slope",
    "SparseGPT",
    "Swaps",
    "TakeOver",
    "Threshold",
    "Thresholding",
    "Tuned",
    "Weights",
    "__version__",
    "activation",
    "admm",
    "align",
    "alps",
    "angular_distance",
    "best_",
    "block_influence",
    "choose_blocks",
    "choose_units",
    "constant",
    "cubic",
    "decouple_",
    "decoupling",
    "distill_",
    "drop_blocks",
    "drop_blocks_",
    "exponential",
    "fake_quantize_",
    "finetune_",
    "fisher",
    "flap",
    "geometric",
    "global_magnitude",
    "globally",
    "hold_",
    "last_blocks",
    "linear",
    "load",
    "load_quantized_",
    "lora_",
    "loss_without",
    "magnitude",
    "mend_units_",
    "merge_",
    "merge_blocks",
    "merge_blocks_",
    "movement",
    "per_layer",
    "per_row",
    "percentile",
    "permute_channels_",
    "plan",
    "points",
    "prune_",
    "prune_checkpoint",
    "quantize_",
    "random",
    "random_blocks",
    "read_experiment",
    "recalibrate_",
    "reconstruct_",
    "rescale_norms_",
    "rewind_",
    "ria",
    "run_experiment",
    "save",
    "save_quantized",
    "shrink",
    "shrink_checkpoint",
    "shrunk",
    "slice_like_",
    "slice_optimizer_",
    "snip",
    "sparsegpt",
    "sparsify_",
    "sparsity",
    "taylor",
    "threshold",
    "trainer_callback",
    "undo_",
    "wanda",
    "wanda_l1",
    "wanda_mended",
]

# a module that asks for an extra may be told apart only by importing it, which the tests do
MODULES = sorted(
    info.name
    for info in pkgutil.walk_packages(secateur.__path__, "secateur.")
    if not info.name.endswith("__main__")
)


def test_the_public_names_are_these():
    assert sorted(secateur.__all__) == sorted(NAMES)
    assert len(set(secateur.__all__)) == len(secateur.__all__)
    assert sorted(dir(secateur)) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_public_name_resolves_and_can_be_imported(name):
    value = getattr(secateur, name)
    space: dict = {}
    exec(f"from secateur import {name}", space)
    assert space[name] is value
    if inspect.isclass(value) or inspect.isfunction(value):
        assert inspect.getdoc(value), f"{name} has no docstring"
        assert value.__module__.startswith("secateur.")


def test_the_type_checker_sees_the_same_names():
    """`secateur/__init__.py` says them twice: once for Python, once under TYPE_CHECKING."""
    tree = ast.parse(Path(secateur.__file__).read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {
        alias.asname or alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == secateur._HOME
    assert sorted([*seen, "__version__"]) == sorted(NAMES)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'secateur' has no attribute 'prun_'"):
        secateur.prun_  # noqa: B018
    assert not hasattr(secateur, "nothing")


@pytest.mark.parametrize("module", MODULES)
def test_everything_that_a_module_exports_exists_and_is_documented(module):
    loaded = importlib.import_module(module)
    assert loaded.__doc__ or module.endswith("core"), f"{module} has no docstring"
    for name in getattr(loaded, "__all__", ()):
        value = getattr(loaded, name)
        if not (inspect.isclass(value) or inspect.isfunction(value)):
            continue
        assert inspect.getdoc(value), f"{module}.{name} has no docstring"
        if inspect.isclass(value):
            for method, function in vars(value).items():
                # a protocol's methods are only signatures; a field may have a lambda for its default
                written = inspect.isfunction(function) and function.__name__ == method
                if written and not method.startswith("_") and not getattr(value, "_is_protocol", False):
                    assert inspect.getdoc(getattr(value, method)), f"{module}.{name}.{method}"
