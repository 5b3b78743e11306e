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

Featuring: the whole architecture, cached and left-padded generation, the official checkpoint layout, the balancer that
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


def write_json(path, content, indent=2):
    """Write under a temporary name, then rename: nobody ever reads half a file."""
    with open(f"{path}.tmp", "w", encoding="utf-8") as file:
        json.dump(content, file, indent=indent, ensure_ascii=False)
    os.replace(f"{path}.tmp", path)


@dataclass
class ZayaConfig:
    """The model's shape; every field has the name of the official config (HF ZayaConfig) except `skip_expert`.

    TR table I.  Sizes are in channels, positions in tokens.  `rope_parameters` maps a layer type ("hybrid", or
    "hybrid_sliding" with `sliding_window`) to its `rope_theta` and `partial_rotary_factor`.  Raises ValueError, naming
    the field, for values of a wrong type and shapes that cannot work.  We differ: `skip_expert=False` removes the
    router's extra class, and then HF cannot load the checkpoint.
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
    skip_expert: bool = True                # one more router class, whose tokens get nothing from the MoE block
    max_position_embeddings: int = 131072
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 2
    eos_token_id: int | list | None = 106

    # What HF writes too and no published ZAYA varies.  A file that does is refused rather than computed wrongly.
    # cca_time0 and cca_time1 are the taps of CCA's convolutions.
    FIXED = dict(model_type="zaya", hidden_act="silu", num_experts_per_tok=1, attention_bias=False, lm_head_bias=False,
                 attention_dropout=0.0, cca_time0=2, cca_time1=2)
    # What a config.json says about the file, HF's outputs and its generate.  It changes no logit, as no name does that
    # begins with _ or ends with _token_id.  Any other unknown field may change one: refused.
    DESCRIPTIVE = """
        architectures auto_map dtype torch_dtype transformers_version unsloth_version unsloth_fixed name_or_path
        id2label label2id num_labels problem_type use_cache return_dict output_attentions output_hidden_states
        output_router_logits chunk_size_feed_forward is_decoder is_encoder_decoder tie_encoder_decoder
        do_sample temperature top_k top_p max_length min_length repetition_penalty""".split()

    def __post_init__(self):
        self._check_types()
        self.layer_types = list(self.layer_types or ["hybrid"] * self.num_hidden_layers)
        self._check_shape()
        self._complete_rope()

    def _check_types(self):
        def whole(value, least=1):
            return type(value) is int and value >= least

        def token(value):
            return value is None or whole(value, 0)

        for names, works, wanted in (
            ("vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim num_experts "
             "moe_intermediate_size router_hidden_size max_position_embeddings", whole, "a positive integer"),
            ("rms_norm_eps initializer_range", self._positive, "a positive number"),
            ("tie_word_embeddings skip_expert", lambda value: type(value) is bool, "true or false"),
            ("sliding_window", lambda value: value is None or whole(value), "null or a positive number of tokens"),
            ("layer_types", lambda value: value is None or type(value) in (list, tuple), "a list of layer types"),
            ("pad_token_id bos_token_id", token, "null or a token's number"),
            ("eos_token_id", lambda value: token(value) or type(value) is list and all(whole(i, 0) for i in value),
             "null, a token's number or a list of them"),
        ):
            for name in names.split():
                value = getattr(self, name)
                self._require(works(value), f"{name} must be {wanted}, not {value!r}")

    def _check_shape(self):
        H, K, D, L = self.num_attention_heads, self.num_key_value_heads, self.head_dim, self.num_hidden_layers
        kinds = self.layer_types
        unknown = [kind for kind in kinds if kind not in ("hybrid", "hybrid_sliding")]
        for works, problem in (
            (H % K == 0, f"num_attention_heads ({H}) must be a multiple of num_key_value_heads ({K})"),
            (K * D % 2 == 0, f"num_key_value_heads * head_dim ({K} * {D}) must be even: half of the value channels "
             "come from the previous token"),
            (len(kinds) == L, f"layer_types names {len(kinds)} layers, num_hidden_layers {L}"),
            (not unknown, f"layer_types knows 'hybrid' and 'hybrid_sliding', not {unknown[:1]}"),
            ("hybrid_sliding" not in kinds or self.sliding_window,
             "layer_types has 'hybrid_sliding' layers: set sliding_window to the number of tokens they see"),
        ):
            self._require(works, problem)

    def _complete_rope(self):
        """Fill `rope_parameters` up with the published values, and refuse every RoPE but the default one."""
        given, thetas = self.rope_parameters or {}, {"hybrid": 5e6, "hybrid_sliding": 1e4}
        self._require(type(given) is dict and (not given or thetas.keys() & given.keys()),
                      f"rope_parameters must have a dict per layer type ('hybrid', 'hybrid_sliding'), not {given}")
        # The file on the hub has a "rope_type" beside the layer types, which HF ignores.
        others = [item for item in given.items() if item[0] not in thetas]
        self.rope_parameters = {}
        for kind, theta in thetas.items():
            own, where = given.get(kind) or {}, f"rope_parameters[{kind!r}]"
            self._require(type(own) is dict, f"{where} must be a dict, not {own!r}")
            rope = {"rope_type": "default", "partial_rotary_factor": 0.5, "rope_theta": theta}
            rope.update((name, value) for name, value in own.items() if value is not None)
            self.rope_parameters[kind] = rope
            if kind in self.layer_types:
                others += [item for item in rope.items() if item[0] not in ("partial_rotary_factor", "rope_theta")]
                theta, share = rope["rope_theta"], rope["partial_rotary_factor"]
                self._require(self._positive(theta), f"{where}: rope_theta must be a positive number, not {theta!r}")
                self._require(type(share) in (int, float) and 0 <= share <= 1 and self.head_dim * share % 2 == 0,
                              f"{where}: partial_rotary_factor {share!r} must make head_dim ({self.head_dim}) times it "
                              "an even number of rotated channels")
        for name, value in others:
            self._require(value is None or (name, value) == ("rope_type", "default"),
                          f"rope_parameters: {name} {value!r} is not implemented, only the rope_type 'default'")

    @staticmethod
    def _positive(value):
        return type(value) in (int, float) and 0 < value < math.inf

    @staticmethod
    def _require(condition, message):
        if not condition:
            raise ValueError(f"ZayaConfig: {message}")

    @property
    def router_classes(self):
        return self.num_experts + self.skip_expert

    @classmethod
    def preset(cls, name, **changes):
        """smoke: seconds.  tiny: minutes on two CPU cores.  small: one GPU.  zaya1-8b: the published shape.

        `small` keeps the published ratios: queries E/2 wide, keys and values E/8, router E/8.  `tiny` is too narrow for
        them: with keys of E/8 = 16 channels it hardly learned to copy, with 32 it did.
        """
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
        """Read an official config.json.  ValueError for a field that may change the numbers and is not implemented:
        one that is neither ours nor descriptive, unless it is null or empty."""
        ours = {}
        for name, value in values.items():
            if name in cls.__dataclass_fields__:
                ours[name] = value
            elif not (name in cls.DESCRIPTIVE or name.startswith("_") or name.endswith("_token_id")):
                only = cls.FIXED.get(name)
                cls._require(value in (None, {}, [], only), f"{name} {value!r} is not implemented, only {only!r}; set "
                             "it to null if the model computes the same without it")
        rope = ours.get("rope_parameters")
        if type(rope) is dict:                                  # HF rotates all channels where a file names no share
            ours["rope_parameters"] = {kind: {"partial_rotary_factor": 1.0, **own} if type(own) is dict else own
                                       for kind, own in rope.items()}
        return cls(**ours)

    def to_dict(self):
        values = {"architectures": ["ZayaForCausalLM"], "dtype": "float32", "use_cache": True,
                  "output_router_logits": False, **self.FIXED, **asdict(self)}
        if self.skip_expert:                                    # HF has no such field, and always that expert
            del values["skip_expert"]
        return values


class RMSNorm(nn.Module):
    """Root-mean-square norm, computed in fp32: y = w * x / sqrt(mean(x^2) + eps).

    (…, size) any float -> (…, size) in the weight's dtype, which is what the next matrix product wants.
    Equals HF ZayaRMSNorm; in bf16 we differ by rounding once, at the end, and by reading an fp32 residual stream.
    """

    def __init__(self, size, eps=1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        x = x.float()
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return (self.weight.float() * x).to(self.weight.dtype)


class CCA(nn.Module):
    """Compressed convolutional attention: attention whose queries, keys and values live in a narrow, convolved space.

        q~, k~ = Wq x, Wk x                                     compress: E -> H*D and E -> K*D
        [q; k] = conv_in_head(conv_per_channel([q~; k~])) + [m_q; m_k]
        m_q    = (q~ + k~ of its group) / 2,  m_k = mean of m_q over the group          (q-k-mean)
        v_t    = [Wv1 x_t ; Wv2 x_(t-1)]                                                (value shift)
        q, k  <- sqrt(D) q / |q|,  temp_k sqrt(D) k / |k|,  then RoPE on their first channels
        out    = Wo softmax(q k^T / sqrt(D)) v

    TR section II, CCA sections 3-4.  x (B, S, E) -> (B, S, E).  `positions` says where the tokens stand, and thereby
    what they may see: position ids (B, S) int64, 0 where a sample begins and -1 for padding; None where each row is
    one sample; or the `Positions` that `CCA.positions` makes of either, once for all layers of a model.
    `cache`: a LayerCache, read and advanced.  `rope_parameters`: {"rope_theta", "partial_rotary_factor"}.
    ValueError for ids of another shape.  Equals HF ZayaAttention (ZayaCCAProjection and ZayaQKNorm within).
    We differ: one code path for packed, padded and cached rows (HF cannot pack), convolutions of two taps only, written
    as a sum, fp32 from q-k-mean to RoPE in any dtype, temperature initialised to 1 (HF's 0 would make every key zero).
    """

    class Positions:
        """Where the tokens of one call stand, and what follows from it: position_ids (B, S) int64, or None for rows of
        one sample each; cos, sin (B or 1, S, R/2) fp32; mask (B, 1, S, T) bool, None for causal attention."""

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
        positions = self.locate(x, positions, cache)
        packed = torch.cat([self.q_proj(x), self.k_proj(x)], -1)                    # (B, S, C)
        current, delayed = self.v_proj_current(x), self.v_proj_delayed(x)           # (B, S, K*D/2) each
        q, k, v = self.mix(packed, current, delayed, positions, cache)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)           # (B, H or K, S, D)
        if cache is not None:
            k, v = cache.append(k, v, self.sliding_window)                          # (B, K, T, D)
        return self.o_proj(self.attend(q, k, v, positions, cache))

    def mix(self, packed, current, delayed, positions, cache):
        """From the projections to what attention compares: rotated q (B, S, H, D), k and v (B, S, K, D)."""
        S, ids = packed.shape[1], positions.position_ids
        # What came before the new tokens: two packed latents and one delayed value, zeros where a row begins.
        seen, shifted = F.pad(packed, (0, 0, 2, 0)), F.pad(delayed, (0, 0, 1, 0))   # (B, 2 + S, C), (B, 1 + S, K*D/2)
        if cache is not None:
            if cache.packed is not None:
                seen[:, :2], shifted[:, :1] = cache.packed, cache.delayed
            cache.packed, cache.delayed = seen[:, S:].float(), shifted[:, S:].float()
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

    def locate(self, x, positions=None, cache=None):
        """`positions` in any form that `forward` takes -> Positions."""
        if positions is not None and not isinstance(positions, torch.Tensor):
            return positions
        if positions is not None and positions.shape != x.shape[:2]:
            raise ValueError(f"CCA: position ids must have the shape (B, S) of x, {tuple(x.shape[:2])}, not "
                             f"{tuple(positions.shape)}")
        if cache is not None:
            if positions is None and not cache.plain:
                raise ValueError("CCA: the tokens in this cache came with position ids, so the next ones need theirs")
            cache.plain = positions is None
        rotated = int(self.head_dim * self.rope_parameters["partial_rotary_factor"])
        return self.positions(x, positions, self.rope_parameters["rope_theta"], rotated, self.sliding_window,
                              cache.columns if cache is not None else 0)

    @classmethod
    def positions(cls, x, position_ids, rope_theta, rotated, sliding_window=None, columns=0):
        """The Positions of x (B, S, …), whose tokens follow `columns` cached ones in each row.

        position_ids (B, S), or None for tokens `columns` … `columns` + S - 1 of one sample a row; rotated: channels.
        """
        B, S = x.shape[:2]
        plain = position_ids is None
        position = torch.arange(columns, columns + S, device=x.device)[None] if plain else position_ids
        cos, sin = cls.rope_table(position, rope_theta, rotated)
        keys = (min(columns, sliding_window - 1) if sliding_window else columns) + S
        # No mask: S queries on S keys are causal by themselves, and one query sees every key there is.
        masked = not plain or (S > 1 and columns) or (sliding_window and keys > sliding_window)
        mask = cls.attention_mask(position.expand(B, S), keys, sliding_window) if masked else None
        return cls.Positions(position_ids, cos, sin, mask)

    def qk_mean(self, packed):
        """(B, S, C) latents before the convolutions -> m_q (B, S, H, D), m_k (B, S, K, D)."""
        q, k = packed.unflatten(-1, (-1, self.head_dim)).split([self.heads, self.kv_heads], 2)
        q_mean = (q.unflatten(2, (self.kv_heads, -1)) + k.unsqueeze(3)) / 2                # (B, S, K, H/K, D)
        return q_mean.flatten(2, 3), q_mean.mean(3)

    def convolve(self, seen, position_ids=None):
        """Both causal convolutions on `seen` (B, 2 + S, C) -> (B, S, H + K, D) for the last S tokens.

        The latents are padded by zeros once, before the first convolution; so what the second one sees before a
        sample's first token is the first one's bias, not zero.
        """
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
        return x * (x.shape[-1] ** 0.5 / x.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(x.dtype).eps))

    @staticmethod
    def rope_table(position_ids, theta, rotated):
        """(B, S) positions -> cos, sin (B, S, rotated / 2) fp32; channel i turns by p / theta^(2i / rotated)."""
        frequency = theta ** (-torch.arange(0, rotated, 2, device=position_ids.device, dtype=torch.float32) / rotated)
        angle = position_ids[..., None].float() * frequency
        return angle.cos(), angle.sin()

    @staticmethod
    def apply_rotary(x, cos, sin):
        """RoPE on the first 2 * cos.shape[-1] channels of x (B, S, heads, D), channel i paired with i + half."""
        half = cos.shape[-1]
        a, b, rest = x.tensor_split((half, 2 * half), -1)
        cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)

    @staticmethod
    def attention_mask(position_ids, T, sliding_window=None):
        """(B, S) position ids of the newest S of T columns -> (B, 1, S, T) bool, True where a query sees a key.

        Padding (position -1) sees itself: nobody reads the result, and a softmax over nothing would be NaN.
        """
        S = position_ids.shape[1]
        column = torch.arange(T, device=position_ids.device)
        back = column[T - S:, None] - column                                        # (S, T)
        farthest = position_ids.clamp(0, (sliding_window or T) - 1)[..., None]      # (B, S, 1)
        sees = (back >= 0) & (back <= farthest)
        return sees[:, None]


class Router(nn.Module):
    """Top-1 router: a small MLP over a depth-averaged state, with a balancing bias that only affects the choice.

        r_l = W_down x + gamma * r_(l-1)      (EDA: over depth, not time; no gamma in the first layer)
        s   = softmax(W3 gelu(W2 gelu(W1 RMSNorm(r_l))))                 over X experts and the skip expert, in fp32
        e   = argmax(s + b),  weight = s_e                               b: see PIDBalancer

    TR section II.  x (B, S, E), previous (B, S, R) or None -> weight (B, S) fp32, choice (B, S) int64, r (B, S, R).
    `choice` given: keep that expert and recompute only its weight, so that the router still learns (router replay).
    In training mode each call adds its choices to `load`, except where `count` (B, S) bool is False.
    Equals HF ZayaRouter with ZayaRouterMLP; we differ in an fp32 softmax whatever the dtype.
    """

    def __init__(self, hidden_size, router_hidden_size, classes, eda=True, skip_expert=True, eps=1e-5):
        super().__init__()
        self.down_proj = nn.Linear(hidden_size, router_hidden_size)
        if eda:
            self.router_states_scale = nn.Parameter(torch.ones(router_hidden_size))
        self.norm = nn.RMSNorm(router_hidden_size, eps=eps)
        self.fc1 = nn.Linear(router_hidden_size, router_hidden_size)
        self.fc2 = nn.Linear(router_hidden_size, router_hidden_size)
        self.out_proj = nn.Linear(router_hidden_size, classes, bias=False)
        self.skip_expert = skip_expert                          # the last class is the skip expert
        self.register_buffer("balancing_biases", torch.zeros(classes))
        self.register_buffer("load", torch.zeros(classes, dtype=torch.long), persistent=False)     # exact in any dtype
        if skip_expert:
            self.balancing_biases[-1] = -1.0                    # as HF: practically never chosen

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
        if self.training:
            ones = torch.ones_like(choice) if count is None else count.long()
            self.load.scatter_add_(0, choice.flatten(), ones.flatten())
        return scores.gather(-1, choice[..., None]).squeeze(-1), choice, r


class PIDBalancer:
    """Keeps the experts evenly loaded by training the routers' biases, without an auxiliary loss.

        error_e = p_e - 1 / classes          p_e: share of the global batch's tokens that chose e
        b      <- AdamW(b, gradient = error)

    TR section II.  As a controller: the bias accumulates (integrates) the error through AdamW's steps.  Momentum acts
    as a smoothed proportional term, and the second moment sets the gain.

    Contract: `model` is any module; a router in it is a module with the buffers `balancing_biases` (classes,), which
    it adds to its scores before the choice, and `load` (classes,) int64, to which it adds one per real token that chose
    the class while `training` (see the last lines of Router.forward); `skip_expert` says whether the last class is one.
    Make the balancer after loading weights.  Call `step()` once per optimizer step: counts of micro-batches, and of
    processes if torch.distributed runs, add up until then.  The biases are kept in fp32, whatever the model's dtype.
    lr and betas are unpublished; these are AMD Primus'.  ZAYA1-8B ships with its skip expert's bias still at -1, never
    chosen, so by default it stays there; `balance_skip=True` gives it its share.  No official class: HF only runs the
    trained biases.
    """

    def __init__(self, model, lr=1e-3, betas=(0.9, 0.999), balance_skip=False):
        self.routers = [module for module in model.modules() if hasattr(module, "balancing_biases")]
        skip = any(router.skip_expert for router in self.routers) and not balance_skip
        self.biases = nn.Parameter(torch.stack([router.balancing_biases.float() for router in self.routers]))
        self.classes = self.biases.shape[1] - skip
        self.optimizer = torch.optim.AdamW([self.biases], lr=lr, betas=betas, weight_decay=0.0)

    @torch.no_grad()
    def step(self):
        """Update the biases from the counts and clear them.  Returns what to log: {"load": worst expert's load over
        the mean, "entropy": H(p) / ln(classes) averaged over layers, "bias": largest |bias|, "skip": skipped share}.
        RuntimeError if nothing was counted.
        """
        load = torch.stack([router.load for router in self.routers])                # (L, router classes) int64
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(load)
        if load.sum() == 0:
            raise RuntimeError("PIDBalancer.step: no router counted anything; call model.train() before the forward")
        balanced = load[:, :self.classes]
        share = balanced / balanced.sum(1, keepdim=True).clamp_min(1)
        self.biases.grad = F.pad(share - 1 / self.classes, (0, load.shape[1] - self.classes))
        self.optimizer.step()
        for router, bias in zip(self.routers, self.biases):
            router.balancing_biases.copy_(bias)
            router.load.zero_()
        entropy = -torch.special.xlogy(share, share).sum(1) / math.log(max(self.classes, 2))
        return {"load": (share.max() * self.classes).item(),
                "entropy": entropy.mean().item(),
                "bias": self.biases[:, :self.classes].abs().max().item(),
                "skip": (1 - balanced.sum() / load.sum()).item()}

    def state_dict(self):
        return self.optimizer.state_dict()

    def load_state_dict(self, state):
        """Take up a saved state; the biases themselves are part of the model's weights."""
        self.optimizer.load_state_dict(state)


class Experts(nn.Module):
    """X SwiGLU networks; each token visits the one it was sent to: y = weight * W_down(silu(g) * u), [g; u] = W_gu x.

    TR section II.  x (N, E), choice (N,) int64, weight (N,) fp32 -> (N, E) in x's dtype.  A choice of X, the skip
    expert, gives 0.  Equals HF ZayaExperts; we differ by sorting the tokens once, so each expert reads one slice.
    """

    def __init__(self, hidden_size, moe_intermediate_size, num_experts):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * moe_intermediate_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, moe_intermediate_size))
        nn.init.normal_(self.gate_up_proj, std=0.02)
        nn.init.normal_(self.down_proj, std=0.02)

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
    """One layer: x <- scaled(x, CCA(norm x)), x <- scaled(x, MoE(norm x)).  Needs CCA, Router, Experts, RMSNorm,
    ResidualScaling pasted with it.

    x (B, S, E) fp32, r (B, S, R) the router state of the layer before, or None -> x, r, choice (B, S) int64.
    The other arguments are CCA's and Router's.  Equals HF ZayaDecoderLayer.
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
        self.gate = Router(E, config.router_hidden_size, config.router_classes, index > 0, config.skip_expert, eps)
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

    k, v: (B, K, T, D), kept in buffers that double when full, so a token costs no copy of the past.
    packed (B, 2, C) and delayed (B, 1, K*D/2), both fp32 and *projected*: caching the raw x instead has the
    same rank and dtype, and is silently wrong.
    """

    def __init__(self):
        self.k = self.v = self.packed = self.delayed = None
        self.start = self.end = 0                               # the live columns of k and v
        self.columns = 0                                        # tokens and padding seen so far, the same in each row
        self.plain = True                                       # whether CCA was given no position ids of them

    def append(self, k, v, sliding_window=None):
        """Add (B, K, S, D) keys and values; return all that the new tokens may see, (B, K, T, D).

        With a window T is at most window - 1 + S: older columns are forgotten.
        """
        S = k.shape[2]
        if sliding_window:
            self.start = max(self.start, self.end - sliding_window + 1)
        if self.k is None or self.end + S > self.k.shape[2]:
            live = self.end - self.start                        # full: twice the room
            room = max(64, 2 * (live + S)) - live
            self.k = self._with_room(self.k, k, room)
            self.v = self._with_room(self.v, v, room)
            self.start, self.end = 0, live
        self.k[:, :, self.end:self.end + S] = k
        self.v[:, :, self.end:self.end + S] = v
        self.end += S
        self.columns += S
        return self.k[:, :, self.start:self.end], self.v[:, :, self.start:self.end]

    def _with_room(self, old, new, room):
        """The live columns of a buffer, and zeros behind them: they may be read, masked, and 0 * NaN is NaN."""
        live = new[:, :, :0] if old is None else old[:, :, self.start:self.end]
        return F.pad(live, (0, 0, 0, room))

    def select(self, rows):
        """Keep these rows (an index tensor; a row may be named several times), in this order."""
        for name in ("k", "v", "packed", "delayed"):
            if getattr(self, name) is not None:
                setattr(self, name, getattr(self, name)[rows])


class Cache:
    """The decode state of a batch: a LayerCache per layer and the position of each row's next token.

    `Cache(config.num_hidden_layers)`, then pass it to every call of the model; it is advanced in place.  Not shared
    between two conversations: make a new one.
    """

    def __init__(self, num_hidden_layers):
        self.layers = [LayerCache() for _ in range(num_hidden_layers)]
        self.position = None                                    # (B,) int64; None: no row has padding

    @property
    def columns(self):
        return self.layers[0].columns

    def select(self, rows):
        """Keep these rows (an index tensor), in this order; a row named twice is continued twice."""
        self.position = self.position[rows] if self.position is not None else None
        for layer in self.layers:
            layer.select(rows)


class Zaya(nn.Module):
    """The language model: embedding, L layers, final norm, tied LM head in fp32.  Equals HF ZayaForCausalLM.

    model(input_ids) -> logits (B, S, V) fp32.  Pasting it needs Layer and what Layer needs, Cache and LayerCache; its
    checkpoints also need ZayaConfig, read_json and write_json.
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
        """input_ids (B, S) int64 -> logits (B, S, V) fp32; the arguments are those of `hidden_states`."""
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

        attention_mask (B, S), 0 for padding, which lies before or after a row's tokens, never between them; of these
        tokens only, not of those in the cache.
        position_ids (B, S), instead of a mask: restart at 0 to pack samples in a row, -1 for padding.
        cache: continue from it, and advance it.
        routing: a list, filled with each layer's choice (B, S); or, if it already holds L of them, replayed.
        """
        columns = cache.columns if cache is not None else 0
        offset = cache.position if cache is not None else None
        if position_ids is None and (attention_mask is not None or offset is not None):
            real = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
            if offset is None:
                offset = real.new_full((len(real),), columns)
            position_ids = (offset[:, None] + real.cumsum(1) - 1).masked_fill(real == 0, -1)
            if cache is not None:
                cache.position = offset + real.sum(1)
        elif position_ids is not None and cache is not None:
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
        r, replay = None, list(routing) if routing else [None] * len(self.layers)
        for index, (layer, kind) in enumerate(zip(self.layers, self.config.layer_types)):
            layer_cache = cache.layers[index] if cache is not None else None
            x, r, choice = layer(x, r, positions[kind], layer_cache, replay[index], count)
            if routing is not None and replay[index] is None:
                routing.append(choice)
        return self.norm(x)

    @torch.no_grad()
    def generate(self, input_ids, max_new_tokens=64, temperature=1.0, top_p=1.0, attention_mask=None, generator=None,
                 eos_token_id=None, prefill_chunk=2048, uniform=None, record=False):
        """Sample on from each row: (B, S) int64 -> (B, S + new).

        temperature 0 is greedy.  Runs to max_new_tokens unless `eos_token_id` (an id or several) ends a row, which
        is then filled up with pad_token_id (None: with the first of these, as HF).  Left padding goes through
        `attention_mask` (B, S).  A row's tokens depend on the random numbers of its place in the batch, not on when
        others end: `generator` draws them, or `uniform` (max_new_tokens, B) fp32 in [0, 1) brings them.
        record: -> (tokens, logps, choices), as RL needs them: the log probability that the model gives each new token
        at temperature 1 (B, new) fp32, and the expert of each token that was read (L, B, S + new - 1) int16.  In both
        a row's numbers end where its tokens do.
        """
        if not 0 <= temperature < math.inf or not 0 < top_p <= 1 or input_ids.shape[1] == 0:
            raise ValueError("generate needs a finite temperature >= 0, 0 < top_p <= 1 and a token of prompt or more, "
                             f"not {temperature}, {top_p} and {input_ids.shape[1]} tokens")
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
        if not (mask[:, -1].all() and (mask.diff(dim=1) >= 0).all()):
            raise ValueError("generate needs all padding on the left: attention_mask must be 0 … 0 1 … 1 in each row")
        B, device, pad = len(input_ids), input_ids.device, self.config.pad_token_id
        eos = torch.tensor([] if eos_token_id is None else eos_token_id, device=device, dtype=torch.long).flatten()
        if pad is None:                                         # as HF: nobody reads what follows a row's end
            pad = eos[0].item() if len(eos) else 0
        tokens, logps = [input_ids], [torch.zeros(B, 0, device=device)]
        modes = {module: module.training for module in self.modules()}
        self.eval()
        try:
            hidden, cache, choices = self.prefill(input_ids, attention_mask, prefill_chunk)
            # The rows that are still in the batch, and which of these have ended: they are computed, but not kept.
            rows, ended = torch.arange(B, device=device), torch.zeros(B, dtype=torch.bool, device=device)
            token = None
            for step in range(max_new_tokens):
                if step:
                    routing = []
                    hidden = self.hidden_states(token[:, None], cache=cache, routing=routing if record else None)[:, -1]
                    if record:
                        choices.append(choices[0].new_zeros(len(self.layers), B, 1))
                        choices[-1][:, rows] = torch.stack(routing).short()
                logits = self.logits(hidden)
                if uniform is None:
                    draw = torch.rand(B, generator=generator, device=generator.device if generator else device)
                else:
                    draw = uniform[step]
                token = self.sample(logits, temperature, top_p, draw.to(device)[rows]).masked_fill(ended, pad)
                tokens.append(input_ids.new_full((B, 1), pad))
                tokens[-1][rows, 0] = token
                if record:
                    logps.append(logits.new_zeros(B, 1))
                    logps[-1][rows] = logits.log_softmax(-1).gather(1, token[:, None])
                ended |= torch.isin(token, eos)
                # Leaving the batch costs a copy of the cache: worth it for an eighth of the rows.
                if len(eos) and ended.sum() >= len(ended) / 8:
                    going = (~ended).nonzero()[:, 0]
                    rows, token, ended = rows[going], token[going], ended[going]
                    if len(rows) == 0:
                        break
                    cache.select(going)
        finally:                                                # also after an exception, or Ctrl-C in a notebook
            for module, mode in modes.items():
                module.training = mode
        tokens = torch.cat(tokens, 1)
        return (tokens, torch.cat(logps, 1), torch.cat(choices, 2)) if record else tokens

    def new_cache(self):
        """An empty decode state for `generate`, which a subclass may keep in another form."""
        return Cache(len(self.layers))

    def prefill(self, input_ids, attention_mask, chunk):
        """Read prompts (B, S) into a new cache -> their last hidden states (B, E), the cache, and a list with the
        experts taken (L, B, S) int16."""
        B, S = input_ids.shape
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
        # Equal rows are read once: N candidates for one prompt cost the prompt of one.
        unique, copies = torch.cat([input_ids, real], 1).unique(dim=0, return_inverse=True)
        shared = len(unique) < B
        ids, mask = unique.split(S, 1) if shared else (input_ids, real)
        cache, choices = self.new_cache(), []
        for start in range(0, S, chunk):
            part, routing = slice(start, start + chunk), []
            some = None if attention_mask is None else mask[:, part]
            hidden = self.hidden_states(ids[:, part], some, cache=cache, routing=routing)[:, -1]
            choices.append(torch.stack(routing).short())
        choices = torch.cat(choices, 2)
        if shared:
            cache.select(copies)
            hidden, choices = hidden[copies], choices[:, copies]
        return hidden, cache, [choices]

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
        """{"total", "non_embedding", "active"}; active: non-embedding parameters that one token passes through."""
        total = sum(p.numel() for p in self.parameters())
        embeddings = self.output_weight.numel() * (1 if self.config.tie_word_embeddings else 2)
        experts = sum(p.numel() for layer in self.layers for p in layer.experts.parameters())
        idle = experts - experts // self.config.num_experts
        return {"total": total, "non_embedding": total - embeddings, "active": total - embeddings - idle}

    # ---- the official checkpoint layout -----------------------------------------------------------------------------

    @staticmethod
    def official_name(name):
        """Our parameter name -> HF's.  HF nests the projections, the key temperature, the MoE and the router's MLP."""
        name = re.sub(r"\.self_attn\.(?=\w_proj_|[qk]_proj|conv)", ".self_attn.qkv_proj.", name)
        name = name.replace(".self_attn.temp", ".self_attn.qk_norm.temp")
        name = re.sub(r"\.gate\.(?=norm|fc|out_proj)", ".gate.router_mlp.", name)
        name = re.sub(r"\.(gate|experts)\.", r".mlp.\1.", name)
        return name if name.startswith("lm_head.") else "model." + name

    def save_pretrained(self, directory, max_shard_bytes=5_000_000_000, state_dict=None):
        """Write config.json, generation_config.json and model.safetensors (sharded with an index above
        `max_shard_bytes`) that HF's ZayaForCausalLM.from_pretrained loads, each under a temporary name, then renamed.

        state_dict: instead of the model's own, such as the whole tensors of a sharded model.
        """
        from safetensors.torch import save_file
        os.makedirs(directory, exist_ok=True)
        shards, size, total = [{}], 0, 0
        for name, tensor in (self.state_dict() if state_dict is None else state_dict).items():
            if shards[-1] and size + tensor.nbytes > max_shard_bytes:
                shards.append({})
                size = 0
            shards[-1][self.official_name(name)] = tensor.contiguous()
            size += tensor.nbytes
            total += tensor.nbytes
        places, written = {}, {"model.safetensors.index.json"} if len(shards) > 1 else set()
        for number, shard in enumerate(shards, 1):
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
            path = os.path.join(directory, name)
            save_file(shard, path + ".tmp", metadata={"format": "pt"})
            os.replace(path + ".tmp", path)
            places.update(dict.fromkeys(shard, name))
            written.add(name)
        dtype = str(self.embed_tokens.weight.dtype).removeprefix("torch.")
        write_json(os.path.join(directory, "config.json"), {**self.config.to_dict(), "dtype": dtype})
        # Without this file HF's generate and its server would be greedy, whatever temperature they are asked for.
        write_json(os.path.join(directory, "generation_config.json"), {
            "do_sample": True, "top_k": 0, "eos_token_id": self.config.eos_token_id,
            "pad_token_id": self.config.pad_token_id})
        if len(shards) > 1:
            write_json(os.path.join(directory, "model.safetensors.index.json"),
                       {"metadata": {"total_size": total}, "weight_map": places})
        for name in os.listdir(directory):                      # an earlier save's shards, a killed one's leavings
            ours = re.fullmatch(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?(\.tmp)?", name)
            if ours and name not in written:
                os.remove(os.path.join(directory, name))

    @classmethod
    def from_pretrained(cls, directory, dtype=None, device="cpu"):
        """Read config.json and *.safetensors in the official layout.

        The weights stay memory-mapped until they are written to or moved: no second copy, and nothing is read that
        is not used.  `dtype` converts them one by one.  Raises FileNotFoundError or ValueError naming the file or
        tensor.  We differ from HF 5.23, which puts the skip expert's balancing bias back to -1 at every load.
        """
        path = os.path.join(directory, "config.json")
        if not os.path.exists(path):
            raise FileNotFoundError(f"{path} not found: {directory!r} is no checkpoint in the official layout")
        values = read_json(path)
        try:
            config = ZayaConfig.from_dict(values)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        with torch.device("meta"):
            model = cls(config)
        wanted = {cls.official_name(name): (name, tensor.shape) for name, tensor in model.state_dict().items()}
        if config.tie_word_embeddings:                          # some files hold a copy of the tied LM head
            wanted["lm_head.weight"] = None, model.output_weight.shape
        state, source = {}, {}
        for file, official, tensor in cls.stored_tensors(directory):
            if official in source:
                raise ValueError(f"{directory}: tensor {official!r} is in both {source[official]} and {file}: "
                                 "move one of the files away")
            source[official] = file
            if official not in wanted:
                raise ValueError(f"{file}: tensor {official!r} has no place in this config")
            name, shape = wanted[official]
            if tensor.shape != shape:
                raise ValueError(f"{file}: tensor {official!r} has shape {tuple(tensor.shape)}, "
                                 f"the config needs {tuple(shape)}")
            if name:
                # The balancing biases are added to fp32 probabilities and updated in small steps: never rounded.
                state[name] = tensor.to(device, torch.float32 if "balancing_biases" in name else dtype)
        for official, (name, _) in wanted.items():
            if name and name not in state:
                raise ValueError(f"{directory}: tensor {official!r} is missing")
        model.load_state_dict(state, assign=True)
        for layer in model.layers:                              # not in the file: born on the meta device
            layer.gate.load = torch.zeros(config.router_classes, dtype=torch.long, device=device)
        return model.eval()

    @staticmethod
    def stored_tensors(directory):
        """Yield (file name, official tensor name, tensor) of a folder's weights.

        model.safetensors is the model, whatever lies beside it.  Without it the index says which file a tensor is read
        from; without an index all files are read.
        """
        from safetensors import SafetensorError, safe_open
        files = sorted(name for name in os.listdir(directory) if name.endswith(".safetensors"))
        index, places = os.path.join(directory, "model.safetensors.index.json"), {}
        if "model.safetensors" in files:
            files = ["model.safetensors"]
        elif os.path.exists(index):
            places = read_json(index).get("weight_map")
            if not (places and type(places) is dict and all(type(file) is str for file in places.values())):
                raise ValueError(f"{index} is damaged: weight_map must name a file for each tensor")
            files = sorted(set(places.values()))
        if not files:
            raise FileNotFoundError(f"{directory!r} has a config.json but no *.safetensors")
        for file in files:
            path = os.path.join(directory, file)
            if not os.path.exists(path):
                raise FileNotFoundError(f"{index} names {file}, which is not in {directory!r}")
            try:
                with safe_open(path, "pt") as opened:
                    for name in [name for name in places if places[name] == file] or opened.keys():
                        yield file, name, opened.get_tensor(name)
            except SafetensorError as error:                    # also for a tensor that only the index knows
                raise ValueError(f"{path} is damaged: {error}") from None


class Tokenizer:
    """Byte-level BPE with tiktoken inside; digits are single tokens (not so in `named` ones), any bytes round-trip.

    encode(str or bytes) -> list[int];  decode(list[int]) -> str;  decode_bytes -> the exact bytes.  Special tokens are
    never made from ordinary text, only by `render`, which lays out a chat:
    <|user|>…<|end|><|assistant|><think>…</think>…<|end|>.
    Saved as tokenizer.json in the layout of the `tokenizers` library, so HF's AutoTokenizer reads our checkpoints;
    for that it needs read_json and write_json pasted with it.
    """
    PATTERN = r"\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    SPECIAL = ["<|pad|>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<think>", "</think>"]
    CHAT_TEMPLATE = ("{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
                     "{% if add_generation_prompt %}<|assistant|>{% endif %}")

    def __init__(self, ranks, pattern=PATTERN, name="zaya"):
        """ranks: bytes -> rank, the lower ranks merged first; the special tokens follow after the last rank."""
        import tiktoken
        first = max(ranks.values()) + 1
        self.special = {token: first + i for i, token in enumerate(self.SPECIAL)}
        self.ranks, self.pattern = ranks, pattern
        self.encoding = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=self.special)
        self.vocab_size = first + len(self.SPECIAL)
        self.pad, self.end_of_text, self.end = (self.special[t] for t in ("<|pad|>", "<|endoftext|>", "<|end|>"))

    @classmethod
    def train(cls, text, vocab_size=512, progress=iter):
        """Learn `vocab_size` tokens (256 bytes, merges, specials) from a text; the same text gives the same tokens."""
        from collections import Counter, defaultdict
        import regex                                            # comes with tiktoken
        merges = vocab_size - 256 - len(cls.SPECIAL)
        if merges < 0:
            raise ValueError(f"vocab_size {vocab_size} is below the {256 + len(cls.SPECIAL)} bytes and special tokens")
        words, counts, pairs, where = [], [], Counter(), defaultdict(set)

        def count(index, times):                                # add or take away the pairs of a word
            for pair in zip(words[index], words[index][1:]):
                pairs[pair] += times * counts[index]
                where[pair].add(index)

        for word, times in Counter(regex.findall(cls.PATTERN, text)).items():
            words.append([bytes([byte]) for byte in word.encode("utf-8", "replace")])
            counts.append(times)
            count(len(words) - 1, 1)
        ranks = {bytes([i]): i for i in range(256)}
        for _ in progress(range(merges)):
            best = max(pairs, key=lambda pair: (pairs[pair], pair), default=None)
            if best is None or pairs[best] <= 0:
                raise ValueError(f"the text has too few different words for {vocab_size} tokens: it gave {len(ranks)} "
                                 f"and {len(cls.SPECIAL)} special ones; use a smaller vocab_size or more text")
            ranks[best[0] + best[1]] = len(ranks)
            for index in sorted(where[best]):
                count(index, -1)
                word, i = words[index], 0
                while i + 1 < len(word):
                    if (word[i], word[i + 1]) == best:
                        word[i:i + 2] = [word[i] + word[i + 1]]
                    i += 1
                count(index, 1)
            del pairs[best], where[best]
        return cls(ranks)

    @classmethod
    def named(cls, name):
        """One of tiktoken's encodings, such as "gpt2", with our special tokens after its own ranks."""
        import tiktoken
        try:
            encoding = tiktoken.get_encoding(name)
        except ValueError as error:
            raise ValueError(f"tiktoken knows no encoding {name!r}: {error}") from None
        except Exception as error:
            raise RuntimeError(
                f"tiktoken could not download the encoding {name!r} ({type(error).__name__}).  Set TIKTOKEN_CACHE_DIR "
                f"to a folder, call tiktoken.get_encoding({name!r}) where there is a network, and copy the folder "
                "here; or leave --tokenizer out, then a tokenizer is trained on your data") from None
        return cls(encoding._mergeable_ranks, encoding._pat_str, name)

    def encode(self, text):
        """str or bytes -> ids.  Bytes that are not UTF-8 become one token each."""
        data = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
        ids = []
        for i, piece in enumerate(re.split("([\udc80-\udcff]+)", data.decode("utf-8", "surrogateescape"))):
            if i % 2:                                           # the odd pieces are the escaped bytes
                ids += [self.ranks[byte.encode("utf-8", "surrogateescape")] for byte in piece]
            else:
                ids += self.encoding.encode_ordinary(piece)
        return ids

    def decode_bytes(self, ids):
        return self.encoding.decode_bytes(list(ids))

    def decode(self, ids):
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def render(self, messages, generation_prompt=False):
        """[{"role", "content"}, …] -> ids, targets: the chat as tokens, and for each whether the assistant wrote it.

        A message with "weight": 0 is read and not learned: its targets are False.
        With `generation_prompt` the chat ends with the token after which the assistant speaks.  The tags <think> and
        </think> are special tokens in the assistant's turns only: nobody else can open or close its reasoning.
        """
        ids, targets = [], []
        for message in messages:
            role, content = message["role"], message["content"]
            if role not in ("system", "user", "assistant"):
                raise ValueError(f"role {role!r} is not one of system, user, assistant")
            if role == "assistant":
                tags = {"<think>", "</think>"}
                body = self.encoding.encode(content, allowed_special=tags, disallowed_special=())
            else:
                body = self.encode(content)
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
        return {**{byte: chr(byte) for byte in plain}, **{byte: chr(256 + i) for i, byte in enumerate(others)}}

    def _merges(self):
        """The pair of tokens that each token was merged from, by rank."""
        merges = []
        for token, rank in sorted(self.ranks.items(), key=lambda item: item[1]):
            parts = [token[i:i + 1] for i in range(len(token))]
            while len(parts) > 2:                               # undo the last merge: apply all the earlier ones
                ranks = [self.ranks.get(a + b, rank) for a, b in zip(parts, parts[1:])]
                i = ranks.index(min(ranks))
                parts[i:i + 2] = [parts[i] + parts[i + 1]]
            if len(parts) == 2:
                merges.append(parts)
        return merges

    def save_pretrained(self, directory):
        """Write tokenizer.json and tokenizer_config.json (with the chat template), each by rename."""
        visible = self._visible()

        def spell(token):
            return "".join(visible[byte] for byte in token)

        split = {"type": "Split", "pattern": {"Regex": self.pattern}, "behavior": "Isolated", "invert": False}
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        # The tags are no control tokens: a server that leaves those out of its replies must keep the tags.
        added = [dict(id=i, content=token, single_word=False, lstrip=False, rstrip=False, normalized=False,
                      special="think" not in token) for token, i in self.special.items()]
        os.makedirs(directory, exist_ok=True)
        write_json(os.path.join(directory, "tokenizer.json"), {
            "version": "1.0", "added_tokens": added, "decoder": level,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
            "model": {"type": "BPE", "vocab": {spell(token): rank for token, rank in self.ranks.items()},
                      "merges": [[spell(a), spell(b)] for a, b in self._merges()]}}, indent=None)
        write_json(os.path.join(directory, "tokenizer_config.json"), {
            "tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<|pad|>", "bos_token": "<|endoftext|>",
            "eos_token": "<|end|>", "chat_template": self.CHAT_TEMPLATE, "clean_up_tokenization_spaces": False})

    @classmethod
    def from_pretrained(cls, directory):
        """Read a tokenizer.json that `save_pretrained` wrote."""
        path = os.path.join(directory, "tokenizer.json")
        if not os.path.exists(path):
            raise FileNotFoundError(f"{path} not found: {directory!r} has no tokenizer")
        content, byte_of = read_json(path), {character: byte for byte, character in cls._visible().items()}
        try:
            pattern = content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
            ranks = {bytes(byte_of[c] for c in token): rank for token, rank in content["model"]["vocab"].items()}
            tokenizer = cls(ranks, pattern)
            if {token["content"]: token["id"] for token in content["added_tokens"]} != tokenizer.special:
                raise ValueError("other special tokens")
        except (KeyError, TypeError, IndexError, ValueError) as error:
            raise ValueError(f"{path} is damaged or no tokenizer of this project, which is byte-level BPE with the "
                             f"special tokens {' '.join(cls.SPECIAL)} ({type(error).__name__}: {error})") from None
        return tokenizer
