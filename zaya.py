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
    # What HF's base config writes about the file, its classes' outputs and its generate, which changes no logit; names
    # that begin with _ or end with _token_id are of the same kind.  Any other unknown field may change one: refused.
    DESCRIPTIVE = set("""
        architectures auto_map dtype torch_dtype transformers_version unsloth_version unsloth_fixed name_or_path
        tokenizer_class finetuning_task problem_type num_labels id2label label2id task_specific_params prefix
        use_cache return_dict return_dict_in_generate output_attentions output_hidden_states output_router_logits
        output_scores chunk_size_feed_forward is_decoder is_encoder_decoder add_cross_attention tie_encoder_decoder
        torchscript tf_legacy_loss use_bfloat16 attn_implementation experts_implementation
        do_sample temperature top_k top_p typical_p max_length min_length num_beams num_beam_groups early_stopping
        num_return_sequences repetition_penalty diversity_penalty length_penalty no_repeat_ngram_size
        encoder_no_repeat_ngram_size remove_invalid_values""".split())

    def __post_init__(self):
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
                     "head_dim", "num_experts", "moe_intermediate_size", "router_hidden_size",
                     "max_position_embeddings"):
            value = getattr(self, name)
            self._require(type(value) is int and value > 0, f"{name} must be a positive integer, not {value!r}")
        for name in ("rms_norm_eps", "initializer_range"):
            value = getattr(self, name)
            self._require(type(value) in (int, float) and 0 < value < math.inf,
                          f"{name} must be a positive number, not {value!r}")
        for name in ("tie_word_embeddings", "skip_expert"):
            value = getattr(self, name)
            self._require(type(value) is bool, f"{name} must be true or false, not {value!r}")
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            value = getattr(self, name)
            ids = value if name == "eos_token_id" and type(value) is list else [value]
            self._require(value is None or all(type(i) is int and i >= 0 for i in ids),
                          f"{name} must be null or a token's number, not {value!r}")
        self._require(self.sliding_window is None or type(self.sliding_window) is int and self.sliding_window > 0,
                      f"sliding_window must be null or a positive number of tokens, not {self.sliding_window!r}")
        self._require(self.layer_types is None or isinstance(self.layer_types, (list, tuple)),
                      f"layer_types must be a list with a layer type per layer, not {self.layer_types!r}")
        self.layer_types = list(self.layer_types or ["hybrid"] * self.num_hidden_layers)
        self._require(self.num_attention_heads % self.num_key_value_heads == 0,
                      f"num_attention_heads ({self.num_attention_heads}) must be a multiple of num_key_value_heads "
                      f"({self.num_key_value_heads}): each KV head serves a group of query heads of one size")
        self._require(self.num_key_value_heads * self.head_dim % 2 == 0,
                      f"num_key_value_heads * head_dim ({self.num_key_value_heads} * {self.head_dim}) must be even: "
                      "half of the value channels come from the previous token")
        self._require(len(self.layer_types) == self.num_hidden_layers,
                      f"layer_types names {len(self.layer_types)} layers, num_hidden_layers {self.num_hidden_layers}")
        unknown = [kind for kind in self.layer_types if kind not in ("hybrid", "hybrid_sliding")]
        self._require(not unknown, f"layer_types knows 'hybrid' and 'hybrid_sliding', not {unknown[:1]}")
        self._require("hybrid_sliding" not in self.layer_types or self.sliding_window,
                      "layer_types has 'hybrid_sliding' layers: set sliding_window to the number of tokens they see")
        self._fill_rope_parameters()

    def _fill_rope_parameters(self):
        """Complete `rope_parameters` by the published values, and refuse every other kind of RoPE."""
        given = self.rope_parameters or {}
        self._require(not given or isinstance(given, dict) and ("hybrid" in given or "hybrid_sliding" in given),
                      f"rope_parameters must have a dict per layer type ('hybrid', 'hybrid_sliding'), not {given}")
        # The file on the hub has a "rope_type" beside the layer types, which HF ignores.
        self._only_default_rope("rope_parameters", given, {"hybrid", "hybrid_sliding"})
        self.rope_parameters = {}
        for kind, theta in (("hybrid", 5e6), ("hybrid_sliding", 1e4)):
            inner, where = given.get(kind) or {}, f"rope_parameters[{kind!r}]"
            self._require(isinstance(inner, dict), f"{where} must be a dict, not {inner!r}")
            inner = {name: value for name, value in inner.items() if value is not None}
            rope = {"rope_type": "default", "partial_rotary_factor": 0.5, "rope_theta": theta, **inner}
            self.rope_parameters[kind] = rope
            if kind not in self.layer_types:
                continue
            self._only_default_rope(where, rope, {"partial_rotary_factor", "rope_theta"})
            theta, share = rope["rope_theta"], rope["partial_rotary_factor"]
            self._require(type(theta) in (int, float) and 0 < theta < math.inf,
                          f"{where}: rope_theta must be a positive number, not {theta!r}")
            self._require(type(share) in (int, float) and 0 <= share <= 1 and self.head_dim * share % 2 == 0,
                          f"{where}: partial_rotary_factor {share!r} must make head_dim ({self.head_dim}) times it an "
                          "even number of rotated channels")

    def _only_default_rope(self, where, values, known):
        for name, value in values.items():
            self._require(name in known or value is None or (name == "rope_type" and value == "default"),
                          f"{where}: {name} {value!r} is not implemented, only the rope_type 'default'")

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
        shapes = {
            "smoke": dict(vocab_size=384, hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
                          num_key_value_heads=1, head_dim=16, num_experts=4, moe_intermediate_size=64,
                          router_hidden_size=16, max_position_embeddings=4096, initializer_range=0.125),
            "tiny": dict(vocab_size=512, hidden_size=128, num_hidden_layers=4, num_attention_heads=4,
                         num_key_value_heads=1, head_dim=32, num_experts=8, moe_intermediate_size=128,
                         router_hidden_size=32, max_position_embeddings=8192, initializer_range=0.088),
            "small": dict(vocab_size=8192, hidden_size=512, num_hidden_layers=12, num_attention_heads=4,
                          num_key_value_heads=1, head_dim=64, num_experts=16, moe_intermediate_size=512,
                          router_hidden_size=64, max_position_embeddings=32768, initializer_range=0.044),
            "zaya1-8b": {},
        }
        if name not in shapes:
            raise ValueError(f"ZayaConfig has no preset {name!r}; it has {', '.join(shapes)}")
        return cls(**{**shapes[name], **changes})

    @classmethod
    def from_dict(cls, values):
        """Read an official config.json.  ValueError for a field that may change the numbers and is not implemented:
        one that is neither ours nor descriptive, unless it is null or empty."""
        known = {field.name for field in fields(cls)}
        for name, value in values.items():
            if name in cls.FIXED:
                cls._require(value in (None, cls.FIXED[name]),
                             f"{name} {value!r} is not implemented, only {cls.FIXED[name]!r}")
            elif not (name in known or name in cls.DESCRIPTIVE or name.startswith("_") or name.endswith("_token_id")):
                cls._require(value in (None, {}, []), f"the field {name!r} is not implemented: set it to null if the "
                             "model computes the same without it")
        values = {name: value for name, value in values.items() if name in known}
        rope = values.get("rope_parameters")
        if isinstance(rope, dict):                              # HF rotates all channels where a file names no share
            values["rope_parameters"] = {kind: {"partial_rotary_factor": 1.0, **inner} if isinstance(inner, dict)
                                         else inner for kind, inner in rope.items()}
        return cls(**values)

    def to_dict(self):
        official = {name: value for name, value in asdict(self).items() if name != "skip_expert"}
        ours = {} if self.skip_expert else {"skip_expert": False}
        return {"architectures": ["ZayaForCausalLM"], "dtype": "float32", "use_cache": True,
                "output_router_logits": False, **self.FIXED, **official, **ours}


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
        """Where the tokens of one call stand, and the whole of what follows from it; `CCA.positions` makes them.

        position_ids (B, S) int64, None for rows of one sample each; cos, sin (B or 1, S, R/2) fp32; mask (B, 1, S, T)
        bool, True where a query sees a key, None for causal attention.
        """

        def __init__(self, position_ids, cos, sin, mask):
            self.position_ids, self.cos, self.sin, self.mask = position_ids, cos, sin, mask

    def __init__(self, hidden_size, num_attention_heads, num_key_value_heads, head_dim, rope_parameters=None,
                 sliding_window=None):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = num_attention_heads, num_key_value_heads, head_dim
        self.rope_parameters = rope_parameters or {"rope_theta": 5e6, "partial_rotary_factor": 0.5}
        self.sliding_window = sliding_window
        q_size, kv_size = num_attention_heads * head_dim, num_key_value_heads * head_dim
        self.q_proj = nn.Linear(hidden_size, q_size, bias=False)
        self.k_proj = nn.Linear(hidden_size, kv_size, bias=False)
        self.v_proj_current = nn.Linear(hidden_size, kv_size // 2, bias=False)
        self.v_proj_delayed = nn.Linear(hidden_size, kv_size // 2, bias=False)
        self.conv_qk_depthwise = nn.Conv1d(q_size + kv_size, q_size + kv_size, 2, groups=q_size + kv_size)
        self.conv_qk_grouped = nn.Conv1d(q_size + kv_size, q_size + kv_size, 2,
                                         groups=num_attention_heads + num_key_value_heads)
        self.temp = nn.Parameter(torch.ones(num_key_value_heads))
        self.o_proj = nn.Linear(q_size, hidden_size, bias=False)

    def forward(self, x, positions=None, cache=None):
        positions = self.locate(x, positions, cache)
        packed = torch.cat([self.q_proj(x), self.k_proj(x)], -1)                    # (B, S, C)
        current, delayed = self.v_proj_current(x), self.v_proj_delayed(x)           # (B, S, K*D/2)
        q, k, v = self.mix(packed, current, delayed, positions, cache)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)           # (B, H or K, S, D)
        if cache is not None:
            k, v = cache.append(k, v, self.sliding_window)                          # (B, K, T, D)
        return self.o_proj(self.attend(q, k, v, positions, cache))

    def mix(self, packed, current, delayed, positions, cache=None):
        """From the projections to rotated queries, keys and shifted values: (B, S, H or K, D) in packed's dtype."""
        B, S, _ = packed.shape
        if cache is not None and cache.packed is not None:
            before, value_before = cache.packed, cache.delayed
        else:
            before = packed.new_zeros(B, 2, packed.shape[-1])
            value_before = delayed.new_zeros(B, 1, delayed.shape[-1])
        seen = torch.cat([before.to(packed.dtype), packed], 1)                      # (B, 2 + S, C)
        shifted = torch.cat([value_before.to(delayed.dtype), delayed], 1)           # (B, 1 + S, K*D/2)
        if cache is not None:                                                       # the decode state, kept in fp32
            cache.packed = seen[:, S:].float()
            cache.delayed = shifted[:, S:].float()
        shifted = shifted[:, :S]
        if positions.position_ids is not None:
            shifted = shifted * (positions.position_ids >= 1)[..., None]
        v = torch.cat([current, shifted], -1).view(B, S, self.kv_heads, self.head_dim)

        q_mean, k_mean = self.qk_mean(packed.float())
        mixed = self.convolve(seen, positions.position_ids).float()                 # (B, S, H + K, D)
        q = self.unit(mixed[:, :, :self.heads] + q_mean)                            # (B, S, H, D) fp32
        k = self.unit(mixed[:, :, self.heads:] + k_mean) * self.temp.float()[:, None]
        q = self.apply_rotary(q, positions.cos, positions.sin).to(v.dtype)
        return q, self.apply_rotary(k, positions.cos, positions.sin).to(v.dtype), v

    def attend(self, q, k, v, positions, cache=None):
        """Softmax attention: q (B, H, S, D), k and v (B, K, T, D) -> (B, S, H*D)."""
        B, _, S, _ = q.shape
        causal = positions.mask is None and S > 1
        out = F.scaled_dot_product_attention(q, k, v, positions.mask, is_causal=causal, enable_gqa=True)
        return out.transpose(1, 2).reshape(B, S, -1)

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

    def qk_mean(self, packed):
        """(B, S, C) latents before the convolutions -> m_q (B, S, H, D), m_k (B, S, K, D)."""
        B, S, _ = packed.shape
        latents = packed.view(B, S, self.heads + self.kv_heads, self.head_dim)
        q = latents[:, :, :self.heads].reshape(B, S, self.kv_heads, -1, self.head_dim)     # (B, S, K, H/K, D)
        k = latents[:, :, self.heads:].unsqueeze(3)                                        # (B, S, K, 1, D)
        q_mean = (q + k) / 2
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
        a, b, rest = x[..., :half], x[..., half:2 * half], x[..., 2 * half:]
        cos, sin = cos[:, :, None], sin[:, :, None]
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
        return ((back >= 0) & (back <= farthest))[:, None]


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
        h = F.rms_norm(r.float(), r.shape[-1:], self.norm.weight.float(), self.norm.eps).to(self.norm.weight.dtype)
        h = F.gelu(self.fc1(h))
        scores = self.out_proj(F.gelu(self.fc2(h))).float().softmax(-1)             # (B, S, classes)
        if choice is None:
            choice = (scores.detach() + self.balancing_biases.float()).argmax(-1)   # (B, S)
        if self.training:
            ones = torch.ones_like(choice) if count is None else count.long()
            self.load.scatter_add_(0, choice.flatten(), ones.flatten())
        return scores.gather(-1, choice[..., None]).squeeze(-1), choice, r


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
            live, capacity = self.end - self.start, 64
            while capacity < 2 * (live + S):
                capacity *= 2
            for name, new in (("k", k), ("v", v)):
                grown = new.new_zeros(*new.shape[:2], capacity, new.shape[3])     # zeros: may be read, masked
                if live:
                    grown[:, :, :live] = getattr(self, name)[:, :, self.start:self.end]
                setattr(self, name, grown)
            self.start, self.end = 0, live
        self.k[:, :, self.end:self.end + S] = k
        self.v[:, :, self.end:self.end + S] = v
        self.end += S
        self.columns += S
        return self.k[:, :, self.start:self.end], self.v[:, :, self.start:self.end]

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

    model(input_ids) -> logits (B, S, V) fp32.  Pasting it needs Layer and what Layer needs, Cache and LayerCache, and
    for from_pretrained ZayaConfig.
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
        for module in self.modules():                           # as HF; norms, scales and temperatures are born right
            if isinstance(module, (nn.Linear, nn.Embedding, nn.Conv1d)):
                nn.init.normal_(module.weight, std=config.initializer_range)
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)
            elif hasattr(module, "gate_up_proj"):
                nn.init.normal_(module.gate_up_proj, std=config.initializer_range)
                nn.init.normal_(module.down_proj, std=config.initializer_range)

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
        B = len(input_ids)
        columns = cache.columns if cache is not None else 0
        offset = cache.position if cache is not None else None
        if position_ids is None and (attention_mask is not None or offset is not None):
            real = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
            if offset is None:
                offset = real.new_full((B,), columns)
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
                 eos_token_id=None, prefill_chunk=2048):
        """Sample on from each row: (B, S) int64 -> (B, S + new).

        temperature 0 is greedy.  Runs to max_new_tokens unless `eos_token_id` (an id or several) ends a row, which
        then leaves the batch and is filled up with pad_token_id (None: with the first of these, as HF).  Left padding
        goes through `attention_mask` (B, S).
        A row's tokens depend on the seed in `generator` and its place in the batch, not on when others end.
        """
        if not 0 <= temperature < math.inf or not 0 < top_p <= 1 or input_ids.shape[1] == 0:
            raise ValueError("generate needs a finite temperature >= 0, 0 < top_p <= 1 and a token of prompt or more, "
                             f"not {temperature}, {top_p} and {input_ids.shape[1]} tokens")
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
        if not (real[:, -1].all() and (real.diff(dim=1) >= 0).all()):
            raise ValueError("generate needs all padding on the left: attention_mask must be 0 … 0 1 … 1 in each row")
        modes = {module: module.training for module in self.modules()}
        self.eval()
        try:
            cache, length = Cache(len(self.layers)), input_ids.shape[1]
            # Equal rows are prefilled once: N candidates for one prompt cost the prompt of one.
            prefill, copies = torch.cat([input_ids, real], 1).unique(dim=0, return_inverse=True)
            shared = len(prefill) < len(input_ids)
            ids, mask = prefill.split(length, 1) if shared else (input_ids, real)
            for start in range(0, length, prefill_chunk):
                part = slice(start, start + prefill_chunk)
                some = None if attention_mask is None else mask[:, part]
                hidden = self.hidden_states(ids[:, part], some, cache=cache)
            if shared:
                cache.select(copies)
                hidden = hidden[copies]
            B, device = input_ids.shape[0], input_ids.device
            eos = torch.tensor([] if eos_token_id is None else eos_token_id, device=device, dtype=torch.long).flatten()
            pad = self.config.pad_token_id
            if pad is None:                                     # as HF: nobody reads what follows a row's end
                pad = eos[0].item() if len(eos) else 0
            rows, token = torch.arange(B, device=device), None
            columns = [input_ids]
            for step in range(max_new_tokens):
                if step:
                    hidden = self.hidden_states(token[:, None], cache=cache)
                uniform = torch.rand(B, generator=generator, device=generator.device if generator else device)
                token = self.sample(self.logits(hidden[:, -1]), temperature, top_p, uniform.to(device)[rows])
                columns.append(input_ids.new_full((B, 1), pad))
                columns[-1][rows, 0] = token
                going = ~torch.isin(token, eos)
                if len(eos) and not going.all():
                    token, rows = token[going], rows[going]
                    cache.select(going.nonzero()[:, 0])
                    if len(rows) == 0:
                        break
        finally:                                                # also after an exception, or Ctrl-C in a notebook
            for module, mode in modes.items():
                module.training = mode
        return torch.cat(columns, 1)

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
        body = total - self.embed_tokens.weight.numel() - (0 if self.config.tie_word_embeddings
                                                           else self.lm_head.weight.numel())
        experts = sum(p.numel() for layer in self.layers for p in layer.experts.parameters())
        return {"total": total, "non_embedding": body,
                "active": body - experts + experts // self.config.num_experts}

    # ---- the official checkpoint layout -----------------------------------------------------------------------------

    @staticmethod
    def official_name(name):
        """Our parameter name -> HF's.  HF nests the projections, the key temperature, the MoE and the router's MLP."""
        name = name.replace(".self_attn.", ".self_attn.qkv_proj.").replace(".qkv_proj.o_proj", ".o_proj")
        name = name.replace(".qkv_proj.temp", ".qk_norm.temp")
        name = name.replace(".gate.", ".mlp.gate.").replace(".experts.", ".mlp.experts.")
        for inner in ("norm", "fc1", "fc2", "out_proj"):
            name = name.replace(f".gate.{inner}.", f".gate.router_mlp.{inner}.")
        return name if name.startswith("lm_head.") else "model." + name

    def save_pretrained(self, directory, max_shard_bytes=5_000_000_000, state_dict=None):
        """Write config.json, generation_config.json and model.safetensors (sharded with an index above
        `max_shard_bytes`) that HF's ZayaForCausalLM.from_pretrained loads, each under a temporary name, then renamed.
        """
        from safetensors.torch import save_file
        os.makedirs(directory, exist_ok=True)
        state_dict = self.state_dict() if state_dict is None else state_dict        # whole tensors of a sharded model
        shards, size = [{}], 0
        for name, tensor in state_dict.items():
            bytes_here = tensor.numel() * tensor.element_size()
            if shards[-1] and size + bytes_here > max_shard_bytes:
                shards.append({})
                size = 0
            shards[-1][self.official_name(name)] = tensor.contiguous()
            size += bytes_here
        names = ["model.safetensors"] if len(shards) == 1 else \
            [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        config = {**self.config.to_dict(), "dtype": str(self.embed_tokens.weight.dtype).removeprefix("torch.")}
        # Without the second file HF's generate and its server would be greedy, whatever temperature they are asked for.
        texts = {"config.json": config,
                 "generation_config.json": {"do_sample": True, "top_k": 0, "eos_token_id": self.config.eos_token_id,
                                            "pad_token_id": self.config.pad_token_id}}
        if len(shards) > 1:
            texts["model.safetensors.index.json"] = {
                "metadata": {"total_size": sum(t.numel() * t.element_size() for t in state_dict.values())},
                "weight_map": {tensor: name for shard, name in zip(shards, names) for tensor in shard}}
        for name, shard in zip(names, shards):
            path = os.path.join(directory, name)
            save_file(shard, path + ".tmp", metadata={"format": "pt"})
            os.replace(path + ".tmp", path)
        for name, text in texts.items():
            path = os.path.join(directory, name)
            with open(path + ".tmp", "w", encoding="utf-8") as file:
                json.dump(text, file, indent=2)
            os.replace(path + ".tmp", path)
        for name in os.listdir(directory):                      # an earlier save's shards, a killed one's leavings
            ours = re.fullmatch(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?(\.tmp)?", name)
            if ours and name not in (*names, *texts):
                os.remove(os.path.join(directory, name))

    @classmethod
    def from_pretrained(cls, directory, dtype=None, device="cpu"):
        """Read config.json and *.safetensors (or a .pt file of the same tensors) in the official layout.

        model.safetensors is the model.  Without it the index says which file a tensor is read from; without that
        all files of the folder are read, and none may hold a tensor of another.
        The weights stay memory-mapped until they are written to or moved: no second copy, and nothing is read that
        is not used.  `dtype` converts them one by one.  Raises FileNotFoundError or ValueError naming the file or
        tensor.  We differ from HF 5.23, which puts the skip expert's balancing bias back to -1 at every load.
        """
        path = os.path.join(directory, "config.json")
        if not os.path.exists(path):
            raise FileNotFoundError(f"{path} not found: {directory!r} is no checkpoint in the official layout")
        try:
            config = ZayaConfig.from_dict(cls.read_json(path))
        except ValueError as error:
            raise error if path in str(error) else ValueError(f"{path}: {error}") from None
        with torch.device("meta"):
            model = cls(config)
        expected = {cls.official_name(name): name for name in model.state_dict()}
        wanted, state, source = model.state_dict(), {}, {}
        for file, named in cls.weight_files(directory).items():
            for official, tensor in cls.read_tensors(os.path.join(directory, file), named):
                if official in source:
                    raise ValueError(f"{directory}: tensor {official!r} is in both {source[official]} and {file}: "
                                     "move one of the files away")
                source[official] = file
                if official == "lm_head.weight" and config.tie_word_embeddings:
                    continue
                if official not in expected:
                    raise ValueError(f"{file}: tensor {official!r} has no place in this config")
                name = expected[official]
                if tensor.shape != wanted[name].shape:
                    raise ValueError(f"{file}: tensor {official!r} has shape {tuple(tensor.shape)}, "
                                     f"the config needs {tuple(wanted[name].shape)}")
                # The balancing biases are added to fp32 probabilities and updated in small steps: never rounded.
                state[name] = tensor.to(device, torch.float32 if "balancing_biases" in name else dtype)
        missing = [official for official, name in expected.items() if name not in state]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise ValueError(f"{directory}: tensor {missing[0]!r} is missing{more}")
        model.load_state_dict(state, assign=True)
        for layer in model.layers:                              # not in the file: born on the meta device
            layer.gate.load = torch.zeros(config.router_classes, dtype=torch.long, device=device)
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        return model.eval()

    @staticmethod
    def read_json(path):
        """The JSON object in a file -> dict.  ValueError naming the file if it is damaged."""
        try:
            with open(path, encoding="utf-8-sig") as file:
                content = json.load(file)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is damaged: {error}") from None
        if not isinstance(content, dict):
            raise ValueError(f"{path} is damaged: it must hold a JSON object, not a {type(content).__name__}")
        return content

    @classmethod
    def weight_files(cls, directory):
        """The files that hold a checkpoint's weights -> {file name: the tensors to read from it, None for all}."""
        names = sorted(os.listdir(directory))
        if "model.safetensors" in names:                        # the model, whatever else lies beside it
            return {"model.safetensors": None}
        index, files = os.path.join(directory, "model.safetensors.index.json"), {}
        if os.path.exists(index):
            places = cls.read_json(index).get("weight_map")
            if not (places and isinstance(places, dict) and all(isinstance(file, str) for file in places.values())):
                raise ValueError(f"{index} is damaged: weight_map must name a file for each tensor")
            for tensor, file in places.items():
                if not os.path.exists(os.path.join(directory, file)):
                    raise FileNotFoundError(f"{index} names {file}, which is not in {directory!r}")
                files.setdefault(file, []).append(tensor)
            return files
        files = [name for name in names if name.endswith(".safetensors")] or \
            [name for name in names if name.endswith(".pt") and name != "trainer.pt"]
        if not files:
            raise FileNotFoundError(f"{directory!r} has a config.json but no *.safetensors and no *.pt")
        return dict.fromkeys(files)

    @staticmethod
    def read_tensors(path, named=None):
        """Yield (official name, tensor), of all tensors in a file or of the `named` ones."""
        if path.endswith(".pt"):
            yield from torch.load(path, weights_only=True, mmap=True, map_location="cpu").items()
            return
        from safetensors import SafetensorError, safe_open
        try:
            opened = safe_open(path, "pt")
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged: {error}") from None
        with opened as file:
            held = set(file.keys())
            for name in named or sorted(held):
                if name not in held:
                    raise ValueError(f"{path} lacks the tensor {name!r}, which model.safetensors.index.json puts there")
                yield name, file.get_tensor(name)


class PIDBalancer:
    """Keeps the experts evenly loaded by training the routers' biases, without an auxiliary loss.

        error_e = p_e - 1 / classes          p_e: share of the global batch's tokens that chose e
        b      <- AdamW(b, gradient = error)

    TR section II.  Read as a controller: Adam's first moment integrates the error, its second adapts the gain, and the
    bias itself is the accumulated output.  `model`: any module with `Router`s in it, its weights already loaded, in
    training mode so that the routers count their choices; counts add up over micro-batches and, if torch.distributed
    runs, over ranks, until `step()`.  The biases are kept in fp32 here, whatever the model's dtype.
    lr and betas are unpublished; these are AMD Primus'.  The skip expert: ZAYA1-8B ships with its bias still at -1,
    never chosen, so by default it is left there and the classes are the experts; `balance_skip=True` gives it its
    share.  No official class: HF only runs the trained biases.
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
        """
        load = torch.stack([router.load for router in self.routers])                # (L, router classes) int64
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(load)
        if load.sum() == 0:
            raise RuntimeError("PIDBalancer.step: no router counted anything; call model.train() before the forward")
        skipped = 1 - load[:, :self.classes].sum() / load.sum()
        share = load[:, :self.classes] / load[:, :self.classes].sum(1, keepdim=True).clamp_min(1)
        self.biases.grad = F.pad(share - 1 / self.classes, (0, load.shape[1] - self.classes))
        self.optimizer.step()
        for router, bias in zip(self.routers, self.biases):
            router.balancing_biases.copy_(bias)
            router.load.zero_()
        entropy = -(share * share.clamp_min(1e-20).log()).sum(1) / math.log(max(self.classes, 2))
        return {"load": (share.max() * self.classes).item(), "entropy": entropy.mean().item(),
                "bias": self.biases[:, :self.classes].abs().max().item(), "skip": skipped.item()}

    def state_dict(self):
        return self.optimizer.state_dict()

    def load_state_dict(self, state):
        """Take up a saved state; the biases themselves are part of the model's weights."""
        self.optimizer.load_state_dict(state)


class Tokenizer:
    """Byte-level BPE with tiktoken inside; digits are single tokens (not so in `named` ones), any bytes round-trip.

    encode(str or bytes) -> list[int];  decode(list[int]) -> str;  decode_bytes -> the exact bytes.  Special tokens are
    never made from ordinary text, only by `render`, which lays out a chat:
    <|user|>…<|end|><|assistant|><think>…</think>…<|end|>.
    Saved as tokenizer.json in the layout of the `tokenizers` library, so HF's AutoTokenizer reads our checkpoints.
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
        counts = Counter(regex.findall(cls.PATTERN, text))
        words = [[bytes([byte]) for byte in word.encode("utf-8", "replace")] for word in counts]
        counts, pairs, where = list(counts.values()), Counter(), defaultdict(set)
        for index, word in enumerate(words):
            for pair in zip(word, word[1:]):
                pairs[pair] += counts[index]
                where[pair].add(index)
        ranks = {bytes([i]): i for i in range(256)}
        for _ in progress(range(merges)):
            best = max(pairs, key=lambda pair: (pairs[pair], pair), default=None)
            if best is None or pairs[best] <= 0:
                raise ValueError(f"the text has too few different words for {vocab_size} tokens: it gave {len(ranks)} "
                                 f"and {len(cls.SPECIAL)} special ones; use a smaller vocab_size or more text")
            ranks[best[0] + best[1]] = len(ranks)
            for index in sorted(where.pop(best)):
                word, merged, i = words[index], [], 0
                while i < len(word):
                    step = 2 if tuple(word[i:i + 2]) == best else 1
                    merged.append(b"".join(word[i:i + step]))
                    i += step
                for pair in zip(word, word[1:]):
                    pairs[pair] -= counts[index]
                for pair in zip(merged, merged[1:]):
                    pairs[pair] += counts[index]
                    where[pair].add(index)
                words[index] = merged
            del pairs[best]
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
                f"tiktoken could not download the encoding {name!r} ({type(error).__name__}). On a machine with a "
                f"network run  python -c \"import tiktoken; tiktoken.get_encoding('{name}')\"  with TIKTOKEN_CACHE_DIR "
                "set to a folder, copy that folder here and set TIKTOKEN_CACHE_DIR to it; or leave --tokenizer out, "
                "then a tokenizer is trained on your data") from None
        return cls(encoding._mergeable_ranks, encoding._pat_str, name)

    def encode(self, text):
        """str or bytes -> ids.  Bytes that are not UTF-8 become one token each."""
        data = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
        ids = []
        for i, piece in enumerate(re.split("([\udc80-\udcff]+)", data.decode("utf-8", "surrogateescape"))):
            ids += [self.ranks[bytes([ord(c) - 0xDC00])] for c in piece] if i % 2 else \
                self.encoding.encode_ordinary(piece)
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
            ours = role == "assistant"
            body = self.encoding.encode(content, allowed_special={"<think>", "</think>"}, disallowed_special=()) \
                if ours else self.encode(content)
            ids += [self.special[f"<|{role}|>"], *body, self.end]
            targets += [False] + [ours and message.get("weight", 1) != 0] * (len(body) + 1)
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

    def save_pretrained(self, directory):
        """Write tokenizer.json and tokenizer_config.json (with the chat template), each by rename."""
        visible = self._visible()

        def spell(token):
            return "".join(visible[byte] for byte in token)

        merges = []
        for token, rank in sorted(self.ranks.items(), key=lambda item: item[1]):
            parts = [token[i:i + 1] for i in range(len(token))]
            while len(parts) > 2:                               # undo the last merge: apply all the earlier ones
                rank_of = [self.ranks.get(a + b, rank) for a, b in zip(parts, parts[1:])]
                i = rank_of.index(min(rank_of))
                parts[i:i + 2] = [parts[i] + parts[i + 1]]
            if len(parts) == 2:
                merges.append([spell(parts[0]), spell(parts[1])])
        flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False)
        split = {"type": "Split", "pattern": {"Regex": self.pattern}, "behavior": "Isolated", "invert": False}
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        files = {
            "tokenizer.json": {
                "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "post_processor": None,
                # The tags are no control tokens: a server that leaves those out of its replies must keep the tags.
                "added_tokens": [{"id": i, "content": token, **flags, "special": "think" not in token}
                                 for token, i in self.special.items()],
                "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]}, "decoder": level,
                "model": {"type": "BPE", "vocab": {spell(token): rank for token, rank in self.ranks.items()},
                          "merges": merges}},
            "tokenizer_config.json": {
                "tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<|pad|>", "bos_token": "<|endoftext|>",
                "eos_token": "<|end|>", "chat_template": self.CHAT_TEMPLATE, "clean_up_tokenization_spaces": False}}
        os.makedirs(directory, exist_ok=True)
        for name, content in files.items():
            path = os.path.join(directory, name)
            with open(path + ".tmp", "w", encoding="utf-8") as file:
                json.dump(content, file, ensure_ascii=False)
            os.replace(path + ".tmp", path)

    @classmethod
    def from_pretrained(cls, directory):
        """Read a tokenizer.json that `save_pretrained` wrote."""
        path = os.path.join(directory, "tokenizer.json")
        if not os.path.exists(path):
            raise FileNotFoundError(f"{path} not found: {directory!r} has no tokenizer")
        try:
            with open(path, encoding="utf-8") as file:
                content = json.load(file)
            pattern = content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
            byte_of = {character: byte for byte, character in cls._visible().items()}
            ranks = {bytes(byte_of[c] for c in token): rank for token, rank in content["model"]["vocab"].items()}
            tokenizer = cls(ranks, pattern)
            if {token["content"]: token["id"] for token in content["added_tokens"]} != tokenizer.special:
                raise ValueError("other special tokens")
        except (KeyError, TypeError, IndexError, ValueError) as error:
            raise ValueError(f"{path} is damaged or no tokenizer of this project, which is byte-level BPE with the "
                             f"special tokens {' '.join(cls.SPECIAL)} ({type(error).__name__}: {error})") from None
        return tokenizer
