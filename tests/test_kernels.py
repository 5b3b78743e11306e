"""kernels.py: every fast path has the values and the gradients of what it stands for, in fp32 and bf16."""
import copy
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import kernels
import zaya
from conftest import randomise

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


def gradients(function, inputs, module):
    """-> the outputs of function(*inputs), then every gradient that random output gradients give."""
    leaves = [x.clone().requires_grad_() if x.is_floating_point() else x for x in inputs]
    module.zero_grad()
    outputs = function(*leaves)
    generator = torch.Generator().manual_seed(1)
    torch.autograd.backward(outputs, [torch.randn(o.shape, generator=generator).to(o.dtype) for o in outputs])
    found = [x.grad for x in leaves if x.is_floating_point()] + [p.grad.clone() for p in module.parameters()]
    return [o.detach() for o in outputs] + found


def compare(fast, plain, inputs, module, bound):
    """Both functions give the same values and gradients in the same dtypes."""
    for got, want in zip(gradients(fast, inputs, module), gradients(plain, inputs, module), strict=True):
        assert got.dtype == want.dtype and got.shape == want.shape
        close(got, want, bound)


@pytest.mark.parametrize("dtype, bound", DTYPES)
@pytest.mark.parametrize("ids", [packing(), None], ids=["packed", "whole rows"])
def test_cca(dtype, bound, ids):
    """Convolutions, means, norms, temperature, RoPE, value shift, attention: the module's own forward and backward."""
    plain = small().layers[1].self_attn.to(dtype)
    fast = copy.deepcopy(plain)
    fast.__class__ = kernels.FusedCCA
    fast.load_state_dict(plain.state_dict())
    x = torch.randn(2, 40, 64, generator=torch.Generator().manual_seed(2)).to(dtype)
    real = torch.ones(2, 40, 1) if ids is None else (ids >= 0)[..., None]
    real = real.to(dtype)                                       # nobody reads what stands at padding
    found = gradients(lambda x: [fast(x * real, ids) * real], (x,), fast)
    for got, want in zip(found, gradients(lambda x: [plain(x * real, ids) * real], (x,), plain), strict=True):
        assert got.dtype == want.dtype
        close(got, want, bound)


def test_samples_are_found_and_what_is_no_packing_is_refused():
    assert kernels.sample_lengths(packing()) == [7, 1, 22, 10, 40]
    assert kernels.sample_lengths(torch.tensor([[-1, -1, 0, 1], [0, 1, 2, 3]])) == [2, 2, 4]
    assert kernels.sample_lengths(torch.tensor([[3, 4, 5, 6]])) == [4]          # a row may begin anywhere
    assert kernels.sample_lengths(torch.tensor([[0, 1, 5, 6]])) is None         # a jump looks across samples
    cca, x = small().layers[0].self_attn, torch.randn(1, 4, 64)
    fast = copy.deepcopy(cca)
    fast.__class__ = kernels.FusedCCA
    close(fast(x, torch.tensor([[0, 1, 5, 6]])), cca(x, torch.tensor([[0, 1, 5, 6]])), 2e-5)


@pytest.mark.parametrize("dtype, bound", DTYPES)
@pytest.mark.parametrize("only", [None, 2, 4], ids=["all", "one expert", "all skipped"])
def test_grouped_experts(dtype, bound, only):
    experts = small().layers[0].experts.to(dtype)
    choice = torch.randint(0, 5, (30,)) if only is None else torch.full((30,), only)
    choice[choice == 1] = 0                                     # an expert that nobody visits

    def grouped(x, weight):
        return [kernels.grouped_experts(x, experts.gate_up_proj, experts.down_proj, choice, weight)]

    compare(grouped, lambda x, weight: [experts(x, choice, weight)],
            (torch.randn(30, 64).to(dtype), torch.rand(30)), experts, bound)


def test_what_a_grouped_product_leaves_for_skipped_tokens_is_not_read(monkeypatch):
    """Its rows outside of every group are whatever stood in memory; here NaN, forward and backward."""
    product = kernels.grouped_mm

    class Garbage(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, end):
            ctx.end = end
            return torch.where(torch.arange(len(x))[:, None] < end, x, torch.nan)

        @staticmethod
        def backward(ctx, grad):
            return torch.where(torch.arange(len(grad))[:, None] < ctx.end, grad, torch.nan), None

    def careless(a, b, ends):                                   # the weights' gradients, of b (N, J), have no such rows
        if b.ndim == 2:
            return product(a, b, ends)
        return Garbage.apply(product(Garbage.apply(a, ends[-1]), b, ends), ends[-1])

    monkeypatch.setattr(kernels, "grouped_mm", careless)
    test_grouped_experts(torch.float32, 2e-5, None)
    test_grouped_experts(torch.float32, 2e-5, 4)


@pytest.mark.parametrize("dtype, bound", DTYPES)
def test_linear_cross_entropy(dtype, bound):
    head = torch.nn.Linear(48, 101, bias=False).to(dtype)
    targets = torch.randint(0, 101, (30,))
    targets[::4] = -100

    def plain(hidden):
        logits = hidden.float() @ head.weight.float().t()
        return [F.cross_entropy(logits, targets, reduction="sum", ignore_index=-100)]

    compare(lambda h: [kernels.linear_cross_entropy(h, head.weight, targets)], plain,
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


def counted(function, *arguments):
    """-> its result, and how many graphs were compiled for it; a graph break is an error."""
    counters = torch._dynamo.utils.counters
    before = counters["stats"]["unique_graphs"]
    result = function(*arguments)
    assert not counters["graph_break"]
    return result, counters["stats"]["unique_graphs"] - before


# As another CPU Inductor of torch 2.13 writes C++ with vector types that it does not declare.
BACKENDS = [("aot_eager", 2), pytest.param("inductor", 1, marks=pytest.mark.skipif(
    os.environ.get("ATEN_CPU_CAPABILITY") == "default", reason="Inductor's C++ does not compile there"))]


@pytest.mark.parametrize("backend, layers", BACKENDS)
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


@pytest.mark.parametrize("backend, layers", BACKENDS)
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


def test_compiling_is_a_matter_of_the_stages_length():
    model = small()
    few, many = (kernels.should_compile(model, tokens) for tokens in (10_000, 10**12))
    assert not few[0] and "not compiled" in few[1]
    assert many[0] and "is compiled: that might save" in many[1]
    odd = kernels.should_compile(small(moe_intermediate_size=12), 10**12)
    assert not odd[0] and "multiples of 8" in odd[1]
    assert kernels.should_compile(model.to("meta"), 10)[0]      # a device that is no CPU


# ---- int8 ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("rows, width", [(1, 64), (3, 96), (20, 64), (3, 70)])
def test_int8_product(rows, width):
    """PyTorch's packed product, an operation of its own use that may change, is what unpacking the weights gives.

    Widths of 70 it would read beyond their end, which crashed in bf16: they are unpacked.
    """
    x, weight = torch.randn(rows, 3, width), torch.randn(37, width)
    rounded, scale = kernels.int8_rows(weight)
    assert rounded.abs().amax(1).eq(127).all()
    close(rounded * scale[:, None], weight, 1 / 127)
    wanted = x @ (rounded * scale[:, None]).t()
    close(kernels.int8_product(x, rounded, scale), wanted, 1e-5)
    got = kernels.int8_product(x.bfloat16(), rounded, scale)
    assert got.dtype == torch.bfloat16
    close(got, wanted, 2e-2)
    if width % 32 == 0:
        close(torch.ops.aten._weight_int8pack_mm(x.flatten(0, 1), rounded, scale).view_as(wanted), wanted, 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, dict(tie_word_embeddings=False)], ids=["tied", "own head"])
def test_int8(changes, tmp_path):
    """Small errors; the same model by rounding in memory, by saving that, and by rounding a folder."""
    plain = small(**changes)
    plain.save_pretrained(str(tmp_path / "plain"), max_shard_bytes=200_000)
    (tmp_path / "plain" / "tokenizer.json").write_text("{}")
    rounded = kernels.quantize(plain)
    ids, routing = torch.randint(10, 300, (2, 20)), []
    wanted, reference = rounded(ids), plain.logits(plain.hidden_states(ids, routing=routing))
    replayed = rounded.logits(rounded.hidden_states(ids, routing=routing))          # no expert flips
    error = kernels.logit_error(replayed.flatten(0, 1), reference.flatten(0, 1))
    assert 0 < error["error"] < 0.03 and error["same"] > 0.9 and 0 < error["kl"] < 0.01
    rounded.save_pretrained(str(tmp_path / "saved"))
    kernels.main(["--quantize", str(tmp_path / "plain"), str(tmp_path / "folder")])
    assert (tmp_path / "folder" / "tokenizer.json").read_text() == "{}"
    for folder, int8 in (("saved", False), ("folder", False), ("plain", True)):
        model = kernels.load(str(tmp_path / folder), int8)
        assert type(model) is kernels.Int8Zaya and model.state_dict().keys() == rounded.state_dict().keys()
        assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), rounded.state_dict().values()))
        close(model(ids), wanted, 1e-5)
    tokens = rounded.generate(ids, 8, temperature=0)            # a few rows: the packed product
    assert torch.equal(model.generate(ids, 8, temperature=0), tokens)
    size = sum(t.nbytes for t in rounded.state_dict().values()) / sum(t.nbytes for t in plain.state_dict().values())
    assert size < 0.45                                          # of fp32, with a tenth of it not rounded
    assert kernels.gb_per_token(rounded) < kernels.gb_per_token(plain)


@torch.no_grad()
def test_bf16_weights_are_read_as_they_are():
    """Outside of training the LM head widens a slice at a time; the logits are those of the plain model, in fp32."""
    plain = small(vocab_size=2500).bfloat16().eval()
    fast, hidden = kernels.fuse(copy.deepcopy(plain)), torch.randn(2, 3, 64)
    assert fast.logits(hidden).dtype == torch.float32
    close(fast.logits(hidden), plain.logits(hidden), 1e-5)


# ---- the program -----------------------------------------------------------------------------------------------------

def test_the_benchmark_compares_every_path(monkeypatch, capsys):
    """Small: errors as small as rounding, a time and a ratio for each path."""
    monkeypatch.setattr(kernels, "medians", lambda *functions, rounds=9: [2.0 for f in functions if f() is not None])
    full = kernels.benchmark
    monkeypatch.setattr(kernels, "benchmark", lambda device, compiled: full(device, 2, 32, compiled))
    kernels.main(["--json"])
    said = json.loads(capsys.readouterr().out)
    assert len(said["paths"]) == 6 and said["matmul_gflops"] > 0
    # Over so few tokens the terms of one temperature's gradient cancel but for a thousandth of the others'.
    assert all(row["error"] < (1e-2 if "step" in row["path"] else 1e-5) and row["ratio"] == 1 for row in said["paths"])
    monkeypatch.setattr(kernels, "benchmark", lambda device, compiled: said["paths"])
    kernels.main([])
    out = capsys.readouterr().out
    rows = [line for line in out.splitlines() if line.startswith("|")]
    assert len(rows) == 7 and all(line.count("|") == 6 for line in rows)
    assert "A step with top-1 of 8 experts takes 2 ms, of a dense model" in out
    model, cache = zaya.Zaya(kernels.measured_shape()), zaya.Cache(6)               # the bytes of a real cache
    model(torch.zeros(1, 8, dtype=torch.long), cache=cache)
    held = sum(part[:, :, slot.start:slot.end].nbytes for slot in cache.layers for part in (slot.k, slot.v))
    assert held == 8 * said["kv_bytes"] == said["kv_bytes_mha"]


def stopped(*arguments):
    """What ends kernels.py with these arguments: a sentence."""
    with pytest.raises(SystemExit) as end, kernels.plain_errors():
        kernels.main([str(argument) for argument in arguments])
    return end.value.code


def test_mistakes_get_one_clear_sentence(tmp_path, monkeypatch):
    """The path is named, nothing is measured first, and no checkpoint is written over."""
    small().save_pretrained(str(tmp_path / "plain"))
    plain, weights = tmp_path / "plain", (tmp_path / "plain" / "model.safetensors").read_bytes()
    monkeypatch.setattr(kernels, "machine_limits", lambda: pytest.fail("measured"))
    assert "config.json not found" in stopped("--quantize", tmp_path / "none", tmp_path / "int8")
    assert "would overwrite it" in stopped("--quantize", plain, plain)
    kernels.main(["--quantize", str(plain), str(tmp_path / "int8")])
    assert "int8 form already" in stopped("--quantize", tmp_path / "int8", tmp_path / "again")
    (plain / "model.safetensors").write_bytes(weights[:100])
    assert "model.safetensors is damaged" in stopped("--quantize", plain, tmp_path / "cut")
    assert "model.safetensors is damaged" in stopped("--full-size", plain)
    for content in (b'{"hidden', b"[]", b"\xff\xfe{"):
        (plain / "config.json").write_bytes(content)
        assert "config.json is damaged" in stopped("--quantize", plain, tmp_path / "cut")
    assert not (tmp_path / "cut").exists()


def test_full_size_is_measured_on_any_checkpoint(tmp_path, monkeypatch, capsys):
    """A random one is made where there is none; its shapes and file layout are the official ones."""
    monkeypatch.setattr(kernels, "mv_bandwidth", lambda: 10.0)
    preset = zaya.ZayaConfig.preset("smoke")
    monkeypatch.setattr(zaya.ZayaConfig, "preset", lambda name: preset)
    folder = str(tmp_path / "random")
    kernels.main(["--full-size", folder, "--json"])
    plain, rounded = json.loads(capsys.readouterr().out)["decoding"]
    made = zaya.Zaya.from_pretrained(folder)
    assert made.embed_tokens.weight.dtype == torch.bfloat16
    assert made.embed_tokens.weight.float().std().item() == pytest.approx(preset.initializer_range, rel=0.05)
    assert made.norm.weight.eq(1).all() and not made.layers[0].self_attn.conv_qk_grouped.bias.any()
    assert plain["gb_per_token"] > rounded["gb_per_token"] and 0 < rounded["error"] < 0.2
    assert plain["share"] == pytest.approx(plain["tokens_per_s"] * plain["gb_per_token"] / 10)
    kernels.main(["--full-size", folder])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(rows) == 4 and all(line.count("|") == 9 for line in rows)


# ---- decoding in C --------------------------------------------------------------------------------------------------

needs_compiler = pytest.mark.skipif(shutil.which(os.environ.get("CC") or "cc") is None, reason="no C compiler")
ROWS = 13                                                       # two blocks of six rows, and one more


def routed(**changes):
    """A fused model whose tokens visit all experts, the skip expert too."""
    return kernels.fuse(randomise(zaya.Zaya(zaya.ZayaConfig.preset("smoke", **changes)), skip_bias=0)).eval()


def same_replies(model, monkeypatch, **options):
    """`generate` in C and in PyTorch: the same tokens and experts, log probabilities to 1e-4, from prompts of 1 to 9
    tokens of which some are equal.  A near tie may send one row another way."""
    ids, mask, uniform = torch.randint(10, 300, (ROWS, 9)), torch.ones(ROWS, 9, dtype=torch.long), torch.rand(40, ROWS)
    ids[5:8] = ids[4]
    mask[1, :5], mask[2, :8], mask[9, :1] = 0, 0, 0
    options = dict(attention_mask=mask, uniform=uniform, record=True) | options
    assert kernels.decoding_in_c(model)[1] == "C decodes"
    tokens, logps, choices = model.generate(ids, 40, **options)
    with monkeypatch.context() as patch:
        patch.setenv("CC", "/nonexistent/cc")
        assert "PyTorch decodes: no compiler" in kernels.decoding_in_c(model)[1]
        wanted, wanted_logps, wanted_choices = model.generate(ids, 40, **options)
    assert tokens.shape == wanted.shape and choices.shape == wanted_choices.shape and choices.dtype == torch.int16
    same = (tokens == wanted).all(1)
    assert same.sum() >= ROWS - 1
    close(logps[same], wanted_logps[same], 1e-4)
    read = torch.cat([mask.bool(), torch.ones(ROWS, choices.shape[2] - 9, dtype=torch.bool)], 1)    # not the padding
    agree = (choices == wanted_choices).all(0)[read]
    assert agree.float().mean() > 0.99 and len(wanted_choices.unique()) >= 0.9 * model.config.router_classes
    return tokens


@needs_compiler
@pytest.mark.parametrize("changes", [
    {}, dict(num_attention_heads=2, num_key_value_heads=2, num_experts=3),
    dict(num_attention_heads=6, num_key_value_heads=2, head_dim=32, skip_expert=False, tie_word_embeddings=False),
    dict(hidden_size=80, moe_intermediate_size=48, router_hidden_size=32, num_hidden_layers=3, num_experts=17,
         rope_parameters={"hybrid": {"rope_theta": 1e4, "partial_rotary_factor": 0.0}})],
    ids=["smoke", "H = K", "three queries a KV head", "odd sizes"])
def test_decoding_in_c(changes, monkeypatch):
    """Every weight counts, prompts of other lengths beside each other, rows that end, the cache that grows."""
    model = routed(**changes)
    full = same_replies(model, monkeypatch)
    ended = same_replies(model, monkeypatch, eos_token_id=full[:, 14:17].flatten().tolist())
    assert (ended[:, 9:] == model.config.pad_token_id).any()
    same_replies(model, monkeypatch, temperature=0)
    with monkeypatch.context() as patch:                        # a prompt that is read in several calls
        patch.setattr(kernels.Slots, "piece", 4)
        same_replies(model, monkeypatch, temperature=0.7, top_p=0.9)
    model.load_state_dict(randomise(zaya.Zaya(model.config), seed=1, skip_bias=0).state_dict())
    same_replies(model, monkeypatch)                            # and not the weights of the calls before
    alone = model.generate(full[3:4, :9], 20, 0)                # one row, which does not depend on the others
    assert torch.equal(alone, model.generate(full[:, :9], 20, 0)[3:4])


@needs_compiler
def test_decoding_in_c_for_another_cpu(monkeypatch):
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")        # registers of four numbers
    same_replies(routed(), monkeypatch)


def test_when_pytorch_decodes(monkeypatch):
    """Each reason, and that decoding goes on."""
    sliding, odd = dict(layer_types=["hybrid_sliding"] * 2, sliding_window=5), dict(moe_intermediate_size=40)
    own = routed()
    own.layers[1].__class__ = zaya.Layer
    ids = torch.randint(10, 300, (2, 5))
    for model, reason in ((routed(**sliding), "sliding window"), (routed(**odd), "multiples of 16"),
                          (routed().bfloat16(), "fp32"), (kernels.quantize(routed()), "fp32"),
                          (own, "class of their own"),
                          (kernels.compile_decoding(routed(), "eager"), "compile_decoding")):
        library, why = kernels.decoding_in_c(model)
        assert library is None and reason in why
        if not model.decoding_backend:
            assert model.generate(ids, 3).shape == (2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert "autocast" in kernels.decoding_in_c(routed())[1]
    monkeypatch.setenv("CC", "false")                           # a compiler that fails
    assert "no compiler" in kernels.decoding_in_c(routed())[1]


@needs_compiler
def test_two_processes_compile_at_once(tmp_path):
    code = """if True:
        import torch, kernels, zaya
        torch.manual_seed(0)
        model = kernels.fuse(zaya.Zaya(zaya.ZayaConfig.preset("smoke")))
        print(kernels.decoding_in_c(model)[1], model.generate(torch.ones(2, 3, dtype=torch.long), 4, 0).tolist())"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "XDG_CACHE_HOME": str(tmp_path)}
    processes = [subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
                 for _ in range(2)]
    said = [process.communicate()[0] for process in processes]
    assert said[0] == said[1] and said[0].startswith("C decodes [[1, 1, 1, ")
    assert [path.suffix for path in (tmp_path / "zaya").iterdir()] == [".so"]
