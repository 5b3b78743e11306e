"""Properties of zaya.py that hold whatever the weights are; nothing here needs transformers (see test_equality.py)."""
import ast
import builtins
import copy
import json
import math
import os
import random
import subprocess
import symtable
import sys

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from conftest import randomise
from torch import nn

import zaya
from zaya import CCA, Cache, LayerCache, PIDBalancer, Router, Tokenizer, Zaya, ZayaConfig

BASE = dict(vocab_size=96, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
            head_dim=8, num_experts=4, moe_intermediate_size=24, router_hidden_size=12, max_position_embeddings=512)
FULL, SLIDING = "hybrid", "hybrid_sliding"
SHAPES = {
    "full": {},
    "sliding": dict(layer_types=[SLIDING, FULL, SLIDING], sliding_window=5),
    "window_of_one": dict(layer_types=[FULL, SLIDING], num_hidden_layers=2, sliding_window=1, num_key_value_heads=1),
    "three_kv_heads": dict(num_attention_heads=6, num_key_value_heads=3, layer_types=[FULL, SLIDING],
                           num_hidden_layers=2, sliding_window=4),
    "no_groups_untied": dict(num_key_value_heads=4, num_hidden_layers=1, tie_word_embeddings=False),
}


def build(seed=0, skip_bias=0.0, **changes):
    return randomise(Zaya(ZayaConfig(**{**BASE, **changes})), seed, skip_bias).eval()


@pytest.fixture(params=SHAPES)
def model(request):
    return build(**SHAPES[request.param])


def tokens(*shape, seed=0):
    return torch.randint(1, BASE["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


def close(a, b, tolerance=5e-5):                               # on logits of size 2
    assert a.shape == b.shape
    difference = (a - b).abs().max().item()
    assert difference <= tolerance, f"largest difference {difference:.2e}"


def left_padded(lengths, S):
    """ids (B, S) and a mask with `lengths` real tokens at the right of each row; padding is not the pad id."""
    return tokens(len(lengths), S), (torch.arange(S) >= S - torch.tensor(lengths)[:, None]).long()


@torch.no_grad()
def in_chunks(model, ids, sizes, mask=None):
    cache, logits = Cache(model.config.num_hidden_layers), []
    for part in torch.arange(ids.shape[1]).split(sizes):
        logits.append(model(ids[:, part], None if mask is None else mask[:, part], cache=cache))
    return torch.cat(logits, 1), cache


# ---- the forward pass ------------------------------------------------------------------------------------------------

@torch.no_grad()
def test_causal(model):
    ids = tokens(2, 24)
    for t in (1, 11, 23):
        changed = ids.clone()
        changed[:, t] = ids[:, t] % 95 + 1
        a, b = model(ids), model(changed)
        close(a[:, :t], b[:, :t], 1e-5)                         # experts with other rows: sums in another order
        assert ((a - b)[:, t].abs().amax(-1) > 1e-2).all(), "the changed token does matter"


@torch.no_grad()
def test_logits_are_fp32_and_batch_rows_independent(model):
    ids = tokens(3, 9)
    logits = model(ids)
    assert logits.shape == (3, 9, 96) and logits.dtype == torch.float32
    close(logits[1:2], model(ids[1:2]))
    close(logits, model(ids, attention_mask=torch.ones_like(ids)))
    close(logits, model(ids, position_ids=torch.arange(9).expand(3, 9)))


def pack(rows, S):
    """Sample lengths per row -> position_ids (B, S), and where each sample lies: (row, slice)."""
    position, where = torch.full((len(rows), S), -1), []
    for row, lengths in enumerate(rows):
        start = 0
        for length in lengths:
            position[row, start:start + length] = torch.arange(length)
            where.append((row, slice(start, start + length)))
            start += length
    return position, where


# Samples of one token at the start, between others and at the end; longer than every window; padding of 0, 1 and more.
PACKED = [[7, 1, 12, 3], [1, 1, 2, 20], [9, 8, 6, 1], [2]]


@torch.no_grad()
def test_packed_samples_get_the_logits_they_get_alone(model):
    position, where = pack(PACKED, 24)
    ids = tokens(*position.shape)
    packed = model(ids, position_ids=position)
    assert packed.isfinite().all()
    for row, part in where:
        close(packed[row, part], model(ids[row:row + 1, part])[0])


def cca(window=None, seed=0):
    attention = CCA(32, 4, 2, 8, {"rope_theta": 100.0, "partial_rotary_factor": 0.5}, window)
    generator = torch.Generator().manual_seed(seed)
    for parameter in attention.parameters():
        nn.init.normal_(parameter, std=0.5, generator=generator)
    return attention


@pytest.mark.parametrize("form", ["ids", "Positions"])
@pytest.mark.parametrize("window", [None, 1, 4])
def test_cca_keeps_packed_samples_apart(window, form):
    """One argument, in any form, is the whole rule: values and gradients of each sample are what it gets alone."""
    ids, where = pack(PACKED, 24)
    attention, x = cca(window), torch.randn(*ids.shape, 32, requires_grad=True)
    positions = ids if form == "ids" else CCA.positions(x, ids, 100.0, 4, window)
    out = attention(x, positions)
    assert out.isfinite().all()
    for row, part in where:
        alone = x[row:row + 1, part].detach().requires_grad_()
        close(out[row, part], attention(alone)[0])
        weight = torch.randn_like(alone)
        gradient, = torch.autograd.grad((out[row, part] * weight[0]).sum(), x, retain_graph=True)
        expected = torch.zeros_like(x)
        expected[row, part], = torch.autograd.grad((attention(alone) * weight).sum(), alone)
        close(gradient, expected, 5e-4)                         # of size 50
        assert (gradient.abs().sum(-1) > 0).sum() == alone.shape[1], "none reaches another sample"


@torch.no_grad()
@pytest.mark.parametrize("sizes", [[24], [1] * 24, [5, 1, 10, 8]], ids=["at_once", "one_by_one", "chunks"])
@pytest.mark.parametrize("window", [None, 4])
def test_cca_alone_with_a_cache(window, sizes):
    """Packed and padded rows go on by their ids, plain rows by nothing."""
    ids, _ = pack(PACKED, 24)
    attention, x, packed, plain = cca(window), torch.randn(*ids.shape, 32), LayerCache(), LayerCache()
    parts = torch.arange(24).split(sizes)
    close(torch.cat([attention(x[:, part], cache=plain) for part in parts], 1), attention(x))
    chunked = torch.cat([attention(x[:, part], ids[:, part], packed) for part in parts], 1)
    close(chunked[ids >= 0], attention(x, ids)[ids >= 0])
    assert packed.columns == plain.columns == 24


@torch.no_grad()
def test_a_layers_cca_has_the_models_rope():
    """A stage that raises rope_theta in the config reaches the layers too, also those of a copy; each type its own."""
    model, seen, given = copy.deepcopy(build(**SHAPES["sliding"])), [], []
    for layer in model.layers:
        layer.self_attn.register_forward_hook(lambda module, args, out: given.append((module, *args[:2], out)))
    for kind, theta in ((FULL, 50.0), (SLIDING, 50.0), (FULL, 1e6), (SLIDING, 1e6)):
        model.config.rope_parameters[kind]["rope_theta"] = theta
        seen.append(model(tokens(2, 24)))
        for module, x, positions, out in given[-3:]:
            close(module(x), out)
            assert torch.equal(positions.cos, CCA.positions(x, None, module.rope_parameters["rope_theta"], 4).cos)
    assert all((a - b).abs().max() > 1e-4 for a, b in zip(seen, seen[1:]))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_router_bias_changes_the_choice_but_not_the_weight(dtype):
    """The softmax is not rounded: two tokens of nearly the same score must not tie because the weights are bf16."""
    router = Router(16, 8, 5).to(dtype)
    x, before = torch.randn(2, 6, 16, dtype=dtype), torch.randn(2, 6, 8, dtype=dtype)
    nn.init.normal_(router.out_proj.weight)
    logits, given = [], torch.randint(0, 5, (2, 6))
    router.out_proj.register_forward_hook(lambda module, args, out: logits.append(out))
    weight, choice, state = router(x, before)
    assert not (choice == 4).any(), "with its bias of -1 the skip expert is not chosen"
    router.balancing_biases[3] = 2.0
    for weight, choice, _ in (router(x, before), router(x, before, given)):
        assert (choice == 3).all() or torch.equal(choice, given)
        assert torch.equal(weight, logits[0].float().softmax(-1).gather(-1, choice[..., None])[..., 0])


def test_router_replay(model):
    """Perturbed routers keep the recorded choices, and still learn from the weights they give them."""
    ids, recorded = tokens(2, 40), []
    model.hidden_states(ids, routing=recorded)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for layer in other.layers:
            for parameter in layer.gate.parameters():
                parameter.add_(0.5 * torch.randn_like(parameter))
    fresh, replayed, seen = [], list(recorded), []
    other.hidden_states(ids, routing=fresh)
    assert any((a != b).any() for a, b in zip(fresh, recorded)), "the perturbation would have changed choices"
    for layer in other.layers:
        layer.gate.register_forward_hook(lambda module, args, out: seen.append(out[1]))
    other.logits(other.hidden_states(ids, routing=replayed)).logsumexp(-1).sum().backward()
    assert len(seen) == len(recorded) and all(torch.equal(a, b) for a, b in zip(seen, recorded))
    assert len(replayed) == len(recorded) and all(a is b for a, b in zip(replayed, recorded)), "the list is left alone"
    for layer in other.layers:
        assert all(parameter.grad.norm() > 0 for parameter in layer.gate.parameters())


@torch.no_grad()
@pytest.mark.parametrize("autocast", [False, True])
def test_what_matters_stays_in_fp32(model, autocast, monkeypatch):
    """With bf16 weights, or under autocast: the residual stream, router weights, q-k norm, RoPE, latents, logits."""
    ids, exact, seen = tokens(2, 12), model(tokens(2, 12)), {}

    def watch(name):
        plain = getattr(CCA, name)
        monkeypatch.setattr(CCA, name, staticmethod(lambda *given: seen.setdefault(name, given) and plain(*given)))

    watch("unit")
    watch("apply_rotary")
    model = model if autocast else model.to(torch.bfloat16)
    for name, module in model.named_modules():
        if isinstance(module, zaya.RMSNorm):                    # they read the residual stream
            module.register_forward_hook(lambda module, given, out, name=name: seen.update({name: given}))
        if isinstance(module, Router):
            module.register_forward_hook(lambda module, given, out, name=name: seen.update({name: out[:1]}))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits, cache = in_chunks(model, ids, [5, 1, 6])
        assert (model(ids) - exact).abs().mean() < 0.2 and (logits - exact).abs().mean() < 0.2
        hidden = model.hidden_states(ids)
        head = F.linear(hidden.float(), model.output_weight.float()) if not autocast else model.logits(hidden)
        assert torch.equal(model.logits(hidden), head), "the head computes in fp32"
    seen.update({("cache", i): (layer.packed, layer.delayed) for i, layer in enumerate(cache.layers)}, logits=[logits])
    assert len(seen) == 2 + 1 + 4 * len(model.layers) + 1
    for name, tensors in seen.items():
        assert all(tensor.dtype == torch.float32 for tensor in tensors), name
    assert cache.layers[0].k.dtype == torch.bfloat16, "the keys and values are what takes the room"


# ---- the cache -------------------------------------------------------------------------------------------------------

LONG = 70                                                       # beyond the 64 columns of a cache's first buffer
CHUNKS = {"one_by_one": [1] * LONG, "chunks": [3, 1, 1, 20, 2, 40, 3], "prefill": [60] + [1] * 10}


@torch.no_grad()
@pytest.mark.parametrize("lengths", [None, (LONG, 50, 3)], ids=["full", "left_padded"])
@pytest.mark.parametrize("sizes", CHUNKS.values(), ids=CHUNKS)
def test_cache_equals_full_forward(model, sizes, lengths):
    ids, mask = left_padded(lengths or (LONG,) * 3, LONG)
    chunked, cache = in_chunks(model, ids, sizes, mask if lengths else None)
    assert chunked.isfinite().all()
    for row in range(len(ids)):
        real = mask[row] == 1
        close(chunked[row, real], model(ids[row, real][None])[0])
    if not lengths:
        close(chunked, model(ids))
    assert cache.columns == LONG and (cache.position is None) == (lengths is None)
    assert all(LONG <= layer.k.shape[2] <= 4 * LONG for layer in cache.layers), "the buffers double"


@torch.no_grad()
def test_masks_and_ids_may_come_late_or_end_early(model):
    """Each call's mask is about its own tokens: a cache filled with one goes on without, and the other way round.  A
    packed prompt goes on from its last sample."""
    ids, cache = tokens(2, 12), Cache(model.config.num_hidden_layers)
    parts = [model(ids[:, :5], cache=cache), model(ids[:, 5:9], torch.ones(2, 4), cache=cache),
             model(ids[:, 9:], cache=cache)]
    close(torch.cat(parts, 1), model(ids))
    assert cache.position.tolist() == [12, 12]
    ids, cache = tokens(1, 20), Cache(model.config.num_hidden_layers)
    model(ids[:, :12], position_ids=pack([[5, 7]], 12)[0], cache=cache)
    close(torch.cat([model(part, cache=cache) for part in (ids[:, 12:13], ids[:, 13:])], 1), model(ids[:, 5:])[:, 7:])


@torch.no_grad()
@pytest.mark.parametrize("lengths", [None, (11, 8, 1, 4)], ids=["full", "left_padded"])
def test_cache_select(model, lengths):
    """Keep, drop, reorder and duplicate rows; each goes on as it would alone, its copies independently."""
    ids, mask = left_padded(lengths or (11,) * 4, 11)
    _, cache = in_chunks(model, ids, [6, 5], mask if lengths else None)
    rows, more = torch.tensor([2, 0, 0, 3, 2]), tokens(5, 9, seed=1)
    cache.select(rows)
    got = torch.cat([model(part, cache=cache) for part in more.split([1, 1, 7], 1)], 1)
    for i, row in enumerate(rows):
        close(got[i], model(torch.cat([ids[row, mask[row] == 1], more[i]])[None])[0, -9:])
    cache.select(torch.tensor([1]))                             # once more, down to a single row
    last = tokens(1, 2, seed=2)
    close(model(last, cache=cache)[0], model(torch.cat([ids[0, mask[0] == 1], more[1], last[0]])[None])[0, -2:])


# ---- generation ------------------------------------------------------------------------------------------------------

def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_generate_shape_and_seed(model):
    ids = tokens(3, 7)
    a, b, c = (model.generate(ids, max_new_tokens=20, generator=seeded(seed)) for seed in (1, 1, 2))
    assert a.shape == (3, 27) and a.dtype == torch.long and torch.equal(a[:, :7], ids)
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(model.generate(ids, max_new_tokens=0), ids)
    results = [torch.manual_seed(seed) and model.generate(ids) for seed in (3, 3, 4)]       # the global generator
    assert results[0].shape == (3, 7 + 64), "64 new tokens, sampled, by default"
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


def test_uniform_takes_the_generators_place_and_a_record_says_how_each_token_came(model):
    """The same tokens; their log probabilities and experts are those of one forward pass over the result."""
    ids = tokens(3, 7)
    expected = model.generate(ids, 10, generator=seeded(1))
    uniform = torch.rand(10, 3, generator=seeded(1))
    result, logps, choices = model.generate(ids, 10, uniform=uniform, record=True)
    routing = []
    with torch.no_grad():
        logits = model.logits(model.hidden_states(result[:, :-1], routing=routing))
    assert torch.equal(result, expected)
    assert torch.allclose(logps, logits.log_softmax(-1)[:, 6:].gather(-1, result[:, 7:, None])[..., 0], atol=1e-4)
    assert torch.equal(choices.long(), torch.stack(routing))


@pytest.mark.parametrize("lengths", [None, (6, 5, 1, 3, 6, 2)], ids=["full", "left_padded"])
def test_eos_ends_a_row_and_leaves_the_others_alone(lengths):
    model = build(pad_token_id=3)
    ids, mask = left_padded(lengths or (6,) * 6, 6)
    options = dict(attention_mask=mask if lengths else None, max_new_tokens=30, top_p=0.9)
    free = model.generate(ids, generator=seeded(), **options)
    # A token from the middle of the first row and one of the second such that some row never meets either.
    stops = next([a, b] for a in free[0, 12:].tolist() for b in free[1, 12:].tolist()
                 if not torch.isin(free[:, 6:], torch.tensor([a, b])).any(1).all())
    for eos, ends in ((stops, stops), (stops[0], stops[:1])):
        stopped = model.generate(ids, generator=seeded(), eos_token_id=eos, **options)
        expected = free.clone()
        for row in range(6):
            met = [i for i in range(6, 36) if free[row, i] in ends]
            expected[row, met[0] + 1 if met else 36:] = 3
        untouched = (expected == free).all(1)
        assert untouched.any() and not untouched[0]
        assert torch.equal(stopped, expected)
    stopped = model.generate(ids, generator=seeded(), eos_token_id=free[:, 8].tolist(), **options)
    assert stopped.shape[1] <= 9, "it stops when every row has ended"


@pytest.mark.parametrize("chunk", [1, 5, 2048])
def test_rows_generate_what_they_generate_alone(model, monkeypatch, chunk):
    """Left-padded ones, and equal ones, which are read once: their places in the batch draw different tokens."""
    monkeypatch.setattr(Zaya.prefill, "__defaults__", (chunk,))
    ids, mask = (tensor[[0, 1, 2, 1]] for tensor in left_padded((12, 7, 1), 12))
    uniform = torch.rand(9, 4)
    together = model.generate(ids, 9, attention_mask=mask, uniform=uniform)
    assert not torch.equal(together[1], together[3])
    for row in range(4):
        alone = model.generate(ids[row, mask[row] == 1][None], 9, uniform=uniform[:, row, None])
        assert torch.equal(together[row, 12:], alone[0, -9:])


@pytest.mark.parametrize("options, word", [
    (dict(temperature=-0.1), "temperature"), (dict(temperature=math.nan), "temperature"),
    (dict(top_p=0.0), "top_p"), (dict(top_p=1.1), "top_p"),
    (dict(input_ids=torch.zeros(1, 0, dtype=torch.long)), "prompt"),
    (dict(attention_mask=torch.tensor([[1, 1, 0], [1, 1, 1]])), "left")])
def test_generate_refuses(options, word):
    with pytest.raises(ValueError, match=word):
        build(num_hidden_layers=1).generate(**{"input_ids": tokens(2, 3), **options})


def test_generate_leaves_training_alone():
    """Each module's own mode, also after an exception; and generated tokens are no one's load."""
    model, plain = build().train(), build()
    model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    with pytest.raises(IndexError):
        model.generate(torch.tensor([[99999]]), 2)
    assert torch.equal(model.generate(tokens(2, 3), 4, 0), plain.generate(tokens(2, 3), 4, 0))
    assert [module.training for module in model.modules()] == modes and len(set(modes)) == 2
    assert all((layer.gate.load == 0).all() for layer in model.layers)


LOGITS = torch.tensor([2.0, -1.0, 0.5, 0.0, 1.0, -math.inf])


@pytest.mark.parametrize("temperature, top_p, allowed", [
    (1.0, 1.0, [0, 1, 2, 3, 4]), (0.5, 1.0, [0, 1, 2, 3, 4]), (3.0, 1.0, [0, 1, 2, 3, 4]),
    (1.0, 0.5, [0]), (1.0, 0.7, [0, 4]), (1.0, 0.85, [0, 2, 4]), (1.0, 0.95, [0, 2, 3, 4])])
def test_sample_follows_the_distribution(temperature, top_p, allowed):
    """Probabilities at temperature 1: 0.56, 0.03, 0.13, 0.08, 0.21, 0.  top_p keeps the fewest tokens that reach it."""
    draws = 20_000
    uniform = torch.rand(draws, generator=seeded())
    drawn = Zaya.sample(LOGITS.expand(draws, -1), temperature, top_p, uniform)
    counts = torch.bincount(drawn, minlength=6).double()
    assert counts.nonzero()[:, 0].tolist() == allowed
    expected = torch.zeros(6, dtype=torch.float64)
    expected[allowed] = (LOGITS.double() / temperature)[allowed].softmax(0) * draws
    chi_square = ((counts - expected)[allowed] ** 2 / expected[allowed]).sum()
    assert chi_square < 18.5                                    # one in a thousand for 4 degrees of freedom


@pytest.mark.parametrize("top_p", [1.0, 0.6, 0.9])
def test_sample_at_the_ends_of_the_interval(top_p):
    """Tokens without probability are never drawn, not even by the smallest and largest uniform numbers."""
    logits = torch.tensor([-math.inf, 1.0, 0.9, -math.inf]).expand(2, -1)
    assert Zaya.sample(logits, 1.0, top_p, torch.tensor([0.0, 1 - 2 ** -24])).tolist() == [1, 2]
    assert Zaya.sample(logits, 0, top_p, torch.tensor([0.0, 0.99])).tolist() == [1, 1]


# ---- sizes and configuration -----------------------------------------------------------------------------------------

def test_published_sizes():
    with torch.device("meta"):
        model = Zaya(ZayaConfig.preset("zaya1-8b"))
    count = model.parameter_counts()
    assert (f"{count['total'] / 1e9:.3f}", f"{count['active'] / 1e9:.4f}") == ("8.840", "0.7536")
    untied = Zaya(ZayaConfig(**BASE, tie_word_embeddings=False))
    count, expert = untied.parameter_counts(), 3 * 32 * 24
    assert count["total"] == sum(p.numel() for p in untied.parameters())
    assert count["total"] - count["active"] == 2 * 96 * 32 + 3 * (4 - 1) * expert
    layer = model.layers[0]
    assert sum(p.numel() for p in layer.self_attn.parameters()) == pytest.approx(5.576e6, rel=1e-4)
    assert sum(p.numel() for p in layer.gate.parameters()) == pytest.approx(0.661e6, rel=2e-3)
    assert sum(p.numel() for p in layer.experts.parameters()) / 16 == pytest.approx(12.58e6, rel=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("name", ["smoke", "tiny", "small"])
def test_presets(name):
    config = ZayaConfig.preset(name)
    if name == "small":                                         # the others are too narrow for the published ratios
        assert config.num_attention_heads * config.head_dim == 4 * config.num_key_value_heads * config.head_dim \
            == config.hidden_size / 2
        config = ZayaConfig.preset(name, num_hidden_layers=1)
    logits = Zaya(config).eval()(torch.randint(0, config.vocab_size, (1, 6)))
    assert logits.shape == (1, 6, config.vocab_size)
    loss = -logits.log_softmax(-1).mean()
    assert 0 < loss.item() - math.log(config.vocab_size) < 0.7, "about as good as guessing at first"


SIZES = ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
         "num_experts", "moe_intermediate_size", "router_hidden_size", "max_position_embeddings"]
REFUSED = [
    *[({name: value}, name) for name in SIZES for value in (0, -2, 4.0, "4", True, None, [4])],
    *[({name: value}, name) for name in ("rms_norm_eps", "initializer_range")
      for value in (0, -1e-5, "1e-5", True, None, math.nan, math.inf)],
    *[({name: value}, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")
      for value in (-1, 2.0, "2", True, [-1], ["2"], [None], {})],
    *[({name: value}, name) for name, value in dict(
        pad_token_id=[0], tie_word_embeddings=1, sliding_window="5", layer_types="hybrid", rope_parameters=[1],
        rope_scaling={"rope_type": "linear", "factor": 8.0}, quantization_config={"quant_method": "fp8"},
        rope_theta=1e4, attn_logit_softcapping=50.0, router_scale=2.0, final_logit_softcapping=30.0, use_qk_norm=False,
        zaya_layers=["a", 16], num_experts_per_tok=2, attention_bias=True, lm_head_bias=True,
        attention_dropout=0.1, skip_expert=False).items()],
    *[(dict(rope_parameters={FULL: {name: value}}), name) for name, value in
      (("rope_theta", "1e4"), ("rope_theta", -1), ("partial_rotary_factor", "0.5"), ("partial_rotary_factor", 2.0),
       ("partial_rotary_factor", 0.4), ("factor", 8.0), ("type", "linear"), ("mrope_section", [1, 1]))],
    *[(dict(rope_parameters=rope), word) for rope, word in
      (({FULL: 3}, "rope_parameters"), ({"rope_theta": 1e4}, "rope_parameters"), ({FULL: {}, "factor": 2.0}, "factor"),
       ({FULL: {}, "partial_rotary_factor": 0.25}, "partial_rotary_factor"),
       ({FULL: {"rope_type": "yarn"}}, "rope_type.*yarn"), ({FULL: {}, "rope_type": "yarn"}, "rope_type.*yarn"),
       ({FULL: {"rope_type": "default"}, "rope_type": "yarn"}, "rope_type.*yarn"))],
    (dict(cca_time0=3), "cca_time0 3.*only 2"), (dict(cca_time1=1), "cca_time1 1.*only 2"),
    (dict(model_type="llama"), "model_type.*llama"), (dict(hidden_act="gelu"), "hidden_act.*gelu"),
    (dict(num_key_value_heads=3), "num_attention_heads.*num_key_value_heads"),
    (dict(num_key_value_heads=1, head_dim=7), "head_dim"), (dict(layer_types=[FULL]), "layer_types"),
    (dict(layer_types=[FULL, FULL, "mamba"]), "layer_types.*mamba"),
    (dict(layer_types=[FULL, FULL, {}]), "layer_types"),
    (dict(layer_types=[FULL, FULL, SLIDING]), "sliding_window"),
    (dict(layer_types=[FULL, FULL, SLIDING], sliding_window=0), "sliding_window")]


def test_config_errors_name_the_field():
    for changes, word in REFUSED:
        with pytest.raises(ValueError, match=word):
            ZayaConfig.from_dict({**BASE, **changes})
            pytest.fail(f"{changes} was accepted")
    with pytest.raises(ValueError, match="'huge'.*smoke, tiny, small, zaya1-8b"):
        ZayaConfig.preset("huge")
    assert ZayaConfig.preset("tiny", num_experts=2).num_experts == 2


NULLS = dict(pad_token_id=None, bos_token_id=None, eos_token_id=None)


@pytest.mark.parametrize("changes", [*SHAPES.values(), dict(eos_token_id=[5, 6]), dict(eos_token_id=[]), NULLS])
def test_config_round_trip(changes):
    config = ZayaConfig(**{**BASE, **changes})
    written = json.loads(json.dumps(config.to_dict()))
    assert ZayaConfig.from_dict(written) == config
    assert ZayaConfig.from_dict(written).to_dict() == config.to_dict()
    assert written["model_type"] == "zaya" and written["architectures"] == ["ZayaForCausalLM"]


def test_config_reads_the_hub_style():
    """The file on the hub has a "rope_type" beside the two layer types, nulls for defaults, and fields of no number."""
    rope = {FULL: {"rope_theta": 1e6, "rope_type": "default", "partial_rotary_factor": 0.25}, "rope_type": "default",
            SLIDING: {"rope_theta": 2e4, "rope_type": "default", "partial_rotary_factor": 0.5}}
    config = ZayaConfig.from_dict({
        **BASE, "rope_parameters": rope, "layer_types": None, "sliding_window": None, "hidden_act": None,
        "rope_scaling": None, "quantization_config": None, "attn_logit_softcapping": None, "pruned_heads": {},
        "architectures": ["ZayaForCausalLM"], "model_type": "zaya", "torch_dtype": "bfloat16", "use_cache": False,
        "output_hidden_states": True, "return_dict": True, "_name_or_path": "x", "_attn_implementation": "sdpa",
        "auto_map": {"AutoModel": "modeling.Zaya"}, "id2label": {"0": "A"}, "sep_token_id": 7, "temperature": 0.6,
        "top_p": 0.95, "is_encoder_decoder": False, "chunk_size_feed_forward": 0, "transformers_version": "4.57.0"})
    assert config == ZayaConfig(**BASE, rope_parameters={FULL: rope[FULL], SLIDING: rope[SLIDING]})
    assert config.rope_parameters == {FULL: rope[FULL], SLIDING: rope[SLIDING]} and config.layer_types == [FULL] * 3
    assert ZayaConfig(**BASE).rope_parameters == {
        FULL: {"rope_type": "default", "partial_rotary_factor": 0.5, "rope_theta": 5e6},
        SLIDING: {"rope_type": "default", "partial_rotary_factor": 0.5, "rope_theta": 1e4}}


# ---- save and load ---------------------------------------------------------------------------------------------------

NAME = "model.layers.1.self_attn.qkv_proj.k_proj.weight"


@pytest.fixture(scope="module")
def saved_model():
    return build(num_hidden_layers=2)


def same(a, b):
    assert a.state_dict().keys() == b.state_dict().keys()
    assert all(torch.equal(tensor, b.state_dict()[name]) for name, tensor in a.state_dict().items())


def read_weights(directory):
    """The tensors of the only weight file, which may be written over."""
    stored = safetensors.torch.load_file(directory / "model.safetensors")
    return {name: tensor.clone() for name, tensor in stored.items()}


def split(directory, index=True):
    """Spread model.safetensors over two files, every other tensor to one.  index: and say so."""
    state, places = read_weights(directory), {}
    for file in ("a.safetensors", "b.safetensors"):
        part = dict(list(state.items())[file == "b.safetensors"::2])
        safetensors.torch.save_file(part, directory / file)
        places |= dict.fromkeys(part, file)
    os.remove(directory / "model.safetensors")
    if index:
        (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return state, places


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
def test_save_and_load(tmp_path, tied):
    nulls = dict(pad_token_id=None, eos_token_id=[5, 6])
    model, ids = build(tie_word_embeddings=tied, **nulls).train(), tokens(2, 9)
    model.save_pretrained(tmp_path)
    generation = json.load(open(tmp_path / "generation_config.json"))
    assert generation == {"do_sample": True, "top_k": 0, **nulls}
    back = Zaya.from_pretrained(str(tmp_path))
    same(model, back)
    assert not back.training and all(parameter.requires_grad for parameter in back.parameters())
    assert all((layer.gate.load == 0).all() and len(layer.gate.load) == 5 for layer in back.layers)
    close(back(ids), model.eval()(ids))                         # mapped weights lie elsewhere: sums in another order
    assert back.config == model.config
    names = read_weights(tmp_path).keys()                       # counts in the routers are not part of a checkpoint
    assert len(names) == len(model.state_dict()) and ("lm_head.weight" in names) == (not tied)
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]


def test_a_loaded_model_learns(tmp_path, saved_model):
    """The weights are mapped from the file: writing to them must work and leave the file alone."""
    saved_model.save_pretrained(tmp_path)
    back, ids = Zaya.from_pretrained(tmp_path).train(), tokens(2, 9)
    optimizer = torch.optim.SGD(back.parameters(), 0.1)
    F.cross_entropy(back(ids).flatten(0, 1), ids.flatten()).backward()
    optimizer.step()
    assert not torch.equal(back.layers[0].self_attn.temp, saved_model.layers[0].self_attn.temp)
    same(saved_model, Zaya.from_pretrained(tmp_path))
    back.save_pretrained(tmp_path)                              # over the file it is mapped from
    same(back, Zaya.from_pretrained(tmp_path))
    saved_model.save_pretrained(tmp_path, state_dict=back.state_dict())
    same(back, Zaya.from_pretrained(tmp_path))


def test_a_save_that_fails_leaves_the_earlier_checkpoint(tmp_path, saved_model, monkeypatch):
    saved_model.save_pretrained(tmp_path)

    def full_disk(tensors, path, metadata=None):
        open(path, "wb").write(b"half a file")
        raise OSError("No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full_disk)
    with pytest.raises(OSError, match="space"):
        build(seed=1, num_hidden_layers=2).save_pretrained(tmp_path)
    same(saved_model, Zaya.from_pretrained(tmp_path))


def test_a_wrong_tensor_is_named(tmp_path, saved_model):
    saved_model.save_pretrained(tmp_path)
    good, extra = read_weights(tmp_path), NAME.replace("layers.1", "layers.7")
    missing = {name: tensor for name, tensor in good.items() if name != NAME}
    ours = r"layers\.1\.self_attn\.k_proj\.weight"
    for name, state in ((ours, missing), (extra.replace(".", r"\."), good | {extra: torch.ones(3)}),
                        (ours, good | {NAME: good[NAME].T.contiguous()})):
        safetensors.torch.save_file(state, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=name) as caught:
            Zaya.from_pretrained(tmp_path)
        assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
    copy_of_head = good | {"lm_head.weight": good["model.embed_tokens.weight"].clone()}
    safetensors.torch.save_file(copy_of_head, tmp_path / "model.safetensors")
    same(saved_model, Zaya.from_pretrained(tmp_path))           # a tied model needs no head, and ignores a copy


def test_only_the_model_is_read(tmp_path, saved_model):
    """Beside model.safetensors: a backup of zeros, an index to it and a damaged file."""
    saved_model.save_pretrained(tmp_path)
    zeros = {name: 0 * tensor for name, tensor in read_weights(tmp_path).items()}
    safetensors.torch.save_file(zeros, tmp_path / "backup.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {NAME: "backup.safetensors"}}))
    (tmp_path / "z.safetensors").write_bytes(b"cut")
    same(saved_model, Zaya.from_pretrained(tmp_path))


def test_the_index_decides_tensor_by_tensor(tmp_path, saved_model):
    """Each of two files holds zeros of what the index takes from the other, and a third is not in the index."""
    saved_model.save_pretrained(tmp_path)
    state, places = split(tmp_path)
    for file in ("a.safetensors", "b.safetensors", "c.safetensors"):
        held = {name: tensor if places[name] == file else 0 * tensor for name, tensor in state.items()}
        safetensors.torch.save_file(held | {"another.model": torch.ones(3)}, tmp_path / file)
    same(saved_model, Zaya.from_pretrained(tmp_path))
    del state[NAME]
    safetensors.torch.save_file(state, tmp_path / places[NAME])
    with pytest.raises(ValueError, match=places[NAME] + " is damaged: .*" + NAME.replace(".", r"\.")):
        Zaya.from_pretrained(tmp_path)


def test_files_without_an_index_must_not_overlap(tmp_path, saved_model):
    saved_model.save_pretrained(tmp_path)
    state, places = split(tmp_path, index=False)
    same(saved_model, Zaya.from_pretrained(tmp_path))
    safetensors.torch.save_file({NAME: state[NAME].clone()}, tmp_path / "three.safetensors")
    with pytest.raises(ValueError, match=rf"{NAME}' is in both {places[NAME]} and three.safetensors"):
        Zaya.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_a_damaged_json_is_named(tmp_path, saved_model, name):
    saved_model.save_pretrained(tmp_path)
    split(tmp_path)
    path = tmp_path / name
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())       # a byte order mark does no harm
    same(saved_model, Zaya.from_pretrained(tmp_path))
    for content in (b"", b'{"hidden_size": 3', b"[1]", b"null", b'"text"', b"\xff\xfe{\x00}\x00", b"[" * 100_000,
                    b'{"hidden_size": "64"}', b'{"weight_map": 3}'):
        path.write_bytes(content)
        with pytest.raises(ValueError) as caught:
            Zaya.from_pretrained(tmp_path)
        message = str(caught.value)
        assert message.count(str(path)) == 1 and "\n" not in message and len(message) < 300


def test_missing_and_cut_files_are_named(tmp_path, saved_model):
    with pytest.raises(FileNotFoundError) as caught:
        Zaya.from_pretrained(tmp_path / "nowhere")
    assert "config.json" in str(caught.value)
    saved_model.save_pretrained(tmp_path)
    split(tmp_path)
    path = tmp_path / "b.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="b.safetensors is damaged"):
        Zaya.from_pretrained(tmp_path)
    os.remove(path)
    with pytest.raises(FileNotFoundError, match="b.safetensors"):
        Zaya.from_pretrained(tmp_path)
    os.remove(tmp_path / "a.safetensors")
    os.remove(tmp_path / "model.safetensors.index.json")
    with pytest.raises(FileNotFoundError, match="safetensors"):
        Zaya.from_pretrained(tmp_path)


@torch.no_grad()
def test_loading_in_bf16_keeps_the_balancing_biases(tmp_path, saved_model):
    saved_model.save_pretrained(tmp_path / "fp32")
    back = Zaya.from_pretrained(tmp_path / "fp32", dtype=torch.bfloat16)
    assert all(parameter.dtype == torch.bfloat16 for parameter in back.parameters())
    for layer, exact in zip(back.layers, saved_model.layers):
        assert torch.equal(layer.gate.balancing_biases, exact.gate.balancing_biases)
        assert layer.gate.load.dtype == torch.int64
    back.save_pretrained(tmp_path / "bf16")
    assert json.load(open(tmp_path / "bf16" / "config.json"))["dtype"] == "bfloat16"
    same(back, Zaya.from_pretrained(tmp_path / "bf16"))
    assert Zaya.from_pretrained(tmp_path / "bf16", dtype=torch.float32).norm.weight.dtype == torch.float32


FRESH = """
import sys, torch
torch.set_num_threads(1)
for name in ("transformers", "tiktoken", "regex", "safetensors", "numpy"):      # imported where they are used
    sys.modules[name] = None
import zaya
with torch.device("meta"):                      # where torch itself imports more, with numpy or without
    zaya.Zaya(zaya.ZayaConfig.preset("smoke"))
zaya.Zaya(zaya.ZayaConfig.preset("smoke")).generate(torch.ones(1, 3, dtype=torch.long), 2)
for name in [name for name, module in sys.modules.items() if module is None]:
    del sys.modules[name]
import safetensors.torch
print(sorted(zaya.Tokenizer.train(open(sys.argv[1] + "/prose.txt").read(), 320).ranks.items()))
def private():
    return int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1]) * 1024
if sys.platform == "linux":
    before = private()
    model = zaya.Zaya.from_pretrained(sys.argv[1])
    loaded = private()
    copy = [parameter.detach().clone() for parameter in model.parameters()]
    print(loaded - before, private() - loaded)
"""


def test_a_fresh_process(tmp_path, tokenizer):
    """zaya.py needs torch alone until something else is used; another hash seed trains the same tokenizer; and loading
    maps the weights instead of copying them."""
    config = ZayaConfig(**{**BASE, "hidden_size": 512, "vocab_size": 32768, "moe_intermediate_size": 256})
    with torch.device("meta"):
        model = Zaya(config)
    model = model.to_empty(device="cpu")
    size = sum(parameter.numel() * 4 for parameter in model.parameters())
    assert size > 80e6
    model.save_pretrained(tmp_path)
    (tmp_path / "prose.txt").write_text(PROSE)
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", FRESH, str(tmp_path)], capture_output=True, text=True,
                          env={**os.environ, "PYTHONHASHSEED": "12345"}, cwd=os.path.dirname(zaya.__file__) or ".")
    assert done.returncode == 0, done.stderr
    ranks, *sizes = done.stdout.splitlines()
    assert ranks == str(sorted(tokenizer.ranks.items()))
    for rise, copied in [map(int, line.split()) for line in sizes]:
        assert rise < 0.1 * size, f"loading {size / 1e6:.0f} MB took {rise / 1e6:.0f} MB"
        assert copied > 0.9 * size, "the measure sees a copy when there is one"


# ---- balancing -------------------------------------------------------------------------------------------------------

class Routers(nn.Module):
    """The least a PIDBalancer needs: a module with routers in it, fixed inputs, and a strong preference."""

    def __init__(self, experts=6):
        super().__init__()
        self.routers = nn.ModuleList(Router(16, 8, experts + 1, layer > 0) for layer in range(2))
        self.x = torch.randn(1, 600, 16, generator=torch.Generator().manual_seed(0))
        generator = torch.Generator().manual_seed(1)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.5, generator=generator)
            parameter.requires_grad_(False)

    def forward(self, part=slice(None), count=None):
        for router in self.routers:
            router(self.x[:, part], count=count)

    def loads(self):
        return torch.stack([router.load for router in self.routers])

    def biases(self):
        return torch.stack([router.balancing_biases for router in self.routers])


def test_balancer_is_adamw_on_the_share():
    routers, lr, betas = Routers(), 0.05, (0.8, 0.9)
    group = PIDBalancer(routers).optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (1e-3, (0.9, 0.999), 0.0)
    balancer = PIDBalancer(routers, lr=lr, betas=betas)
    expected, m, v = routers.biases()[:, :6].double(), 0.0, 0.0
    for t in range(1, 4):
        load = torch.randint(1, 50, (2, 7)).double()
        for router, row in zip(routers.routers, load):
            router.load.copy_(row)
        log = balancer.step()
        assert (routers.loads() == 0).all()
        share = load[:, :6] / load[:, :6].sum(1, keepdim=True)
        m = betas[0] * m + (1 - betas[0]) * (share - 1 / 6)     # textbook Adam
        v = betas[1] * v + (1 - betas[1]) * (share - 1 / 6) ** 2
        expected = expected - lr * (m / (1 - betas[0] ** t)) / ((v / (1 - betas[1] ** t)).sqrt() + 1e-8)
        close(routers.biases()[:, :6].double(), expected, 1e-6)
        assert (routers.biases()[:, -1] == -1).all(), "the skip expert's is left at exactly -1"
        entropy = -(share * share.log()).sum(1).mean().item() / math.log(6)
        skipped, bias = (load[:, -1].sum() / load.sum()).item(), expected.abs().max().item()
        wanted = {"load": share.max().item() * 6, "entropy": entropy, "bias": bias, "skip": skipped}
        assert log == pytest.approx(wanted, abs=1e-5)


def test_balancer_alone_makes_a_skewed_load_uniform():
    routers = Routers().train()
    before = copy.deepcopy(dict(routers.named_parameters()))
    balancer, log = PIDBalancer(routers, lr=0.01, betas=(0.9, 0.99)), []
    for _ in range(400):
        routers()
        log.append(balancer.step())
    assert log[0]["entropy"] < 0.8 and log[0]["load"] > 2.5, "it starts skewed"
    assert min(entry["entropy"] for entry in log[-20:]) > 0.98
    assert max(entry["load"] for entry in log[-20:]) < 1.5
    assert all(torch.equal(parameter, before[name]) for name, parameter in routers.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_counts_are_exact_in_every_dtype(dtype):
    """bf16 has 8 bits: a counter of that type is wrong beyond 256, and a bias in steps of 1e-3 stops at 0.5."""
    routers = Routers(experts=2).to(dtype).train()
    routers.x = routers.x.to(dtype)
    for start in range(0, 600, 4):
        routers(slice(start, start + 4))
    assert (routers.loads().double().sum(1) == 600).all(), routers.loads()
    balancer = PIDBalancer(routers)
    for _ in range(700):
        for router in routers.routers:
            router.load.zero_()[0] = 1
        balancer.step()
    close(routers.biases()[:, 0].float(), torch.full((2,), -0.7), 0.01)


def test_counts_add_up_over_micro_batches_and_a_balancer_goes_on_from_its_state():
    """Over processes too: see test_distributed.py."""
    whole, resumed = Routers().train(), Routers().train()
    a, b = PIDBalancer(whole, lr=0.1), PIDBalancer(resumed, lr=0.1)
    for i in range(6):
        whole()
        if i == 3:                                              # a new process: weights and balancer from files
            state, weights = copy.deepcopy(b.state_dict()), copy.deepcopy(resumed.state_dict())
            resumed = Routers().train()
            resumed.load_state_dict(weights)
            b = PIDBalancer(resumed, lr=0.1)
            b.load_state_dict(state)
        for part in (slice(None),) if i else (slice(0, 200), slice(200, None)):
            resumed(part)
        assert torch.equal(whole.loads(), resumed.loads()) and a.step() == b.step(), i
        assert torch.equal(whole.biases(), resumed.biases()), i


def test_padding_is_not_counted(model):
    (ids, mask), (position, _) = left_padded((12, 5, 1), 12), pack(PACKED, 24)
    padded, packed = dict(input_ids=ids, attention_mask=mask), dict(input_ids=tokens(4, 24), position_ids=position)
    for arguments, real in ((dict(input_ids=ids), torch.ones_like(ids)), (padded, mask), (packed, position + 1)):
        routing = []
        model.train()
        model.hidden_states(**arguments, routing=routing)
        for layer, choice in zip(model.layers, routing):
            assert torch.equal(layer.gate.load, choice[real > 0].bincount(minlength=model.config.num_experts + 1))
            layer.gate.load.zero_()
        model.eval()(**arguments)
        assert all((layer.gate.load == 0).all() for layer in model.layers), "nothing is counted in eval mode"


def test_balancer_needs_counts():
    """From training with gradients: neither eval mode nor a forward pass without them counts."""
    model = build(skip_bias=-1.0)
    balancer = PIDBalancer(model)
    model(tokens(4, 30))
    with torch.no_grad():
        model.train()(tokens(4, 30))
    with pytest.raises(RuntimeError, match="train"):
        balancer.step()
    model(tokens(4, 30))
    log = balancer.step()
    assert set(log) == {"load", "entropy", "bias", "skip"} and 0 < log["entropy"] <= 1 <= log["load"]
    with pytest.raises(RuntimeError, match="train"):
        balancer.step()


def test_balancer_on_somebody_elses_router():
    """What it has to have is the biases, the counts and whether the last class skips."""
    router = nn.Module()
    router.skip_expert = False
    router.register_buffer("balancing_biases", torch.zeros(4))
    router.register_buffer("load", torch.tensor([9.0, 1, 1, 1]))
    log = PIDBalancer(nn.Sequential(router)).step()
    assert router.balancing_biases[0] < 0 < router.balancing_biases[1] and log["load"] == 3.0


# ---- the tokenizer ---------------------------------------------------------------------------------------------------

PROSE = ("The model reads 12345 numbers and 67890 words; it was 2024-05-17, 3.14159 or 1000000.\n"
         "def add(a, b):\n    return a + b  # 42 is the answer, not 43\n") * 3 \
    + " ".join(f"number{i} {i * 7919} is larger than {i * i}" for i in range(300))
TEXTS = ["", "naïve café — 中文 🙂👩‍👩‍👧 \U0001f1e9\U0001f1ea", "a\r\n\tb  c \x00\x85\u2028\ufeff", " 007 x1y22  333",
         PROSE]

@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(PROSE, 320)


def test_text_round_trips(tokenizer):
    """Digits are single tokens, and ordinary text never makes special ones."""
    spelled = [text.format(special) for special in Tokenizer.SPECIAL for text in ("{}", "a{}b", " {}\n")]
    for text in [*TEXTS, *spelled, *("".join(random.Random(seed).choices(TEXTS[1], k=200)) for seed in range(5))]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and tokenizer.decode_bytes(ids) == text.encode()
        assert not set(ids) & set(tokenizer.special.values())
        pieces = [tokenizer.decode([token]) for token in ids]
        assert [piece for piece in pieces if any(c.isdigit() for c in piece)] == [c for c in text if c.isdigit()]
    assert len(tokenizer.encode(PROSE)) < 0.7 * len(PROSE), "and it does compress"
    assert tokenizer.decode(tokenizer.encode("a\ud83db\udc80c")) == "a\ufffdb\ufffdc", "lone surrogates are no text"
    assert [tokenizer.decode([i]) for i in tokenizer.special.values()] == Tokenizer.SPECIAL


def test_render_targets_what_the_assistant_wrote(tokenizer):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1?"},
                {"role": "assistant", "content": "<think>easy</think>2"}, {"role": "user", "content": ""},
                {"role": "assistant", "content": "sure <|end|>"}]
    ids, targets = tokenizer.render(messages)
    assert len(ids) == len(targets) and all(isinstance(target, bool) for target in targets)
    assert tokenizer.decode(ids) == ("<|system|>Be brief.<|end|><|user|>1 + 1?<|end|><|assistant|><think>easy</think>2"
                                     "<|end|><|user|><|end|><|assistant|>sure <|end|><|end|>")
    targeted = [i for i, target in zip(ids, targets) if target]
    assert tokenizer.decode(targeted) == "<think>easy</think>2<|end|>sure <|end|><|end|>"
    assert targeted.count(tokenizer.end) == 2 and ids.count(tokenizer.end) == 5, "a written <|end|> is only text"
    assert [ids.count(tokenizer.special[tag]) for tag in ("<think>", "</think>")] == [1, 1]
    prompted, more = tokenizer.render(messages, generation_prompt=True)
    assert prompted == ids + [tokenizer.special["<|assistant|>"]] and more == targets + [False]
    assert tokenizer.render([]) == ([], [])
    for role in ("user", "system"):                             # nobody else opens the assistant's reasoning
        ids, targets = tokenizer.render([{"role": role, "content": "<think></think><|end|><|assistant|>"}])
        assert [i for i in ids if i in tokenizer.special.values()] == [tokenizer.special[f"<|{role}|>"], tokenizer.end]
        assert not any(targets)
    for role in ("tool", "User", "end", "pad", "endoftext", ""):
        with pytest.raises(ValueError, match="role"):
            tokenizer.render([{"role": role, "content": "x"}])


def test_merges_are_the_most_frequent_pairs():
    tokenizer = Tokenizer.train("abab abab abab xyz", 256 + 3 + len(Tokenizer.SPECIAL))
    learned = [a + b for a, b in tokenizer.merges]
    assert learned == [b"ab", b"abab", b" abab"]                # 6 times; 3 times; 2 times and before the x y of that
    assert tokenizer.encode("abab abab abx") == [257, 258, 32, 256, 120]


def test_vocab_size_is_respected_or_refused():
    for vocab_size in (264, 265, 320):
        tokenizer = Tokenizer.train(PROSE, vocab_size)
        assert tokenizer.vocab_size == vocab_size
        assert sorted([*tokenizer.ranks.values(), *tokenizer.special.values()]) == list(range(vocab_size))
    for text, vocab_size, word in ((PROSE, 263, "vocab_size"), ("abc", 300, "too few"), ("", 300, "too few")):
        with pytest.raises(ValueError, match=word):
            Tokenizer.train(text, vocab_size)


def drop(*path):
    def damage(content):
        for key in path[:-1]:
            content = content[key]
        del content[path[-1]]
    return damage


def test_tokenizer_save_and_load(tokenizer, tmp_path):
    """And a missing, changed or cut file is named."""
    path = tmp_path / "tokenizer.json"
    with pytest.raises(FileNotFoundError, match="tokenizer.json"):
        Tokenizer.from_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    back = Tokenizer.from_pretrained(tmp_path)
    assert (back.merges, back.ranks, back.special) == (tokenizer.merges, tokenizer.ranks, tokenizer.special)
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]
    whole = path.read_text(encoding="utf-8")
    for damage in (drop("model", "merges"), drop("model"), drop("pre_tokenizer", "pretokenizers", 0),
                   drop("added_tokens", 3), drop("model", "merges", 5),
                   lambda content: content["model"]["merges"].append(["€", "a"]),
                   lambda content: content.update(added_tokens=None),
                   lambda content: content["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex="."),
                   lambda content: content["pre_tokenizer"].update(pretokenizers=[{"type": "ByteLevel"}])):
        content = json.loads(whole)
        damage(content)
        path.write_text(json.dumps(content))
        with pytest.raises(ValueError, match="tokenizer.json"):
            Tokenizer.from_pretrained(tmp_path)
    path.write_text(whole[:len(whole) // 2], encoding="utf-8")
    with pytest.raises(ValueError, match="tokenizer.json"):
        Tokenizer.from_pretrained(tmp_path)


# ---- every class works when it is pasted alone -----------------------------------------------------------------------

HEADER = """import json, math, os, re
from dataclasses import asdict, dataclass, fields
import torch
import torch.nn.functional as F
from torch import nn
"""
LAYER = "CCA Router Experts RMSNorm ResidualScaling"
NEEDS = {"Layer": LAYER, "Cache": "LayerCache", "Tokenizer": "read_json write_json",
         "Zaya": f"{LAYER} Layer LayerCache Cache ZayaConfig read_json write_json"}
SOURCE = open(zaya.__file__, encoding="utf-8").read()
PIECES = {node.name: "".join(f"@{ast.unparse(decorator)}\n" for decorator in node.decorator_list)
          + ast.get_source_segment(SOURCE, node)
          for node in ast.parse(SOURCE).body if isinstance(node, (ast.ClassDef, ast.FunctionDef))}


@pytest.mark.parametrize("name", PIECES)
def test_pasted_alone(name):
    """With a user's imports and what its docstring asks for, every name that a piece's code reads is there."""
    pasted = {"__name__": "pasted"}
    exec("\n\n".join([HEADER, *(PIECES[other] for other in [*NEEDS.get(name, "").split(), name])]), pasted)
    tables, read = [symtable.symtable(PIECES[name], "pasted", "exec")], set()
    for table in tables:
        tables += table.get_children()
        read |= {symbol.get_name() for symbol in table.get_symbols() if symbol.is_global() and symbol.is_referenced()}
    missing = [other for other in read if other not in pasted and not hasattr(builtins, other)]
    assert len(read) > 1 and not missing
