"""kernels.py: every fast path has the values and the gradients of what it stands for, in fp32 and bf16."""
import copy
import itertools
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
    leaves = [x.clone().requires_grad_() for x in inputs]
    module.zero_grad()
    outputs = function(*leaves)
    generator = torch.Generator().manual_seed(1)
    torch.autograd.backward(outputs, [torch.randn(o.shape, generator=generator).to(o.dtype) for o in outputs])
    return [*(o.detach() for o in outputs), *(x.grad for x in leaves), *(p.grad.clone() for p in module.parameters())]


def compare(fast, plain, inputs, modules, bound):
    """Both functions give the same values and gradients in the same dtypes."""
    for got, want in zip(gradients(fast, inputs, modules[0]), gradients(plain, inputs, modules[1]), strict=True):
        assert got.dtype == want.dtype and got.shape == want.shape
        close(got, want, bound)


@pytest.mark.parametrize("dtype, bound", DTYPES)
@pytest.mark.parametrize("ids", [packing(), torch.tensor([[*range(10), *range(5, 35)]] * 2), None],
                         ids=["packed", "a jump that looks across samples", "whole rows"])
def test_cca(dtype, bound, ids):
    """Convolutions, means, norms, temperature, RoPE, value shift, attention: the module's own forward and backward."""
    plain = small().layers[1].self_attn.to(dtype)
    fast = copy.deepcopy(plain)
    fast.__class__ = kernels.FusedCCA
    x = torch.randn(2, 40, 64, generator=torch.Generator().manual_seed(2)).to(dtype)
    real = torch.ones(2, 40, 1) if ids is None else (ids >= 0)[..., None]
    real = real.to(dtype)                                       # nobody reads what stands at padding
    compare(lambda x: [fast(x * real, ids) * real], lambda x: [plain(x * real, ids) * real], (x,), (fast, plain), bound)


def test_samples_are_found_and_what_is_no_packing_is_refused():
    assert kernels.sample_lengths(packing()) == [7, 1, 22, 10, 40]
    assert kernels.sample_lengths(torch.tensor([[-1, -1, 0, 1], [0, 1, 2, 3]])) == [2, 2, 4]
    assert kernels.sample_lengths(torch.tensor([[3, 4, 5, 6]])) == [4]          # a row may begin anywhere
    assert kernels.sample_lengths(torch.tensor([[0, 1, 5, 6]])) is None         # a jump looks across samples


@pytest.mark.parametrize("dtype, bound", DTYPES)
@pytest.mark.parametrize("only", [None, 2, 4], ids=["all", "one expert", "all skipped"])
def test_grouped_experts(dtype, bound, only):
    experts = small().layers[0].experts.to(dtype)
    choice = torch.randint(0, 5, (30,)) if only is None else torch.full((30,), only)
    choice[choice == 1] = 0                                     # an expert that nobody visits

    def grouped(x, weight):
        return [kernels.grouped_experts(x, experts.gate_up_proj, experts.down_proj, choice, weight)]

    compare(grouped, lambda x, weight: [experts(x, choice, weight)],
            (torch.randn(30, 64).to(dtype), torch.rand(30)), (experts, experts), bound)


def test_what_a_grouped_product_leaves_for_skipped_tokens_is_not_read(monkeypatch):
    """Its rows outside of every group are whatever stood in memory; here NaN, forward and backward."""
    product = kernels.grouped_mm

    def careless(a, b, ends):                                   # the weights' gradients, of b (N, J), have no such rows
        outside = (torch.arange(len(a)) >= ends[-1])[:, None]
        return product(a, b, ends) if b.ndim == 2 else product(a, b, ends).masked_fill(outside, torch.nan)

    monkeypatch.setattr(kernels, "grouped_mm", careless)
    test_grouped_experts(torch.float32, 2e-5, None)
    test_grouped_experts(torch.float32, 2e-5, 4)


@pytest.mark.parametrize("changes", [{}, dict(num_key_value_heads=1), dict(tie_word_embeddings=False),
                                     dict(layer_types=["hybrid", "hybrid_sliding", "hybrid"], sliding_window=5)],
                         ids=["two KV heads", "one", "own head", "windows"])
def test_the_whole_model(changes):
    plain = small(**changes).train()
    fast = kernels.fuse(copy.deepcopy(plain))
    ids, positions = torch.randint(0, 300, (2, 40)), packing()
    targets = torch.where(positions >= 0, ids.roll(-1, 1), -100)
    logits = plain(ids, position_ids=positions)
    F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").backward()
    kernels.summed_loss(fast, ids, targets, positions).backward()
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
    fast, ids = kernels.fuse(copy.deepcopy(plain)), torch.randint(0, 300, (2, 40))
    for model in (plain, fast):
        loss = kernels.summed_loss(model, ids, ids, packing(), torch.bfloat16)
        assert loss.dtype == torch.float32
        loss.backward()
    for (name, p), q in zip(plain.named_parameters(), fast.parameters()):
        assert p.grad.dtype == q.grad.dtype
        if p.ndim >= 2 and "gate" not in name:                  # a router's choice may flip in bf16
            cosine = F.cosine_similarity(p.grad.flatten(), q.grad.flatten(), 0)
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


@pytest.fixture
def captured(monkeypatch):
    """Without a GPU: instead of `capture`, one whose replay runs the step again on the tensors that it saw then.

    -> a list with the number of replays of each graph."""
    counts = []

    def capture(step):
        number, outputs = len(counts), []
        counts.append(0)

        def replay():
            counts[number] += 1
            new = step()
            for own, other in zip(outputs, new):
                own.copy_(other)
            outputs.extend([] if outputs else new)
        return replay, outputs

    monkeypatch.setattr(kernels, "capture", capture)
    monkeypatch.setattr(kernels.GraphedStep, "BLOCK", 16)
    return counts


def test_decoding_as_a_cuda_graph(captured):
    """The same tokens, whatever the columns, the rows, the padding, the ends."""
    cache = zaya.LayerCache()
    cache.append(*torch.ones(2, 1, 2, 3, 4))
    assert not cache.k[:, :, 3:].any() and not cache.v[:, :, 3:].any()          # read, masked, before they are written
    plain = kernels.fuse(small(num_hidden_layers=2))
    model = copy.deepcopy(plain)
    model.graphed_step = kernels.GraphedStep()
    ids, mask = torch.randint(10, 300, (6, 12)), torch.ones(6, 12, dtype=torch.long)
    mask[1, :5], mask[2, :11] = 0, 0
    for rows, new, padding, eos in ((6, 40, mask, None), (6, 40, mask, 40), (3, 9, None, None)):
        given = [(ids[:rows], new, 1.0, 1.0, padding, torch.Generator().manual_seed(5), eos) for _ in range(2)]
        assert torch.equal(model.generate(*given[0]), plain.generate(*given[1]))
    assert sum(captured) > 60 > 20 > len(captured) >= 3         # a graph serves many steps, but not all
    routing, caches = ([], []), [zaya.Cache(2) for _ in range(2)]
    with torch.no_grad():                                       # the experts taken are recorded too
        for some, cache, chosen in zip((plain, model), caches, routing):
            some.hidden_states(ids, cache=cache)
            some.hidden_states(ids[:, :1], cache=cache, routing=chosen)
    assert all(torch.equal(a, b) for a, b in zip(*routing)) and len(routing[0]) == 2


@torch.no_grad()
def test_what_a_cuda_graph_knows(captured):
    """New weights in the old place, without a new graph; what is built into it asks for a new one."""
    model, step = kernels.fuse(small(num_hidden_layers=2)), kernels.GraphedStep()
    cache = zaya.LayerCache()
    model.layers[0](torch.randn(3, 4, model.config.hidden_size), None, None, cache)
    buffers = [[part.clone() for part in model.static_buffers(cache, 16)] for _ in model.layers]

    def same():
        """Of the step, and of decode_step as it is: the first call notes new things, the second captures them."""
        for token in torch.randint(10, 300, (3, 3, 1)):
            given = token, torch.full((3, 1), 4), torch.tensor([4])
            expected, _ = kernels.decode_step(model, *given, copy.deepcopy(buffers))
            own = [[part.clone() for part in layer] for layer in buffers]
            hidden, _ = step(model, *given, buffers)
            for layer, kept in zip(buffers, own):
                for part, before in zip(layer, kept):
                    part.copy_(before)                          # as if the token had not been read
            close(hidden, expected, 1e-6)
        return list(captured)

    assert same() == [2] and same() == [5]
    model.norm.weight.mul_(2)
    assert same() == [8]
    model.config.rope_parameters["hybrid"]["rope_theta"] *= 2
    assert same() == [8, 2]
    model.embed_tokens.weight = torch.nn.Parameter(model.embed_tokens.weight + 1)
    assert same() == [8, 2, 2]
    with torch.inference_mode():
        assert same() == [8, 2, 2, 2]
    torch.set_autocast_enabled("cuda", True)
    try:
        assert same() == [8, 2, 2, 2, 2]
    finally:
        torch.set_autocast_enabled("cuda", False)
    model.graphed_step = step
    assert copy.deepcopy(model).graphed_step.key is None        # a copy has weights elsewhere
    assert model.double().graphed_step is None                  # and so has one in another dtype


def test_which_models_get_a_cuda_graph(monkeypatch):
    monkeypatch.setattr(kernels, "on_gpu", lambda x: True)
    token, own = torch.ones(1, 1), kernels.fuse(small())
    own.layers[1].experts.__class__ = zaya.Experts              # which asks how many tokens each expert has
    sliding = kernels.fuse(small(layer_types=["hybrid_sliding"] * 3, sliding_window=5))
    assert kernels.fuse(small()).has_graph(token)
    assert not any(model.has_graph(token) for model in (own, sliding, kernels.quantize(small())))
    monkeypatch.undo()
    assert not kernels.fuse(small()).has_graph(token)


def test_compiling_is_a_matter_of_the_stages_length():
    model = small()
    few, many = (kernels.should_compile(model, tokens, 1) for tokens in (10_000, 10**12))
    assert not few[0] and "not compiled" in few[1]
    assert many[0] and "is compiled: that might save" in many[1]
    odd = kernels.should_compile(small(moe_intermediate_size=12), 10**12, 1)
    assert not odd[0] and "multiples of 8" in odd[1]
    gpu = model.to("meta")                                      # a device that is no CPU: there passes count as well
    assert [kernels.should_compile(gpu, 10, passes)[0] for passes in (10, 10**6)] == [False, True]


@pytest.mark.parametrize("rows, width", [(1, 64), (3, 96), (20, 64), (3, 70)])
def test_the_product_of_8_bits(rows, width):
    """PyTorch's packed product, an operation of its own use that may change, is what unpacking the weights gives.

    Widths of 70 it would read beyond their end, which crashed in bf16: they are unpacked.
    """
    x, weight = torch.randn(rows, 3, width), torch.randn(37, width)
    rounded, scale = kernels.round_weight(weight, 8)
    assert rounded.abs().amax(1).eq(127).all()
    close(kernels.restore_weight(rounded, scale), weight, 1 / 127)
    wanted = x @ (rounded * scale[:, None]).t()
    close(kernels.rounded_product(x, rounded, scale), wanted, 1e-5)
    got = kernels.rounded_product(x.bfloat16(), rounded, scale)
    assert got.dtype == torch.bfloat16
    close(got, wanted, 2e-2)


@pytest.mark.parametrize("rows", [1, 5, 40])
def test_the_product_of_4_bits(rows):
    """The same for 4 bits, by PyTorch's operation where its layout is known here, and by unpacking."""
    x, weight = torch.randn(rows, 192), torch.randn(128, 192)
    rounded, scale = kernels.round_weight(weight, 4)
    assert rounded.shape == (128, 96) and scale.shape == (3, 128, 2) and rounded.dtype == torch.uint8
    restored = kernels.restore_weight(rounded, scale)
    groups = weight.unflatten(1, (-1, 64))
    steps = (groups.amax(-1) - groups.amin(-1)) / 15
    error = (restored.unflatten(1, (-1, 64)) - groups).abs().amax(-1)
    assert (error < 0.55 * steps + 0.02).all()                  # half a step, and bf16's share
    wanted = x @ restored.t()
    close(kernels.rounded_product(x, rounded, scale), wanted, 1e-5)
    layout = kernels.packed_layout()
    assert layout, "this PyTorch packs 4 bits in another way: see packed_layout"
    packed = kernels.pack(rounded, layout)
    close(kernels.rounded_product(x, packed, scale, layout), wanted, 1e-5)
    got = kernels.rounded_product(x.bfloat16(), packed, scale, layout)
    assert got.dtype == torch.bfloat16
    close(got, wanted, 2e-2)
    for other in itertools.product((64, 32, 16), (True, False)):
        assert torch.equal(kernels.unpack(kernels.pack(rounded, other), other), rounded)


def test_a_group_of_equal_weights_is_exact_in_4_bits():
    weight = torch.tensor([0.0, 0.5, -2.0])[:, None].expand(3, 64)
    assert torch.equal(kernels.restore_weight(*kernels.round_weight(weight, 4)), weight)


@torch.no_grad()
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("changes", [{}, dict(tie_word_embeddings=False)], ids=["tied", "own head"])
def test_rounded_models(bits, changes, tmp_path):
    """Small errors; the same model by rounding in memory, by saving that, and by rounding a folder."""
    plain = small(hidden_size=64, moe_intermediate_size=64, num_attention_heads=4, head_dim=16, **changes)
    plain.save_pretrained(str(tmp_path / "plain"))
    (tmp_path / "plain" / "tokenizer.json").write_text("{}")
    rounded = kernels.quantize(plain, bits)
    ids, routing = torch.randint(10, 300, (2, 20)), []
    wanted, reference = rounded(ids), plain.logits(plain.hidden_states(ids, routing=routing))
    replayed = rounded.logits(rounded.hidden_states(ids, routing=routing))          # no expert flips
    error = kernels.logit_error(replayed.flatten(0, 1), reference.flatten(0, 1))
    most, same, kl = (0.03, 0.9, 0.01) if bits == 8 else (0.4, 0.6, 0.4)
    assert 0 < error["error"] < most and error["same"] > same and 0 < error["kl"] < kl
    rounded.save_pretrained(str(tmp_path / "saved"))
    kernels.main(["--quantize", str(tmp_path / "plain"), str(tmp_path / "folder"), "--bits", str(bits)])
    assert (tmp_path / "folder" / "tokenizer.json").read_text() == "{}"
    for folder, now in (("saved", None), ("folder", None), ("plain", bits)):
        model = kernels.load(str(tmp_path / folder), now)
        assert type(model) is kernels.ROUNDED[bits] and model.state_dict().keys() == rounded.state_dict().keys()
        close(model(ids), wanted, 1e-5 if bits == 8 else 1e-4)
        if bits == 4 and kernels.packed_layout():
            assert model.layers[0].experts.layout == kernels.packed_layout()
        model.set_layout(None)
        assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), rounded.state_dict().values()))
    model = kernels.load(str(tmp_path / "folder"))
    model.save_pretrained(str(tmp_path / "again"))              # a file has every CPU's order, also of a packed model
    assert read_bytes(tmp_path / "again") == read_bytes(tmp_path / "saved")
    tokens = rounded.generate(ids, 8, temperature=0)            # a few rows: the packed product
    assert torch.equal(model.generate(ids, 8, temperature=0), tokens)
    size = sum(t.nbytes for t in rounded.state_dict().values()) / sum(t.nbytes for t in plain.state_dict().values())
    assert size < (0.45 if bits == 8 else 0.4)                  # of fp32, with a tenth of it not rounded


def test_a_small_checkpoint_in_half_precision_is_widened(tmp_path, monkeypatch):
    """On a CPU, where C then decodes it; a large one stays what it is."""
    model = small().bfloat16()
    model.save_pretrained(str(tmp_path))
    loaded = kernels.load(str(tmp_path))
    assert {tensor.dtype for tensor in loaded.state_dict().values()} == {torch.float32}
    assert torch.equal(loaded.layers[0].gate.fc1.weight, model.layers[0].gate.fc1.weight.float())
    monkeypatch.setattr(kernels, "SMALL", 1000)
    assert kernels.load(str(tmp_path)).norm.weight.dtype == torch.bfloat16


def read_bytes(folder):
    return (folder / "model.safetensors").read_bytes()


def table_rows(capsys):
    """The cells of what is printed as the last table, without its head."""
    lines = capsys.readouterr().out.strip().split("\n\n")[-1].split("\n")
    assert len({line.count("|") for line in lines}) == 1
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_the_benchmark_compares_every_path(monkeypatch, capsys):
    """Small: errors as small as rounding, a time and a ratio for each path."""
    monkeypatch.setattr(kernels, "medians", lambda *functions, rounds=9: [2.0 for f in functions if f() is not None])
    full = kernels.benchmark
    monkeypatch.setattr(kernels, "benchmark", lambda device, compiled: full(device, 2, 32, compiled))
    kernels.main(["--json"])
    said = json.loads(capsys.readouterr().out)
    assert len(said["paths"]) == 5 + torch.cuda.is_available() and said["matmul_gflops"] > 0
    # Over so few tokens the terms of one temperature's gradient cancel but for a thousandth of the others'.
    assert all(row["error"] < (1e-2 if "step" in row["path"] else 1e-5) and row["ratio"] == 1 for row in said["paths"])
    monkeypatch.setattr(kernels, "benchmark", lambda device, compiled: said["paths"])
    kernels.main([])
    assert [row[0] for row in table_rows(capsys)] == [row["path"] for row in said["paths"]]


def stopped(*arguments):
    """What ends kernels.py with these arguments: a sentence."""
    with pytest.raises(SystemExit) as end:
        kernels.main([str(argument) for argument in arguments])
    return end.value.code


def test_mistakes_get_one_clear_sentence(tmp_path):
    """The path is named, and no checkpoint is written over."""
    small().save_pretrained(str(tmp_path / "plain"))
    plain, weights = tmp_path / "plain", (tmp_path / "plain" / "model.safetensors").read_bytes()
    assert "none/config.json" in stopped("--quantize", tmp_path / "none", tmp_path / "int8")
    assert f"{plain}: its int8 form would overwrite it" in stopped("--quantize", plain, plain)
    kernels.main(["--quantize", str(plain), str(tmp_path / "int8")])
    assert "int8 form already" in stopped("--quantize", tmp_path / "int8", tmp_path / "again")
    assert "File exists" in stopped("--quantize", plain, plain / "config.json")     # a file in the folder's place
    (plain / "model.safetensors").write_bytes(weights[:100])
    assert "model.safetensors is damaged" in stopped("--quantize", plain, tmp_path / "cut")
    assert "model.safetensors is damaged" in stopped("--full-size", plain)
    (plain / "config.json").write_bytes(b'{"hidden')
    assert "config.json is damaged" in stopped("--quantize", plain, tmp_path / "cut")
    assert not (tmp_path / "cut").exists()


def test_full_size_is_measured_on_any_checkpoint(tmp_path, monkeypatch, capsys):
    """A random one is made where there is none; its shapes and file layout are the official ones."""
    preset = zaya.ZayaConfig.preset("smoke", vocab_size=2500)
    monkeypatch.setattr(zaya.ZayaConfig, "preset", lambda name: preset)
    folder = str(tmp_path / "random")
    kernels.main(["--full-size", folder, "--json"])
    plain, rounded, four = json.loads(capsys.readouterr().out)["decoding"]
    made = zaya.Zaya.from_pretrained(folder)
    assert made.embed_tokens.weight.dtype == torch.bfloat16
    assert made.embed_tokens.weight.float().std().item() == pytest.approx(preset.initializer_range, rel=0.05)
    assert made.norm.weight.eq(1).all() and not made.layers[0].self_attn.conv_qk_grouped.bias.any()
    hidden = torch.randn(2, 3, 64)                              # outside of training a slice at a time is widened
    with torch.no_grad():
        close(kernels.load(folder).logits(hidden), made.logits(hidden), 1e-5)
    assert plain["gb_per_token"] > rounded["gb_per_token"] > four["gb_per_token"]
    assert plain["gb_on_disk"] > rounded["gb_on_disk"] > four["gb_on_disk"] > 0
    assert plain["error"] == 0 < rounded["error"] < 0.2 and rounded["error"] < four["error"]
    assert plain["share"] == pytest.approx(plain["tokens_per_s"] * plain["gb_per_token"] / plain["torch.mv_gb_per_s"])
    monkeypatch.setattr(kernels, "decoding", lambda folder: [plain, rounded, four])
    kernels.main(["--full-size", folder])
    assert [row[0] for row in table_rows(capsys)] == [folder, folder + "-int8", folder + "-int4"]


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
    agree = (choices == wanted_choices)[:, same].all(0)[read[same]]
    assert agree.float().mean() > 0.99 and len(wanted_choices.unique()) > 0.85 * (model.config.num_experts + 1)
    return tokens


@needs_compiler
@pytest.mark.parametrize("changes", [
    {}, dict(num_attention_heads=2, num_key_value_heads=2, num_experts=3,
             rope_parameters={"hybrid": {"partial_rotary_factor": 1.0}}),
    dict(num_attention_heads=6, num_key_value_heads=2, head_dim=32, tie_word_embeddings=False),
    dict(hidden_size=80, moe_intermediate_size=48, router_hidden_size=32, num_hidden_layers=3, num_experts=17,
         rope_parameters={"hybrid": {"rope_theta": 1e4, "partial_rotary_factor": 0.25}})],
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
def test_rows_that_go_on_twice_in_c():
    model, steps, continued = routed(), torch.randint(10, 300, (3, 4, 1)), []
    ids, mask = torch.randint(10, 300, (6, 9)), torch.ones(6, 9, dtype=torch.long)
    mask[3, :4] = 0
    for cache in (model.new_cache(), zaya.Cache(len(model.layers))):
        with torch.no_grad():
            model.hidden_states(ids, mask, cache=cache)
            cache.select(torch.tensor([5, 3, 3, 0]))            # each writes behind its own past from here on
            continued.append(torch.cat([model.hidden_states(token, cache=cache) for token in steps]))
    close(*continued, 1e-4)


@needs_compiler
def test_decoding_in_c_for_another_cpu(monkeypatch):
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")        # registers of four numbers
    same_replies(routed(), monkeypatch)


def test_when_pytorch_decodes(monkeypatch):
    """Each reason, and that decoding goes on."""
    sliding, odd = dict(layer_types=["hybrid_sliding"] * 2, sliding_window=5), dict(moe_intermediate_size=40)
    own = routed()
    own.layers[1].__class__ = zaya.Layer
    graphed = routed()
    graphed.graphed_step = kernels.GraphedStep()
    ids = torch.randint(10, 300, (2, 5))
    for model, reason in ((routed(**sliding), "sliding window"), (routed(**odd), "multiples of 16"),
                          (routed().bfloat16(), "fp32"), (kernels.quantize(routed()), "fp32"),
                          (own, "class of their own"),
                          (graphed, "CUDA graph")):
        library, why = kernels.decoding_in_c(model)
        assert library is None and reason in why
        if not model.graphed_step:
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
