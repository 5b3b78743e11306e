"""kernels.py: every fast path has the values and the gradients of what it stands for, in fp32 and bf16."""
import copy
import json
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import kernels
import zaya

DTYPES = [(torch.float32, 2e-5), (torch.bfloat16, 3e-2)]


def small(seed=0, **changes):
    """A model whose every parameter is random, so that none can be left out unnoticed."""
    torch.manual_seed(seed)
    shape = dict(num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=3)
    model = zaya.Zaya(zaya.ZayaConfig.preset("smoke", **{**shape, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def packing():
    """Two rows of 40: samples of 7, 1, 22 tokens and padding; one of 40."""
    packed = torch.cat([torch.arange(7), torch.arange(1), torch.arange(22), torch.full((10,), -1)])
    return torch.stack([packed, torch.arange(40)])


def close(got, wanted, bound):
    """Largest difference, relative to the largest value."""
    scale = wanted.float().abs().max().clamp_min(1e-6)
    assert (got.float() - wanted.float()).abs().max() / scale < bound


def compare(fast, plain, inputs, modules, bound):
    """Both on the same inputs (floating ones get gradients), the same random gradients backwards."""
    results = []
    for function in (fast, plain):
        leaves = [x.detach().clone().requires_grad_() if x is not None and x.is_floating_point() else x for x in inputs]
        modules.zero_grad()
        outputs = function(*leaves)
        generator = torch.Generator().manual_seed(1)
        sum((o.float() * torch.randn(o.shape, generator=generator)).sum() for o in outputs).backward()
        results.append(([o.detach() for o in outputs], [x.grad for x in leaves if x is not None and x.requires_grad],
                        {name: p.grad.clone() for name, p in modules.named_parameters() if p.grad is not None}))
    (values, grads, weights), (expected, wanted, reference) = results
    assert weights.keys() == reference.keys() and weights
    for got, want in zip([*values, *grads, *weights.values()], [*expected, *wanted, *reference.values()]):
        assert got.dtype == want.dtype and got.shape == want.shape
        close(got, want, bound)


@pytest.mark.parametrize("dtype, bound", DTYPES)
def test_residual_norm(dtype, bound):
    torch.manual_seed(0)
    both = torch.nn.ModuleList([kernels.FusedScaling(48), kernels.FusedNorm(48).to(dtype)])
    for parameter in both.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)

    def plain(x, y):
        x = zaya.ResidualScaling.forward(both[0], x, y)
        return x, zaya.RMSNorm.forward(both[1], x)

    compare(lambda x, y: kernels.residual_norm(x, y, *both), plain,
            (torch.randn(3, 5, 48), torch.randn(3, 5, 48).to(dtype)), both, bound)


@pytest.mark.parametrize("dtype, bound", DTYPES)
@pytest.mark.parametrize("ids", [packing(), None], ids=["packed", "whole rows"])
def test_cca(dtype, bound, ids):
    """Convolutions, means, norms, temperature, RoPE, value shift, attention: the module's own forward and backward."""
    plain = small().layers[1].self_attn.to(dtype)
    fast = copy.deepcopy(plain)
    fast.__class__ = kernels.FusedCCA
    real = torch.ones(2, 40, 1) if ids is None else (ids >= 0)[..., None]
    results = []
    for module, positions in ((fast, ids), (plain, plain.locate(real, ids))):
        x = torch.randn(2, 40, 64, generator=torch.Generator().manual_seed(2)).to(dtype).requires_grad_()
        out = module(x, positions) * real                       # nobody reads what stands at padding
        out.float().square().sum().backward()
        results.append([out.detach(), x.grad * real, *(p.grad for p in module.parameters())])
    for got, want in zip(*results):
        close(got, want, bound)


def test_cca_mix_alone():
    cca = small().layers[0].self_attn
    packed = torch.randn(2, 40, 6 * 16, requires_grad=True)
    positions = cca.locate(packed, packing())
    rope = positions.cos, positions.sin

    def plain(packed):
        seen = torch.cat([packed.new_zeros(2, 2, packed.shape[-1]), packed], 1)
        q_mean, k_mean = cca.qk_mean(packed)
        mixed = cca.convolve(seen, positions.position_ids)
        q, k = cca.unit(mixed[:, :, :4] + q_mean), cca.unit(mixed[:, :, 4:] + k_mean) * cca.temp[:, None]
        return cca.apply_rotary(q, *rope), cca.apply_rotary(k, *rope)

    compare(lambda p: kernels.cca_mix(p, cca, positions), plain, (packed,), cca, 2e-5)


def test_samples_are_found_and_what_is_no_packing_is_refused():
    assert kernels.sample_lengths(packing()) == [7, 1, 22, 10, 40]
    assert kernels.sample_lengths(torch.tensor([[-1, -1, 0, 1], [0, 1, 2, 3]])) == [2, 2, 4]
    assert kernels.sample_lengths(torch.tensor([[3, 4, 5, 6]])) == [4]          # a row may begin anywhere
    assert kernels.sample_lengths(torch.tensor([[0, 1, 5, 6]])) is None         # a jump looks across samples


@pytest.mark.parametrize("dtype, bound", DTYPES)
@pytest.mark.parametrize("only", [None, 2, 4], ids=["all", "one expert", "all skipped"])
def test_experts(dtype, bound, only):
    plain = small().layers[0].experts.to(dtype)
    fast = copy.deepcopy(plain)
    fast.__class__ = kernels.FusedExperts
    choice = torch.randint(0, 5, (30,)) if only is None else torch.full((30,), only)
    choice[choice == 1] = 0                                     # an expert that nobody visits
    results = []
    for module in (fast, plain):
        generator = torch.Generator().manual_seed(3)
        x = torch.randn(30, 64, generator=generator).to(dtype).requires_grad_()
        weight = torch.rand(30, generator=generator).requires_grad_()
        y = module(x, choice, weight)
        y.float().mul(torch.randn(30, 64, generator=generator)).sum().backward()
        results.append([y.detach(), x.grad, weight.grad, *(p.grad for p in module.parameters())])
    for got, want in zip(*results):
        assert got.dtype == want.dtype
        close(got, want, bound)


@pytest.mark.parametrize("dtype, bound", DTYPES)
@pytest.mark.parametrize("chunk", [7, 1024])
def test_linear_cross_entropy(dtype, bound, chunk):
    torch.manual_seed(0)
    head = torch.nn.Linear(48, 101, bias=False).to(dtype)
    targets = torch.randint(0, 101, (30,))
    targets[::4] = -100

    def plain(hidden):
        logits = hidden.float() @ head.weight.float().t()
        return (F.cross_entropy(logits, targets, reduction="sum", ignore_index=-100),)

    compare(lambda h: (kernels.linear_cross_entropy(h, head.weight, targets, chunk),), plain,
            (torch.randn(30, 48).to(dtype),), head, bound)


@pytest.mark.parametrize("changes", [{}, dict(num_key_value_heads=1), dict(tie_word_embeddings=False),
                                     dict(layer_types=["hybrid", "hybrid_sliding", "hybrid"], sliding_window=5)],
                         ids=["two KV heads", "one", "own head", "windows"])
def test_the_whole_model(changes):
    plain = small(**changes).train()
    fast = kernels.fuse(copy.deepcopy(plain))
    ids, positions = torch.randint(0, 300, (2, 40)), packing()
    targets = torch.where(positions >= 0, ids.roll(-1, 1), -100)
    for model in (plain, fast):
        hidden = model.hidden_states(ids, position_ids=positions)
        kernels.linear_cross_entropy(hidden.flatten(0, 1), model.output_weight, targets.flatten()).backward()
    for p, q in zip(plain.parameters(), fast.parameters()):
        close(q.grad, p.grad, 1e-4)
    for a, b in zip(plain.layers, fast.layers):
        assert torch.equal(a.gate.load, b.gate.load)
    close(fast(ids), plain(ids), 2e-5)                          # neither packed nor padded
    real = positions >= 0
    close(fast(ids, real)[real], plain(ids, real)[real], 2e-5)
    assert fast.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize("changes", [{}, dict(layer_types=["hybrid_sliding"] * 3, sliding_window=5)],
                         ids=["full", "windows"])
def test_decoding(changes):
    """The same tokens, from prompts of different lengths, one of a single token, rows that end early."""
    plain = small(**changes)
    fast = kernels.fuse(copy.deepcopy(plain))
    ids = torch.randint(10, 300, (4, 12))
    mask = torch.ones_like(ids)
    mask[1, :5], mask[2, :11] = 0, 0
    for eos in (None, 40):
        assert torch.equal(*(model.generate(ids, 40, 1.0, 1.0, mask, torch.Generator().manual_seed(5), eos)
                             for model in (plain, fast)))
    with torch.no_grad():
        caches = [zaya.Cache(3), zaya.Cache(3)]
        for part in (slice(0, 12), slice(0, 1), slice(4, 5)):
            some = [model(ids[:, part], mask[:, part] if part.stop == 12 else None, cache=cache)
                    for model, cache in zip((plain, fast), caches)]
        close(some[1], some[0], 2e-5)


def test_autocast_keeps_its_dtypes():
    """As on a GPU: bf16 in the middle, an fp32 residual stream and loss, gradients near those in fp32."""
    plain = small().train()
    fast = kernels.fuse(copy.deepcopy(plain))
    ids = torch.randint(0, 300, (2, 40))
    for model in (plain, fast):
        with torch.autocast("cpu", torch.bfloat16):
            hidden = model.hidden_states(ids, position_ids=packing())
            loss = kernels.linear_cross_entropy(hidden.flatten(0, 1), model.output_weight, ids.flatten())
        assert loss.dtype == torch.float32
        loss.backward()
    for (name, p), q in zip(plain.named_parameters(), fast.named_parameters()):
        assert p.grad.dtype == q[1].grad.dtype
        if p.ndim >= 2 and "gate" not in name:                  # a router's choice may flip in bf16
            cosine = F.cosine_similarity(p.grad.flatten(), q[1].grad.flatten(), 0)
            assert cosine > 0.9, (name, cosine)


@pytest.fixture
def traced(monkeypatch):
    """The paths that torch.compile traces, run as they stand."""
    monkeypatch.setattr(kernels, "traced", lambda x: True)


@pytest.mark.parametrize("dtype, bound", DTYPES)
def test_traced_residual_norm(traced, dtype, bound):
    test_residual_norm(dtype, bound)


@pytest.mark.parametrize("dtype, bound", DTYPES)
@pytest.mark.parametrize("ids", [packing(), None], ids=["packed", "whole rows"])
def test_traced_cca(traced, dtype, bound, ids):
    test_cca(dtype, bound, ids)


@pytest.mark.parametrize("dtype, bound", DTYPES)
@pytest.mark.parametrize("only", [None, 2, 4], ids=["all", "one expert", "all skipped"])
def test_traced_experts(traced, dtype, bound, only):
    test_experts(dtype, bound, only)


@pytest.mark.parametrize("dtype, bound", DTYPES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("S", [40, 150], ids=["one block", "three blocks"])
def test_attention_backward(dtype, bound, masked, S):
    """Against scaled_dot_product_attention, its gradients included, with and without a mask."""
    mask = zaya.CCA.attention_mask(torch.arange(S).remainder(37).expand(2, S), S) if masked else None
    bias = kernels.attention_bias(mask if masked else torch.ones(1, 1, S, S).tril().bool(), dtype)
    results = []
    for function in (lambda *x: kernels.Attention.apply(*x, bias, not masked),
                     lambda *x: F.scaled_dot_product_attention(*x, mask, is_causal=not masked, enable_gqa=True)):
        torch.manual_seed(0)
        leaves = [torch.randn(2, heads, S, 16).to(dtype).requires_grad_() for heads in (4, 2, 2)]
        out = function(*leaves)
        out.backward(torch.randn(out.shape).to(dtype))
        results.append([out.detach(), *(x.grad for x in leaves)])
    for got, want in zip(*results):
        assert got.dtype == want.dtype
        close(got, want, bound)


def counted(function, *arguments):
    """-> its result, and how many graphs were compiled for it; a graph break is an error."""
    counters = torch._dynamo.utils.counters
    before = counters["stats"]["unique_graphs"]
    result = function(*arguments)
    assert not counters["graph_break"]
    return result, counters["stats"]["unique_graphs"] - before


@pytest.mark.parametrize("backend, layers", [("aot_eager", 2), ("inductor", 1)])
def test_the_compiled_training_step(backend, layers):
    """Forward, loss and backward as one graph each: the gradients of the plain model, and nothing compiled anew for
    other values, another number of rows, or another model of this shape.  aot_eager traces the same graphs."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    positions, shape, loss = packing(), dict(num_hidden_layers=layers), kernels.compile_loss(backend)
    for seed, rows, graphs in ((0, 2, 1), (0, 3, 0), (1, 2, 0)):
        plain = small(seed, **shape).train()
        fast = kernels.fuse(copy.deepcopy(plain))
        position_ids = positions[torch.arange(rows) % 2]
        ids = torch.randint(0, 300, position_ids.shape)
        targets = torch.where(position_ids >= 0, ids.roll(-1, 1), -100)
        kernels.summed_loss(plain, ids, targets, position_ids).backward()
        total, compiled = counted(loss, fast, ids, targets, position_ids)
        total.backward()
        assert compiled == graphs
        close(total, kernels.summed_loss(plain, ids, targets, position_ids), 1e-5)
        for p, q in zip(plain.parameters(), fast.parameters()):
            close(q.grad, p.grad, 1e-4)
        for a, b in zip(plain.layers, fast.layers):
            assert torch.equal(a.gate.load, 2 * b.gate.load)   # the plain one ran forward twice


@pytest.mark.parametrize("backend, layers", [("aot_eager", 2), ("inductor", 1)])
def test_compiled_decoding(backend, layers, monkeypatch):
    """The same tokens, whatever the columns, the rows, the padding, the ends; one graph for all of it."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    fused = kernels.fuse(small(num_hidden_layers=layers))
    fast = kernels.compile_decoding(copy.deepcopy(fused), backend)
    cache = zaya.LayerCache()
    with monkeypatch.context() as patch:                        # columns not yet written are multiplied by 0: no NaN
        patch.setattr(torch.Tensor, "new_empty", lambda x, *shape: x.new_full(shape, torch.nan))
        cache.append(*torch.ones(2, 1, 2, 3, 4))
    assert not cache.k[:, :, 3:].any() and not cache.v[:, :, 3:].any()
    ids, mask = torch.randint(10, 300, (6, 12)), torch.ones(6, 12, dtype=torch.long)
    mask[1, :5], mask[2, :11] = 0, 0
    for rows, new, padding, eos, graphs in ((6, 30, mask, None, 1), (6, 70, mask, 40, 0), (5, 60, None, None, 0)):
        given = [(ids[:rows], new, 1.0, 1.0, padding, torch.Generator().manual_seed(5), eos) for _ in range(2)]
        wanted = fused.generate(*given[0])
        got, compiled = counted(fast.generate, *given[1])
        assert torch.equal(got, wanted) and compiled == graphs
    routing, (some, more) = [[], []], ([zaya.Cache(layers) for _ in range(2)], [fused, fast])
    with torch.no_grad():                                       # the experts taken are recorded too
        for model, cache, chosen in zip(more, some, routing):
            model.hidden_states(ids, cache=cache)
            model.hidden_states(ids[:, :1], cache=cache, routing=chosen)
    assert all(torch.equal(a, b) for a, b in zip(*routing)) and len(routing[0]) == layers
    with pytest.raises(ValueError, match="sliding windows"):
        kernels.compile_decoding(small(layer_types=["hybrid_sliding"] * 3, sliding_window=5))


def test_the_benchmark_compares_every_path(monkeypatch, capsys):
    """Small, and without transformers: errors as small as rounding, a time and a ratio for each path."""
    monkeypatch.setattr(kernels, "official", lambda config: None)
    monkeypatch.setattr(kernels, "medians", lambda *functions, rounds=9: [2.0 for f in functions if f() is not None])
    full, cost = kernels.benchmark, kernels.costs
    monkeypatch.setattr(kernels, "benchmark", lambda: full(2, 32))
    monkeypatch.setattr(kernels, "costs", lambda: cost(2, 32))
    kernels.main(["--json"])
    said = json.loads(capsys.readouterr().out)
    assert len(said["paths"]) == 6 and said["matmul_gflops"] > 0
    assert all(row["error"] < 1e-3 for row in said["paths"])
    kernels.main([])
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(table) == 8 and all(line.count("|") == 8 for line in table)


@pytest.mark.parametrize("preset, mha", [("zaya1-8b", 40 * 2 * 2048 * 4), ("small", 12 * 2 * 512 * 4)])
def test_the_cache_is_an_eighth_of_multi_head_attentions(preset, mha):
    """By the shape, and by the bytes that the tensors of a real cache grow by."""
    config = zaya.ZayaConfig.preset(preset)
    assert kernels.kv_bytes_of_mha(config) == mha
    assert config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim * 4 * 8 == mha
    config = kernels.measured_shape()
    assert kernels.kv_bytes(zaya.Zaya(config)) * 8 == kernels.kv_bytes_of_mha(config)


def test_prefill_over_context(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "context_times", lambda full=kernels.context_times: full((64, 128), 256, 1))
    monkeypatch.setattr(kernels, "benchmark", list)
    monkeypatch.setattr(kernels, "costs", lambda: dict.fromkeys(
        ("moe_ms", "dense_ms", "moe_over_dense", "kv_bytes", "kv_bytes_mha"), 0))
    kernels.main(["--picture", str(tmp_path / "context.png")])
    assert (tmp_path / "context.png").read_bytes()[:4] == b"\x89PNG"


def test_compiling_is_a_matter_of_the_stages_length():
    model = small()
    few, many = (kernels.should_compile(model, tokens) for tokens in (10_000, 10**12))
    assert not few[0] and "not compiled" in few[1]
    assert many[0] and "is compiled: that might save" in many[1]
    assert not kernels.should_compile(model.to("meta"), 10**12)[0]


def test_the_loss_needs_an_eighth_of_the_memory():
    """Peak memory of forward and backward beyond what was there, in a process each; the gradients are the same."""
    code = """if True:
        import resource, sys, torch, torch.nn.functional as F, kernels
        torch.manual_seed(0)
        hidden, weight = torch.randn(512, 8, requires_grad=True), torch.randn(262_272, 8, requires_grad=True)
        targets = torch.randint(0, len(weight), (512,))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if sys.argv[1] == "plain":
            F.cross_entropy(hidden @ weight.t(), targets, reduction="sum").backward()
        else:
            kernels.linear_cross_entropy(hidden, weight, targets).backward()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, hidden.grad.norm().item(),
              weight.grad.norm().item())"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    plain, fused = ([float(word) for word in subprocess.run(
        [sys.executable, "-c", code, way], env=environment, capture_output=True, text=True, check=True).stdout.split()]
        for way in ("plain", "fused"))
    assert fused[0] * 8 < plain[0]
    assert fused[1:] == pytest.approx(plain[1:], rel=1e-4)


@pytest.fixture(params=["C", "no compiler"])
def compiler(request, monkeypatch):
    """Both ways of decoding: what `cc` made, and what there is without it."""
    if request.param == "C" and kernels.c_code() is None:
        pytest.skip("no C compiler with OpenMP")
    if request.param != "C":
        monkeypatch.setattr(kernels, "c_code", lambda: None)


@pytest.mark.parametrize("rows", [1, 3, 20])
def test_wide_linear(rows, compiler):
    """Exact sums of bf16 weights in fp32; int8 weights that do not fit int32's sums by much; a last odd row."""
    torch.manual_seed(0)
    x, weight = torch.randn(rows, 3, 70), torch.randn(37, 70)
    close(kernels.wide_linear(x, weight.bfloat16()), x @ weight.bfloat16().float().t(), 1e-5)
    rounded, scale = kernels.int8_rows(weight)
    assert rounded.abs().amax(1).eq(127).all()
    close(rounded * scale[:, None], weight, 1 / 127)
    wanted = x @ (rounded * scale[:, None]).t()
    close(kernels.wide_linear(x, rounded, scale), wanted, 1e-4)
    got = kernels.wide_linear(x.bfloat16(), rounded, scale)
    assert got.dtype == torch.bfloat16
    close(got, wanted, 2e-2)
    most = torch.full((5, 4096), 127, dtype=torch.int8)         # every product as large as it can be
    got = kernels.wide_linear(torch.full((rows, 4096), -3.0), most, torch.ones(5))
    close(got, torch.tensor(-3.0 * 127 * 4096), 1e-3)


@torch.no_grad()
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 2e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("changes", [{}, dict(num_key_value_heads=1), dict(tie_word_embeddings=False),
                                     dict(layer_types=["hybrid", "hybrid_sliding", "hybrid"], sliding_window=4)],
                         ids=["two KV heads", "one", "own head", "windows"])
@pytest.mark.parametrize("padding", [0, 3])
def test_a_step_of_one_row(dtype, bound, changes, padding, compiler):
    """Token by token after a prompt; the plain model replays the choices, each of which its own router must find the
    best but for rounding, which breaks ties in bf16."""
    plain = small(**changes).to(dtype).eval()
    fast = kernels.fuse(copy.deepcopy(plain))
    behind = []

    def compare(gate, given, out):
        live, own, _ = zaya.Router.forward(gate, *given[:2])
        biases = gate.balancing_biases
        behind.append((live + biases[own] - out[0] - biases[out[1]]).abs().max())

    for layer in plain.layers:
        layer.gate.register_forward_hook(compare)
    ids, caches = torch.randint(10, 300, (1, 12)), [zaya.Cache(3), zaya.Cache(3)]
    mask = torch.ones_like(ids)
    mask[:, :padding] = 0
    for part in (slice(0, 5), *(slice(i, i + 1) for i in range(5, 12))):
        routing = []                                            # filled by the fast model, replayed by the plain one
        got, wanted = (model.hidden_states(ids[:, part], mask[:, part] if padding else None, cache=cache,
                                           routing=routing) for model, cache in zip((fast, plain), caches))
        close(fast.logits(wanted), plain.logits(wanted), 1e-5)
        close(got, wanted, bound)
    assert len(behind) == 8 * 3 and max(behind) < bound


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, dict(tie_word_embeddings=False)], ids=["tied", "own head"])
def test_int8(changes, compiler, tmp_path):
    """Small errors; the same model by rounding in memory, by saving that, and by rounding the folder shard by shard."""
    plain = small(**changes)
    with pytest.raises(FileNotFoundError, match="no config.json"):
        kernels.quantize_checkpoint(str(tmp_path), str(tmp_path / "out"))
    plain.save_pretrained(str(tmp_path / "plain"), max_shard_bytes=200_000)
    rounded = kernels.quantize(plain)
    ids, routing = torch.randint(10, 300, (2, 20)), []
    wanted, reference = rounded(ids), plain.logits(plain.hidden_states(ids, routing=routing))
    replayed = rounded.logits(rounded.hidden_states(ids, routing=routing))          # no expert flips
    error = kernels.logit_error(replayed.flatten(0, 1), reference.flatten(0, 1))
    assert 0 < error["error"] < 0.03 and error["same"] > 0.9 and 0 < error["kl"] < 0.01
    rounded.save_pretrained(str(tmp_path / "saved"))
    kernels.main(["--quantize", str(tmp_path / "plain"), str(tmp_path / "shards")])
    for folder, int8 in (("saved", False), ("shards", False), ("plain", True)):
        model = kernels.load(str(tmp_path / folder), int8)
        assert type(model) is kernels.Int8Zaya and model.state_dict().keys() == rounded.state_dict().keys()
        assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), rounded.state_dict().values()))
        close(model(ids), wanted, 1e-3)                         # mapped weights: other last bits, which int16 may widen
    size = sum(t.nbytes for t in rounded.state_dict().values()) / sum(t.nbytes for t in plain.state_dict().values())
    assert size < 0.45                                          # of fp32, with a tenth of it not rounded
    assert kernels.gb_per_token(rounded) < kernels.gb_per_token(plain)


def stopped(*arguments):
    """What ends kernels.py with these arguments: a sentence."""
    with pytest.raises(SystemExit) as end, kernels.plain_errors():
        kernels.main([str(argument) for argument in arguments])
    return end.value.code


def test_mistakes_get_one_clear_sentence(tmp_path, capsys, monkeypatch):
    """The path is named, nothing is measured first, and no checkpoint is written over."""
    small().save_pretrained(str(tmp_path / "plain"))
    plain, weights = tmp_path / "plain", (tmp_path / "plain" / "model.safetensors").read_bytes()
    monkeypatch.setattr(kernels, "machine_limits", lambda: pytest.fail("measured"))
    for picture in (tmp_path, tmp_path / "nowhere" / "context.png"):
        assert stopped("--picture", picture) == 2 and str(picture) in capsys.readouterr().err
    assert f"{tmp_path / 'none'}: No such file" in stopped("--quantize", tmp_path / "none", tmp_path / "int8")
    assert "would overwrite it" in stopped("--quantize", plain, plain)
    kernels.main(["--quantize", str(plain), str(tmp_path / "int8")])
    assert "int8 form already" in stopped("--quantize", tmp_path / "int8", tmp_path / "again")
    (plain / "model.safetensors").write_bytes(weights[:100])
    assert "model.safetensors is damaged" in stopped("--quantize", plain, tmp_path / "cut")
    assert "model.safetensors is damaged" in stopped("--full-size", plain)
    for content in (b'{"hidden', b"[]", b"\xff\xfe{"):
        (plain / "config.json").write_bytes(content)
        assert "config.json is damaged" in stopped("--quantize", plain, tmp_path / "cut")


def test_full_size_is_measured_on_any_checkpoint(tmp_path, monkeypatch, capsys):
    """A random one is made where there is none; its shapes and file layout are the official ones."""
    monkeypatch.setattr(kernels, "mv_bandwidth", lambda: 10.0)
    preset = zaya.ZayaConfig.preset("smoke")
    monkeypatch.setattr(zaya.ZayaConfig, "preset", lambda name: preset)
    folder = str(tmp_path / "random")
    kernels.main(["--full-size", folder, "--json"])
    plain, rounded = json.loads(capsys.readouterr().out)["decoding"]
    assert zaya.Zaya.from_pretrained(folder).embed_tokens.weight.dtype == torch.bfloat16
    assert plain["gb_per_token"] > rounded["gb_per_token"] and 0 < rounded["error"] < 0.2
    assert plain["share"] == pytest.approx(plain["tokens_per_s"] * plain["gb_per_token"] / 10)
    kernels.main(["--full-size", folder])
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(table) == 4 and all(line.count("|") == 11 for line in table)
