"""CCA rung by rung, and CCGQA against MHA, GQA and MLA, at equal parameters and tokens: the held-out loss of each.

    python notebooks/cca.py --seed 0 1 2     # writes notebooks/results/cca/seed-N.json, goes on where it stopped
    python notebooks/cca.py --table          # the tables, over all seeds that are there

Every arm is one module in the place of a layer's `self_attn`, called with CCA's Positions.  All are trained on the same
batches at the same rates, and begin with the same numbers in every tensor of the same name and shape.  What an arm's
attention has less in parameters, its experts get in width.  02_cca.ipynb runs a smaller ladder live.
"""
import os
import sys
import time
import zlib

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "notebooks")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from evidence import command_line, interval, resume, seeds  # noqa: E402
from residual_scaling import prepare  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402
from tqdm import tqdm  # noqa: E402

import train  # noqa: E402
from zaya import CCA, Cache, PIDBalancer, RMSNorm, Zaya, ZayaConfig  # noqa: E402

# The published ratios, as in `attention`: 8 heads of 24 for MHA, 4 query heads and 1 KV head for CCGQA.
SHAPE = dict(hidden_size=192, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=1, head_dim=24,
             num_experts=4, moe_intermediate_size=128, router_hidden_size=32, initializer_range=192 ** -0.5)
# The CCA paper's losses: the ladder in a MoE of 350M active parameters, the kinds in a dense 1B, 300B tokens.
PUBLISHED = {"nothing": 2.280, "one conv": 2.264, "two convs": 2.252, "+ value shift": 2.248, "+ q-k-mean": 2.241,
             "MHA": 2.297, "GQA": 2.297, "MLA": 2.321, "CCGQA": 2.286}


def attend(q, k, v, mask, scale=None):
    """Softmax attention, (B, H, S, D) on (B, K, T, D) -> (B, H, S, D of v).  One new token: the query heads of a KV
    head are queries on the same keys, so they go as one block and no key is copied."""
    B, H, S, _ = q.shape
    if S == 1:
        return F.scaled_dot_product_attention(q.reshape(B, k.shape[1], -1, q.shape[-1]), k, v, mask,
                                              scale=scale).reshape(B, H, 1, -1)
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scale, enable_gqa=True)


class Attention(nn.Module):
    """MHA, or GQA if there are fewer KV heads.  Norm, temperature and partial RoPE are CCA's, so that at CCA's number
    of heads this is CCA with nothing of its own left: no convolution, no value shift, no q-k-mean."""

    def __init__(self, hidden_size, heads, kv_heads, head_dim):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.q_proj = nn.Linear(hidden_size, heads * head_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, kv_heads * head_dim, bias=False)
        self.temp = nn.Parameter(torch.ones(kv_heads))
        self.o_proj = nn.Linear(heads * head_dim, hidden_size, bias=False)

    def forward(self, x, positions, cache=None):
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        rope = positions.cos, positions.sin
        q, k = CCA.apply_rotary(CCA.unit(q), *rope), CCA.apply_rotary(CCA.unit(k) * self.temp[:, None], *rope)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)           # (B, H or K, S, D)
        if cache is not None:
            k, v = cache.append(k, v)
        return self.o_proj(attend(q, k, v, positions.mask).transpose(1, 2).flatten(2))


class MLA(nn.Module):
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
        self.norm = RMSNorm(latent)
        self.rope_proj = nn.Linear(hidden_size, rotated, bias=False)
        self.up_k = nn.Linear(latent, heads * head_dim, bias=False)
        self.up_v = nn.Linear(latent, heads * head_dim, bias=False)
        self.o_proj = nn.Linear(heads * head_dim, hidden_size, bias=False)

    def forward(self, x, positions, cache=None):
        mask, rope = positions.mask, (positions.cos, positions.sin)
        q = self.q_proj(x).unflatten(-1, (self.heads, -1))                          # (B, S, H, D + R)
        q, q_rope = q[..., :self.head_dim], CCA.apply_rotary(q[..., self.head_dim:], *rope)
        latent = self.norm(self.down_proj(x))                                       # (B, S, r)
        k_rope = CCA.apply_rotary(self.rope_proj(x)[:, :, None], *rope)             # (B, S, 1, R)
        up_k, up_v = (up.weight.unflatten(0, (self.heads, -1)) for up in (self.up_k, self.up_v))    # (H, D, r)
        scale = (self.head_dim + self.rotated) ** -0.5
        if cache is None:
            k, v = (torch.einsum("bsr,hdr->bshd", latent, up) for up in (up_k, up_v))
            k = torch.cat([k, k_rope.expand(-1, -1, self.heads, -1)], -1)
            out = attend(*(t.transpose(1, 2) for t in (torch.cat([q, q_rope], -1), k, v)), mask, scale)
            return self.o_proj(out.transpose(1, 2).flatten(2))
        q = torch.cat([torch.einsum("bshd,hdr->bshr", q, up_k), q_rope], -1).transpose(1, 2)
        key = torch.cat([latent, k_rope[:, :, 0]], -1)[:, None]                     # (B, 1, S, r + R)
        key, _ = cache.append(key, key[..., :0])
        out = attend(q, key, key, mask, scale)[..., :self.latent]                   # (B, H, S, r)
        return self.o_proj(torch.einsum("bhsr,hdr->bshd", out, up_v).flatten(2))


class NoChannels(nn.Module):
    def forward(self, x):
        return x[..., :0]


class TwoConvs(CCA):
    """CCA without q-k-mean and without value shift: all value channels are the current token's."""

    def __init__(self, hidden_size, *shape):
        super().__init__(hidden_size, *shape)
        self.v_proj_current = nn.Linear(hidden_size, self.kv_heads * self.head_dim, bias=False)
        self.v_proj_delayed = NoChannels()

    def qk_mean(self, packed):
        return 0.0, 0.0


class OneConv(TwoConvs):
    """Only the depthwise convolution."""

    def __init__(self, *shape):
        super().__init__(*shape)
        del self.conv_qk_grouped

    def convolve(self, seen, position_ids=None):
        now, before, conv = seen[:, 2:], seen[:, 1:-1], self.conv_qk_depthwise
        if position_ids is not None:
            before = before * (position_ids >= 1)[..., None]
        return (now * conv.weight[:, 0, 1] + before * conv.weight[:, 0, 0] + conv.bias).unflatten(
            -1, (-1, self.head_dim))


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
    with torch.no_grad():                                       # Zaya's own rule, but a generator for each name
        for name, parameter in model.named_parameters():
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
            if parameter.ndim >= 2:
                parameter.normal_(std=shape.initializer_range, generator=generator)
            elif "conv_qk" in name:
                parameter.zero_()
    return model


@torch.no_grad()
def flops(function):
    """Multiplications and additions of the matrix products in a call, as torch counts them."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):   # of a fused kernel it sees nothing
        function()
    return counter.get_total_flops()


def kv_bytes(slots):
    """What LayerCaches hold of keys and values, in bytes a token."""
    live = [slot.append(slot.k[:, :, :0], slot.v[:, :, :0]) for slot in slots]
    return sum(part.numel() * part.element_size() / part.shape[2] for pair in live for part in pair)


@torch.no_grad()
def costs(model, context):
    """Parameters, and what a token costs at this context."""
    ids, cache = torch.arange(context)[None] % model.config.vocab_size, Cache(len(model.layers))
    model.eval()(ids, cache=cache)
    return {**model.parameter_counts(), "attention": size(model.layers[0].self_attn),
            "expert_width": model.config.moe_intermediate_size, "flops": flops(lambda: model(ids)) / context,
            "kv_bytes": kv_bytes(cache.layers)}


def fit(kind, shared):
    """Train one arm -> its costs, {"loss" of each step, "held out" by source, "seconds"}."""
    config, stage, tokenizer, sources, shape = shared
    model, begun = build(kind, shape, config.seed), time.perf_counter()
    loader = train.Loader(sources, stage, config.tokens_per_step, config.seed, tokenizer.pad)
    optimizers = train.make_optimizers(model, stage.lr, config.weight_decay)
    balancer, losses = PIDBalancer(model, config.balancer_lr), []
    for step in tqdm(range(stage.steps), desc=kind, unit=" steps", leave=False, disable=None):
        lr = train.learning_rate(step, stage.steps, stage.lr, stage.lr_end)
        row = train.train_step(model, optimizers, balancer, loader.next()[:3], config, torch.float32, lr)
        losses.append(round(row["loss"], 4))
    with torch.no_grad():
        held = train.held_out_loss(model, sources, stage, tokenizer.pad, stage.context)
    return {**costs(model, stage.context), "loss": losses, "held out": {n: r["loss"] for n, r in held.items()},
            "seconds": time.perf_counter() - begun}


def measure(seed, steps):
    command = f"python notebooks/cca.py --seed {seed} --steps {steps}"
    path, result = resume("cca", seed, {"command": command, "arms": {}})
    *shared, shape = prepare("tiny", seed, SHAPE["num_hidden_layers"], steps)
    shape = ZayaConfig(**{**vars(shape), **SHAPE})
    for kind in [kind for kind in ARMS if kind not in result["arms"]]:
        result["arms"][kind] = fit(kind, (*shared, shape))
        train.write_json(path, result)
        print(f"seed {seed}, {kind}: held-out loss {held_out(result['arms'][kind]):.3f}, "
              f"{result['arms'][kind]['seconds']:.0f} s", flush=True)


def held_out(run):
    """The mean over the held-out sources."""
    return np.mean(list(run["held out"].values()))


def read_results():
    """All seeds that every arm was trained for; CCGQA is the ladder's last rung."""
    return [{**arms, "CCGQA": arms["+ q-k-mean"]} for arms in (result["arms"] for result in seeds("cca"))
            if set(arms) == set(ARMS)]


def paired(results, kind, base):
    """The mean of kind - base over seeds, and half its 95 % interval (None: one seed has none)."""
    mean, low, _ = interval([held_out(result[kind]) - held_out(result[base]) for result in results])
    return mean, mean - low if len(results) > 1 else None


def table(results, kinds, bases, against):
    """Markdown: a row for each kind; its difference is to the kind in `bases` at the same place, if there is one."""
    lines = ["| | parameters (active) | MFLOP a token | KV bytes a token | held-out loss by seed | by source | mean "
             f"| {against} | published |", "|---|---|---|---|---|---|---|---|---|"]
    for kind, base in zip(kinds, bases):
        run, losses = results[0][kind], [held_out(result[kind]) for result in results]
        mean, half = paired(results, kind, base) if base else (None, None)
        change = "" if mean is None else f"{mean:+.3f}" + (f" ± {half:.3f}" if half else "")
        told = f"{PUBLISHED[kind]:.3f}" + (f" ({PUBLISHED[kind] - PUBLISHED[base]:+.3f})" if base else "")
        sources = ", ".join(f"{name} {np.mean([result[kind]['held out'][name] for result in results]):.3f}"
                            for name in run["held out"])
        lines.append(f"| {kind} | {run['total']:,} ({run['active']:,}) | {run['flops'] / 1e6:.2f} "
                     f"| {run['kv_bytes']:.0f} | {', '.join(f'{loss:.3f}' for loss in losses)} | {sources} "
                     f"| {np.mean(losses):.3f} | {change} | {told} |")
    return "\n".join(lines)


def tables(results):
    return "\n\n".join([table(results, tuple(LADDER), (None, *LADDER), "minus the rung before (95 %)"),
                        table(results, KINDS, ("CCGQA", "CCGQA", "CCGQA", None), "minus CCGQA (95 %)")])


if __name__ == "__main__":
    command_line(__doc__, measure, lambda: read_results() and tables(read_results()), steps=250)
