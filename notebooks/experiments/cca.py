"""CCA rung by rung, and CCGQA against MHA, GQA and a canon layer, at equal parameters and tokens.

    python notebooks/experiments/cca.py --seeds 3

Every arm is one module in the place of a layer's `self_attn`.  An arm begins with the same numbers as the others in
every tensor of the same name and shape.  What its attention has less in parameters, its experts get in width.  Each is
trained twice: on the pretraining mixture, which asks for everything at once, and as a smaller model on drills that ask
for the one thing that convolutions are said to do.  02_cca.ipynb runs a smaller ladder live.
"""
import random
import types
import zlib
from dataclasses import replace
from functools import partial

import arms
import torch
import torch.nn.functional as F
from torch import nn

from zaya import CCA, Zaya, ZayaConfig

# The published ratios, as in `attention`: 8 heads of 24 for MHA, 4 query heads and 1 KV head for CCGQA.
SHAPE = dict(hidden_size=192, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=1, head_dim=24,
             num_experts=4, moe_intermediate_size=128, router_hidden_size=32, initializer_range=192 ** -0.5)
# Of the drills: 2 layers, the fewest in which one token can find another by what stands before it.
DRILL_SHAPE = dict(hidden_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=1, head_dim=16,
                   num_experts=4, moe_intermediate_size=128, router_hidden_size=16, initializer_range=128 ** -0.5,
                   vocab_size=32)
DRILL_STAGE = arms.train.Stage(400, 64, 1e4, 1.0, 1e-2, 1e-3, difficulty=0, turns=1, mask_prompts=True)

# ---- attention, arm by arm ------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """MHA, or GQA if there are fewer KV heads, called like zaya.CCA: it takes rotation tables and mask of `positions`.

    Norm, temperature and partial RoPE are CCA's, so that at CCA's number of heads this is CCA with nothing of its own
    left: no convolution, no value shift, no q-k-mean.
    """

    def __init__(self, hidden_size, heads, kv_heads, head_dim):
        super().__init__()
        query_width, kv_width = heads * head_dim, kv_heads * head_dim
        self.head_dim = head_dim
        self.q_proj = nn.Linear(hidden_size, query_width, bias=False)
        self.k_proj = nn.Linear(hidden_size, kv_width, bias=False)
        self.v_proj = nn.Linear(hidden_size, kv_width, bias=False)
        self.temp = nn.Parameter(torch.ones(kv_heads))
        self.o_proj = nn.Linear(query_width, hidden_size, bias=False)

    def forward(self, x, positions, cache=None):
        heads = (-1, self.head_dim)
        q = CCA.unit(self.q_proj(x).unflatten(-1, heads))                           # (B, S, H, D)
        k = CCA.unit(self.k_proj(x).unflatten(-1, heads)) * self.temp[:, None]      # (B, S, K, D)
        v = self.v_proj(x).unflatten(-1, heads).transpose(1, 2)                     # (B, K, S, D)
        q = CCA.apply_rotary(q, positions.cos, positions.sin).transpose(1, 2)
        k = CCA.apply_rotary(k, positions.cos, positions.sin).transpose(1, 2)
        if cache is not None:
            k, v = cache.append(k, v)
        mask = positions.mask
        if x.shape[1] > 1:
            out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=True)
        else:
            # One new token: the query heads of a KV head are queries on the same keys, so no key is copied.
            q = q[:, :, 0].unflatten(1, (k.shape[1], -1))                           # (B, K, H / K, D)
            out = F.scaled_dot_product_attention(q, k, v, mask).flatten(1, 2)[:, :, None]
        return self.o_proj(out.transpose(1, 2).flatten(2))                          # of (B, S, H * D)


class Canon(Attention):
    """A canon layer before plain attention: x + conv(x), depthwise over the last four tokens of the stream itself."""

    def __init__(self, hidden_size, *shape):
        super().__init__(hidden_size, *shape)
        # train.make_optimizers gives what is named conv_qk to AdamW, as it does CCA's convolutions.
        self.conv_qk_stream = nn.Conv1d(hidden_size, hidden_size, 4, groups=hidden_size, bias=False)

    def forward(self, x, positions, cache=None):
        mixed, position_ids = x, positions.position_ids
        for back, tap in enumerate(self.conv_qk_stream.weight[:, 0].flip(-1).unbind(-1)):
            earlier = F.pad(x, (0, 0, back, 0))[:, :x.shape[1]]
            if position_ids is not None:                        # a sample's first token has none before it
                earlier = earlier * (position_ids >= back)[..., None]
            mixed = mixed + earlier * tap
        return super().forward(mixed, positions, cache)


class Nothing(nn.Module):
    """Stands for a convolution that is not there, or for a projection to no channels."""

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
        older, newer = conv.weight[:, 0].unbind(-1)
        y = now * newer + before * older + conv.bias
        return y.unflatten(-1, (-1, self.head_dim))


class ValueShift(CCA):
    """CCA without q-k-mean."""
    qk_mean = TwoConvs.qk_mean


LADDER = {"nothing": Attention, "one conv": OneConv, "two convs": TwoConvs, "+ value shift": ValueShift,
          "+ q-k-mean": CCA, "canon": Canon}                    # "+ q-k-mean" is CCA as it is in zaya.py: CCGQA
# Each arm and what it is compared with: a rung with the one before it, the rivals with the last one.
ARMS = {"nothing": None, "one conv": "nothing", "two convs": "one conv", "+ value shift": "two convs",
        "+ q-k-mean": "+ value shift", "canon": "nothing", "MHA": "+ q-k-mean", "GQA": "+ q-k-mean"}


def attention(kind, E, D):
    """Attention at width E with heads of D channels.  MHA has E / D heads; all others cache E / 4 numbers a token, an
    eighth of MHA's; the ladder and CCGQA have half of MHA's query heads (C1 = 2, C2 = 8), GQA has all of them."""
    wide, few = E // D, E // (8 * D)
    if kind == "MHA":
        return Attention(E, wide, wide, D)
    if kind == "GQA":
        return Attention(E, wide, few, D)
    return LADDER.get(kind, CCA)(E, wide // 2, few, D)          # "CCGQA" is the last rung, too


def size(module):
    return sum(p.numel() for p in module.parameters())


def build(kind, shape, seed):
    """A Zaya with this attention, its experts as wide as makes its parameters those of a Zaya of this shape."""
    E, D = shape.hidden_size, shape.head_dim
    spare = size(attention("CCGQA", E, D)) - size(attention(kind, E, D))
    width = shape.moe_intermediate_size + round(spare / (3 * E * shape.num_experts))
    model = Zaya(replace(shape, moe_intermediate_size=width))
    for layer in model.layers:
        layer.self_attn = attention(kind, E, D)
    for name, parameter in model.named_parameters():            # Zaya's own rule, but a generator for each name
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        if parameter.ndim >= 2:
            nn.init.normal_(parameter, std=shape.initializer_range, generator=generator)
        elif "conv_qk" in name:
            nn.init.zeros_(parameter)
    return model

# ---- the drills -----------------------------------------------------------------------------------------------------


class Drill:
    """A source for train.Loader: endless sequences of symbols, in which only what can be known counts in the loss.

    The vocabulary: 0 is padding, 1 ends a pair or a text, 2 asks, 3 … 31 are symbols.
    """
    is_traces = True                                            # made, not read: without an end

    def __init__(self, name, seed):
        self.name, self.seed = name, seed

    def size(self, held_out):
        return None

    def get(self, index, held_out):
        rng = random.Random(f"{self.seed} {self.name} {index} {held_out}")
        return self.copy(rng) if self.name == "copy" else self.recall(rng, hops=int(self.name[0]))

    @staticmethod
    def recall(rng, hops):
        """Six pairs "a b", in any order, that lead from symbol to symbol and back to the first; then for each "a ?" and
        where `hops` of them lead to."""
        symbols = rng.sample(range(4, 32), 6)
        leads_to, ids = dict(zip(symbols, symbols[1:] + symbols[:1])), []
        for first in rng.sample(symbols, 6):
            ids += [first, leads_to[first], 1]
        marks = [0] * len(ids)
        for place in rng.sample(range(6), 6):
            ids += [symbols[place], *[2] * hops, symbols[(place + hops) % 6]]
            marks += [0] * (1 + hops) + [1]
        return ids, marks

    @staticmethod
    def copy(rng):
        """Eight symbols, up to 40 others that are to be passed over, and the eight again."""
        text, between = rng.choices(range(4, 20), k=8), rng.choices(range(20, 32), k=rng.randint(0, 40))
        return [*text, 1, *between, 2, *text], [0] * (len(text) + len(between) + 2) + [1] * 8


DRILLS = ("1 hop", "2 hops", "copy")


@torch.no_grad()
def accuracy(model, source):
    """The share of a drill's held-out answers that are the model's likeliest."""
    loader = arms.train.Loader([source], DRILL_STAGE, 256 * DRILL_STAGE.context, 0, 0, held_out=True)
    inputs, targets, positions, _ = loader.next()
    asked = targets >= 0
    found = model.eval()(inputs, position_ids=positions).argmax(-1)
    return (found == targets)[asked].float().mean().item()


def drill(kind, config):
    """Train a small model on all drills -> {drill: accuracy}."""
    sources = [Drill(name, config.seed) for name in DRILLS]
    setting = arms.Setting(config, DRILL_STAGE, types.SimpleNamespace(pad=0), sources)      # numbers, so no text
    model = build(kind, replace(ZayaConfig.preset("smoke"), **DRILL_SHAPE), config.seed)
    list(arms.practise(model, setting, name=f"{kind}, drills"))
    return {source.name: accuracy(model, source) for source in sources}


def measure(setting, kind, rows):
    """Train one arm -> its parameters, "loss" of each step, "held out" by source, "drills"."""
    model, losses = build(kind, setting.shape, setting.config.seed), []
    for row in arms.practise(model, setting, name=kind):
        losses.append(round(row["loss"], 4))
    return {**model.parameter_counts(), "loss": losses, "held out": arms.held_out(model, setting),
            "drills": drill(kind, setting.config)}


COLUMNS = {"held-out loss": (arms.loss, ".3f"), "on traces": (arms.of("held out", "traces"), ".3f"),
           "1 hop": (arms.of("drills", "1 hop"), ".2f"), "2 hops": (arms.of("drills", "2 hops"), ".2f"),
           "copy": (arms.of("drills", "copy"), ".2f"), "parameters": (arms.of("total"), ",.0f"),
           "active": (arms.of("active"), ",.0f")}

if __name__ == "__main__":
    arms.main(__doc__, "cca", partial(arms.prepare, **SHAPE), measure, ARMS, COLUMNS, steps=250)
