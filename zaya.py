"""ZAYA1-8B in one file: Zyphra's MoE++ language model, numerically equal to transformers.models.zaya.

x = (E[tokens] + b) * a;  40 times: x = scaled(x, CCA(norm x)), x = scaled(x, MoE(norm x));  logits = norm(x) @ E^T
("TR": ZAYA1-8B Technical Report, arXiv 2605.05365.  "CCA": arXiv 2510.04476.  "HF": transformers.models.zaya.)

Names in the code and symbols in the papers:
    B batch, S new tokens, T keys seen (cache + new), E hidden_size, V vocab_size, L num_hidden_layers
    H num_attention_heads, K num_key_value_heads, D head_dim, C = (H + K) * D packed query and key channels
    X num_experts, R router_hidden_size, F moe_intermediate_size, N = B * S tokens seen by the experts

One rule covers padding, packing, caching and sliding windows: **a token at position p looks back at most p tokens.**
Attention, both convolutions and the value shift obey it, so `position_ids` that restart at 0 pack several samples in
one row, and position -1 marks padding.  Nothing else in this file knows about either.

Featuring: the whole architecture, cached and left-padded generation, official and legacy checkpoints, the balancer that
trains the router's biases, a tokenizer.  Does NOT include: fused kernels (kernels.py), training (train.py).
"""
import json
import math
import os
import re
from dataclasses import asdict, dataclass, fields

import torch
import torch.nn.functional as F
from torch import nn


def read_json(path):
    """The JSON object in a file -> dict.  Raises FileNotFoundError, or ValueError if the file is damaged."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            content = json.load(file)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: it must hold a JSON object, not a {type(content).__name__}")
    return content


def write_json(path, content):
    """Write under a temporary name, then rename: nobody ever reads half a file."""
    with open(f"{path}.tmp", "w", encoding="utf-8") as file:
        json.dump(content, file, indent=2, ensure_ascii=False)
    os.replace(f"{path}.tmp", path)


@dataclass
class ZayaConfig:
    """The model's shape; every field has the name of the official config (HF ZayaConfig).  TR table I.

    Sizes are in channels, positions in tokens.  `rope_parameters` maps a layer type ("hybrid", or "hybrid_sliding" with
    `sliding_window`) to its `rope_theta` and `partial_rotary_factor`.  ValueError names the field that cannot work.
    """
    vocab_size: int = 262272
    hidden_size: int = 2048
    num_hidden_layers: int = 40
    num_attention_heads: int = 8
    num_key_value_heads: int = 2
    head_dim: int = 128
    num_experts: int = 16
    moe_intermediate_size: int = 2048
    router_hidden_size: int = 256
    rope_parameters: dict | None = None
    sliding_window: int | None = None
    layer_types: list | None = None         # one of "hybrid", "hybrid_sliding" per layer
    max_position_embeddings: int = 131072
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 2
    eos_token_id: int | list | None = 106

    # What HF writes too and no published ZAYA varies: another value is refused.  (cca_time: taps of the convolutions.)
    FIXED = dict(model_type="zaya", hidden_act="silu", num_experts_per_tok=1, attention_bias=False, lm_head_bias=False,
                 attention_dropout=0.0, cca_time0=2, cca_time1=2)
    # Other fields that change no logit.  Any unknown field may change one: refused.
    DESCRIPTIVE = re.compile("architectures|auto_map|(torch_)?dtype|transformers_version|unsloth_.*|id2label|label2id|"
                             "problem_type|use_cache|return_dict|output_.*|chunk_size_feed_forward|is_encoder_decoder|"
                             "do_sample|temperature|top_[kp]|.*_token_id|_.*")

    def __post_init__(self):
        for field in fields(self):
            name, value, kind = field.name, getattr(self, field.name), field.type
            if value is None and kind not in (int, float, bool):
                continue                                        # null is a value that this field may have
            wanted, works = f"of type {kind}", isinstance(value, kind)
            if name.endswith("token_id"):
                wanted = "null or a token's number; eos_token_id may be a list of them"
                ids = value if name == "eos_token_id" and isinstance(value, list) else [value]
                works = all(type(i) is int and i >= 0 for i in ids)
            elif kind in (int, int | None):
                wanted, works = "a positive integer", type(value) is int and value > 0
            elif kind is float:
                wanted, works = "a positive number", self._positive(value)
            self._require(works, f"{name} must be {wanted}, not {value!r}")
        H, K, D, L = self.num_attention_heads, self.num_key_value_heads, self.head_dim, self.num_hidden_layers
        self._require(H % K == 0, f"num_attention_heads ({H}) must be a multiple of num_key_value_heads ({K})")
        # Half of the value channels come from the previous token.
        self._require(K * D % 2 == 0, f"num_key_value_heads * head_dim ({K} * {D}) must be even")
        self.layer_types = list(self.layer_types or ["hybrid"] * L)
        self._require(len(self.layer_types) == L, f"layer_types must name {L} layers, as num_hidden_layers says")
        for kind in self.layer_types:
            self._require(kind in ("hybrid", "hybrid_sliding"), f"layer_types does not know {kind!r}")
            self._require(kind == "hybrid" or self.sliding_window,
                          "layer_types has 'hybrid_sliding': set sliding_window to the number of tokens it sees")
        self._complete_rope()

    def _complete_rope(self):
        """Fill `rope_parameters` up with the published values, and refuse every RoPE but the default one."""
        # The file on the hub has a "rope_type" beside the layer types too.
        given = {"rope_type": "default", "hybrid": {}, "hybrid_sliding": {}, **(self.rope_parameters or {})}
        self.rope_parameters = {}
        for kind, theta in (("hybrid", 5e6), ("hybrid_sliding", 1e4)):
            own = given[kind]
            self._require(len(given) == 3 and isinstance(own, dict),
                          f"rope_parameters must have a dict per layer type ('hybrid', 'hybrid_sliding'), not {given}")
            share = 1.0 if own else 0.5                         # as HF: all channels turn where a file names no share
            rope = {"rope_type": given["rope_type"], "rope_theta": theta, "partial_rotary_factor": share, **own}
            self._require(len(rope) == 3 and rope["rope_type"] == "default",
                          f"rope_parameters[{kind!r}]: only the rope_type 'default' is implemented, not {rope}")
            numbers = self._positive(rope["rope_theta"]) and self._positive(rope["partial_rotary_factor"])
            self._require(numbers and self.head_dim * rope["partial_rotary_factor"] in range(0, self.head_dim + 1, 2),
                          f"rope_parameters[{kind!r}] must have a positive rope_theta and a partial_rotary_factor that "
                          f"turns an even number of the {self.head_dim} channels of a head, not {rope}")
            self.rope_parameters[kind] = rope

    @staticmethod
    def _positive(value):
        return type(value) in (int, float) and 0 < value < math.inf

    @staticmethod
    def _require(condition, message):
        if not condition:
            raise ValueError(f"ZayaConfig: {message}")

    @classmethod
    def preset(cls, name, **changes):
        """smoke: seconds.  tiny: minutes on two CPU cores.  small: one GPU.  zaya1-8b: the published shape.

        `small` keeps the published ratios: queries E/2 wide, keys and values E/8, router E/8.  `tiny` hardly learned to
        copy with keys of E/8 = 16 channels, so it has 32."""
        sizes = [field.name for field in fields(cls)[:9]] + ["max_position_embeddings", "initializer_range"]
        shapes = {  # V   E   L  H  K   D   X    F   R  positions  std
            "smoke": (384, 64, 2, 2, 1, 16, 4, 64, 16, 4096, 0.125),
            "tiny": (512, 128, 4, 4, 1, 32, 8, 128, 32, 8192, 0.088),
            "small": (8192, 512, 12, 4, 1, 64, 16, 512, 64, 32768, 0.044),
            "zaya1-8b": (),
        }
        if name not in shapes:
            raise ValueError(f"ZayaConfig has no preset {name!r}; it has {', '.join(shapes)}")
        return cls(**{**dict(zip(sizes, shapes[name])), **changes})

    @classmethod
    def from_dict(cls, values):
        """Read an official config.json.  ValueError for a field that may change the numbers and is not implemented."""
        ours = {}
        for name, value in values.items():
            if name in cls.__dataclass_fields__:
                ours[name] = value
            elif not cls.DESCRIPTIVE.fullmatch(name):
                only = cls.FIXED.get(name)
                cls._require(value in (None, {}, [], only), f"{name} {value!r} is not implemented, only {only!r}")
        return cls(**ours)

    @classmethod
    def from_legacy(cls, values, query_rows):
        """Read the config.json of a checkpoint of alternating sublayers, attention and MoE: ZAYA1-base and its like.

        query_rows: of a query projection.  A field may be a list, an entry a sublayer, 0 where it means nothing.
        """
        def number(*names, default=None):
            for name in names:
                value = values.get(name)
                if value is not None:
                    return max(value) if isinstance(value, list) else value
            cls._require(default is not None, f"{' or '.join(names)} is missing")
            return default

        for name in ("zaya_use_eda", "zaya_use_mod", "scale_residual_merge", "gated_linear_unit"):
            cls._require(values.get(name, True) is True, f"{name} must be true in a legacy checkpoint")
        for name, only in {**cls.FIXED, "clamp_temp": False, "moe_router_topk": 1, "rope_scaling": None}.items():
            value = values.get(name, only)
            cls._require(value == only or not (value or only), f"{name} {value!r} is not implemented, only {only!r}")
        sublayers = values.get("zaya_layers") or ["a", number("num_experts")] * (number("num_hidden_layers") // 2)
        cls._require(set(sublayers[::2]) == {"a"} and len(set(sublayers[1::2])) == 1 and len(sublayers) % 2 == 0,
                     "zaya_layers must alternate between 'a' and a number of experts")
        windows, head_dim = values.get("swa_layers") or [], number("kv_channels", "head_dim")
        cls._require(len({*windows} - {0}) <= 1, "swa_layers must have one window")
        rope = {"rope_theta": number("rope_theta", "rotary_base"),
                "partial_rotary_factor": number("partial_rotary_factor", "rope_pct", default=0.5)}
        same = {name: values[name] for name in cls.__dataclass_fields__ if name in values}
        return cls(**{
            **same, "num_hidden_layers": len(sublayers) // 2, "num_experts": sublayers[1], "head_dim": head_dim,
            "num_attention_heads": number("cca_num_q_heads", default=query_rows // head_dim),
            "num_key_value_heads": number("num_query_groups_list", "num_query_groups", "num_key_value_heads"),
            "moe_intermediate_size": number("ffn_hidden_size_list", "ffn_hidden_size") // 2,
            "router_hidden_size": number("zaya_mlp_expansion"), "rms_norm_eps": number("norm_epsilon", "rms_norm_eps"),
            # The legacy window leaves the query itself out, and the official one counts it.
            "sliding_window": max(windows) + 1 if any(windows) else None,
            "layer_types": ["hybrid_sliding" if window else "hybrid" for window in windows[:len(sublayers):2]] or None,
            "rope_parameters": {"hybrid": rope, "hybrid_sliding": {**rope, "rope_theta": number("swa_rotary_base",
                                                                                              default=1e4)}}})

    def to_dict(self):
        return {"architectures": ["ZayaForCausalLM"], **self.FIXED, **asdict(self)}


class RMSNorm(nn.RMSNorm):
    """Root-mean-square norm, computed in fp32: y = w * x / sqrt(mean(x^2) + eps).

    (…, size) any float -> (…, size) in the weight's dtype, which is what the next matrix product wants.
    Equals HF ZayaRMSNorm; in bf16 we differ by rounding once, at the end, and by reading an fp32 residual stream.
    """

    def __init__(self, size, eps=1e-5):
        super().__init__(size, eps)

    def forward(self, x):
        return F.rms_norm(x.float(), x.shape[-1:], self.weight.float(), self.eps).to(self.weight.dtype)


class CCA(nn.Module):
    """Compressed convolutional attention: queries, keys and values live in a narrow, convolved space.

        q~, k~ = Wq x, Wk x                                     compress: E -> H*D and E -> K*D
        [q; k] = conv_in_head(conv_per_channel([q~; k~])) + [m_q; m_k]
        m_q    = (q~ + k~ of its group) / 2,  m_k = mean of m_q over the group          (q-k-mean)
        v_t    = [Wv1 x_t ; Wv2 x_(t-1)]                                                (value shift)
        q, k  <- sqrt(D) q / |q|,  temp_k sqrt(D) k / |k|,  then RoPE on their first channels
        out    = Wo softmax(q k^T / sqrt(D)) v

    TR section II, CCA sections 3-4.  x (B, S, E) -> (B, S, E).  positions: position ids (B, S) int64, 0 where a sample
    begins and -1 for padding; None where each row is one sample; or the `Positions` that `CCA.positions` makes of
    either, once for all layers.  cache: a LayerCache, read and advanced.  Equals HF ZayaAttention.  We differ: packed
    rows, which HF lacks, padded and cached ones take one path; convolutions of two taps only; fp32 from q-k-mean to
    RoPE in any dtype; a temperature of 1 at first (HF's 0 would make every key zero).  Alone it starts with PyTorch's
    own random weights; Zaya draws them again, and sets the convolutions' biases to 0.

    >>> attention = CCA(hidden_size=64, num_attention_heads=4, num_key_value_heads=1, head_dim=16)
    >>> attention(torch.randn(2, 5, 64), positions=torch.tensor([[0, 1, 2, 0, 1], [0, 1, 2, 3, -1]])).shape
    torch.Size([2, 5, 64])
    """

    class Positions:
        """What `positions` says of the tokens of one call: position_ids (B, S) int64 or None; cos, sin (B or 1, S, R/2)
        fp32; mask (B or 1, 1, S, T) bool, None for causal attention."""

        def __init__(self, position_ids, cos, sin, mask):
            self.position_ids, self.cos, self.sin, self.mask = position_ids, cos, sin, mask

    def __init__(self, hidden_size, num_attention_heads, num_key_value_heads, head_dim, rope_parameters=None,
                 sliding_window=None):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = num_attention_heads, num_key_value_heads, head_dim
        self.rope_parameters = rope_parameters or {"rope_theta": 5e6, "partial_rotary_factor": 0.5}
        self.sliding_window = sliding_window
        q_size, kv_size = num_attention_heads * head_dim, num_key_value_heads * head_dim
        channels = q_size + kv_size
        self.q_proj = nn.Linear(hidden_size, q_size, bias=False)
        self.k_proj = nn.Linear(hidden_size, kv_size, bias=False)
        self.v_proj_current = nn.Linear(hidden_size, kv_size // 2, bias=False)
        self.v_proj_delayed = nn.Linear(hidden_size, kv_size // 2, bias=False)
        self.conv_qk_depthwise = nn.Conv1d(channels, channels, 2, groups=channels)
        self.conv_qk_grouped = nn.Conv1d(channels, channels, 2, groups=channels // head_dim)
        self.temp = nn.Parameter(torch.ones(num_key_value_heads))
        self.o_proj = nn.Linear(q_size, hidden_size, bias=False)

    def forward(self, x, positions=None, cache=None):
        if not isinstance(positions, self.Positions):
            rotated = int(self.head_dim * self.rope_parameters["partial_rotary_factor"])
            positions = self.positions(x, positions, self.rope_parameters["rope_theta"], rotated, self.sliding_window,
                                       cache.columns if cache is not None else 0)
        packed = torch.cat([self.q_proj(x), self.k_proj(x)], -1)                    # (B, S, C)
        current, delayed = self.v_proj_current(x), self.v_proj_delayed(x)           # (B, S, K*D/2) each
        q, k, v = self.mix(packed, current, delayed, positions, cache)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)           # (B, H or K, S, D)
        if cache is not None:
            k, v = cache.append(k, v)                                               # (B, K, T, D)
        return self.o_proj(self.attend(q, k, v, positions, cache))

    def mix(self, packed, current, delayed, positions, cache):
        """From the projections to what attention compares: rotated q (B, S, H, D), k and v (B, S, K, D)."""
        S, ids = packed.shape[1], positions.position_ids
        # What came before the new tokens: two packed latents and one delayed value, zeros where a row begins.
        seen = F.pad(packed, (0, 0, 2, 0))                                          # (B, 2 + S, C)
        shifted = F.pad(delayed, (0, 0, 1, 0))                                      # (B, 1 + S, K*D/2)
        if cache is not None:
            if cache.packed is not None:
                seen[:, :2] = cache.packed
                shifted[:, :1] = cache.delayed
            cache.packed = seen[:, S:].float()
            cache.delayed = shifted[:, S:].float()
        shifted = shifted[:, :S]
        if ids is not None:
            shifted = shifted * (ids >= 1)[..., None]
        v = torch.cat([current, shifted], -1).unflatten(-1, (self.kv_heads, self.head_dim))

        # All in fp32 from here to the end of RoPE.
        q_mean, k_mean = self.qk_mean(packed.float())
        mixed = self.convolve(seen, ids).float()                                    # (B, S, H + K, D)
        q, k = mixed.split([self.heads, self.kv_heads], 2)
        q = self.unit(q + q_mean)
        k = self.unit(k + k_mean) * self.temp.float()[:, None]
        q = self.apply_rotary(q, positions.cos, positions.sin)
        k = self.apply_rotary(k, positions.cos, positions.sin)
        return q.to(v.dtype), k.to(v.dtype), v

    def attend(self, q, k, v, positions, cache):
        """q (B, H, S, D) on k and v (B, K, T, D) -> (B, S, H*D)."""
        causal = positions.mask is None and q.shape[2] > 1
        out = F.scaled_dot_product_attention(q, k, v, positions.mask, is_causal=causal, enable_gqa=True)
        return out.transpose(1, 2).flatten(2)

    @classmethod
    def positions(cls, x, position_ids, rope_theta, rotated, sliding_window=None, columns=0):
        """The Positions of x (B, S, …) behind `columns` cached tokens a row.  Without ids they are those of one sample:
        `columns` … `columns` + S - 1.  rotated: how many channels turn, channel i by p / theta^(2i / rotated)."""
        S = x.shape[1]
        T = columns + S
        column = torch.arange(T, device=x.device)
        ids = position_ids if position_ids is not None else column[None, columns:]
        frequency = rope_theta ** (-torch.arange(0, rotated, 2, device=x.device, dtype=torch.float32) / rotated)
        angle = ids[..., None].float() * frequency
        mask = None
        # No mask: S queries on S keys are causal by themselves, and one query sees every key there is.
        if position_ids is not None or (S > 1 and columns) or (sliding_window and T > sliding_window):
            back = column[columns:, None] - column                                  # (S, T)
            # Padding (position -1) sees itself: nobody reads the result, and a softmax over nothing would be NaN.
            farthest = ids.clamp(0, (sliding_window or T) - 1)[..., None]           # (B or 1, S, 1)
            mask = ((back >= 0) & (back <= farthest))[:, None]
        return cls.Positions(position_ids, angle.cos(), angle.sin(), mask)

    def qk_mean(self, packed):
        """(B, S, C) latents before the convolutions -> m_q (B, S, H, D), m_k (B, S, K, D)."""
        q, k = packed.unflatten(-1, (-1, self.head_dim)).split([self.heads, self.kv_heads], 2)
        q_mean = (q.unflatten(2, (self.kv_heads, -1)) + k.unsqueeze(3)) / 2                # (B, S, K, H/K, D)
        k_mean = q_mean.mean(3)
        return q_mean.flatten(2, 3), k_mean

    def convolve(self, seen, position_ids=None):
        """Both causal convolutions on `seen` (B, 2 + S, C) -> (B, S, H + K, D) for the last S tokens.

        Zeros are padded once, before the first convolution: before a sample's first token the second sees its bias."""
        depthwise, grouped, by_head = self.conv_qk_depthwise, self.conv_qk_grouped, (-1, self.head_dim)
        previous, newest = seen[:, :-1], seen[:, 1:]                                # (B, 1 + S, C)
        if position_ids is not None:                           # the column before the first token is one token earlier
            position = torch.cat([position_ids[:, :1] - 1, position_ids], 1)
            previous = previous * (position >= 1)[..., None]
        weight = depthwise.weight[:, 0]                        # (C, 2), the last column for the newest token
        middle = torch.addcmul(depthwise.bias, newest, weight[:, 1])
        middle = torch.addcmul(middle, previous, weight[:, 0]).unflatten(-1, by_head)
        previous, newest = middle[:, :-1], middle[:, 1:]                            # (B, S, H + K, D)
        if position_ids is not None:
            bias = depthwise.bias.unflatten(-1, by_head).to(middle.dtype)
            previous = torch.where((position_ids >= 1)[..., None, None], previous, bias)
        weight = grouped.weight.unflatten(0, by_head)                               # (H + K, D out, D in, 2)
        out = grouped.bias.unflatten(-1, by_head) + torch.einsum("bshi,hoi->bsho", newest, weight[..., 1])
        return out + torch.einsum("bshi,hoi->bsho", previous, weight[..., 0])

    @staticmethod
    def unit(x):
        """Scale each head's vector to length sqrt(D)."""
        return x.shape[-1] ** 0.5 * F.normalize(x, dim=-1, eps=torch.finfo(x.dtype).eps)

    @staticmethod
    def apply_rotary(x, cos, sin):
        """RoPE on the first 2 * cos.shape[-1] channels of x (B, S, heads, D), channel i paired with i + half."""
        half = cos.shape[-1]
        a, b, rest = x.tensor_split((half, 2 * half), -1)
        cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)


class Router(nn.Module):
    """Top-1 router: a small MLP over a depth-averaged state, with a balancing bias that only affects the choice.

        r_l = W_down x + gamma * r_(l-1)      (EDA, exponential depth averaging; no gamma in the first layer)
        s   = softmax(W3 gelu(W2 gelu(W1 RMSNorm(r_l))))                 over X experts and the skip expert, in fp32
        e   = argmax(s + b),  weight = s_e                               b: see PIDBalancer

    TR section II.  x (B, S, E), previous (B, S, R) or None -> weight (B, S) fp32, choice (B, S) int64, r (B, S, R).
    choice: keep these experts and recompute only their weights, so that the router still learns (router replay).
    In training, with gradients, a call adds its choices to `load`, except where `count` (B, S) bool is False.
    Equals HF ZayaRouter with ZayaRouterMLP; we differ in an fp32 softmax whatever the dtype.
    """

    def __init__(self, hidden_size, router_hidden_size, classes, eda=True, eps=1e-5):
        super().__init__()
        self.skip_expert = True                                 # the last class is the skip expert
        self.down_proj = nn.Linear(hidden_size, router_hidden_size)
        if eda:
            self.router_states_scale = nn.Parameter(torch.ones(router_hidden_size))
        self.norm = nn.RMSNorm(router_hidden_size, eps=eps)
        self.fc1 = nn.Linear(router_hidden_size, router_hidden_size)
        self.fc2 = nn.Linear(router_hidden_size, router_hidden_size)
        self.out_proj = nn.Linear(router_hidden_size, classes, bias=False)
        self.register_buffer("balancing_biases", torch.zeros(classes))
        self.register_buffer("load", torch.zeros(classes, dtype=torch.long), persistent=False)     # exact in any dtype
        self.balancing_biases[-1] = -1.0                        # as HF: practically never chosen

    def forward(self, x, previous=None, choice=None, count=None):
        r = self.down_proj(x)
        if previous is not None and hasattr(self, "router_states_scale"):
            r = r + previous * self.router_states_scale
        gain = self.norm.weight
        h = F.rms_norm(r.float(), r.shape[-1:], gain.float(), self.norm.eps).to(gain.dtype)
        h = F.gelu(self.fc1(h))
        h = F.gelu(self.fc2(h))
        scores = self.out_proj(h).float().softmax(-1)                               # (B, S, classes), never rounded
        if choice is None:
            choice = (scores.detach() + self.balancing_biases.float()).argmax(-1)   # (B, S)
        if self.training and torch.is_grad_enabled():
            ones = torch.ones_like(choice) if count is None else count.long()
            self.load.scatter_add_(0, choice.flatten(), ones.flatten())
        return scores.gather(-1, choice[..., None]).squeeze(-1), choice, r


class PIDBalancer:
    """Keeps the experts evenly loaded by training the routers' biases, without an auxiliary loss.

        error_e = p_e - 1 / X                p_e: share of expert e in the global batch, skipped tokens aside
        b      <- AdamW(b, gradient = error)

    TR section II calls it PID-like.  Read as a controller, the bias integrates the error, momentum smooths it, and the
    second moment sets the gain.  The law is this optimizer: for another one put anything with step(), state_dict() and
    load_state_dict() over the gradient `biases.grad` = error into `optimizer`, right after making the balancer
    (notebooks/experiments/router.py does so with DeepSeek-V3's sign update).  lr and betas are those of Primus, AMD's
    trainer.  A skip expert's bias stays as it is: ZAYA1-8B ships with -1, never chosen.  HF only runs trained biases.

    `model` is any module.  A router in it has the buffers `balancing_biases` (classes,), which it adds to its scores
    before the choice, and `load` (classes,) int64, to which it adds one per real token of training that chose the
    class; `skip_expert` says whether the last class is one.  Make the balancer after loading weights; `step()` once per
    optimizer step takes the counts of all micro-batches, and of all processes of torch.distributed.
    """

    def __init__(self, model, lr=1e-3, betas=(0.9, 0.999)):
        self.routers = [module for module in model.modules() if hasattr(module, "balancing_biases")]
        self.biases = nn.Parameter(torch.stack([router.balancing_biases.float() for router in self.routers]))
        self.experts = self.biases.shape[1] - int(self.routers[0].skip_expert)      # X
        self.optimizer = torch.optim.AdamW([self.biases], lr=lr, betas=betas, weight_decay=0.0)

    @torch.no_grad()
    def step(self):
        """Update the biases from the counts and clear them.  Returns what to log: {"load": worst expert's load over
        the mean, "entropy": H(p) / ln(classes) averaged over layers, "bias": largest |bias|, "skip": skipped share}.
        RuntimeError if nothing was counted."""
        load = torch.stack([router.load for router in self.routers])                # (L, router classes) int64
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(load)
        if load.sum() == 0:
            raise RuntimeError("PIDBalancer.step: no router counted anything: model.train() and gradients let it")
        balanced = load[:, :self.experts]
        share = balanced / balanced.sum(1, keepdim=True).clamp_min(1)
        self.biases.grad = F.pad(share - 1 / self.experts, (0, load.shape[1] - self.experts))
        self.optimizer.step()
        for router, bias in zip(self.routers, self.biases):
            router.balancing_biases.copy_(bias)
            router.load.zero_()
        entropy = -torch.special.xlogy(share, share).sum(1) / math.log(max(self.experts, 2))
        return {"load": (share.max() * self.experts).item(),
                "entropy": entropy.mean().item(),
                "bias": self.biases[:, :self.experts].abs().max().item(),
                "skip": (1 - balanced.sum() / load.sum()).item()}

    def state_dict(self):
        """All of its state but the biases, which are among the model's weights."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state):
        self.optimizer.load_state_dict(state)


class Experts(nn.Module):
    """X SwiGLU networks; each token visits the one it was sent to: y = weight * W_down(silu(g) * u), [g; u] = W_gu x.

    TR section II.  x (N, E), choice (N,) int64, weight (N,) fp32 -> (N, E) in x's dtype.  A choice of X, the skip
    expert, gives 0.  Equals HF ZayaExperts; we differ by sorting the tokens once, so each expert reads one slice.
    """

    def __init__(self, hidden_size, moe_intermediate_size, num_experts):
        super().__init__()
        self.gate_up_proj = nn.Parameter(0.02 * torch.randn(num_experts, 2 * moe_intermediate_size, hidden_size))
        self.down_proj = nn.Parameter(0.02 * torch.randn(num_experts, hidden_size, moe_intermediate_size))

    def forward(self, x, choice, weight):
        order = choice.argsort(stable=True)
        counts = torch.bincount(choice, minlength=len(self.down_proj) + 1).tolist()
        outputs = []
        slices = x.index_select(0, order).split(counts)         # the last one, of the skip expert, has no weights
        for tokens, gate_up, down in zip(slices, self.gate_up_proj.unbind(), self.down_proj.unbind()):
            gate, up = F.linear(tokens, gate_up).chunk(2, -1)                       # (tokens, F) each
            outputs.append(F.linear(F.silu(gate) * up, down))
        y = F.pad(torch.cat(outputs), (0, 0, 0, counts[-1]))                        # zeros for the skipped tokens
        return (y.index_select(0, order.argsort()) * weight[:, None]).to(x.dtype)


class ResidualScaling(nn.Module):
    """Join a sublayer's output to the stream, each with a learned scale and bias per channel, in fp32.

        x <- (x + b_r) * a_r + (y + b_o) * a_o            scales 1 and biases 0 at first: a plain residual

    TR section II (written there as a*x + b; all code computes (x + b) * a).  x (…, E) fp32, y (…, E) any float ->
    (…, E) fp32.  Equals HF ZayaResidualScaling.
    """

    def __init__(self, size):
        super().__init__()
        self.residual_scale = nn.Parameter(torch.ones(size))
        self.residual_bias = nn.Parameter(torch.zeros(size))
        self.hidden_states_scale = nn.Parameter(torch.ones(size))
        self.hidden_states_bias = nn.Parameter(torch.zeros(size))

    def forward(self, x, y):
        x = (x + self.residual_bias) * self.residual_scale
        return torch.addcmul(x, y.float() + self.hidden_states_bias, self.hidden_states_scale)


class Layer(nn.Module):
    """One layer: x <- scaled(x, CCA(norm x)), x <- scaled(x, MoE(norm x)).  Equals HF ZayaDecoderLayer.

    x (B, S, E) fp32, r (B, S, R) the router state of the layer before, or None -> x, r, choice (B, S) int64.
    The other arguments are CCA's and Router's.  Needs CCA, Router, Experts, RMSNorm, ResidualScaling pasted with it.
    """

    def __init__(self, config, index):
        super().__init__()
        E, eps = config.hidden_size, config.rms_norm_eps
        kind = config.layer_types[index]
        window = config.sliding_window if kind == "hybrid_sliding" else None
        self.input_layernorm = RMSNorm(E, eps)
        self.self_attn = CCA(E, config.num_attention_heads, config.num_key_value_heads, config.head_dim,
                             config.rope_parameters[kind], window)
        self.post_attention_residual_scale = ResidualScaling(E)
        self.post_attention_layernorm = RMSNorm(E, eps)
        self.gate = Router(E, config.router_hidden_size, config.num_experts + 1, index > 0, eps)
        self.experts = Experts(E, config.moe_intermediate_size, config.num_experts)
        self.post_mlp_residual_scale = ResidualScaling(E)

    def forward(self, x, r, positions=None, cache=None, choice=None, count=None):
        x = self.post_attention_residual_scale(x, self.self_attn(self.input_layernorm(x), positions, cache))
        h = self.post_attention_layernorm(x)
        weight, choice, r = self.gate(h, r, choice, count)
        y = self.experts(h.flatten(0, 1), choice.flatten(), weight.flatten()).view_as(h)
        return self.post_mlp_residual_scale(x, y), r, choice


class LayerCache:
    """What one layer remembers of a row: keys and values, the last packed latents, the last delayed value.

    k, v: (B, K, T, D), kept in buffers that double when full, so a token costs no copy of the past.  packed (B, 2, C)
    and delayed (B, 1, K*D/2), both fp32 and *projected*: the raw x instead would fit too, and be silently wrong.
    """

    def __init__(self):
        self.k = self.v = self.packed = self.delayed = None
        self.columns = 0                                        # tokens and padding seen so far, the same in each row

    def append(self, k, v):
        """Add (B, K, S, D) keys and values; return all of them, (B, K, T, D)."""
        start = self.columns
        self.columns += k.shape[2]
        if self.k is None:
            self.k, self.v = k[:, :, :0], v[:, :, :0]
        if self.columns > self.k.shape[2]:
            # Zeros, not garbage, make the room: they may be read, masked, and 0 * NaN is NaN.
            room = (0, 0, 0, max(64, self.columns))
            self.k = F.pad(self.k, room)
            self.v = F.pad(self.v, room)
        self.k[:, :, start:self.columns] = k
        self.v[:, :, start:self.columns] = v
        return self.k[:, :, :self.columns], self.v[:, :, :self.columns]


class Cache:
    """The decode state of a batch: a LayerCache per layer and the position of each row's next token.

    Make one with `Cache(config.num_hidden_layers)`; the model reads and advances it.
    """

    def __init__(self, num_hidden_layers):
        self.layers = [LayerCache() for _ in range(num_hidden_layers)]
        self.position = None                                    # (B,) int64; None: no row has padding

    @property
    def columns(self):
        return self.layers[0].columns

    def select(self, rows):
        """Keep these rows (an index tensor), in this order; a row named twice is continued twice."""
        if self.position is not None:
            self.position = self.position[rows]
        for layer in self.layers:
            for name, part in vars(layer).items():
                if isinstance(part, torch.Tensor):
                    setattr(layer, name, part[rows])


class Zaya(nn.Module):
    """The language model: embedding, L layers, final norm, tied LM head in fp32.  Equals HF ZayaForCausalLM.

    model(input_ids) -> logits (B, S, V) fp32; `hidden_states` explains the other arguments.  Pasting it needs Layer and
    what Layer needs, Cache and LayerCache; its checkpoints also need ZayaConfig, read_json and write_json.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.input_hidden_states_scale = nn.Parameter(torch.ones(config.hidden_size))
        self.input_hidden_states_bias = nn.Parameter(torch.zeros(config.hidden_size))
        self.layers = nn.ModuleList(Layer(config, index) for index in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        for name, parameter in self.named_parameters():         # as HF; norms, scales and temperatures are born right
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=config.initializer_range)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, input_ids, attention_mask=None, position_ids=None, cache=None):
        return self.logits(self.hidden_states(input_ids, attention_mask, position_ids, cache))

    @property
    def output_weight(self):
        """The LM head's (V, E)."""
        return self.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def logits(self, hidden):
        """LM head in fp32, whatever the weights' dtype and autocast say: (…, E) -> (…, V)."""
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.float(), self.output_weight.float())

    def hidden_states(self, input_ids, attention_mask=None, position_ids=None, cache=None, routing=None):
        """Everything below the LM head: (B, S) int64 -> (B, S, E) in the weights' dtype.

        attention_mask (B, S): 0 for padding before or after a row's tokens; of these tokens, not of those in the cache.
        position_ids (B, S), instead of a mask: restart at 0 to pack samples in a row, -1 for padding.
        cache: continue from it, and advance it.
        routing: a list, filled with each layer's choice (B, S); or, if it already holds L of them, replayed."""
        columns, offset = (cache.columns, cache.position) if cache is not None else (0, None)
        if position_ids is None and (attention_mask is not None or offset is not None):
            real = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
            if offset is None:
                offset = real.new_full((len(real),), columns)
            position_ids = (offset[:, None] + real.cumsum(1) - 1).masked_fill(real == 0, -1)
        if position_ids is not None and cache is not None:
            cache.position = position_ids[:, -1] + 1

        positions = {}                                          # made once for all layers of a type
        for kind in set(self.config.layer_types):
            rope = self.config.rope_parameters[kind]
            rotated = int(self.config.head_dim * rope["partial_rotary_factor"])
            window = self.config.sliding_window if kind == "hybrid_sliding" else None
            positions[kind] = CCA.positions(input_ids, position_ids, rope["rope_theta"], rotated, window, columns)

        x = self.embed_tokens(input_ids)
        x = (x.float() + self.input_hidden_states_bias) * self.input_hidden_states_scale
        count = None if position_ids is None else position_ids >= 0                 # padding is no expert's load
        r, nothing = None, [None] * len(self.layers)
        caches = cache.layers if cache is not None else nothing
        replayed = list(routing) if routing else nothing
        for layer, kind, layer_cache, given in zip(self.layers, self.config.layer_types, caches, replayed):
            x, r, choice = layer(x, r, positions[kind], layer_cache, given, count)
            if routing is not None and given is None:
                routing.append(choice)
        return self.norm(x)

    @torch.no_grad()
    def generate(self, input_ids, max_new_tokens=64, temperature=1.0, top_p=1.0, attention_mask=None, generator=None,
                 eos_token_id=None, uniform=None, record=False):
        """Sample on from each row: (B, S) int64 -> (B, S + new).

        temperature 0 is greedy.  `eos_token_id`, an id or several, ends a row, which pad_token_id then fills up (None:
        the first of these, as HF).  attention_mask (B, S): 0 for left padding.  `generator` draws the random numbers,
        or `uniform` (max_new_tokens, B) in [0, 1) brings them; a row depends on its own alone.
        record: -> (tokens, logps, choices) for RL: each new token's log probability at temperature 1 (B, new) fp32,
        and the expert of each token that was read (L, B, S + new - 1) int16, up to a row's end."""
        B, S = input_ids.shape
        device, pad = input_ids.device, self.config.pad_token_id
        if not 0 <= temperature < math.inf or not 0 < top_p <= 1 or S == 0:
            raise ValueError("generate needs a finite temperature >= 0, 0 < top_p <= 1 and a token of prompt or more")
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
        if not (mask[:, -1].all() and (mask.diff(dim=1) >= 0).all()):
            raise ValueError("generate needs all padding on the left: attention_mask must be 0 … 0 1 … 1 in each row")
        eos = torch.tensor([] if eos_token_id is None else eos_token_id, device=device, dtype=torch.long).flatten()
        if pad is None:                                         # as HF: nobody reads what follows a row's end
            pad = eos[0].item() if len(eos) else 0
        if uniform is None:
            where = generator.device if generator else device
            uniform = torch.rand(max_new_tokens, B, generator=generator, device=where)
        uniform = uniform.to(device)

        tokens = F.pad(input_ids, (0, max_new_tokens), value=pad)                   # (B, S + new)
        logps = torch.zeros(B, max_new_tokens, device=device)
        choices = torch.zeros(len(self.layers), B, S + max_new_tokens, dtype=torch.int16, device=device)
        hidden, cache, choices[:, :, :S] = self.prefill(input_ids, mask)
        # The rows that are still in the batch, and which of these have ended: they are computed, but not kept.
        rows = torch.arange(B, device=device)
        ended = torch.zeros(B, dtype=torch.bool, device=device)
        end = S
        for step in range(max_new_tokens):
            if step:
                routing = []
                hidden = self.hidden_states(tokens[rows, end - 1, None], cache=cache, routing=routing)[:, -1]
                choices[:, rows, end - 1] = torch.stack(routing)[:, :, 0].short()
            logits = self.logits(hidden)
            token = self.sample(logits, temperature, top_p, uniform[step, rows]).masked_fill(ended, pad)
            tokens[rows, end] = token
            if record:
                logps[rows, step] = logits.log_softmax(-1).gather(1, token[:, None])[:, 0]
            end += 1
            ended |= torch.isin(token, eos)
            # Leaving the batch costs a copy of the cache: worth it for an eighth of the rows.
            if len(eos) and ended.sum() >= len(ended) / 8:
                going = (~ended).nonzero()[:, 0]
                rows, ended = rows[going], ended[going]
                if len(rows) == 0:
                    break
                cache.select(going)
        if record:
            return tokens[:, :end], logps[:, :end - S], choices[:, :, :end - 1]
        return tokens[:, :end]

    def new_cache(self):
        """An empty decode state for `generate`; a subclass may keep its own."""
        return Cache(len(self.layers))

    def prefill(self, input_ids, mask):
        """Read prompts and masks (B, S), some columns at a time -> the last hidden states (B, E), the new cache, and
        the experts taken (L, B, S) int16."""
        # Equal rows are read once: N candidates for one prompt cost the prompt of one.
        unique, copies = torch.cat([input_ids, mask], 1).unique(dim=0, return_inverse=True)
        shared = len(unique) < len(input_ids)
        if shared:
            input_ids, mask = unique.chunk(2, 1)
        cache, choices = self.new_cache(), []
        padded = not mask.all()
        # What a piece needs should stay in a CPU's caches, and fill a GPU.
        chunk = max(1, 2**(12 if input_ids.device.type == "cpu" else 18) // len(input_ids))
        for ids, real in zip(input_ids.split(chunk, 1), mask.split(chunk, 1)):
            routing = []
            hidden = self.hidden_states(ids, real if padded else None, cache=cache, routing=routing)[:, -1]
            choices.append(torch.stack(routing).short())
        choices = torch.cat(choices, 2)
        if shared:
            cache.select(copies)
            hidden = hidden[copies]
            choices = choices[:, copies]
        return hidden, cache, choices

    @staticmethod
    def sample(logits, temperature, top_p, uniform):
        """One token a row by inverting the CDF: logits (B, V), uniform (B,) in [0, 1) -> (B,) int64."""
        if temperature == 0:
            return logits.argmax(-1)
        probability = (logits / temperature).softmax(-1)
        if top_p < 1:                                           # the smallest set that holds top_p of the mass
            ranked, order = probability.sort(-1, descending=True)
            ranked = ranked * (ranked.cumsum(-1) - ranked < top_p)
            probability = torch.zeros_like(probability).scatter(-1, order, ranked)
        cdf = probability.cumsum(-1)
        return (cdf <= uniform[:, None] * cdf[:, -1:]).sum(-1).clamp_max(logits.shape[-1] - 1)

    def parameter_counts(self):
        """{"total", "active"}; active: parameters that one token passes through, without the embedding."""
        total = active = 0
        for name, parameter in self.named_parameters():
            size = parameter.numel()
            total += size
            if ".experts." in name:
                active += size // self.config.num_experts
            elif name not in ("embed_tokens.weight", "lm_head.weight"):
                active += size
        return {"total": total, "active": active}

    # ---- the official checkpoint layout -----------------------------------------------------------------------------

    @staticmethod
    def official_name(name):
        """Our parameter name -> HF's.  HF nests the projections, the key temperature, the MoE and the router's MLP."""
        name = re.sub(r"\.self_attn\.(?=\w_proj_|[qk]_proj|conv)", ".self_attn.qkv_proj.", name)
        name = name.replace(".self_attn.temp", ".self_attn.qk_norm.temp")
        name = re.sub(r"\.gate\.(?=norm|fc|out_proj)", ".gate.router_mlp.", name)
        name = re.sub(r"\.(gate|experts)\.", r".mlp.\1.", name)
        return name if name.startswith("lm_head.") else "model." + name

    @property
    def stored_dtype(self):
        """What config.json says of the weights."""
        return str(self.embed_tokens.weight.dtype).removeprefix("torch.")

    def save_pretrained(self, directory, state_dict=None):
        """Write what HF's ZayaForCausalLM.from_pretrained loads, each file under a temporary name, then renamed.

        state_dict: instead of the model's own, such as the whole tensors of a sharded model."""
        from safetensors.torch import save_file
        os.makedirs(directory, exist_ok=True)
        state = self.state_dict() if state_dict is None else state_dict
        state = {self.official_name(name): tensor.contiguous() for name, tensor in state.items()}
        path = f"{directory}/model.safetensors"
        save_file(state, path + ".tmp", metadata={"format": "pt"})
        os.replace(path + ".tmp", path)
        config = self.config.to_dict()
        config["dtype"] = self.stored_dtype
        write_json(f"{directory}/config.json", config)
        # Without this file HF's generate and its server would be greedy, whatever temperature they are asked for.
        generation = {name: config[name] for name in ("eos_token_id", "pad_token_id")}
        write_json(f"{directory}/generation_config.json", {"do_sample": True, "top_k": 0, **generation})

    # What a legacy checkpoint calls the parts of a layer: in its attention sublayer, and in its MoE sublayer.
    LEGACY = ({"input_norm": "input_layernorm", "qkv.linear_q": "q_proj", "qkv.linear_k": "k_proj",
               "qkv.val_proj1": "v_proj_current", "qkv.val_proj2": "v_proj_delayed", "qkv.temp": "temp",
               "qkv.conv_qk.0": "conv_qk_depthwise", "qkv.conv_qk.1": "conv_qk_grouped"},
              {"input_norm": "post_attention_layernorm", "zaya_block.router": "gate", "rmsnorm_eda": "norm",
               "router_mlp.0": "fc1", "router_mlp.2": "fc2", "router_mlp.4": "out_proj",
               "zaya_block.experts": "experts"})

    @classmethod
    def legacy_name(cls, name, layers):
        """A legacy checkpoint's parameter name -> ours.  Its sublayers 2i and 2i + 1 are layer i's attention and MoE.

        It merges a sublayer's output before the next sublayer's norm, we behind the sublayer: scales stand half a layer
        earlier here, and those of sublayer 0 are the embedding's."""
        name = name.removeprefix("model.")
        place, is_scale, part = name.rpartition("res_scale.")
        if is_scale:
            sublayer = int(place.split(".")[1]) if place else 2 * layers
            kind = "post_mlp" if sublayer % 2 == 0 else "post_attention"
            return f"layers.{(sublayer - 1) // 2}.{kind}_residual_scale.{part}" if sublayer else f"input_{part}"
        if not name.startswith("layers."):
            return name.replace("final_norm", "norm")
        _, sublayer, part = name.split(".", 2)
        for theirs, ours in cls.LEGACY[int(sublayer) % 2].items():
            part = part.replace(theirs, ours)
        return f"layers.{int(sublayer) // 2}.{part}"

    @classmethod
    def from_legacy(cls, tensors, config):
        """A legacy checkpoint's tensors by name -> ours, its experts stacked."""
        state, experts = {}, {}
        for legacy in list(tensors):
            name, tensor = cls.legacy_name(legacy, config.num_hidden_layers), tensors.pop(legacy)
            one = re.fullmatch(r"(.*experts)\.local_experts\.(\d+)\.linear_fc([12])\.weight", name)
            if one:
                stack = f"{one[1]}.{'gate_up_proj' if one[3] == '1' else 'down_proj'}"
                experts.setdefault(stack, {})[int(one[2])] = tensor
            else:
                state[name] = tensor
        for name, stack in experts.items():
            state[name] = torch.stack([stack[number] for number in sorted(stack)])
        # A token that the skip expert wins passes there, times its probability; here it adds nothing.  It never wins
        # where some expert's bias is larger by 1, as probabilities are at most 1.
        biases = [tensor for name, tensor in state.items() if name.endswith("balancing_biases")]
        if any(bias[:-1].max() < bias[-1] + 1 for bias in biases):
            import warnings
            warnings.warn("the skip expert of this legacy checkpoint may be chosen: there logits differ", stacklevel=3)
        return state

    @classmethod
    def from_pretrained(cls, directory, dtype=None, device="cpu"):
        """Read config.json and *.safetensors, in the official layout or the legacy one of alternating sublayers.

        `dtype` converts the weights one by one.  They stay memory-mapped until they are written to or moved.  Raises
        FileNotFoundError or ValueError naming the file or tensor.  We differ from HF 5.23, which puts the skip expert's
        balancing bias back to -1 at every load.
        """
        path = f"{directory}/config.json"
        values = read_json(path)
        legacy, tensors, source = "zaya_layers" in values or "cca" in values, {}, {}
        for file, name, tensor in cls.stored_tensors(directory):
            if name in source:
                raise ValueError(f"{directory}: tensor {name!r} is in both {source[name]} and {file}: "
                                 "move one of the files away")
            source[name], tensors[name] = file, tensor
        try:
            if legacy:
                queries = tensors.get("model.layers.0.self_attn.qkv.linear_q.weight", torch.empty(0))
                config = ZayaConfig.from_legacy(values, len(queries))
            else:
                config = ZayaConfig.from_dict(values)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: {error}") from None
        with torch.device("meta"):
            model = cls(config)
        if config.tie_word_embeddings:
            tensors.pop("lm_head.weight", None)                 # some files hold a copy of the tied LM head
        if legacy:
            state = cls.from_legacy(tensors, config)
        else:
            names = {cls.official_name(name): name for name in model.state_dict()}
            state = {names.get(name, name): tensor for name, tensor in tensors.items()}
        for name, tensor in state.items():
            # The balancing biases are added to fp32 probabilities and updated in small steps: never rounded.
            state[name] = tensor.to(device, torch.float32 if name.endswith("balancing_biases") else dtype)
        try:
            model.load_state_dict(state, assign=True)
        except RuntimeError as error:                           # it names what is missing, too much or of another shape
            raise ValueError(f"{directory}: {' '.join(str(error).split())[:500]}") from None
        for layer in model.layers:                              # not in the file: born on the meta device
            layer.gate.load = torch.zeros_like(layer.gate.balancing_biases, dtype=torch.long)
        return model.eval()

    @staticmethod
    def stored_tensors(directory):
        """Yield (file name, official tensor name, tensor) of a folder's weights: of model.safetensors, if it is there;
        else as the index says, tensor by tensor; else of all files."""
        from safetensors import SafetensorError, safe_open
        index, places = f"{directory}/model.safetensors.index.json", {}
        files = sorted(name for name in os.listdir(directory) if name.endswith(".safetensors"))
        if "model.safetensors" in files:
            files = ["model.safetensors"]
        elif os.path.exists(index):
            places = read_json(index).get("weight_map")
            if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
                raise ValueError(f"{index} is damaged: weight_map must name a file for each tensor")
            files = sorted(set(places.values()))
        if not files:
            raise FileNotFoundError(f"{directory!r} has a config.json but no *.safetensors")
        for file in files:
            path = f"{directory}/{file}"
            try:
                with safe_open(path, "pt") as opened:
                    for name in opened.keys() if not places else [name for name in places if places[name] == file]:
                        yield file, name, opened.get_tensor(name)
            except SafetensorError as error:                    # also for a tensor that only the index knows
                raise ValueError(f"{path} is damaged: {error}") from None


class Tokenizer:
    """Byte-level BPE with tiktoken inside; digits are single tokens, and any text round-trips.

    encode(str) -> list[int];  decode(list[int]) -> str;  decode_bytes -> bytes.  Only `render`, which lays out a chat,
    makes special tokens: <|user|>…<|end|><|assistant|><think>…</think>…<|end|>.  Saved as HF's AutoTokenizer reads it;
    for that it needs read_json and write_json pasted with it.
    """
    PATTERN = r"\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    SPECIAL = ["<|pad|>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<think>", "</think>"]
    CHAT_TEMPLATE = ("{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
                     "{% if add_generation_prompt %}<|assistant|>{% endif %}")

    def __init__(self, merges=()):
        """merges: pairs (bytes, bytes) of tokens that become one, the first ones first; without any, a byte a token."""
        import tiktoken
        self.merges = merges
        self.ranks = {bytes([i]): i for i in range(256)}
        for a, b in merges:
            self.ranks.setdefault(a + b, len(self.ranks))
        self.special = {token: len(self.ranks) + i for i, token in enumerate(self.SPECIAL)}
        self.encoding = tiktoken.Encoding("zaya", pat_str=self.PATTERN, mergeable_ranks=self.ranks,
                                          special_tokens=self.special)
        self.vocab_size = len(self.ranks) + len(self.SPECIAL)
        self.pad = self.special["<|pad|>"]
        self.end_of_text = self.special["<|endoftext|>"]
        self.end = self.special["<|end|>"]

    @classmethod
    def train(cls, text, vocab_size=512, progress=iter):
        """Learn `vocab_size` tokens (256 bytes, merges, specials) from a text; the same text gives the same tokens."""
        from collections import Counter, defaultdict
        import regex                                            # comes with tiktoken
        least = 256 + len(cls.SPECIAL)
        if vocab_size < least:
            raise ValueError(f"vocab_size {vocab_size} is below the {least} bytes and special tokens")
        words, counts, pairs, where = [], [], Counter(), defaultdict(set)

        def count(index, times):                                # add or take away the pairs of a word
            for pair in zip(words[index], words[index][1:]):
                pairs[pair] += times * counts[index]
                where[pair].add(index)

        for word, times in Counter(regex.findall(cls.PATTERN, text)).items():
            words.append([bytes([byte]) for byte in word.encode("utf-8", "replace")])
            counts.append(times)
            count(len(words) - 1, 1)
        merges = []
        for _ in progress(range(vocab_size - least)):
            best = max(pairs, key=lambda pair: (pairs[pair], pair), default=None)
            if best is None or pairs[best] <= 0:
                raise ValueError(f"the text has too few different words for {vocab_size} tokens: it gave "
                                 f"{least + len(merges)}; use a smaller vocab_size or more text")
            merges.append(best)
            for index in sorted(where[best]):
                count(index, -1)
                word, i = words[index], 0
                while i + 1 < len(word):
                    if (word[i], word[i + 1]) == best:
                        word[i:i + 2] = [word[i] + word[i + 1]]
                    i += 1
                count(index, 1)
            del pairs[best], where[best]
        return cls(merges)

    def encode(self, text):
        return self.encoding.encode_ordinary(text)

    def decode_bytes(self, ids):
        return self.encoding.decode_bytes(list(ids))

    def decode(self, ids):
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def render(self, messages, generation_prompt=False):
        """[{"role", "content"}, …] -> ids, targets: the chat as tokens, and for each whether the assistant wrote it and
        the message has no "weight": 0.  `generation_prompt`: the assistant is to speak next."""
        ids, targets = [], []
        for message in messages:
            role, content = message["role"], message["content"]
            if role not in ("system", "user", "assistant"):
                raise ValueError(f"role {role!r} is not one of system, user, assistant")
            # Nobody else can open or close the assistant's reasoning.
            tags = {"<think>", "</think>"} if role == "assistant" else set()
            body = self.encoding.encode(content, allowed_special=tags, disallowed_special=())
            learned = role == "assistant" and message.get("weight", 1) != 0
            ids += [self.special[f"<|{role}|>"], *body, self.end]
            targets += [False] + [learned] * (len(body) + 1)
        if generation_prompt:
            ids.append(self.special["<|assistant|>"])
            targets.append(False)
        return ids, targets

    @staticmethod
    def _visible():
        """GPT-2's one printable character per byte, in which tokenizer.json spells tokens."""
        plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [byte for byte in range(256) if byte not in plain]
        visible = {byte: chr(byte) for byte in plain}
        for i, byte in enumerate(others):
            visible[byte] = chr(256 + i)
        return visible

    def save_pretrained(self, directory):
        """Write tokenizer.json and tokenizer_config.json (with the chat template), each by rename."""
        visible = self._visible()

        def spell(token):
            return "".join(visible[byte] for byte in token)

        split = {"type": "Split", "pattern": {"Regex": self.PATTERN}, "behavior": "Isolated", "invert": False}
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        # The tags are no control tokens: a server that leaves those out of its replies must keep the tags.
        added = [dict(id=i, content=token, single_word=False, lstrip=False, rstrip=False, normalized=False,
                      special="think" not in token) for token, i in self.special.items()]
        os.makedirs(directory, exist_ok=True)
        write_json(f"{directory}/tokenizer.json", {
            "version": "1.0", "added_tokens": added, "decoder": level,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
            "model": {"type": "BPE", "vocab": {spell(token): rank for token, rank in self.ranks.items()},
                      "merges": [[spell(a), spell(b)] for a, b in self.merges]}})
        write_json(f"{directory}/tokenizer_config.json", {
            "tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<|pad|>", "bos_token": "<|endoftext|>",
            "eos_token": "<|end|>", "chat_template": self.CHAT_TEMPLATE, "clean_up_tokenization_spaces": False})

    @classmethod
    def from_pretrained(cls, directory):
        """Read a tokenizer.json that `save_pretrained` wrote."""
        path = f"{directory}/tokenizer.json"
        content, byte_of = read_json(path), {character: byte for byte, character in cls._visible().items()}
        try:
            merges = []
            for pair in content["model"]["merges"]:
                merges.append(tuple(bytes(byte_of[character] for character in token) for token in pair))
            tokenizer = cls(merges)
            pattern = content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
            special = {added["content"]: added["id"] for added in content["added_tokens"]}
            if (pattern, special) != (cls.PATTERN, tokenizer.special):
                raise ValueError("another pattern or other special tokens")
        except (KeyError, TypeError, IndexError, ValueError) as error:
            raise ValueError(f"{path} is damaged or no tokenizer of this project, which is byte-level BPE with the "
                             f"special tokens {' '.join(cls.SPECIAL)} ({type(error).__name__}: {error})") from None
        return tokenizer
