"""What the name of an integer says about the axis it counts; it only ranks candidates, a check decides."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import nn

__all__ = ["HINTED", "NEUTRAL", "UNRELATED", "hint", "of_torch"]

HINTED, NEUTRAL, UNRELATED = 0, 1, 2

HEADS = {"head", "KV group", "query head"}
DIMENSIONS = {"qk dimension", "rotary pair", "v dimension", "head dimension"}
FEED_FORWARD = {"feed-forward unit", "expert feed-forward"}
HIDDEN = {"hidden"}
CHANNELS = {"channel", "hidden", "recurrent unit"}

OTHER = re.compile(  # numbers of things that are no width
    r"idx|index|layers?($|_)|depth|position|vocab|token|_id$|window|kernel|stride|padding|dilation|patch|image|"
    r"seed|epoch|version|expert|bucket|beam|length|top_?k|classes|labels|block|resolution|n_ctx|max_|context|upscale"
)

# what the names say, the first that fits: (name, kinds that have to be in the label, kinds that may be)
RULES: tuple[tuple[re.Pattern[str], set[str], set[str]], ...] = (
    (re.compile(r"(kv|key_value)_groups"), {"query head"}, set()),
    (re.compile(r"(kv|key_value).*heads?"), {"KV group", "head"}, set()),
    (re.compile(r"all_head|inner_dim"), HEADS, DIMENSIONS | HEADS),
    (re.compile(r"v_head_dim|value_dim"), {"v dimension", "head dimension"}, set()),
    (re.compile(r"qk|rope|rotary"), {"qk dimension", "rotary pair", "head dimension"}, DIMENSIONS),
    (re.compile(r"head.*(dim|size|width)|d_kv|proj_dim"), DIMENSIONS, set()),
    (re.compile(r"head"), HEADS, HEADS),
    (re.compile(r"inter|ffn|inner|d_ff|mlp|feed|^hidden_dim$|expand"), FEED_FORWARD, set()),
    (re.compile(r"hidden|embd|embed|d_model|model_dim|width"), HIDDEN | {"recurrent unit"}, set()),
    (re.compile(r"channel|features|planes|^dim$|dims?$|conv_dim"), CHANNELS | FEED_FORWARD, set()),
)


def hint(name: str, kinds: Sequence[str]) -> int:
    """How well a name fits an axis made of these kinds: HINTED, NEUTRAL or UNRELATED."""
    word = name.lower()
    if OTHER.search(word):
        return UNRELATED
    for pattern, needed, allowed in RULES:
        if pattern.search(word):
            found = set(kinds)
            return HINTED if found & needed and found <= needed | allowed else UNRELATED
    return NEUTRAL


def of_torch(module: nn.Module) -> dict[str, int]:
    """The sizes that torch's own layers remember, read off their tensors; empty for other classes."""
    return {name: int(size) for name, size in _sizes(module).items() if name in vars(module)}


def _sizes(module: Any) -> dict[str, Any]:
    kind = type(module)
    if isinstance(module, nn.Linear):
        return {"out_features": module.weight.shape[0], "in_features": module.weight.shape[1]}
    if isinstance(module, nn.Bilinear):
        rows, first, second = (int(size) for size in module.weight.shape)
        return {"out_features": rows, "in1_features": first, "in2_features": second}
    if isinstance(module, nn.modules.conv._ConvNd):
        rows, columns = (int(size) for size in module.weight.shape[:2])
        if module.transposed:
            return {"in_channels": rows, "out_channels": columns * module.groups}
        return {"out_channels": rows, "in_channels": columns * module.groups}
    if isinstance(module, nn.modules.batchnorm._NormBase):
        held: Any = module.weight if module.weight is not None else module.running_mean
        return {} if held is None else {"num_features": held.shape[0]}
    if isinstance(module, nn.GroupNorm):
        return {} if module.weight is None else {"num_channels": module.weight.shape[0]}
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return {"num_embeddings": module.weight.shape[0], "embedding_dim": module.weight.shape[1]}
    if isinstance(module, nn.PReLU):
        return {"num_parameters": module.weight.shape[0]}
    if isinstance(module, nn.RNNBase):
        gates = {"LSTM": 4, "GRU": 3}.get(module.mode, 1)
        layer: Any = module
        return {"hidden_size": layer.weight_hh_l0.shape[0] // gates, "input_size": layer.weight_ih_l0.shape[1]}
    if isinstance(module, nn.RNNCellBase):
        gates = 4 if isinstance(module, nn.LSTMCell) else 3 if isinstance(module, nn.GRUCell) else 1
        return {"hidden_size": module.weight_hh.shape[0] // gates, "input_size": module.weight_ih.shape[1]}
    if kind.__name__ == "Conv1D" and {"nf", "nx"} <= set(vars(module)):  # transformers' transposed linear layer
        return {"nx": module.weight.shape[0], "nf": module.weight.shape[1]}
    return {}
