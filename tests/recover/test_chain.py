"""Walking block by block: the very bits of running from the model's start, in time that is linear in depth."""

import copy

import pytest
import torch
from torch import nn

from secateur.core.statistics import evaluating
from secateur.prune import prune_
from secateur.recover import chain
from secateur.recover import reconstruct as module
from secateur.recover.chain import chained, links
from secateur.recover.reconstruct import reconstruct_, without_cache

from ..language import Block, Tiny, ids
from .test_reconstruct import Layers

SMALL = {"vocab_size": 24, "bos_token_id": 1, "eos_token_id": 2}
WIDE = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}


def built(kind: str) -> nn.Module:
    import transformers as t

    torch.manual_seed(0)
    if kind == "gpt2":
        return t.GPT2LMHeadModel(t.GPT2Config(n_embd=16, n_layer=3, n_head=2, n_positions=32, **SMALL))
    if kind == "llama":
        config = t.LlamaConfig(**WIDE, intermediate_size=24, num_key_value_heads=1, **SMALL)
        return t.LlamaForCausalLM(config)
    if kind == "gemma3":
        config = t.Gemma3TextConfig(
            **WIDE, intermediate_size=24, num_key_value_heads=1, head_dim=8, sliding_window=4,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"], **SMALL,
        )  # fmt: skip
        return t.Gemma3ForCausalLM(config)
    if kind == "opt":
        config = t.OPTConfig(**WIDE, ffn_dim=24, word_embed_proj_dim=16, max_position_embeddings=32, **SMALL)
        return t.OPTForCausalLM(config)
    if kind == "bert":
        return t.BertForMaskedLM(t.BertConfig(**WIDE, intermediate_size=24, vocab_size=24))
    if kind == "t5":
        config = t.T5Config(d_model=16, d_ff=24, num_layers=2, num_heads=2, d_kv=8, vocab_size=24)
        return t.T5ForConditionalGeneration(config)
    odd = {"writes": Writing, "returns": Returning, "bare": Bare}
    if kind in odd:
        return Odd(odd[kind])
    return {"tiny": lambda: Tiny(blocks=3), "layers": Layers, "between": Between, "hands": Hands}[kind]()


class Odd(Tiny):
    """A model of blocks of a class of their own."""

    def __init__(self, block: type[Block] = Block):
        super().__init__()
        self.blocks = nn.ModuleList(block(16) for _ in range(2))

    def forward(self, input_ids, attention_mask=None):
        x = self.embed(input_ids)
        for block in self.blocks:
            x = self.through(block, x)
        return self.head(x)

    def through(self, block, x):
        found = block(x)
        return found[0] if isinstance(found, tuple) else found


class Between(Odd):
    """Something happens between the blocks."""

    def through(self, block, x):
        return block(x).tanh()


class Hands(Odd):
    """What a block is called with is made of what the block before it gave."""

    def through(self, block, x):
        return block(x, x[:, None, :, :1])


class Writing(Block):
    """Writes into what it is given."""

    def forward(self, x, mask=None):
        return super().forward(x.mul_(0.5), mask)


class Returning(Block):
    """Returns more than hidden states."""

    def forward(self, x, mask=None):
        return super().forward(x, mask), x.mean()


class Bare(Block):
    """Returns a tuple with a hole in it."""

    def forward(self, x, mask=None):
        return super().forward(x, mask), None


def batch(kind: str) -> object:
    rows = ids(16, 10)
    if kind == "layers":
        return torch.randn(16, 6, 16, generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(rows)
    mask[::3, 6:] = 0  # only some of the pieces have padding
    mask[:4] = 1
    given = {"input_ids": rows, "attention_mask": mask}
    return {**given, "decoder_input_ids": ids(16, 7, seed=2)} if kind == "t5" else given


SIMPLE = ["gpt2", "llama", "opt", "tiny", "layers", "bare"]
MORE = ["gemma3", "bert"]  # simple, too
OTHERS = ["t5", "between", "writes", "returns", "hands"]


@pytest.mark.parametrize(
    "kind", [*SIMPLE, *OTHERS, *(pytest.param(kind, marks=pytest.mark.thorough) for kind in MORE)]
)
def test_the_same_bits_as_from_the_start(monkeypatch, kind):
    """Of weights, errors and order; and what is no simple chain is seen to be none."""
    pytest.importorskip("transformers")
    dense = built(kind).eval()
    used, results = [], []

    def noted(*given):
        used.append(chained(*given))
        return used[-1]

    for way in (noted, lambda *_: None):
        monkeypatch.setattr(module, "chained", way)
        model = copy.deepcopy(dense)
        masks = prune_(model, 0.6)
        found = reconstruct_(model, dense, masks, [batch(kind)], epochs=1, seed=3)
        assert any(each.after < each.before for each in found)
        results.append((found, model.state_dict()))
    assert [walks is not None for walks in used] == [kind not in OTHERS]
    assert results[0][0] == results[1][0]
    for name, value in results[0][1].items():
        assert torch.equal(value, results[1][1][name]), name


def test_blocks_without_a_masked_layer_are_walked_through(monkeypatch):
    dense = Tiny(blocks=4).eval()
    results = []
    for way in (chained, lambda *_: None):
        monkeypatch.setattr(module, "chained", way)
        model = copy.deepcopy(dense)
        masks = prune_(model, 0.6, only=["blocks.1.*", "blocks.3.mlp.*"])
        results.append((reconstruct_(model, dense, masks, [ids()], epochs=2), model.state_dict()))
    assert [each.path for each in results[0][0]] == ["blocks.1.attn", "blocks.1.mlp", "blocks.3.mlp"]
    assert results[0][0] == results[1][0]
    assert all(torch.equal(value, results[1][1][name]) for name, value in results[0][1].items())


@pytest.mark.parametrize("depth", [2, 6])
def test_how_often_a_block_runs_does_not_grow_with_depth(depth):
    """From the start, the first block would run once more for each sub-module of the whole model."""
    dense = Tiny(blocks=depth).eval()
    model = copy.deepcopy(dense)
    masks = prune_(model, 0.6)
    runs = {id(each.blocks[0]): 0 for each in (model, dense)}

    def count(block, args):
        runs[id(block)] += 1

    handles = [each.blocks[0].register_forward_pre_hook(count) for each in (model, dense)]
    reconstruct_(model, dense, masks, [ids(24)], epochs=1)
    for handle in handles:
        handle.remove()
    # six pieces: each to attention, to the feed-forward, and through; once more to see whether it is a chain: as a
    # whole, with stand-ins for the first piece and for all, and walked to the end; and for the order of the model
    assert runs[id(model.blocks[0])] <= 3 * 6 + 6 + 5
    assert runs[id(dense.blocks[0])] <= 3 * 6 + 6 + 4


def test_blocks_are_as_before_even_those_with_a_forward_of_their_own():
    model = Tiny().eval()
    for block in model.blocks:
        block.forward = lambda x, mask, own=block.forward: own(x, mask)
    own = [vars(block)["forward"] for block in model.blocks]
    with evaluating(model):
        assert chained(model, copy.deepcopy(model), ["blocks.0.attn"], [ids(4)]) is not None
    assert [vars(block)["forward"] for block in model.blocks] == own
    plain = Tiny().eval()
    with evaluating(plain):
        assert chained(plain, copy.deepcopy(plain), ["blocks.0.attn"], [ids(4)]) is not None
    assert all("forward" not in vars(block) for block in plain.blocks)


def test_a_model_that_is_another_than_the_dense_one_is_not_walked():
    model, shorter = Tiny(blocks=3).eval(), Tiny(blocks=2).eval()
    with evaluating(model), evaluating(shorter):
        assert chained(model, shorter, ["blocks.0.attn"], [ids(4)]) is None


def test_modules_outside_of_the_blocks_or_in_another_order_are_not_walked_to():
    model = Tiny(blocks=3)
    blocks = ("blocks.0", "blocks.1", "blocks.2")
    assert links(model, ["blocks.0.attn", "blocks.0.mlp", "blocks.2.mlp"]) == blocks
    assert links(model, ["head"]) is None
    assert links(model, ["blocks.1.attn", "blocks.0.mlp"]) is None


def test_a_cache_is_never_the_same():
    """Blocks that fill a cache would find it full when they run again."""
    pytest.importorskip("transformers")
    dense = built("gpt2").eval()
    with evaluating(dense):
        assert chained(dense, dense, ["transformer.h.0.attn"], [ids(4)]) is None
    with evaluating(dense), without_cache(dense):
        assert chained(dense, dense, ["transformer.h.0.attn"], [ids(4)]) is not None


def test_what_is_compared():
    one = torch.tensor([1.0])
    assert chain._same([one, {"a": 1}], (one, {"a": 1}))
    assert not chain._same(one, one + 1e-7)
    assert not chain._same(one, one.double())
    assert not chain._same(one, 1.0)
    assert not chain._same((one,), (one, one))
    assert not chain._same({"a": 1}, {"b": 1})
    assert not chain._same(1, True)
    assert not chain._same(print, print)
