"""CCA rung by rung, and CCGQA against MHA, GQA and MLA, at equal parameters and tokens: the held-out loss of each.

    python notebooks/experiments/cca.py --seeds 3

Every arm is one module in the place of a layer's `self_attn`.  An arm begins with the same numbers as the others in
every tensor of the same name and shape.  What its attention has less in parameters, its experts get in width.
02_cca.ipynb runs a smaller ladder live.
"""
import time
import zlib

import arms
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from zaya import CCA, Cache, Zaya, ZayaConfig

# The published ratios, as in `attention`: 8 heads of 24 for MHA, 4 query heads and 1 KV head for CCGQA.
SHAPE = dict(hidden_size=192, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=1, head_dim=24,
             num_experts=4, moe_intermediate_size=128, router_hidden_size=32, initializer_range=192 ** -0.5)
# The CCA paper's losses: the ladder in a MoE of 350M active parameters, the kinds in a dense 1B, 300B tokens.
PUBLISHED = {"nothing": 2.280, "one conv": 2.264, "two convs": 2.252, "+ value shift": 2.248, "+ q-k-mean": 2.241,
             "CCGQA": 2.286, "MHA": 2.297, "GQA": 2.297, "MLA": 2.321}

# ---- the rivals -----------------------------------------------------------------------------------------------------


def attend(q, k, v, mask, scale=None):
    """Softmax attention, (B, H, S, D) on (B, K, T, D) -> (B, H, S, D of v)."""
    B, H, S, D = q.shape
    if S > 1:
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scale, enable_gqa=True)
    # One new token: the query heads of a KV head are queries on the same keys, so no key is copied.
    out = F.scaled_dot_product_attention(q.reshape(B, k.shape[1], -1, D), k, v, mask, scale=scale)
    return out.reshape(B, H, 1, -1)


class Rival(nn.Module):
    """Attention called like zaya.CCA, with its Positions, of which it takes the rotation tables and the mask."""

    def forward(self, x, positions, cache=None):
        heads = self.heads_of(x, (positions.cos, positions.sin), positions.mask, cache)     # (B, H, S, D)
        return self.o_proj(heads.transpose(1, 2).flatten(2))


class Attention(Rival):
    """MHA, or GQA if there are fewer KV heads.  Norm, temperature and partial RoPE are CCA's, so that at CCA's number
    of heads this is CCA with nothing of its own left: no convolution, no value shift, no q-k-mean."""

    def __init__(self, hidden_size, heads, kv_heads, head_dim):
        super().__init__()
        self.head_dim = head_dim
        self.q_proj = nn.Linear(hidden_size, heads * head_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, kv_heads * head_dim, bias=False)
        self.temp = nn.Parameter(torch.ones(kv_heads))
        self.o_proj = nn.Linear(heads * head_dim, hidden_size, bias=False)

    def heads_of(self, x, rope, mask, cache):
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim))                       # (B, S, H, D)
        k = self.k_proj(x).unflatten(-1, (-1, self.head_dim))                       # (B, S, K, D)
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)       # (B, K, S, D)
        q = CCA.apply_rotary(CCA.unit(q), *rope).transpose(1, 2)                          # (B, H, S, D)
        k = CCA.apply_rotary(CCA.unit(k) * self.temp[:, None], *rope).transpose(1, 2)     # (B, K, S, D)
        if cache is not None:
            k, v = cache.append(k, v)
        return attend(q, k, v, mask)


class MLA(Rival):
    """DeepSeek-V2's multi-head latent attention: keys and values of all heads from one latent, and one rotated key.

        c = RMSNorm(Wc x),  k_h = [Uk_h c ; RoPE(Wr x)],  v_h = Uv_h c,  q_h = Wq_h x with RoPE on its last channels

    The cache holds [c ; RoPE(Wr x)].  With a cache Uk moves over to the query and Uv behind the softmax, so that the
    heads read the latents themselves.  No norm of queries and keys: it would not commute with Uk.
    """

    def __init__(self, hidden_size, heads, head_dim, latent, rotated):
        super().__init__()
        self.heads, self.head_dim, self.latent, self.rotated = heads, head_dim, latent, rotated
        self.q_proj = nn.Linear(hidden_size, heads * (head_dim + rotated), bias=False)
        self.down_proj = nn.Linear(hidden_size, latent, bias=False)
        self.norm = nn.RMSNorm(latent, eps=1e-5)
        self.rope_proj = nn.Linear(hidden_size, rotated, bias=False)
        self.up_k = nn.Linear(latent, heads * head_dim, bias=False)
        self.up_v = nn.Linear(latent, heads * head_dim, bias=False)
        self.o_proj = nn.Linear(heads * head_dim, hidden_size, bias=False)

    def heads_of(self, x, rope, mask, cache):
        q = self.q_proj(x).unflatten(-1, (self.heads, -1))                          # (B, S, H, D + R)
        q, q_rope = q[..., :self.head_dim], CCA.apply_rotary(q[..., self.head_dim:], *rope)
        latent = self.norm(self.down_proj(x))                                       # (B, S, r)
        k_rope = CCA.apply_rotary(self.rope_proj(x)[:, :, None], *rope)                   # (B, S, 1, R)
        up_k = self.up_k.weight.unflatten(0, (self.heads, -1))                      # (H, D, r)
        up_v = self.up_v.weight.unflatten(0, (self.heads, -1))
        scale = (self.head_dim + self.rotated) ** -0.5
        if cache is None:                                       # many queries: narrow keys cost less than wide latents
            k = torch.einsum("bsr,hdr->bshd", latent, up_k)
            k = torch.cat([k, k_rope.expand(-1, -1, self.heads, -1)], -1).transpose(1, 2)
            v = torch.einsum("bsr,hdr->bhsd", latent, up_v)
            return attend(torch.cat([q, q_rope], -1).transpose(1, 2), k, v, mask, scale)
        q = torch.cat([torch.einsum("bshd,hdr->bshr", q, up_k), q_rope], -1).transpose(1, 2)
        key = torch.cat([latent, k_rope[:, :, 0]], -1)[:, None]                     # (B, 1, S, r + R)
        key, _ = cache.append(key, key[..., :0])
        out = attend(q, key, key, mask, scale)[..., :self.latent]                   # (B, H, S, r)
        return torch.einsum("bhsr,hdr->bhsd", out, up_v)


# ---- the ladder: CCA without some of its parts ----------------------------------------------------------------------


class Nothing(nn.Module):
    """Stands for a convolution that is not there, or for a projection to no channels."""
    kernel_size = (1,)

    def forward(self, x):
        return x[..., :0]


class TwoConvs(CCA):
    """CCA without q-k-mean and without value shift: all value channels are the current token's."""

    def __init__(self, hidden_size, *shape):
        super().__init__(hidden_size, *shape)
        self.v_proj_current = nn.Linear(hidden_size, self.kv_heads * self.head_dim, bias=False)
        self.v_proj_delayed = Nothing()

    def qk_mean(self, packed):
        return 0.0, 0.0


class OneConv(TwoConvs):
    """Only the depthwise convolution."""

    def __init__(self, *shape):
        super().__init__(*shape)
        self.conv_qk_grouped = Nothing()

    def convolve(self, seen, position_ids=None):
        now, before, conv = seen[:, 2:], seen[:, 1:-1], self.conv_qk_depthwise
        if position_ids is not None:                            # a sample's first token has none before it
            before = before * (position_ids >= 1)[..., None]
        y = now * conv.weight[:, 0, 1] + before * conv.weight[:, 0, 0] + conv.bias
        return y.unflatten(-1, (-1, self.head_dim))


class ValueShift(CCA):
    """CCA without q-k-mean."""
    qk_mean = TwoConvs.qk_mean


LADDER = {"nothing": Attention, "one conv": OneConv, "two convs": TwoConvs, "+ value shift": ValueShift,
          "+ q-k-mean": CCA}                                    # the last one is CCA as it is in zaya.py: CCGQA
KINDS = ("MHA", "GQA", "MLA", "CCGQA")
ARMS = (*LADDER, "MHA", "GQA", "MLA")


def attention(kind, E, D):
    """Attention at width E with heads of D channels.  MHA has E / D heads; all others cache E / 4 numbers a token, an
    eighth of MHA's; the ladder and CCGQA have half of MHA's query heads (C1 = 2, C2 = 8), GQA and MLA all of them."""
    wide, few = E // D, E // (8 * D)
    if kind in ("MHA", "GQA"):
        return Attention(E, wide, wide if kind == "MHA" else few, D)
    if kind == "MLA":
        return MLA(E, wide, D, E // 4 - D // 2, D // 2)
    return LADDER["+ q-k-mean" if kind == "CCGQA" else kind](E, wide // 2, few, D)


# ---- one arm --------------------------------------------------------------------------------------------------------


def size(module):
    return sum(p.numel() for p in module.parameters())


def build(kind, shape, seed):
    """A Zaya with this attention, its experts as wide as makes its parameters those of a Zaya of this shape."""
    E, D = shape.hidden_size, shape.head_dim
    spare = size(attention("CCGQA", E, D)) - size(attention(kind, E, D))
    width = shape.moe_intermediate_size + round(spare / (3 * E * shape.num_experts))
    model = Zaya(ZayaConfig(**{**vars(shape), "moe_intermediate_size": width}))
    for layer in model.layers:
        layer.self_attn = attention(kind, E, D)
    for name, parameter in model.named_parameters():            # Zaya's own rule, but a generator for each name
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        if parameter.ndim >= 2:
            nn.init.normal_(parameter, std=shape.initializer_range, generator=generator)
        elif "conv_qk" in name:
            nn.init.zeros_(parameter)
    return model


@torch.no_grad()
def flops(function):
    """Multiplications and additions of the matrix products in a call, as torch counts them."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):   # of a fused kernel it sees nothing
        function()
    return counter.get_total_flops()


def kv_bytes(slots):
    """What LayerCaches hold of keys and values, in bytes a token."""
    total = 0
    for slot in slots:
        for part in slot.append(slot.k[:, :, :0], slot.v[:, :, :0]):
            total += part.numel() * part.element_size() / part.shape[2]
    return total


@torch.no_grad()
def costs(model, context):
    """Parameters, and what a token costs at this context."""
    ids, cache = torch.arange(context)[None] % model.config.vocab_size, Cache(len(model.layers))
    model.eval()(ids, cache=cache)
    return {**model.parameter_counts(), "attention": size(model.layers[0].self_attn),
            "expert_width": model.config.moe_intermediate_size, "flops": flops(lambda: model(ids)) / context,
            "kv_bytes": kv_bytes(cache.layers)}


def fit(kind, setting):
    """Train one arm -> its costs, "loss" of each step, "held out" by source, "seconds"."""
    model, begun, losses = build(kind, setting.shape, setting.config.seed), time.perf_counter(), []
    for row in arms.pretrain(model, setting, name=kind):
        losses.append(round(row["loss"], 4))
    return {**costs(model, setting.stage.context), "loss": losses, "held out": arms.held_out(model, setting),
            "seconds": time.perf_counter() - begun}


def measure(seed, steps):
    found = arms.Seed("cca", seed, steps=steps)
    setting = arms.prepare("tiny", seed, steps, **SHAPE)
    for kind in found.missing(ARMS):
        found.add(kind, fit(kind, setting))


# ---- the table -------------------------------------------------------------------------------------------------------


def read_results():
    """All complete seeds, with the published losses beside ours; CCGQA is the ladder's last rung."""
    results = arms.read_results("cca", "arms")
    for result in results:
        if "+ q-k-mean" in result["arms"]:
            result["arms"]["CCGQA"] = dict(result["arms"]["+ q-k-mean"])
        for kind, arm in result["arms"].items():
            arm["published"] = PUBLISHED[kind]
    return results


def table(results):
    """Each rung beside the one before it, each kind beside CCGQA."""
    bases = {**dict(zip(LADDER, (None, *LADDER))), "CCGQA": None, "MHA": "CCGQA", "GQA": "CCGQA", "MLA": "CCGQA"}
    return arms.table(results, bases, {
        "held-out loss": (arms.loss, ".3f"), "on traces": (arms.of("held out", "traces"), ".3f"),
        "parameters": (arms.of("total"), ",.0f"), "active": (arms.of("active"), ",.0f"),
        "FLOP a token": (arms.of("flops"), ",.0f"), "KV bytes a token": (arms.of("kv_bytes"), ".0f"),
        "published": (arms.of("published"), ".3f")})


if __name__ == "__main__":
    arms.main(__doc__, lambda: table(read_results()), measure, steps=250)
