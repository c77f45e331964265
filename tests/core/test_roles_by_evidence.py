"""The roles of matrices inside a block by widths, containers and attributes; names last; mixtures of experts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from secateur.core.roles import survey
from secateur.core.where import layers

from .unnamed import Foo, container, squares


def roles_of(*shapes: tuple[int, int]) -> str:
    """Roles as letters, of a block with these matrices."""
    model = nn.Sequential(nn.Linear(5, 32), Foo(list(shapes)), Foo(list(shapes)), nn.Linear(32, 3))
    found = layers(model)
    assert [found[0].role, found[-1].role] == ["other", "head"]
    inside = "".join(layer.role[0] for layer in found[1:-1])
    assert inside[: len(shapes)] == inside[len(shapes) :]
    return inside[: len(shapes)]


@pytest.mark.parametrize(
    ("expected", "shapes"),
    [
        ("aaff", [(96, 32), (32, 32), (128, 32), (32, 128)]),
        ("aaff", [(32, 32), (96, 32), (32, 128), (128, 32)]),
        ("ffaa", [(128, 32), (32, 128), (96, 32), (32, 32)]),
        ("aaaaff", [(32, 32), (32, 32), (32, 32), (32, 32), (64, 32), (32, 64)]),
        ("aaaafff", [(32, 32), (8, 32), (8, 32), (32, 32), (64, 32), (64, 32), (32, 64)]),
        ("aaaaaaaaff", [(32, 32)] * 8 + [(64, 32), (32, 64)]),
        # narrow heads, as T5's; queries and fused keys and values; one key for all queries; a fused gate
        ("aaaafff", [(16, 32), (16, 32), (16, 32), (32, 16), (80, 32), (80, 32), (32, 80)]),
        ("aaaff", [(32, 32), (64, 32), (32, 32), (96, 32), (32, 96)]),
        ("aaff", [(40, 32), (32, 32), (160, 32), (32, 80)]),
        # cross-attention to a stack of another width
        ("aaaaff", [(32, 32), (32, 48), (32, 48), (32, 32), (64, 32), (32, 64)]),
        # parts alone
        ("ff", [(128, 32), (32, 128)]),
        ("aa", [(96, 32), (32, 32)]),
        # not in the order in which they are used
        ("afaf", [(96, 32), (128, 32), (32, 32), (32, 128)]),
        # all widths equal: attention comes first
        ("aaaaff", [(32, 32)] * 6),
        # no pattern
        ("ooo", [(7, 32), (11, 7), (32, 13)]),
    ],
)
def test_a_flat_block_is_told_by_widths(expected: str, shapes: list[tuple[int, int]]) -> None:
    assert roles_of(*shapes) == expected


@given(
    head=st.sampled_from([4, 8, 16]),
    groups=st.sampled_from([1, 2, 4]),
    queries=st.sampled_from([1, 2, 3]),
    attention=st.sampled_from(["separate", "fused", "queries apart"]),
    feed=st.sampled_from(["plain", "gated", "fused"]),
    widening=st.sampled_from([1.5, 2, 3, 4]),
    feed_first=st.booleans(),
)
@pytest.mark.thorough
def test_widths_tell_any_usual_block(
    head: int, groups: int, queries: int, attention: str, feed: str, widening: float, feed_first: bool
) -> None:
    width, kv = head * groups * queries, head * groups
    inner = int(width * widening)
    attend = {
        "separate": [(width, width), (kv, width), (kv, width), (width, width)],
        "fused": [(width + 2 * kv, width), (width, width)],
        "queries apart": [(width, width), (2 * kv, width), (width, width)],
    }[attention]
    # one matrix of queries and one of keys and values, both of the same size, are a gated unit by widths
    if attention == "queries apart" and queries == 2:
        attend = [(width, width), (width, width), (width, width), (width, width)]
    forward = {
        "plain": [(inner, width), (width, inner)],
        "gated": [(inner, width), (inner, width), (width, inner)],
        "fused": [(2 * inner, width), (width, inner)],
    }[feed]
    parts = ["a" * len(attend), "f" * len(forward)]
    shapes = forward + attend if feed_first else attend + forward
    assert roles_of(*shapes) == "".join(reversed(parts) if feed_first else parts)


def roles_by_path(block: Callable[[], nn.Module]) -> dict[str, str]:
    model = nn.ModuleList([block(), block()])
    return {layer.path.removeprefix("0."): layer.role for layer in layers(model) if layer.block == 0}


def test_containers_decide_where_all_widths_are_equal() -> None:
    found = roles_by_path(
        lambda: container(
            "A", {"x": container("B", squares("p", "q")), "y": container("C", squares("r", "s", "t", "u"))}
        )
    )
    assert found == {
        **dict.fromkeys(["x.p", "x.q"], "ffn"),
        **dict.fromkeys(["y.r", "y.s", "y.t", "y.u"], "attention"),
    }


def test_attributes_decide_before_widths() -> None:
    # shared queries and keys: by widths a gated feed-forward
    found = roles_by_path(lambda: container("A", {"x": container("B", squares("p", "r", "s"), num_heads=4)}))
    assert set(found.values()) == {"attention"}
    without = roles_by_path(lambda: container("A", {"x": container("B", squares("p", "r", "s"))}))
    assert set(without.values()) == {"ffn"}
    flag = roles_by_path(lambda: container("A", {"x": container("B", squares("p", "r", "s"), heads=True)}))
    assert set(flag.values()) == {"ffn"}


def test_attributes_of_a_whole_layer_do_not_make_its_feed_forward_attention() -> None:
    found = roles_by_path(
        lambda: container(
            "Stage",
            {
                "list": nn.ModuleList(
                    [
                        container(
                            "Layer",
                            {**squares("p", "r", "s", "t"), "u": nn.Linear(32, 64), "w": nn.Linear(64, 32)},
                            num_heads=4,
                        ),
                        container(
                            "Layer",
                            {**squares("p", "r", "s", "t"), "u": nn.Linear(32, 64), "w": nn.Linear(64, 32)},
                            num_heads=4,
                        ),
                    ]
                )
            },
        )
    )
    assert {path: role for path, role in found.items() if path[-1] in "uw"} == {
        f"list.{index}.{name}": "ffn" for index in (0, 1) for name in "uw"
    }
    assert {role for path, role in found.items() if path[-1] not in "uw"} == {"attention"}


def test_the_closing_matrix_may_stand_outside_the_module_that_counts_heads() -> None:
    found = roles_by_path(
        lambda: container(
            "A",
            {
                "x": container("B", squares("p", "r", "s"), n_head=4),
                "y": nn.Linear(32, 32),
                "z": nn.Linear(32, 64),
                "zz": nn.Linear(64, 32),
            },
        )
    )
    assert found == {"x.p": "attention", "x.r": "attention", "x.s": "attention", "y": "attention"} | {
        "z": "ffn",
        "zz": "ffn",
    }


def test_a_mixer_that_counts_heads_and_convolves_over_time_is_no_attention() -> None:
    def block(groups: int) -> nn.Module:
        convolution = nn.Conv1d(32, 32, 3, groups=groups)
        return container("A", {"x": container("B", {"c": convolution, **squares("p", "r")}, num_heads=4)})

    assert set(roles_by_path(lambda: block(32)).values()) == {"other"}
    # keys and values reduced by a convolution: still attention
    assert set(roles_by_path(lambda: block(1)).values()) == {"attention"}


def test_odd_attention_does_not_hide_the_feed_forward_beside_it() -> None:
    low = {"p": nn.Linear(32, 12), "r": nn.Linear(12, 48), "s": nn.Linear(32, 9), "t": nn.Linear(48, 32)}
    found = roles_by_path(
        lambda: container(
            "A", {"x": container("B", low, num_heads=4), "u": nn.Linear(32, 64), "w": nn.Linear(64, 32)}
        )
    )
    assert found == {**dict.fromkeys(["x.p", "x.r", "x.s", "x.t"], "attention"), "u": "ffn", "w": "ffn"}


def test_adapters_belong_to_what_they_adapt() -> None:
    def adapted(rows: int, columns: int) -> nn.Module:
        low = {"down": nn.Linear(columns, 4, bias=False), "up": nn.Linear(4, rows, bias=False)}
        return container("Adapter", {"base": nn.Linear(columns, rows), **low})

    def block() -> nn.Module:
        attention = {"p": adapted(32, 32), **squares("r", "s", "t")}
        feed = {"u": adapted(64, 32), "w": nn.Linear(64, 32)}
        return container("A", {"x": container("B", attention, n_heads=4), "mlp": container("C", feed)})

    for path, role in roles_by_path(block).items():
        assert role == ("attention" if path.startswith("x.") else "ffn"), path


def test_blocks_in_the_lists_and_dictionaries_of_small_implementations() -> None:
    def layer() -> nn.Module:
        attend = container(
            "Attend", {"qkv": nn.Linear(32, 192), "out": nn.Sequential(nn.Linear(64, 32))}, heads=8
        )
        feed = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
        return nn.ModuleList([attend, feed])

    parts = {"words": nn.Embedding(50, 32), "layers": nn.ModuleList([layer(), layer()])}
    model = container("Small", {"parts": nn.ModuleDict(parts), "head": nn.Linear(32, 50)})
    assert [(each.path, each.role, each.block) for each in layers(model)] == [
        ("parts.words", "embedding", None),
        *[
            (f"parts.layers.{block}.{path}", role, block)
            for block in (0, 1)
            for path, role in [("0.qkv", "attention"), ("0.out.0", "attention"), ("1.1", "ffn"), ("1.3", "ffn")]
        ],
        ("head", "head", None),
    ]
    assert [place.path for place in survey(model).places if place.vocabulary] == ["head"]


@pytest.mark.parametrize(
    ("class_name", "path", "role"),
    [
        ("Mystery", "self_attn", "attention"),
        ("Mystery", "mlp", "ffn"),
        ("FeedForward", "m", "ffn"),
        ("CausalSelfAttention", "m", "attention"),
        ("Mystery", "m", "other"),
    ],
)
def test_names_are_the_last_resort(class_name: str, path: str, role: str) -> None:
    odd = {"p": (7, 32), "r": (11, 7), "s": (32, 13)}
    found = roles_by_path(
        lambda: container(
            "A", {path: container(class_name, {name: nn.Linear(c, r) for name, (r, c) in odd.items()})}
        )
    )
    assert set(found.values()) == {role}


def test_names_do_not_overrule_widths() -> None:
    found = roles_by_path(
        lambda: container(
            "A", {"attention": container("Attention", {"q": nn.Linear(32, 64), "k": nn.Linear(64, 32)})}
        )
    )
    assert set(found.values()) == {"ffn"}


# Mixtures of experts ---------------------------------------------------------------------------------------


def expert() -> nn.Module:
    return container("E", {"u": nn.Linear(32, 48, bias=False), "d": nn.Linear(48, 32, bias=False)})


def mixture(rows: int, **more: nn.Module) -> nn.Module:
    return container(
        "M", {"g": nn.Linear(32, rows, bias=False), "list": nn.ModuleList([expert() for _ in range(5)]), **more}
    )


def test_a_matrix_with_one_row_for_each_expert_is_the_router() -> None:
    found = roles_by_path(lambda: container("A", {"m": mixture(5, single=nn.Linear(32, 1))}))
    assert found.pop("m.g") == "router"
    assert found.pop("m.single") == "router"
    assert set(found.values()) == {"ffn"}
    assert len(found) == 10


def test_other_row_counts_are_no_router() -> None:
    found = roles_by_path(lambda: container("A", {"m": mixture(6)}))
    assert found["m.g"] == "other"


def test_keys_with_as_many_rows_as_experts_are_no_router() -> None:
    def block() -> nn.Module:
        attention = {
            "q": nn.Linear(32, 32),
            "k": nn.Linear(32, 5),
            "v": nn.Linear(32, 5),
            "o": nn.Linear(32, 32),
        }
        return container("A", {"x": container("B", attention, num_heads=4), "m": mixture(5)})

    found = roles_by_path(block)
    assert {found[f"x.{name}"] for name in "qkvo"} == {"attention"}
    assert found["m.g"] == "router"


def test_a_block_that_is_itself_the_mixture() -> None:
    keys = {"r": nn.Linear(32, 5), "s": nn.Linear(32, 5)}
    found = roles_by_path(lambda: mixture(5, x=container("B", {**squares("p", "t"), **keys}, num_heads=4)))
    assert found["g"] == "router"
    assert {found[f"x.{name}"] for name in "prst"} == {"attention"}


def test_a_single_row_deeper_in_the_mixture_is_no_router() -> None:
    deep = container("D", {"one": nn.Linear(32, 1), "two": nn.Linear(32, 7)})
    assert roles_by_path(lambda: container("A", {"m": mixture(5, deep=deep)}))["m.deep.one"] == "other"
