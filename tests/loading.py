"""Small models in folders, and what loading says of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from secateur.errors import InputError, SecateurError
from secateur.model import load

transformers = pytest.importorskip("transformers")

GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "vocab_size": 300}
BERT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 64,
}
T5 = {"d_model": 16, "num_layers": 1, "num_heads": 2, "d_ff": 24, "d_kv": 8, "vocab_size": 64}
MIXTRAL = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 24,
    "num_local_experts": 3,
    "vocab_size": 64,
}


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    letters = pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {"<|endoftext|>": 0} | {letter: i for i, letter in enumerate(sorted(letters), start=1)}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|endoftext|>")


def make(kind: str) -> nn.Module:
    torch.manual_seed(1)
    model = {
        "gpt2": lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(**GPT2, bos_token_id=0, eos_token_id=0)
        ),
        "bert": lambda: transformers.BertForSequenceClassification(
            transformers.BertConfig(**BERT, num_labels=3)
        ),
        "t5": lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**T5)),
        "mixtral": lambda: transformers.MixtralForCausalLM(transformers.MixtralConfig(**MIXTRAL)),
    }[kind]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def configure(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def refused(spec: object, error: type[SecateurError] = InputError, **options: Any) -> str:
    with pytest.raises(error) as caught:
        load(str(spec), **options)
    assert type(caught.value) is error
    return str(caught.value)


def same(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


def write_pickle(folder: Path, state: dict[str, torch.Tensor]) -> Path:
    torch.save(state, folder / "weights.pt")
    return folder / "weights.pt"
