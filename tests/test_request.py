"""What is asked for: read strictly, told in one line, the same again from a recipe file."""

from __future__ import annotations

import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import pytest
import typer
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from secateur import recipes
from secateur.allocate import Normalised, Percentile, Threshold, globally, per_layer, per_row
from secateur.errors import UsageError
from secateur.pattern import NM, Blocks, Columns, Rows, Weights
from secateur.request import (
    METHOD_NAMES,
    PruneRequest,
    build_recipe,
    parse_count,
    request,
    spec_name,
    with_method,
)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("104.69M", 104_690_000),
        ("104690000", 104_690_000),
        ("104,690,000", 104_690_000),
        ("104_690_000", 104_690_000),
        ("1.5k", 1500),
        ("1.5 K", 1500),
        (" 7B ", 7_000_000_000),
        ("2g", 2_000_000_000),
        ("0", 0),
        ("3.0", 3),
        (12, 12),
    ],
)
def test_counts_as_people_write_them(text, count):
    assert parse_count(text) == count


@given(st.integers(0, 10**13), st.sampled_from([("", 0), ("k", 3), ("M", 6), ("B", 9)]))
def test_a_count_is_exact_where_a_float_would_round(count, unit):
    letter, power = unit
    written = format(Decimal(count).scaleb(-power), "f") + letter
    assert parse_count(written) == count


@pytest.mark.parametrize(
    "text", ["", "M", "1e6", "-5", "1.5", "1.2345k", "ten", "5T", "1.2.3", "0x10", "nan", "½"]
)
def test_no_count(text):
    with pytest.raises(
        UsageError, match=r"is no (whole )?number of parameters; expected for example 104690000"
    ):
        parse_count(text)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sparsity": 50}, "sparsity: 50 is not in [0, 1]. Did you mean 0.5?"),
        ({"sparsity": 33.3}, "sparsity: 33.3 is not in [0, 1]. Did you mean 0.333?"),
        ({"sparsity": 150.0}, "sparsity: Input should be less than or equal to 1, got 150.0"),
        ({"sparsity": -0.5}, "sparsity: Input should be greater than or equal to 0, got -0.5"),
        ({"sparsity": float("nan")}, "sparsity: Input should be greater than or equal to 0, got nan"),
        ({"sparsity": float("inf")}, "sparsity: Input should be less than or equal to 1, got inf"),
        ({"sparsity": "0.5"}, "sparsity: Input should be a valid number, got '0.5'"),
        ({"sparsity": True}, "sparsity: Input should be a valid number, got True"),
        ({"tau": float("nan")}, "tau: Input should be a finite number, got nan"),
        ({"tau": float("inf")}, "tau: Input should be a finite number, got inf"),
        ({"tau": -1.0}, "tau: Input should be greater than or equal to 0, got -1.0"),
        ({"percentile": float("nan")}, "percentile: Input should be less than or equal to 100, got nan"),
        ({"percentile": 101}, "percentile: Input should be less than or equal to 100, got 101"),
        ({"method": "wandaa"}, "method: 'wandaa' is no method; nearest: wanda, wanda-l1"),
        ({"method": "os.system"}, "method: 'os.system' is no method; known: best, magnitude, "),
        (
            {"pattern": "2-4"},
            "pattern: '2-4' is no pattern; expected weights, rows, columns, 2:4 (n kept of m)",
        ),
        ({"pattern": 124}, "pattern: '124' is no pattern"),
        (
            {"allocate": "per_head"},
            "allocate: Input should be 'per-row', 'per-layer', 'global', 'normalised' or 'per-cost', got 'per_head'",
        ),
        ({"nonzero": "12.3456k"}, "nonzero: '12.3456k' is no whole number of parameters"),
        ({"nonzero": -1}, "nonzero: Input should be greater than or equal to 0, got -1"),
        ({"nonzero": 1.5}, "nonzero: 1.5 is no whole number of parameters"),
        ({"samples": 0}, "samples: Input should be greater than or equal to 1, got 0"),
        ({"samples": 3.5}, "samples: Input should be a valid integer, got 3.5"),
        ({"context": 1}, "context: Input should be greater than or equal to 2, got 1"),
        ({"seed": 2**32}, "seed: Input should be less than 4294967296, got 4294967296"),
        ({"only": 5}, "only: Input should be a valid tuple, got 5"),
        ({"only": [5]}, "only.0: Input should be a valid string, got 5"),
        ({"sparcity": 0.5}, "sparcity is no setting; nearest: sparsity"),
        ({"model": ""}, "model: String should have at least 1 character, got ''"),
        ({"sparsity": 50, "seed": -1}, "Did you mean 0.5?; seed: Input should be"),
    ],
)
def test_a_mistake_names_the_setting_and_what_was_expected(given, message):
    with pytest.raises(UsageError) as told:
        request({"model": "m", **given})
    assert message in str(told.value)
    assert "\n" not in str(told.value)


def test_the_model_is_needed():
    with pytest.raises(UsageError, match="model: Field required"):
        request({})


def test_a_request_does_not_change():
    asked = request({"model": "m", "sparsity": 0.5})
    with pytest.raises(ValidationError, match="frozen"):
        asked.sparsity = 0.6


def test_one_word_or_a_list_of_words():
    assert request({"model": "m", "only": "ffn"}).only == ("ffn",)
    assert request({"model": "m", "only": ["ffn", "head"]}).only == ("ffn", "head")


REQUESTS = st.fixed_dictionaries(
    {"model": st.text(min_size=1)},
    optional={
        "method": st.sampled_from(METHOD_NAMES),
        "sparsity": st.floats(0, 1),
        "nonzero": st.integers(0, 10**12),
        "tau": st.floats(0, 10),
        "percentile": st.floats(0, 100),
        "pattern": st.sampled_from(["weights", "rows", "columns", "2:4", "1:30", "blocks:4x1"]),
        "allocate": st.sampled_from(["per-row", "per-layer", "global"]),
        "only": st.lists(st.text(), max_size=3),
        "data": st.text(),
        "samples": st.integers(1, 10**6),
        "seed": st.integers(0, 2**32 - 1),
    },
)


@given(REQUESTS)
@pytest.mark.thorough
def test_a_recipe_file_gives_the_request_back(given):
    asked = request(given)
    written = yaml.safe_dump(asked.model_dump(mode="json", exclude_unset=True), allow_unicode=True)
    again = yaml.safe_load(written)
    assert request(again) == asked
    assert set(again) == set(given)


@pytest.mark.parametrize(
    ("given", "recipe"),
    [
        ({"sparsity": 0.5}, recipes.magnitude),
        ({"sparsity": 0.5, "method": "best"}, recipes.alps),
        ({"sparsity": 0.5, "method": "global_magnitude"}, recipes.global_magnitude),
        ({"sparsity": 0.5, "method": "wanda"}, recipes.wanda),
        ({"nonzero": "1k", "method": "random"}, recipes.random),
        ({"method": "threshold", "tau": 0.4}, recipes.Recipe(recipes.magnitude.score, allocate=Threshold(0.4))),
        ({"method": "percentile", "percentile": 30}, recipes.percentile(30.0)),
    ],
)
def test_a_method_is_its_recipe(given, recipe):
    assert build_recipe(request({"model": "m", **given})) == recipe


@pytest.mark.parametrize(
    ("pattern", "shape"),
    [
        ("weights", Weights()),
        ("rows", Rows()),
        ("columns", Columns()),
        ("2:4", NM(2, 4)),
        ("blocks:4x1", Blocks(4, 1)),
    ],
)
def test_patterns(pattern, shape):
    given = {} if pattern == "2:4" else {"sparsity": 0.5}
    assert build_recipe(request({"model": "m", "pattern": pattern, **given})).pattern == shape


@pytest.mark.parametrize(
    ("word", "function"),
    [("per-row", per_row), ("per-layer", per_layer), ("global", globally), ("normalised", Normalised())],
)
def test_allocators(word, function):
    assert build_recipe(request({"model": "m", "sparsity": 0.5, "allocate": word})).allocate == function


def test_the_decisive_methods_carry_their_number():
    assert build_recipe(
        request({"model": "m", "method": "percentile", "percentile": 7})
    ).allocate == Percentile(7.0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "how much is to be cut? Give --sparsity 0.5"),
        ({"sparsity": 0.5, "nonzero": 5}, "--sparsity and --nonzero both say how much is cut"),
        ({"method": "threshold"}, "method threshold needs --tau"),
        ({"method": "percentile"}, "method percentile needs --percentile"),
        (
            {"method": "wanda", "sparsity": 0.5, "tau": 0.1},
            "--tau belongs to method threshold (or to activation), got method wanda",
        ),
        (
            {"sparsity": 0.5, "percentile": 3},
            "--percentile belongs to method percentile, got method best or magnitude, as no --method is given",
        ),
        (
            {"method": "best", "sparsity": 0.5, "allocate": "global"},
            "method best tries allocations and picks one itself; leave --allocate out, or name another --method",
        ),
        (
            {"method": "threshold", "tau": 0.1, "sparsity": 0.5},
            "decides by --tau how much is cut; leave --sparsity",
        ),
        (
            {"method": "percentile", "percentile": 3, "nonzero": 5},
            "decides by --percentile how much is cut; leave --n",
        ),
        (
            {"method": "threshold", "tau": 0.1, "allocate": "global"},
            "decides for itself how much each layer pays",
        ),
        ({"pattern": "4:2"}, "4:2 keeps 4 of every 2; expected 0 < n <= m"),
        ({"pattern": "0:4"}, "expected 0 < n <= m"),
        ({"pattern": "blocks:0x4", "sparsity": 0.5}, "holds no weight"),
        ({"pattern": "2:4", "allocate": "global"}, "fixes the sparsity of every group"),
    ],
)
def test_settings_that_do_not_belong_together(given, message):
    with pytest.raises(UsageError) as told:
        build_recipe(request({"model": "m", **given}))
    assert message in str(told.value)


def test_every_method_of_the_library_has_its_word():
    assert set(METHOD_NAMES) == {*recipes.METHODS, "best", "threshold", "percentile"}


@pytest.mark.parametrize(("language", "method"), [(True, "best"), (False, "magnitude")])
def test_the_default_method_depends_on_the_model_and_stays_unsaid(language, method):
    typed = request({"model": "m", "sparsity": 0.5})
    settled = with_method(typed, language=language)
    assert settled.method == method
    assert typed.method is None
    assert set(settled.model_dump(exclude_unset=True)) == {"model", "sparsity"}


@pytest.mark.parametrize("language", [True, False])
def test_a_method_that_was_named_stays(language):
    typed = request({"model": "m", "sparsity": 0.5, "method": "wanda"})
    assert with_method(typed, language=language) is typed


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("/home/me/models/gpt2/", "gpt2"),
        ("~/gpt2", "gpt2"),
        ("openai-community/gpt2", "openai-community/gpt2"),
        ("net.py:build", "net.py:build"),
        ("/home/me/net.py:build@/home/me/net.safetensors", "net.py:build@net.safetensors"),
        ("/home/me/text.jsonl:field", "text.jsonl:field"),
        ("models/a\nb\x1b[31m", "a?b?[31m"),
        ("models/\udcff", "?"),
        ("/", "?"),
    ],
)
def test_results_name_things_without_their_place(spec, name):
    assert spec_name(spec) == name


def test_the_name_of_where_we_are_is_its_folder(tmp_path, monkeypatch):
    (tmp_path / "gpt2" / "run").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "gpt2")
    assert spec_name(".") == "gpt2"
    monkeypatch.chdir("run")
    assert spec_name("..") == "gpt2"
    monkeypatch.chdir(tmp_path)
    assert spec_name("gpt2/run") == "run"  # a folder of that name is no name on the hub


def test_reading_a_request_needs_no_torch():
    code = "import sys, secateur.request as r; r.request({'model': 'm'}); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_the_schema_is_closed():
    assert PruneRequest.model_config["extra"] == "forbid"
    assert Path(sys.modules[PruneRequest.__module__].__file__).name == "request.py"


def test_evolution_belongs_to_best():
    assert (
        build_recipe(request({"model": "m", "sparsity": 0.5, "method": "best", "evolution": True}))
        == recipes.alps
    )
    for other in ({"method": "wanda", "sparsity": 0.5}, {"pattern": "2:4"}):
        with pytest.raises(
            UsageError, match="--evolution searches a share for each layer; it belongs to method best"
        ):
            build_recipe(request({"model": "m", "evolution": True, **other}))


def test_permuting_belongs_to_n_of_m():
    assert build_recipe(request({"model": "m", "pattern": "2:4", "permute": True})).pattern == NM(2, 4)
    with pytest.raises(UsageError, match=r"--permute puts channels in order for N:M.* got pattern rows"):
        build_recipe(request({"model": "m", "sparsity": 0.5, "pattern": "rows", "permute": True}))


@pytest.mark.parametrize(
    ("text", "hint"), [("50%", " Did you mean 0.5?"), ("0,25", " Did you mean 0.25?"), ("half", "")]
)
def test_a_fraction_that_is_no_number_is_told_with_what_was_meant(text, hint):
    from secateur.cli.options import fraction

    assert fraction("0.5") == 0.5
    with pytest.raises(typer.BadParameter) as told:
        fraction(text)
    assert str(told.value) == f"{text!r} is no number; a fraction is expected, as 0.5.{hint}"
