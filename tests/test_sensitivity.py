"""What each layer's sparsity alone costs: against brute force, resumed, refused."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

from secateur import prune_, sparsegpt, wanda
from secateur.errors import InputError, UsageError
from secateur.sensitivity import Journal, sensitivity

from .tiny import OWN, Secateur

SHARES = (0.25, 0.5, 1.0)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 5))


def batches() -> list:
    random = torch.Generator().manual_seed(1)
    return [
        (torch.randn(n, 12, generator=random), torch.randint(0, 5, (n,), generator=random)) for n in (9, 30, 4)
    ]


@pytest.mark.parametrize("recipe", [None, wanda])
@pytest.mark.parametrize("measure", ["kl", "loss", "error"])
def test_every_point_is_what_pruning_that_layer_alone_gives(measure, recipe):
    dense, data = model(), batches()
    options = {} if recipe is None else {"recipe": recipe}
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    found = sensitivity(dense, data, measure=measure, sparsities=SHARES, **options)
    assert all(torch.equal(before[name], value) for name, value in dense.state_dict().items())
    x, y = (torch.cat([batch[at] for batch in data]) for at in (0, 1))
    for place, name in ((0, "0.weight"), (2, "2.weight"), (4, "4.weight")):
        for at, share in enumerate(SHARES):
            pruned = copy.deepcopy(dense)
            prune_(pruned, share, *options.values(), data=data, only=str(place))
            with torch.no_grad():
                if measure == "kl":
                    truth, said = dense(x).log_softmax(1), pruned(x).log_softmax(1)
                    expected = (truth.exp() * (truth - said)).sum(1).mean()
                elif measure == "loss":
                    expected = nn.functional.cross_entropy(pruned(x), y)
                else:
                    inside = dense[:place](x)
                    whole = inside @ dense[place].weight.T
                    expected = ((inside @ pruned[place].weight.T - whole) ** 2).sum() / (whole**2).sum()
            assert found.layers[name][at] == pytest.approx(float(expected), rel=1e-4, abs=1e-6)
    if measure == "loss":
        with torch.no_grad():
            assert found.reference == pytest.approx(float(nn.functional.cross_entropy(dense(x), y)), rel=1e-5)


def test_one_pass_of_the_data_serves_all_points_of_the_error():
    dense, calls = model(), []
    dense.register_forward_hook(lambda *_: calls.append(1))
    sensitivity(dense, batches(), measure="error", sparsities=SHARES)
    assert len(calls) == len(batches())


def test_padding_does_not_count():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.layer, self.head = nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 9)

        def forward(self, input_ids, attention_mask=None):
            return self.head(self.layer(self.table(input_ids)))

    torch.manual_seed(0)
    words, ids = Words(), torch.randint(0, 9, (3, 6))
    padded = torch.cat([ids, torch.full((3, 4), 8)], 1)
    mask = torch.cat([torch.ones(3, 6), torch.zeros(3, 4)], 1).long()
    plain, long = (
        sensitivity(words, [batch], only="all", sparsities=[0.5]).layers
        for batch in (
            {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
            {"input_ids": padded, "attention_mask": mask},
        )
    )
    assert plain.keys() == long.keys()
    for name, values in plain.items():
        assert values == pytest.approx(long[name], rel=1e-5)


def test_a_killed_analysis_goes_on_and_measures_nothing_twice(tmp_path):
    path, who = tmp_path / "points.jsonl", {"model": "m", "data": "d"}
    whole = sensitivity(model(), batches(), sparsities=SHARES)

    class Dies(Journal):
        def keep(self, layer, sparsity, value):
            if len(self.points) == 4:
                raise KeyboardInterrupt
            super().keep(layer, sparsity, value)

    with pytest.raises(KeyboardInterrupt):
        sensitivity(model(), batches(), sparsities=SHARES, journal=Dies(path, who))
    with open(path, "ab") as file:
        file.write(b'{"layer": "0.wei')  # killed in the middle of a line
    again = Journal(path, who)
    assert len(again.points) == 4
    first = path.read_text()
    assert first.count("\n") == 5
    found = sensitivity(model(), batches(), sparsities=SHARES, journal=again)
    assert found == whole
    assert path.read_text().startswith(first)
    assert path.read_text().count("\n") == 1 + 9
    calls: list = []
    done = model()
    done.register_forward_hook(lambda *_: calls.append(1))
    assert sensitivity(done, batches(), sparsities=SHARES, journal=Journal(path, who)) == whole
    assert not calls


def test_journals_of_something_else(tmp_path):
    path = tmp_path / "points.jsonl"
    Journal(path, {"model": "m", "data": "d"}).keep("a", 0.5, 1.0)
    with pytest.raises(UsageError, match="was begun with another data \\('d' instead of 'e'\\)"):
        Journal(path, {"model": "m", "data": "e"})
    for text in ('{"identity": {}}\n{"layer": 1}\n', "[]\n", "nonsense\n", '{"identity": {}}\n"a"\n'):
        path.write_text(text)
        with pytest.raises(InputError, match="no journal of a sensitivity analysis"):
            Journal(path, {"model": "m"})
    path.write_text('{"identity"')
    assert Journal(path, {"model": "m"}).points == {}


def test_analyses_that_cannot_be():
    with pytest.raises(UsageError, match="measure 'lk' is not known"):
        sensitivity(model(), batches(), measure="lk")
    for more in ({"sparsities": []}, {"sparsities": [0.0]}, {"sparsities": [1.5]}):
        with pytest.raises(UsageError, match=r"needs batches and sparsities in \(0, 1\]"):
            sensitivity(model(), batches(), **more)
    with pytest.raises(UsageError, match="needs batches"):
        sensitivity(model(), [])
    with pytest.raises(UsageError, match="take a recipe without update"):
        sensitivity(model(), batches(), recipe=sparsegpt)


@pytest.fixture
def secateur(monkeypatch, capsys, tmp_path) -> Secateur:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(OWN)
    return Secateur(monkeypatch, capsys)


@pytest.mark.thorough
def test_on_the_command_line(secateur, tmp_path):
    pytest.importorskip("plotly")
    asked = (
        "inspect",
        "own.py:mlp",
        "--sensitivity",
        "--data",
        "own.py:labelled_rows",
        "--sparsities",
        "0.5,0.9",
    )
    said = secateur(*asked, "--out", "out")
    assert said.code == 0, said
    assert "KL divergence" in said.out
    told = json.loads((tmp_path / "out" / "sensitivity.json").read_text())
    assert set(told["layers"]) == {"0.weight", "2.weight"}
    assert told["sparsities"] == [0.5, 0.9]
    assert 'id="sensitivity"' in (tmp_path / "out" / "report.html").read_text()
    assert not (tmp_path / "out" / "run" / "state").exists()
    plain = secateur(*asked, "--json").json
    assert plain["layers"] == told["layers"]
    assert "--method 'wandaa' is not known; nearest: wanda" in secateur.refused(2, *asked, "--method", "wandaa")
    assert "expected numbers with commas" in secateur.refused(2, *asked[:-1], "half")
    assert "give batches with --data" in secateur.refused(2, "inspect", "own.py:mlp", "--sensitivity")
