"""zaya.py against transformers.models.zaya: tiny random models, the same numbers everywhere.

Every parameter and balancing bias is random (see conftest.randomise), so that nothing hides behind a scale of 1 or a
bias of 0.  The official model is saved and ours is loaded from the file: the layout is tested along with the numbers.
"""
import copy
import inspect
import json

import pytest
import safetensors.torch as safetensors_torch
import torch
import torch.nn.functional as F
from conftest import randomise

from zaya import CCA, Cache, Tokenizer, Zaya, ZayaConfig

transformers = pytest.importorskip("transformers")
official_zaya = pytest.importorskip("transformers.models.zaya")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

TOLERANCE = 1e-4                            # on logits of size 2: rounding moves them by about 1e-6
LENGTH = 24
FORWARD = inspect.signature(official_zaya.ZayaForCausalLM.forward).parameters
CACHE_NAME = "cache" if "cache" in FORWARD else "past_key_values"       # renamed in transformers 5.24

BASE = dict(vocab_size=96, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
            head_dim=8, num_experts=4, moe_intermediate_size=24, router_hidden_size=12, eos_token_id=95,
            max_position_embeddings=512)
FULL, SLIDING = "hybrid", "hybrid_sliding"
CASES = {                                   # changes to BASE, seed of the weights: one without near ties of experts
    "one_kv_head": (dict(num_key_value_heads=1, num_hidden_layers=2), 3),
    "two_kv_heads": (dict(rms_norm_eps=0.1), 1),
    "sliding": (dict(num_hidden_layers=4, layer_types=[SLIDING, FULL, SLIDING, FULL], sliding_window=5,
                     rope_parameters={FULL: {"rope_theta": 1e4, "partial_rotary_factor": 1.0},
                                      SLIDING: {"rope_theta": 100.0, "partial_rotary_factor": 0.25}}), 4),
    "three_kv_heads": (dict(num_attention_heads=6, num_key_value_heads=3, sliding_window=4,
                            layer_types=[FULL, FULL, SLIDING]), 7),
    "skip": (dict(num_hidden_layers=2, sliding_window=3, layer_types=[FULL, SLIDING]), 4),
    "untied": (dict(tie_word_embeddings=False, num_attention_heads=2, head_dim=12, num_experts=7), 4),
}


def official_model(config):
    model = official_zaya.ZayaForCausalLM(official_zaya.ZayaConfig.from_dict(config.to_dict()))
    model.generation_config.eos_token_id = None         # runs on, as ours does unless it is told to stop
    return model.eval()


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory):
    """(official, ours) with the same random weights."""
    changes, seed = CASES[request.param]
    official = official_model(ZayaConfig(**{**BASE, **changes}))
    randomise(official, seed, skip_bias=0.0 if request.param == "skip" else -1.0)
    directory = tmp_path_factory.mktemp(request.param)
    official.save_pretrained(directory, max_shard_size="20KB" if request.param == "sliding" else "5GB")
    assert (directory / "model.safetensors.index.json").exists() == (request.param == "sliding")
    ours = Zaya.from_pretrained(directory)
    ours.case = request.param
    return official, ours


def tokens(batch=3, length=LENGTH, seed=0):
    """Without the pad id, whose embedding gets no gradient in the official model."""
    return torch.randint(1, BASE["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(seed))


def left_padded(lengths=(LENGTH, 15, 2)):
    mask = (torch.arange(LENGTH) >= LENGTH - torch.tensor(lengths)[:, None]).long()
    return tokens(len(lengths)).masked_fill(mask == 0, 0), mask


def positions(mask):
    return (mask.cumsum(1) - 1).clamp_min(0)


def close(a, b, tolerance=TOLERANCE):
    difference = (a - b).abs().max().item()
    assert difference <= tolerance, f"largest difference {difference:.2e}"


@torch.no_grad()
def in_chunks(model, ids, sizes, mask=None):
    """HF wants the mask of everything so far, and the positions of the new tokens."""
    ours, logits = isinstance(model, Zaya), []
    cache = Cache(len(model.layers)) if ours else transformers.DynamicCache(config=model.config)
    for part in torch.arange(ids.shape[1]).split(sizes):
        if ours:
            logits.append(model(ids[:, part], None if mask is None else mask[:, part], cache=cache))
            continue
        extra = {} if mask is None else dict(attention_mask=mask[:, :part[-1] + 1],
                                             position_ids=positions(mask)[:, part])
        logits.append(model(ids[:, part], **{CACHE_NAME: cache}, use_cache=True, **extra).logits)
    return torch.cat(logits, 1)


CHUNKS = {"one_by_one": [1] * LENGTH, "chunks": [4, 7, 1, 8, 1, 3], "prefill_then_steps": [15] + [1] * 9}


@torch.no_grad()
def test_full_forward(pair):
    """By models that use their experts: if every token went to one, the tests here would say little about routing."""
    official, ours = pair
    close(ours(tokens()), official(tokens()).logits)
    routing = []
    ours.hidden_states(tokens(8), routing=routing)
    classes = ours.config.num_experts + 1
    load = torch.stack([choice.flatten().bincount(minlength=classes) for choice in routing])
    assert ((load > 0).sum(1) >= 3).all(), load
    if ours.case == "skip":
        assert (load[:, -1] > 5).all() and (load[:, -1] < load.sum(1) / 2).all(), load
    state = ours.state_dict()
    assert all(tensor.std() > 0 for name, tensor in state.items() if tensor.numel() > 1)


@torch.no_grad()
@pytest.mark.parametrize("sizes", CHUNKS.values(), ids=CHUNKS)
def test_decoding_with_a_cache(pair, sizes):
    """HF takes a lone token for a real one whatever the mask says: rows that pad in one-token steps are left out."""
    official, ours = pair
    full = official(tokens()).logits
    close(in_chunks(ours, tokens(), sizes), full)
    close(in_chunks(official, tokens(), sizes), full)
    ids, mask = left_padded()
    mine, theirs = in_chunks(ours, ids, sizes, mask), in_chunks(official, ids, sizes, mask)
    single = [part[0] for part in torch.arange(LENGTH).split(sizes) if len(part) == 1]
    fair = (mask[:, single] == 1).all(1)
    assert fair.sum() > 1 or sizes[0] == 1
    close(mine[fair][mask[fair] == 1], theirs[fair][mask[fair] == 1])


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batch(pair, side):
    official, ours = pair
    ids, mask = left_padded() if side == "left" else (tensor.flip(1) for tensor in left_padded())
    mine, theirs = ours(ids, mask), official(ids, attention_mask=mask, position_ids=positions(mask)).logits
    close(mine[mask == 1], theirs[mask == 1])
    for row in range(len(ids)):
        close(mine[row, mask[row] == 1], official(ids[row, mask[row] == 1][None]).logits[0])


def restore_last_biases(official, ours):
    """transformers 5.23 puts every skip bias back to -1 after loading."""
    for layer, mine in zip(official.model.layers, ours.layers):
        layer.mlp.gate.balancing_biases.copy_(mine.gate.balancing_biases)


@torch.no_grad()
def test_round_trip_official_ours_official(pair, tmp_path):
    official, ours = pair
    ours.save_pretrained(tmp_path)
    back, report = official_zaya.ZayaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    before, after = official.state_dict(), back.state_dict()
    assert back.dtype == torch.float32 and before.keys() == after.keys()
    for name, tensor in before.items():
        kept = slice(-1 if name.endswith("balancing_biases") else None)
        assert torch.equal(tensor[kept], after[name][kept]), name
    restore_last_biases(back, ours)
    close(back(tokens()).logits, official(tokens()).logits)     # mapped weights lie elsewhere: sums in another order
    for name in ZayaConfig().to_dict():
        assert getattr(back.config, name) == getattr(official.config, name) or name == "architectures", name


@torch.no_grad()
def test_a_rope_without_a_share_rotates_all_channels(tmp_path):
    """What the official config reads where partial_rotary_factor is left out."""
    randomise(official_model(ZayaConfig(**BASE))).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["rope_parameters"] = {FULL: {"rope_type": "default", "rope_theta": 100.0}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    official, ours = official_zaya.ZayaForCausalLM.from_pretrained(tmp_path), Zaya.from_pretrained(tmp_path)
    restore_last_biases(official, ours)
    close(ours(tokens()), official(tokens()).logits)


@torch.no_grad()
def test_a_model_without_special_tokens(tmp_path):
    """Null ids: the official model loads them, and both fill up ended rows with the first token that ends one."""
    nulls = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    ours = randomise(Zaya(ZayaConfig(**{**BASE, **nulls}))).eval()
    ours.save_pretrained(tmp_path)
    official = official_zaya.ZayaForCausalLM.from_pretrained(tmp_path)
    restore_last_biases(official, ours)
    ids = tokens(3, 10)
    free = ours.generate(ids, max_new_tokens=20, temperature=0)
    stops = [free[0, 14].item(), free[1, 20].item()]
    theirs = official.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False,
                               eos_token_id=stops)
    mine = ours.generate(ids, max_new_tokens=20, temperature=0, eos_token_id=stops)
    assert torch.equal(mine, theirs) and not torch.equal(mine, free[:, :mine.shape[1]])


def test_fresh_models_are_alike():
    """The same initialisation: deviations of all matrices, and every other parameter the same but the temperature."""
    config = ZayaConfig(**BASE)
    theirs, std = official_model(config).state_dict(), config.initializer_range
    for name, mine in Zaya(config).state_dict().items():
        expected = theirs[Zaya.official_name(name)]
        few = 4 * std / expected.numel() ** 0.5                 # deviation of an estimated deviation
        if name.endswith("temp"):
            assert (mine == 1).all() and (expected == 0).all()
        elif expected.ndim < 2:
            assert torch.equal(mine, expected), name
        else:                                                   # the official embedding has zeros for the pad id
            assert abs(mine.std() - std) < few and ("embed" in name or abs(expected.std() - std) < few), name


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
def test_greedy_tokens(pair, padded):
    official, ours = pair
    ids, mask = left_padded() if padded else (tokens(8, 10), torch.ones(8, 10, dtype=torch.long))
    theirs = official.generate(ids, attention_mask=mask, max_new_tokens=32, do_sample=False)
    mine = ours.generate(ids, max_new_tokens=32, temperature=0, attention_mask=mask if padded else None)
    assert mine.shape == (len(ids), ids.shape[1] + 32) and torch.equal(mine, theirs)
    assert padded or len(mine[:, 10:].unique()) > 15, "a model that repeats itself tests little"


def test_gradients(pair):
    """Of every parameter, through the same loss on a left-padded batch."""
    official, ours = (copy.deepcopy(model).train() for model in pair)
    ids, mask = left_padded((LENGTH, 17, 9))
    target = tokens(seed=1).masked_fill(mask == 0, -100)
    for logits in official(ids, attention_mask=mask, position_ids=positions(mask)).logits, ours(ids, mask):
        F.cross_entropy(logits.flatten(0, 1), target.flatten()).backward()
    theirs = dict(official.named_parameters())
    places = {name for name in official.state_dict() if name != "lm_head.weight" or not ours.config.tie_word_embeddings}
    assert {Zaya.official_name(name) for name in ours.state_dict()} == places
    for name, parameter in ours.named_parameters():
        expected = theirs[Zaya.official_name(name)].grad
        assert expected.norm() > 0, name
        error = (parameter.grad - expected).norm() / expected.norm()
        assert error <= 1e-4, f"{name}: relative error {error:.2e}"


@torch.no_grad()
def test_bf16_is_no_worse_than_the_official_one(tmp_path):
    """Both cast to bf16, each against its own fp32 logits; averaged, because a flipped expert decides a single case."""
    ids, errors = torch.cat([tokens(4, seed=seed) for seed in range(4)]), {"ours": [], "theirs": []}
    for changes, _ in CASES.values():
        for seed in range(4):
            official = randomise(official_model(ZayaConfig(**{**BASE, **changes})), seed)
            official.save_pretrained(tmp_path)
            for name, model in (("ours", Zaya.from_pretrained(tmp_path)), ("theirs", official)):
                exact, rounded = model(ids), copy.deepcopy(model).to(torch.bfloat16)(ids)
                if name == "theirs":
                    exact, rounded = exact.logits, rounded.logits
                errors[name].append((rounded.float() - exact).abs().mean())
    mine, theirs = (sum(part).item() / len(part) for part in errors.values())
    assert mine <= theirs, f"mean error ours {mine:.4f}, theirs {theirs:.4f}"


# ---- the tokenizer ---------------------------------------------------------------------------------------------------

VARIED = [
    "Plain words, numbers 1234567890 and 3.14159; x_1 += (a*b)//c  !!", "", " ", "\n\n\t  indented\n    more\n",
    "trailing spaces   ", "café naïve — “quotes” … 中文字符 ユニコード Привет שלום",
    "emoji 🙂👩‍👩‍👧‍👦🇩🇪 e\u0301 combining",
    "a\u00a0b\u3000c\u2003d\u2028e\u0085f\x0bg\x0ch", "²³¼ ٣٤ Ⅷ 𝟘𝟙", "\x00\x01\x1c\x1d\x1e\x1f\x7f", "don't we've I'M",
    "  def f(x):\r\n\treturn x ** 2  # comment\r\n", "the the the thethethe THE The", "\ufeffbom \u200bzero\u200d",
]


def test_autotokenizer_gives_the_same_ids(tmp_path):
    import pydoc_data.topics
    ours = Tokenizer.train("\n".join(pydoc_data.topics.topics.values())[:40_000] + "1234 café 中文 " * 9, 400)
    ours.save_pretrained(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in [*VARIED, "".join(VARIED)]:
        assert theirs(text, add_special_tokens=False)["input_ids"] == ours.encode(text)
        assert theirs(text)["input_ids"] == ours.encode(text), "no special tokens are added on their own"
        assert theirs.decode(ours.encode(text)) == text == ours.decode(ours.encode(text))
    assert len(theirs) == ours.vocab_size
    assert (theirs.pad_token_id, theirs.bos_token_id, theirs.eos_token_id) == (ours.pad, ours.end_of_text, ours.end)
    assert {token: theirs.convert_tokens_to_ids(token) for token in ours.special} == ours.special
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 12 + 30?\n"},
                {"role": "assistant", "content": "<think>12 + 30 = 42\n</think>\n42"},
                {"role": "user", "content": " and 🙂? "}, {"role": "assistant", "content": ""}]
    for prompt in (False, True):
        chat = theirs.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=False)
        assert chat == ours.render(messages, prompt)[0]


# ---- legacy checkpoints ---------------------------------------------------------------------------------------------


def legacy_checkpoint(folder, window=0, seed=0, own_head=False, **values):
    """Write a random model in the layout of ZAYA1-base, name by name as its table says -> its tensors."""
    E, H, K, D, X, F_, R, L, V = 32, 4, 2, 8, 3, 24, 12, 3, values.get("vocab_size", 96)
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape):
        return torch.randn(*shape, generator=generator) / shape[-1] ** 0.5

    def around(value, size):
        return value + 0.3 * torch.randn(size, generator=generator)

    tensors = {"model.embed_tokens.weight": E**0.5 * noise(V, E), "model.final_norm.weight": around(1, E)}
    if own_head:
        tensors["lm_head.weight"] = noise(V, E)
    for place in [f"layers.{n}." for n in range(2 * L)] + [""]:
        for part in ("hidden_states", "residual")[:1 if place == "layers.0." else 2]:
            tensors[f"model.{place}res_scale.{part}_scale"] = around(1, E)
            tensors[f"model.{place}res_scale.{part}_bias"] = around(0, E)
    for n in range(2 * L):
        layer = f"model.layers.{n}."
        tensors[layer + "input_norm.weight"] = around(1, E)
        if n % 2 == 0:
            C = (H + K) * D
            tensors |= {layer + "self_attn.qkv.linear_q.weight": noise(H * D, E),
                        layer + "self_attn.qkv.linear_k.weight": noise(K * D, E),
                        layer + "self_attn.qkv.val_proj1.weight": noise(K * D // 2, E),
                        layer + "self_attn.qkv.val_proj2.weight": noise(K * D // 2, E),
                        layer + "self_attn.qkv.conv_qk.0.weight": noise(C, 1, 2),
                        layer + "self_attn.qkv.conv_qk.0.bias": around(0, C),
                        layer + "self_attn.qkv.conv_qk.1.weight": noise(C, D, 2) / 2,
                        layer + "self_attn.qkv.conv_qk.1.bias": around(0, C),
                        layer + "self_attn.qkv.temp": around(1, K), layer + "self_attn.o_proj.weight": noise(E, H * D)}
            continue
        router = layer + "zaya_block.router."
        tensors |= {router + "down_proj.weight": noise(R, E), router + "down_proj.bias": around(0, R),
                    router + "rmsnorm_eda.weight": around(1, R), router + "router_mlp.4.weight": 3 * noise(X + 1, R),
                    router + "balancing_biases": torch.tensor([0.1, -0.1, 0.02, -1.0])}
        if n > 1:
            tensors[router + "router_states_scale"] = around(1, R)
        for i in (0, 2):
            tensors[f"{router}router_mlp.{i}.weight"] = noise(R, R)
            tensors[f"{router}router_mlp.{i}.bias"] = around(0, R)
        for e in range(X):
            expert = f"{layer}zaya_block.experts.local_experts.{e}."
            tensors[expert + "linear_fc1.weight"] = noise(2 * F_, E)
            tensors[expert + "linear_fc2.weight"] = noise(E, F_)
    config = {"model_type": "zaya", "cca": True, "zaya_layers": ["a", X] * L, "num_hidden_layers": 5 * L,
              "hidden_size": E, "vocab_size": V, "num_attention_heads": 16, "cca_num_q_heads": [H, 0] * L,
              "kv_channels": D,
              "num_query_groups_list": [K, 0] * L, "ffn_hidden_size_list": [0, 2 * F_] * (L + 2), "rope_theta": 1e6,
              "zaya_mlp_expansion": [0, R] * L, "norm_epsilon": 1e-5, "moe_router_topk": 1, "zaya_use_eda": True,
              "zaya_use_mod": True, "scale_residual_merge": True, "gated_linear_unit": True, "eos_token_id": 1,
              "max_position_embeddings": 32768, "tie_word_embeddings": not own_head, "partial_rotary_factor": 0.5,
              "swa_layers": [0, 0, window, 0, 0, 0], "swa_rotary_base": 100.0, "rope_scaling": False, **values}
    folder.mkdir(exist_ok=True)
    safetensors_torch.save_file(tensors, str(folder / "model.safetensors"))
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return tensors


def legacy_logits(tensors, ids, window=0):
    """The forward of that layout: each sublayer first merges what the one before it gave, and then norms."""
    def named(prefix):
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

    def merge(x, y, scale):
        y = (y + scale["hidden_states_bias"]) * scale["hidden_states_scale"]
        return y if x is None else (x + scale["residual_bias"]) * scale["residual_scale"] + y

    def norm(x, weight):
        return x * (x * x).mean(-1, keepdim=True).add(1e-5).rsqrt() * weight

    x, y, r = None, tensors["model.embed_tokens.weight"][ids], None
    for n in range(6):
        x = merge(x, y, named(f"model.layers.{n}.res_scale."))
        h = norm(x, tensors[f"model.layers.{n}.input_norm.weight"])
        if n % 2 == 0:
            part, slides = named(f"model.layers.{n}.self_attn."), n == 2 and window
            attention = CCA(32, 4, 2, 8)
            attention.load_state_dict({
                "q_proj.weight": part["qkv.linear_q.weight"], "k_proj.weight": part["qkv.linear_k.weight"],
                "v_proj_current.weight": part["qkv.val_proj1.weight"], "o_proj.weight": part["o_proj.weight"],
                "v_proj_delayed.weight": part["qkv.val_proj2.weight"], "temp": part["qkv.temp"],
                "conv_qk_depthwise.weight": part["qkv.conv_qk.0.weight"],
                "conv_qk_depthwise.bias": part["qkv.conv_qk.0.bias"],
                "conv_qk_grouped.weight": part["qkv.conv_qk.1.weight"],
                "conv_qk_grouped.bias": part["qkv.conv_qk.1.bias"]})
            positions = CCA.positions(h, None, 100.0 if slides else 1e6, 4)
            if slides:                                          # the query, and as many tokens before it
                back = torch.arange(ids.shape[1])[:, None] - torch.arange(ids.shape[1])
                positions.mask = ((back >= 0) & (back <= window))[None, None]
            y = attention(h, positions)
            continue
        block = f"model.layers.{n}.zaya_block."
        part, experts = named(block + "router."), block + "experts.local_experts."
        state = F.linear(h, part["down_proj.weight"], part["down_proj.bias"])
        r = state if r is None else state + r * part["router_states_scale"]
        hidden = norm(r, part["rmsnorm_eda.weight"])
        for i in (0, 2):
            hidden = F.gelu(F.linear(hidden, part[f"router_mlp.{i}.weight"], part[f"router_mlp.{i}.bias"]))
        probability = (hidden @ part["router_mlp.4.weight"].T).softmax(-1)
        choice = (probability + part["balancing_biases"]).argmax(-1)
        y = torch.zeros_like(h)
        for e in range(3):
            gate, up = F.linear(h, tensors[f"{experts}{e}.linear_fc1.weight"]).chunk(2, -1)
            out = F.linear(F.silu(gate) * up, tensors[f"{experts}{e}.linear_fc2.weight"])
            y = torch.where((choice == e)[..., None], out * probability[..., e:e + 1], y)
        y = torch.where((choice == 3)[..., None], h * probability[..., 3:], y)      # skipped: it passes
    x = merge(x, y, named("model.res_scale."))
    head = tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"])
    return norm(x, tensors["model.final_norm.weight"]) @ head.T


@torch.no_grad()
@pytest.mark.parametrize("window, own_head, values", [
    (0, False, {}), (4, False, {}), (0, True, dict(cca_num_q_heads=None)),
    (0, False, dict(kv_channels=None, head_dim=8, num_query_groups_list=None, num_query_groups=2)),
    (0, False, dict(ffn_hidden_size_list=None, ffn_hidden_size=48, zaya_mlp_expansion=12, swa_layers=None)),
    (0, False, dict(zaya_layers=None, num_hidden_layers=6, num_experts=3))])
def test_legacy_checkpoints(tmp_path, window, own_head, values):
    """They load by their names and lists, and are saved in the official layout, which transformers reads."""
    tensors = legacy_checkpoint(tmp_path / "legacy", window, own_head=own_head, **values)
    ids = tokens()
    wanted = legacy_logits(tensors, ids, window)
    model = Zaya.from_pretrained(tmp_path / "legacy")
    close(model(ids), wanted)
    assert model.config.num_hidden_layers == 3 and model.config.num_attention_heads == 4
    assert model.config.sliding_window == (window + 1 if window else None)
    routing = []
    model.hidden_states(ids, routing=routing)
    assert {int(choice) for choice in torch.stack(routing).unique()} == {0, 1, 2}   # all are used, none is skipped
    model.save_pretrained(tmp_path / "official")
    close(Zaya.from_pretrained(tmp_path / "official")(ids), wanted)
    theirs = official_zaya.ZayaForCausalLM.from_pretrained(tmp_path / "official").eval()
    close(theirs(ids).logits, wanted)


def test_what_a_legacy_checkpoint_may_not_be(tmp_path):
    folder = tmp_path / "legacy"
    for values, words in (
            (dict(zaya_use_eda=False), "zaya_use_eda"), (dict(clamp_temp=True), "clamp_temp True"),
            (dict(moe_router_topk=2), "moe_router_topk 2"), (dict(cca_time0=4), "cca_time0 4"),
            (dict(swa_layers=[2, 0, 3, 0, 0, 0]), "one window"),
            (dict(zaya_layers=["a", 3, "a", 4]), "alternate"), (dict(zaya_layers=["a", "a"] * 3), "config.json"),
            (dict(kv_channels=None), "kv_channels or head_dim is missing"), (dict(rope_theta=None), "rope_theta or"),
            (dict(zaya_layers=["a", 4] * 3), "experts.gate_up_proj"), (dict(hidden_size=64), "size mismatch")):
        legacy_checkpoint(folder, **values)
        with pytest.raises(ValueError, match=words):
            Zaya.from_pretrained(folder)
    tensors = legacy_checkpoint(folder)
    tensors.pop("model.layers.3.res_scale.residual_bias")
    safetensors_torch.save_file(tensors, str(folder / "model.safetensors"))
    with pytest.raises(ValueError, match="layers.1.post_attention_residual_scale.residual_bias"):
        Zaya.from_pretrained(folder)
    tensors = legacy_checkpoint(folder)
    tensors["model.layers.3.zaya_block.router.balancing_biases"][-1] = -0.5
    safetensors_torch.save_file(tensors, str(folder / "model.safetensors"))
    with pytest.warns(UserWarning, match="skip expert"):
        Zaya.from_pretrained(folder)
