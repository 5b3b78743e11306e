"""Fast paths for zaya.py: fuse(model) gives the same numbers, by other means.

    from kernels import fuse
    model = fuse(model)                     same parameters, same checkpoints, same call forms

Every path is a plain function, usable alone, that says in one line what it equals in zaya.py:

    packed_attention      attention sample by sample instead of under a dense mask        CPU, eager
    grouped_experts       the experts as two grouped matrix products                      under torch.compile, GPU
    linear_cross_entropy  LM head and loss in chunks, never holding (N, V) logits         any device
    triton_residual_norm, triton_cca_mix, triton_experts    one kernel a pass, one source for CUDA and ROCm
    compile_loss, compile_decoding                          one graph for a training step, one for a decoding step
    quantize, load        int8 weights, a scale a row

Importing this file needs neither Triton nor a GPU.  `python kernels.py` prints how equal and how fast each path is on
this machine.  Featuring: paths that are short because PyTorch does most of the work.  Does NOT include: hand-written
backward passes for the CPU, where the plain code is nearly as fast; the model (zaya.py).
"""
import argparse
import collections
import contextlib
import copy
import ctypes
import functools
import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time

import torch
import torch.nn.functional as F
from tqdm import tqdm

import zaya

# ---- attention ------------------------------------------------------------------------------------------------------


@functools.cache
def has_triton():
    return importlib.util.find_spec("triton") is not None


def on_gpu(x):
    """Whether the Triton kernels below are to be used: CUDA and ROCm builds of PyTorch bring Triton."""
    return x.is_cuda and has_triton()


def sample_lengths(position_ids):
    """(B, S) position ids -> the lengths of the samples in the flattened batch, a list; None if they are no packing."""
    before = F.pad(position_ids, (1, 0), value=-2)[:, :-1]
    padding = (position_ids == -1) & (before == -1)             # a run of padding counts as one sample
    starts = (position_ids == 0) | ((position_ids != before + 1) & ~padding)
    starts[:, 0] = True
    # A sample that starts in mid-row with a position above 0 would look back into the one before it.
    if (starts[:, 1:] & (position_ids[:, 1:] > 0)).any():
        return None
    bounds = starts.flatten().nonzero()[:, 0]
    return torch.diff(bounds, append=bounds.new_tensor([position_ids.numel()])).tolist()


def packed_attention(q, k, v, lengths):
    """Causal attention within each sample: equals scaled_dot_product_attention under CCA.attention_mask.

    q (B, S, H, D), k and v (B, S, K, D) with samples of `lengths` (they sum to B * S) -> (B, S, H * D).
    The work is the samples' squares instead of the row's.
    """
    B, S = q.shape[:2]
    q, k, v = (tensor.flatten(0, 1).split(lengths) for tensor in (q, k, v))
    outputs = []
    for sample in zip(q, k, v):
        heads_first = [tensor.transpose(0, 1)[None] for tensor in sample]           # (1, H or K, n, D)
        out = F.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True)
        outputs.append(out[0].transpose(0, 1))                                      # (n, H, D)
    return torch.cat(outputs).reshape(B, S, -1)


class FusedCCA(zaya.CCA):
    """zaya.CCA with packed attention on a CPU and one kernel for the mixing on a GPU."""

    def mix(self, packed, current, delayed, positions, cache=None):
        fits = self.head_dim >= 16 and self.head_dim & (self.head_dim - 1) == 0     # Triton's blocks: powers of two
        if cache is not None or not fits or not on_gpu(packed):
            return super().mix(packed, current, delayed, positions, cache)
        depthwise, grouped = self.conv_qk_depthwise, self.conv_qk_grouped
        return triton_cca_mix(packed, current, delayed, depthwise.weight, depthwise.bias,
                              grouped.weight.to(packed.dtype), grouped.bias, self.temp,
                              positions.cos, positions.sin, positions.position_ids)

    def attend(self, q, k, v, positions, cache=None):
        B, H, S, D = q.shape
        if S == 1 and cache is not None:
            # Decoding: the query heads that share a KV head become queries of one head, so the keys are read once.
            together = q.reshape(B, self.kv_heads, -1, D)
            return F.scaled_dot_product_attention(together, k, v, positions.mask).reshape(B, 1, H * D)
        ids = positions.position_ids
        # A list of lengths is a value, which no trace can know, and a GPU would have to be waited for.
        if cache is not None or ids is None or q.device.type != "cpu" or torch.compiler.is_compiling():
            return super().attend(q, k, v, positions, cache)
        lengths = sample_lengths(ids)
        if lengths is None or (self.sliding_window and max(lengths) > self.sliding_window):
            return super().attend(q, k, v, positions, cache)
        return packed_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), lengths)


# ---- experts --------------------------------------------------------------------------------------------------------


@torch.library.custom_op("zaya::grouped_mm", mutates_args=())
def grouped_mm(a: torch.Tensor, b: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """F.grouped_mm, which torch.compile takes in bf16 alone (PyTorch 2.13): as an operation of ours it takes any dtype.

    a (N, I), b (X, I, J), ends (X,) int32: rows up to ends[x] times b[x] -> (N, J).  a (I, N), b (N, J): a product for
    each group of the N -> (X, I, J), which is what the weights' gradient needs.
    """
    return F.grouped_mm(a, b, offs=ends)


@grouped_mm.register_fake
def _(a, b, ends):
    if b.ndim == 3:
        return a.new_empty(a.shape[0], b.shape[2])
    return a.new_empty(ends.shape[0], a.shape[0], b.shape[1])


def save_grouped_mm(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def differentiate_grouped_mm(ctx, grad):
    (a, b, ends), grad = ctx.saved_tensors, grad.contiguous()
    return grouped_mm(grad, b.mT, ends), grouped_mm(a.mT, grad, ends), None


grouped_mm.register_autograd(differentiate_grouped_mm, setup_context=save_grouped_mm)


def grouped_experts(x, gate_up_proj, down_proj, choice, weight):
    """zaya.Experts.forward as two grouped products: x (N, E), choice (N,) int64, weight (N,) fp32 -> (N, E).

    Tokens are sorted by expert; the skip expert's come last, outside of every group.
    """
    order = choice.argsort(stable=True)
    by_expert = choice[order]
    experts = torch.arange(len(down_proj), device=x.device)
    ends = torch.searchsorted(by_expert, experts, right=True).to(torch.int32)       # (X,)
    skipped = (by_expert == len(down_proj))[:, None]                                # (N, 1)
    # Outside of every group a grouped product leaves garbage, in its output and in its input's gradient.  The second
    # masked_fill clears the one, the first one's backward the other.
    tokens = x.index_select(0, order).masked_fill(skipped, 0)                       # (N, E)
    gate, up = grouped_mm(tokens, gate_up_proj.mT, ends).chunk(2, -1)        # (N, F) each
    y = grouped_mm(F.silu(gate) * up, down_proj.mT, ends).masked_fill(skipped, 0)
    return (y.index_select(0, order.argsort()) * weight[:, None]).to(x.dtype)


class FusedExperts(zaya.Experts):
    """zaya.Experts by Triton on a GPU, by grouped products under torch.compile; the products' dtype is autocast's."""

    def forward(self, x, choice, weight):
        device, dtype = x.device.type, self.down_proj.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        # The plain loop asks how many tokens each expert has: a graph break, or a wait for the GPU.  An eager CPU has
        # neither, and there the loop is as fast.
        if device == "cpu" and not torch.compiler.is_compiling():
            return super().forward(x, choice, weight)
        path = triton_experts if on_gpu(x) else grouped_experts
        with torch.autocast(device, enabled=False):
            y = path(x.to(dtype), self.gate_up_proj.to(dtype), self.down_proj.to(dtype), choice, weight)
        return y.to(x.dtype)


# ---- LM head and loss -----------------------------------------------------------------------------------------------


def linear_cross_entropy(hidden, weight, targets):
    """F.cross_entropy(model.logits(hidden), targets, reduction="sum") in fp32, a chunk of tokens at a time.

    hidden (N, E) any float, weight (V, E), targets (N,) int64, -100 where nothing is asked -> () fp32.
    """
    # 64 MiB of logits at most.  PyTorch would choose a chunk for each number of tokens, and so compile for each anew;
    # compiled, it also warns, which breaks the graph, unless the gradients may serve a second backward.
    chunk = max(1, min(256, 2**24 // len(weight)))
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=chunk,
                                                 allow_retain_graph=torch.compiler.is_compiling())
    with torch.autocast(hidden.device.type, enabled=False):
        return F.linear_cross_entropy(hidden.float(), weight.float(), targets, reduction="sum", options=options)


def summed_loss(model, input_ids, targets, position_ids, dtype=torch.float32):
    """The summed cross-entropy of a batch, everything below the LM head under autocast to `dtype`.

    input_ids, targets, position_ids (B, S) int64 -> () fp32.
    """
    with torch.autocast(input_ids.device.type, dtype, enabled=dtype != torch.float32):
        hidden = model.hidden_states(input_ids, position_ids=position_ids)
    return linear_cross_entropy(hidden.flatten(0, 1), model.output_weight, targets.flatten())


def residual_norm(x, y, scaling, norm):
    """zaya.ResidualScaling, then zaya.RMSNorm: x (…, E) fp32, y (…, E) any float -> the new x fp32, norm(x)."""
    if not on_gpu(x):
        x = scaling(x, y)
        return x, norm(x)
    return triton_residual_norm(x, y, scaling.residual_scale, scaling.residual_bias, scaling.hidden_states_scale,
                                scaling.hidden_states_bias, norm.weight, norm.eps)


class FusedLayer(zaya.Layer):
    """zaya.Layer with residual scaling and norm as one path."""

    def forward(self, x, r, positions=None, cache=None, choice=None, count=None):
        y = self.self_attn(self.input_layernorm(x), positions, cache)
        x, h = residual_norm(x, y, self.post_attention_residual_scale, self.post_attention_layernorm)
        weight, choice, r = self.gate(h, r, choice, count)
        y = self.experts(h.flatten(0, 1), choice.flatten(), weight.flatten()).view_as(h)
        return self.post_mlp_residual_scale(x, y), r, choice


# ---- torch.compile --------------------------------------------------------------------------------------------------


@functools.cache
def compile_loss(backend="inductor"):
    """-> summed_loss, compiled as one graph forward and one backward; another number of rows compiles nothing anew.

    For a `fuse`d model.  The first call costs tens of seconds (cold), later stages and processes some seconds: Inductor
    keeps what it compiled on disk.
    """
    compiled = torch.compile(summed_loss, fullgraph=True, backend=backend)

    def loss(model, input_ids, targets, position_ids, dtype=torch.float32):
        for tensor in (input_ids, targets, position_ids):
            if tensor is not None:
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return compiled(model, input_ids, targets, position_ids, dtype)
    return loss


def should_compile(model, tokens):
    """Whether a stage of so many tokens gets back what compiling its training step costs -> bool, and why.

    Decided from sizes and not from the clock, so that a run that is taken up again computes what it would have
    computed.  On a GPU always.  On a CPU the constants are rough (20 s a layer for compiling and a third of the time
    saved, at preset tiny on one core), so the saving must be three times the cost.
    """
    if model.norm.weight.device.type != "cpu":
        return True, "the training step is compiled: this is a GPU"
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler
        get_cpp_compiler()
    except Exception:                                           # Inductor raises its own, and others
        return False, "the training step is not compiled: there is no C++ compiler here"
    if any(size % 8 for size in model.layers[0].experts.down_proj.shape[1:]):
        return False, "the training step is not compiled: grouped products need hidden_size and " \
            "moe_intermediate_size in multiples of 8"
    seconds = 6 * model.parameter_counts()["active"] * tokens / 7e10                # forward and backward
    saved, warm_up = 0.3 * seconds, 20 * len(model.layers)
    sums = f"that might save {saved:.0f} of {seconds:.0f} s and cost {warm_up} s"
    if saved > 3 * warm_up:
        return True, f"the training step is compiled: {sums}"
    return False, f"the training step is not compiled: {sums}"


class Slot:
    """What stands for a zaya.LayerCache while a decode step is traced: buffers (B, K, T, D) and the column to write."""

    def __init__(self, column, k, v, packed, delayed):
        self.column, self.k, self.v, self.packed, self.delayed = column, k, v, packed, delayed

    def append(self, k, v, sliding_window=None):
        return self.k.index_copy_(2, self.column, k), self.v.index_copy_(2, self.column, v)


def decode_step(model, token, position_ids, column, buffers):
    """zaya.Zaya.hidden_states for one new token a row, with nothing in it that changes from step to step but tensors.

    token (B, 1), position_ids (B, 1), column (1,) int64; buffers: per layer k, v (B, K, T, D), packed, delayed, all
    written in place -> hidden (B, 1, E), choices (L, B, 1).
    """
    rope = model.config.rope_parameters["hybrid"]
    rotated = int(model.config.head_dim * rope["partial_rotary_factor"])
    cos, sin = zaya.CCA.rope_table(position_ids, rope["rope_theta"], rotated)
    back = column - torch.arange(buffers[0][0].shape[2], device=token.device)                       # (T,)
    mask = ((back >= 0) & (back <= position_ids))[:, None, None]                                    # (B, 1, 1, T)
    positions = zaya.CCA.Positions(position_ids, cos, sin, mask)
    x = (model.embed_tokens(token).float() + model.input_hidden_states_bias) * model.input_hidden_states_scale
    r, choices = None, []
    for layer, (k, v, packed, delayed) in zip(model.layers, buffers):
        slot = Slot(column, k, v, packed, delayed)
        x, r, choice = layer(x, r, positions, slot)
        packed.copy_(slot.packed)
        delayed.copy_(slot.delayed)
        choices.append(choice)
    return model.norm(x), torch.stack(choices)


@functools.cache
def compiled_decode_step(backend):
    # On a GPU hundreds of small kernels a step are launched together as a CUDA graph, where that is possible.
    mode = "reduce-overhead" if backend == "inductor" and torch.cuda.is_available() else None
    return torch.compile(decode_step, fullgraph=True, backend=backend, mode=mode)


def compile_decoding(model, backend="inductor"):
    """Let a fused model's `generate`, and all that decodes one token at a time, run its steps compiled -> the model.

    Raises ValueError for sliding windows: their columns are forgotten, which moves what a static buffer would hold.
    """
    if "hybrid_sliding" in model.config.layer_types:
        raise ValueError("compile_decoding: this model has layers with sliding windows; use it as it is")
    model.decoding_backend = backend
    return model


class FusedZaya(zaya.Zaya):
    """zaya.Zaya whose LM head, outside of training, reads bf16 or int8 weights as they are, and whose decoding steps
    can be compiled."""
    decoding_backend = None                                     # or the one that `compile_decoding` was asked for

    def logits(self, hidden):
        weight = self.output_weight
        if weight.dtype == torch.float32 or (torch.is_grad_enabled() and weight.requires_grad):
            return super().logits(hidden)
        head = self.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        with torch.autocast(hidden.device.type, enabled=False):
            if weight.dtype == torch.int8:
                return int8_product(hidden.float(), weight, head.scale)
            # An fp32 copy of a slice stays in the cache, one of the whole (V, E) would be read from memory again.
            return torch.cat([hidden.float() @ part.float().mT for part in weight.split(1024)], -1)

    def hidden_states(self, input_ids, attention_mask=None, position_ids=None, cache=None, routing=None):
        if isinstance(cache, Slots):
            return cache.hidden_states(input_ids, attention_mask, routing)
        one_token = cache is not None and cache.columns and input_ids.shape[1] == 1
        plain = attention_mask is None and position_ids is None and not routing and not torch.is_grad_enabled()
        if not (self.decoding_backend and one_token and plain):
            return super().hidden_states(input_ids, attention_mask, position_ids, cache, routing)
        position_ids = torch.full_like(input_ids, cache.columns)
        if cache.position is not None:
            position_ids = cache.position[:, None]
            cache.position = cache.position + 1
        for slot in cache.layers:
            self.make_room(slot)
        column = torch.full((1,), cache.layers[0].end, device=input_ids.device)
        buffers = [(slot.k, slot.v, slot.packed, slot.delayed) for slot in cache.layers]
        for tensor in (input_ids, position_ids, *sum(buffers, ())):
            torch._dynamo.maybe_mark_dynamic(tensor, [0, 2] if tensor.ndim == 4 else 0)
        # Two sizes that happen to be equal at the first call, rows and columns, are not the same size.
        with torch.fx.experimental._config.patch(use_duck_shape=False):
            step = compiled_decode_step(self.decoding_backend)
            hidden, choices = step(self, input_ids, position_ids, column, buffers)
        for slot in cache.layers:
            slot.end += 1
            slot.columns += 1
        if routing is not None:
            routing.extend(choices)
        return hidden

    def new_cache(self):
        library, _ = decoding_in_c(self)
        return Slots(self, library) if library else super().new_cache()

    @staticmethod
    def make_room(slot, block=64):
        """Let a LayerCache's buffers end with the block of columns that its next token falls into."""
        live = slot.end - slot.start
        capacity = (live // block + 1) * block
        slot.packed, slot.delayed = slot.packed.contiguous(), slot.delayed.contiguous()     # a stride is a guard
        if slot.start == 0 and slot.k.shape[2] == capacity:
            return
        for name in ("k", "v"):
            old = getattr(slot, name)
            grown = old.new_zeros(*old.shape[:2], capacity, old.shape[3])           # zeros: 0 times garbage may be NaN
            grown[:, :, :live] = old[:, :, slot.start:slot.end]
            setattr(slot, name, grown)
        slot.start, slot.end = 0, live


def fuse(model):
    """Give a Zaya and its layers their fast paths, in place -> the model.  Same parameters, same checkpoints."""
    if not isinstance(model, FusedZaya):                        # an Int8Zaya is one
        model.__class__ = FusedZaya
    for layer in model.layers:
        layer.__class__, layer.self_attn.__class__ = FusedLayer, FusedCCA
        if isinstance(layer.experts, zaya.Experts):             # int8 ones have their own
            layer.experts.__class__ = FusedExperts
    return model


# ---- int8 weights ---------------------------------------------------------------------------------------------------


def int8_rows(weight):
    """(…, N, K) -> int8 of the same shape, scale (…, N) fp32, with weight ~ int8 * scale[…, None]: a scale a row."""
    weight = weight.float()
    scale = weight.abs().amax(-1).clamp_min(1e-30) / 127
    return (weight / scale[..., None]).round_().to(torch.int8), scale


def int8_product(x, weight, scale):
    """x @ (weight * scale[:, None])^T for weight (N, K) int8, scale (N,) fp32: (…, K) any float -> (…, N).

    A few rows on a CPU read the int8 weights as they are; many rows, and a GPU, unpack them first.
    """
    rows = x.reshape(-1, x.shape[-1])
    # The packed product walks a row in whole vectors: a K that is no multiple of them is read beyond its end.
    if len(rows) <= 32 and x.device.type == "cpu" and weight.shape[1] % 32 == 0:
        y = torch.ops.aten._weight_int8pack_mm(rows.contiguous(), weight, scale.to(x.dtype))
    else:
        y = (rows @ weight.to(x.dtype).mT) * scale.to(x.dtype)
    return y.view(*x.shape[:-1], len(weight))


class Int8Linear(torch.nn.Module):
    """nn.Linear without a bias; weight (N, K) int8, scale (N,) fp32.  (…, K) -> (…, N) in x's dtype."""

    def __init__(self, shape):
        super().__init__()
        self.register_buffer("weight", torch.zeros(shape, dtype=torch.int8))
        self.register_buffer("scale", torch.zeros(shape[:-1]))

    def forward(self, x):
        return int8_product(x, self.weight, self.scale)


class Int8Embedding(Int8Linear):
    """nn.Embedding with a scale a token; tied, it is the LM head as well."""

    def forward(self, ids):
        return self.weight[ids].float() * self.scale[ids, None]


class Int8Experts(torch.nn.Module):
    """zaya.Experts with weights in int8, a scale for every expert's output channel."""

    def __init__(self, gate_up, down):
        super().__init__()
        for name, shape in (("gate_up", gate_up), ("down", down)):                  # (X, 2F, E) and (X, E, F)
            self.register_buffer(name + "_proj", torch.zeros(shape, dtype=torch.int8))
            self.register_buffer(name + "_scale", torch.zeros(shape[:-1]))

    def forward(self, x, choice, weight):
        y = torch.zeros_like(x)                                                     # as the skip expert leaves it
        for e in set(choice.tolist()) - {len(self.down_proj)}:
            here = (choice == e).nonzero()[:, 0]
            gate, up = int8_product(x[here], self.gate_up_proj[e], self.gate_up_scale[e]).chunk(2, -1)
            y[here] = int8_product(F.silu(gate) * up, self.down_proj[e], self.down_scale[e])
        return (y * weight[:, None]).to(x.dtype)


class Int8Zaya(FusedZaya):
    """A fused model whose experts, attention projections, embedding and LM head are int8: a scale an output channel.

    Routers, convolutions, norms and scales stay as they are: 1 % of the weights, which decide where tokens go.  It is
    made by `quantize`, saved by save_pretrained and mapped by from_pretrained, and is not for training.
    """
    QUANTIZED = re.compile(r"((embed_tokens|lm_head|[qko]_proj|v_proj_\w+)\.weight|experts\.\w+_proj)$")

    def __init__(self, config):
        super().__init__(config)
        for layer in self.layers:
            for name in ("q_proj", "k_proj", "v_proj_current", "v_proj_delayed", "o_proj"):
                setattr(layer.self_attn, name, Int8Linear(getattr(layer.self_attn, name).weight.shape))
            layer.experts = Int8Experts(layer.experts.gate_up_proj.shape, layer.experts.down_proj.shape)
        self.embed_tokens = Int8Embedding(self.embed_tokens.weight.shape)
        if not config.tie_word_embeddings:
            self.lm_head = Int8Linear(self.lm_head.weight.shape)
        fuse(self)

    @classmethod
    def tensors(cls, name, tensor):
        """One named tensor of a model or a checkpoint -> {name: tensor} of what stands for it in int8."""
        if not cls.QUANTIZED.search(name):
            return {name: tensor}
        weight, scale = int8_rows(tensor)
        return {name: weight, re.sub("(weight|proj)$", "scale", name): scale}


@torch.no_grad()
def quantize(model):
    """Zaya -> Int8Zaya.  Of memory-mapped weights no more than one tensor is in memory beside the result."""
    with torch.device("meta"):
        quantized = Int8Zaya(model.config)
    state = {}
    for name, tensor in model.state_dict().items():
        state |= Int8Zaya.tensors(name, tensor)
    quantized.load_state_dict(state, assign=True)
    for new, old in zip(quantized.layers, model.layers):
        new.gate.load = old.gate.load                           # not in the state: born on the meta device
    return quantized.requires_grad_(False).eval()


class Damaged(OSError, ValueError):
    """A file that does not hold what its name says; the message names it."""


def read_json(path):
    """The object in a JSON file -> dict.  Raises Damaged."""
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except (ValueError, RecursionError) as error:               # no UTF-8, no JSON, brackets without end
        raise Damaged(f"{path} is damaged: {error}") from None
    if not isinstance(content, dict):
        raise Damaged(f"{path} is damaged: it holds no JSON object")
    return content


def is_int8(folder):
    path = os.path.join(folder, "config.json")
    return os.path.exists(path) and read_json(path).get("dtype") == "int8"


def quantize_checkpoint(source, target):
    """Write the int8 form of the checkpoint in `source` to `target`, with its tokenizer.

    Raises FileExistsError where that would overwrite or round what is int8 already, FileNotFoundError, Damaged.
    """
    if is_int8(source):
        raise FileExistsError(f"{source!r} is an int8 form already")
    if os.path.exists(target) and os.path.samefile(source, target):
        raise FileExistsError(f"the int8 form of {source!r} would overwrite it: name another folder")
    load(source, int8=True).save_pretrained(target)
    for name in os.listdir(source):
        weights = name in ("config.json", "model.safetensors.index.json")
        if name.endswith((".json", ".jinja")) and not weights:
            copied = os.path.join(target, name)
            shutil.copyfile(os.path.join(source, name), copied + ".tmp")
            os.replace(copied + ".tmp", copied)


def load(folder, int8=False, device="cpu"):
    """A checkpoint in the official layout, or its int8 form, fused; int8: also rounds the former.

    Raises FileNotFoundError or Damaged.
    """
    rounded = is_int8(folder)
    kind = Int8Zaya if rounded else zaya.Zaya
    try:
        model = kind.from_pretrained(folder, device=device)
    except ValueError as error:                                 # its message may name the file without the folder
        raise Damaged(f"{folder}: {error}") from None
    if rounded:
        return model.requires_grad_(False)
    return quantize(fuse(model)) if int8 else fuse(model)


# ---- decoding on a CPU: one C function ------------------------------------------------------------------------------
# A decoding step in PyTorch is hundreds of small operations, in C one call.  A call may hold several tokens of a row:
# so prompts are read, of any lengths and without padding.  For small models in fp32; `decoding_in_c` says when.

STEP = r"""
#include <math.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

// SIZES: E, H, K, D, X, F, R as in zaya.py; ROUTES of a router; RoPE turns 2 HALF channels.  V: half of the values.
enum { SIZES, G = H + K, Q = H / K, C = G * D, V = K * D / 2, SCORES = (ROUTES + 15) / 16 * 16 };
// A vector is as wide as a register: GCC 12 takes apart a wider one badly, which makes all of this five times slower.
#if defined __AVX512F__
enum { WIDTH = 16 };
#elif defined __AVX__
enum { WIDTH = 8 };
#else
enum { WIDTH = 4 };
#endif
enum { ROWS = 6, PARTS = 16 / WIDTH };      // a product keeps 6 rows of 16 outputs in registers, in parts
typedef float vector __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));

typedef struct {                            // a layer's weights, as `folded` lays them out: matrices by 16 outputs
    float project[(C + 2 * V) / 16][E][16]; // q~, k~, the current half of v, the delayed one
    float taps[G][D / 16][3 * D][16];       // both convolutions as one, of the last two tokens and this one
    float out[E / 16][H * D][16];
    float down[R / 16][E][16], fc1[R / 16][R][16], fc2[R / 16][R][16], routes[SCORES / 16][R][16];
    float gate_up[X][2 * F / 16][E][16], experts[X][E / 16][F][16];
    float after_attention[2][E], after_experts[2][E];           // the residual stream's scale and bias
    float tap_bias[G][D], length[G], down_bias[R], gamma[R], fc1_bias[R], fc2_bias[R], balance[ROUTES];
} Layer;

typedef struct {                            // a token on its way: Python writes the first row, and reads x
    float x[E], cos[HALF], sin[HALF];
    float r[R], weight;
    float h[E], latent[G][D], v[2 * V], seen[G][3][D], qk[G][D], mixed[H][D], mlp[4][R], score[SCORES], gate_up[2 * F];
} Token;
enum { STRIDE = sizeof(Token) / sizeof(float) };
const int token_floats = STRIDE;

// y (n, out) += x (n, in) w (in, out), for the rows named, or the first n; they are ldx and ldy floats apart.  w lies
// in panels of 16 columns, `panel` floats apart, whose rows are `next` floats apart.
static void product(int n, const int *rows, int in, int out, const float *x, long ldx,
                    const float *w, long panel, long next, float *y, long ldy) {
    for (int o = 0; o < out; o += 16, w += panel)
        for (int begin = 0; begin < n; begin += ROWS) {
            int m = n - begin < ROWS ? n - begin : ROWS;
            const float *from[ROWS];
            float *to[ROWS];
            vector sum[ROWS][PARTS];
            for (int j = 0; j < ROWS; j++) {                    // where rows are missing, the last one again
                long row = begin + (j < m ? j : m - 1);
                row = rows ? rows[row] : row;
                from[j] = x + row * ldx;
                to[j] = y + row * ldy + o;
                for (int p = 0; p < PARTS; p++) sum[j][p] = ((vector *)to[j])[p];
            }
            for (int i = 0; i < in; i++)
                for (int j = 0; j < ROWS; j++)
                    for (int p = 0; p < PARTS; p++)
                        sum[j][p] += from[j][i] * ((const vector *)(w + i * next))[p];
            for (int j = 0; j < ROWS; j++)
                for (int p = 0; p < PARTS; p++) ((vector *)to[j])[p] = sum[j][p];
        }
}

// The same for a matrix in panels, between two fields of the tokens.
static void dense(int n, const int *rows, int in, int out, const float *x, const void *w, float *y) {
    product(n, rows, in, out, x, STRIDE, w, 16 * in, 16, y, STRIDE);
}

// e^x = 2^n e^f to within rounding, in arithmetic that compilers turn into vectors.
static inline float exponential(float x) {
    x = x < -87 ? -87 : x > 88 ? 88 : x;
    float n = rintf(x * 1.44269504f), f = x - n * 0.693147181f;
    union { int bits; float value; } power = {((int)n + 127) * (1 << 23)};
    return power.value * (1 + f * (1 + f * (1 / 2.f + f * (1 / 6.f + f * (1 / 24.f + f * (1 / 120.f + f / 720))))));
}

// x Phi(x), with erf by Abramowitz and Stegun 7.1.26: wrong by 1.5e-7 at most.
static inline float gelu(float x) {
    float z = fabsf(x) * 0.707106781f, t = 1 / (1 + 0.3275911f * z);
    float series = 1.421413741f + t * (-1.453152027f + t * 1.061405429f);
    series = t * (0.254829592f + t * (-0.284496736f + t * series));
    return x / 2 * (1 + copysignf(1 - series * exponential(-z * z), x));
}

static inline float squares(const float *x, int n) {
    float sum = 0;
    #pragma omp simd reduction(+ : sum)
    for (int i = 0; i < n; i++) sum += x[i] * x[i];
    return sum;
}

// y = x / sqrt(mean x^2 + eps); the norm's weight is in the matrix that reads y.
static inline void rms_norm(float *y, const float *x, int n, float eps) {
    float scale = 1 / sqrtf(squares(x, n) / n + eps);
    for (int i = 0; i < n; i++) y[i] = x[i] * scale;
}

static inline void softmax(float *x, int n) {
    float top = x[0], sum = 0;
    #pragma omp simd reduction(max : top)
    for (int i = 0; i < n; i++) top = x[i] > top ? x[i] : top;
    #pragma omp simd reduction(+ : sum)
    for (int i = 0; i < n; i++) sum += x[i] = exponential(x[i] - top);
    for (int i = 0; i < n; i++) x[i] /= sum;
}

// N tokens through L layers.  tokens[n] goes to slot[n], where position[n] tokens are before it; the tokens of one slot
// come in order.  kv[l]: (slots, keys and values, K, T, D), keys in blocks of 16 columns; recent[l]: (slots, 2 C + V),
// the last two tokens' latents by head and the last delayed value.  choices (N, L).
void step(int N, int L, int T, float eps, float **kv, float **recent, const Layer *layers, const int *slot,
          const int *position, Token *tokens, short *choices) {
    Token *t = tokens;
    #define EACH_TOKEN for (int n = 0; t = tokens + n, n < N; n++)
    int order[N];
    float *scores = malloc(sizeof(float) * Q * T);
    EACH_TOKEN memset(t->r, 0, sizeof t->r);
    for (int l = 0; l < L; l++) {
        const Layer *w = layers + l;
        // q~, k~, v = W norm(x); everything that is not carried on begins with 0
        EACH_TOKEN {
            memset(t->h, 0, sizeof(Token) - offsetof(Token, h));
            rms_norm(t->h, t->x, E, eps);
        }
        dense(N, NULL, E, C + 2 * V, tokens->h, w->project, tokens->latent[0]);

        // The value shift: v = [Wv1 x_t; Wv2 x_(t-1)];  what the convolutions see: this token's latents and two before
        EACH_TOKEN {
            float *past = recent[l] + (long)slot[n] * (2 * C + V), *delayed = past + 2 * C;
            for (int i = 0; i < V; i++) {
                float current = t->v[V + i];
                t->v[V + i] = delayed[i];
                delayed[i] = current;
            }
            for (int g = 0; g < G; g++, past += 2 * D) {
                memcpy(t->seen[g][0], past, 2 * D * sizeof(float));
                memcpy(t->seen[g][2], t->latent[g], D * sizeof(float));
                memcpy(past, t->seen[g][1], 2 * D * sizeof(float));
            }
        }
        // conv_in_head(conv_per_channel([q~; k~]))
        for (int g = 0; g < G; g++) dense(N, NULL, 3 * D, D, tokens->seen[g][0], w->taps[g], tokens->qk[g]);

        EACH_TOKEN {
            // [q; k] += [m_q; m_k]:  m_q = (q~ + k~ of its group) / 2,  m_k = mean of m_q over the group
            for (int h = 0; h < H; h++)
                for (int i = 0; i < D; i++) {
                    float mean = (t->latent[h][i] + t->latent[H + h / Q][i]) / 2;
                    t->qk[h][i] += mean;
                    t->qk[H + h / Q][i] += mean / Q;
                }
            // q / |q|,  temp_k sqrt(D) k / |k|,  then RoPE
            for (int g = 0; g < G; g++) {
                float *u = t->qk[g];
                for (int i = 0; i < D; i++) u[i] += w->tap_bias[g][i];
                float scale = w->length[g] / fmaxf(sqrtf(squares(u, D)), 1.1920929e-7f);
                for (int i = 0; i < D; i++) u[i] *= scale;
                for (int i = 0; i < HALF; i++) {
                    float a = u[i], b = u[i + HALF];
                    u[i] = a * t->cos[i] - b * t->sin[i];
                    u[i + HALF] = b * t->cos[i] + a * t->sin[i];
                }
            }
            // softmax(q k^T) v, together for the query heads of a KV head
            int p = position[n];
            float *k = kv[l] + (long)slot[n] * 2 * K * T * D, *v = k + (long)K * T * D;
            for (int g = 0; g < K; g++, k += (long)T * D, v += (long)T * D) {
                for (int i = 0; i < D; i++) k[(p / 16 * D + i) * 16 + p % 16] = t->qk[H + g][i];
                memcpy(v + p * D, t->v + g * D, D * sizeof(float));
                for (int j = 0; j < Q; j++) memset(scores + j * T, 0, (p / 16 + 1) * 16 * sizeof(float));
                product(Q, NULL, D, p + 1, t->qk[g * Q], D, k, 16 * D, 16, scores, T);
                for (int j = 0; j < Q; j++) softmax(scores + j * T, p + 1);
                product(Q, NULL, p + 1, D, scores, T, v, 16, D, t->mixed[g * Q], D);
            }
            for (int i = 0; i < E; i++) t->x[i] = t->x[i] * w->after_attention[0][i] + w->after_attention[1][i];
        }
        dense(N, NULL, H * D, E, tokens->mixed[0], w->out, tokens->x);

        // r_l = W_down h + gamma r_(l-1),  s = softmax(W3 gelu(W2 gelu(W1 norm(r))))
        EACH_TOKEN rms_norm(t->h, t->x, E, eps);
        dense(N, NULL, E, R, tokens->h, w->down, tokens->mlp[0]);
        EACH_TOKEN {
            for (int i = 0; i < R; i++) t->r[i] = t->mlp[0][i] + w->down_bias[i] + w->gamma[i] * t->r[i];
            rms_norm(t->mlp[1], t->r, R, eps);
        }
        dense(N, NULL, R, R, tokens->mlp[1], w->fc1, tokens->mlp[2]);
        EACH_TOKEN for (int i = 0; i < R; i++) t->mlp[2][i] = gelu(t->mlp[2][i] + w->fc1_bias[i]);
        dense(N, NULL, R, R, tokens->mlp[2], w->fc2, tokens->mlp[3]);
        EACH_TOKEN for (int i = 0; i < R; i++) t->mlp[3][i] = gelu(t->mlp[3][i] + w->fc2_bias[i]);
        dense(N, NULL, R, SCORES, tokens->mlp[3], w->routes, tokens->score);

        // e = argmax(s + b),  weight = s_e
        EACH_TOKEN {
            int best = 0;
            softmax(t->score, ROUTES);
            for (int e = 1; e < ROUTES; e++)
                if (t->score[e] + w->balance[e] > t->score[best] + w->balance[best]) best = e;
            t->weight = t->score[best];
            choices[n * L + l] = best;
            for (int i = 0; i < E; i++) t->x[i] = t->x[i] * w->after_experts[0][i] + w->after_experts[1][i];
        }
        // y = weight W_down(silu(g) u),  [g; u] = W_gu h,  an expert at a time; the skip expert has no weights
        for (int e = 0; e < X; e++) {
            int visits = 0;
            for (int n = 0; n < N; n++)
                if (choices[n * L + l] == e) order[visits++] = n;
            dense(visits, order, E, 2 * F, tokens->h, w->gate_up[e], tokens->gate_up);
            for (int j = 0; j < visits; j++) {
                t = tokens + order[j];
                for (int i = 0; i < F; i++)
                    t->gate_up[i] *= t->weight * t->gate_up[F + i] / (1 + exponential(-t->gate_up[i]));
            }
            dense(visits, order, F, E, tokens->gate_up, w->experts[e], tokens->x);
        }
    }
    free(scores);
}
"""


def panels(matrix, reads=1.0, scales=None):
    """(…, out, in), a norm's weight before it, a residual scale behind it -> (…, out / 16, in, 16)."""
    matrix = matrix * reads
    if scales is not None:
        matrix = matrix * scales[:, None]
    return matrix.unflatten(-2, (-1, 16)).mT


def folded(layer):
    """A layer's weights -> (numbers,) fp32, in the order of the struct Layer."""
    cca, router, experts = layer.self_attn, layer.gate, layer.experts
    D, by_head = cca.head_dim, (cca.heads + cca.kv_heads, -1)
    norm1, scale1 = layer.input_layernorm.weight, layer.post_attention_residual_scale
    norm2, scale2 = layer.post_attention_layernorm.weight, layer.post_mlp_residual_scale
    project = torch.cat([cca.q_proj.weight, cca.k_proj.weight, cca.v_proj_current.weight, cca.v_proj_delayed.weight])
    routes = F.pad(router.out_proj.weight, (0, 0, 0, -len(router.out_proj.weight) % 16))
    # A convolution of a convolution, of two taps each, has three.
    channel, head = cca.conv_qk_depthwise, cca.conv_qk_grouped
    old, new = channel.weight.view(*by_head, D, 2).unbind(-1)                       # (G, 1, D)
    head_old, head_new = head.weight.view(*by_head, D, 2).unbind(-1)                # (G, D out, D in)
    taps = torch.cat([head_old * old, head_old * new + head_new * old, head_new * new], -1)
    tap_bias = head.bias + ((head_old + head_new) @ channel.bias.view(*by_head, 1)).flatten()
    parts = [
        panels(project, norm1),
        panels(taps),
        panels(cca.o_proj.weight, 1.0, scale1.hidden_states_scale),
        panels(router.down_proj.weight, norm2),
        panels(router.fc1.weight, router.norm.weight),
        panels(router.fc2.weight),
        panels(routes),
        panels(experts.gate_up_proj, norm2),
        panels(experts.down_proj, 1.0, scale2.hidden_states_scale)]
    # (x + b_r) a_r + (y + b_o) a_o  =  x a_r + (b_r a_r + b_o a_o) + a_o y
    for scale in (scale1, scale2):
        bias = scale.residual_bias * scale.residual_scale
        bias = bias + scale.hidden_states_bias * scale.hidden_states_scale
        parts += [scale.residual_scale, bias]
    parts += [
        tap_bias,
        F.pad(D ** 0.5 * cca.temp, (cca.heads, 0), value=1.0),                      # q / sqrt(D) has length 1
        router.down_proj.bias,
        getattr(router, "router_states_scale", router.down_proj.bias),              # the first layer's multiplies 0
        router.fc1.bias,
        router.fc2.bias,
        router.balancing_biases]
    return torch.cat([part.detach().flatten() for part in parts])


def compile_step(sizes, compiler, capability=None):
    """The C function for these sizes, "E=128,…" -> a ctypes library, kept on disk: later processes only open it.

    Raises OSError or subprocess.CalledProcessError where there is no compiler, or one that cannot.
    """
    # ATEN_CPU_CAPABILITY lets PyTorch compute as another CPU would; then this code must run on that one too.
    arch = {"default": [], "avx2": ["-march=x86-64-v3"]}.get(capability, ["-march=native"])
    command = [*shlex.split(compiler), "-O3", *arch, "-std=gnu11", "-fopenmp-simd",
               "-fno-math-errno", "-fno-trapping-math", "-DSIZES=" + sizes, "-x", "c", "-"]

    def run(*more, source=STEP):
        return subprocess.run(command + [*more], input=source, check=True, capture_output=True, text=True).stdout

    # The name tells source, sizes, compiler and CPU: these are what the compiler itself says of the last two.
    described = run("-dM", "-E", source="")
    told = STEP + str(command) + described
    name = hashlib.sha256(told.encode()).hexdigest()[:24] + ".so"
    folder = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = os.path.join(folder, "zaya")
    path = os.path.join(folder, name)
    if not os.path.exists(path):
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            built = os.path.join(scratch, name)
            run("-shared", "-fPIC", "-o", built, "-lm")
            os.replace(built, path)
    library = ctypes.CDLL(path)
    numbers, pointers = [ctypes.c_int] * 3 + [ctypes.c_float], [ctypes.c_void_p] * 7
    library.step.argtypes = numbers + pointers
    return library


@functools.cache
def compiled_step(sizes, compiler, capability):
    """-> compile_step's library or None, and a sentence: what fails once is not tried again in this process."""
    try:
        return compile_step(sizes, compiler, capability), "C decodes"
    except (OSError, subprocess.CalledProcessError) as error:
        return None, f"PyTorch decodes: no compiler built the C function ({error})"


def decoding_in_c(model):
    """-> the library whose `step` decodes this model, or None where PyTorch does; and why, in a sentence."""
    config, state = model.config, model.state_dict().values()
    sizes = dict(E=config.hidden_size, D=config.head_dim, F=config.moe_intermediate_size, R=config.router_hidden_size)
    problem = None
    if any(tensor.dtype != torch.float32 or tensor.device.type != "cpu" for tensor in state):
        problem = "the weights must be fp32 on a CPU"
    elif torch.is_autocast_enabled("cpu"):
        problem = "autocast asks for another dtype"
    elif model.decoding_backend:
        problem = "compile_decoding asks for PyTorch's compiler"
    elif "hybrid_sliding" in config.layer_types:
        problem = "a sliding window forgets columns"
    elif any(type(layer) is not FusedLayer for layer in model.layers):
        problem = "the layers are of a class of their own"
    elif any(size % 16 for size in sizes.values()):
        problem = f"{sizes} must be multiples of 16"
    elif sum(tensor.numel() for tensor in state) > 2**27:
        problem = "at more than 2^27 parameters each call of generate would wait for `folded`"
    if problem:
        return None, f"PyTorch decodes: {problem}"
    rotated = int(config.head_dim * config.rope_parameters["hybrid"]["partial_rotary_factor"])
    sizes |= dict(H=config.num_attention_heads, K=config.num_key_value_heads, X=config.num_experts,
                  ROUTES=config.router_classes, HALF=rotated // 2)
    text = ",".join(f"{name}={size}" for name, size in sizes.items())
    return compiled_step(text, os.environ.get("CC") or "cc", os.environ.get("ATEN_CPU_CAPABILITY"))


class Slots:
    """What stands for a zaya.Cache while C decodes: rows live in slots, and a step names the slots that go on.

    slot, position (B,) int64: where each row lives, and how many tokens it has.  For each layer kv, keys and values
    (slots, 2, K, T / 16, 16 * D), and recent (slots, 2 C + K*D/2), LayerCache's packed and delayed.
    """
    piece = 512                                                 # tokens that are read in one call

    def __init__(self, model, library):
        self.model, self.library = model, library
        self.columns = self.room = 0                            # T: those in use, and those there are
        self.slot = self.position = None
        # Made for each call of generate: the weights may have changed since the last one.
        self.layers = torch.stack([folded(layer) for layer in model.layers])

    def begin(self, rows):
        config = self.model.config
        K, D = config.num_key_value_heads, config.head_dim
        latents = (config.num_attention_heads + K) * D
        self.kv, self.recent = [], []
        for _ in self.layers:
            self.kv.append(torch.zeros(rows, 2, K, 0, 16 * D))
            self.recent.append(torch.zeros(rows, 2 * latents + K * D // 2))
        self.slot = torch.arange(rows)
        self.position = torch.zeros(rows, dtype=torch.long)

    def select(self, rows):
        """As zaya.Cache.select.  Rows that leave cost nothing; where rows are copied, each gets a slot of its own."""
        copied = len(rows) > len(self.slot)
        self.slot = self.slot[rows]
        self.position = self.position[rows]
        if copied:
            self.spread(self.room)

    def spread(self, columns):
        """A slot for each row, with room for so many tokens; those that nobody lives in are dropped."""
        more = cdiv(columns - self.room, 16)
        self.room += 16 * more
        for index, kv in enumerate(self.kv):
            kv = kv[self.slot]
            self.kv[index] = F.pad(kv, (0, 0, 0, more)) if more else kv
            self.recent[index] = self.recent[index][self.slot]
        self.slot = torch.arange(len(self.slot))

    def hidden_states(self, input_ids, attention_mask=None, routing=None):
        """zaya.Zaya.hidden_states with this cache: (B, S) -> (B, S, E); what stands at padding means nothing."""
        B, S = input_ids.shape
        if self.slot is None:
            self.begin(B)
        self.columns += S
        if self.columns > self.room:
            self.spread(2 * self.columns + 128)
        real = torch.ones_like(input_ids)
        if attention_mask is not None:
            real = attention_mask.long()
        position = self.position[:, None] + real.cumsum(1) - 1
        self.position = self.position + real.sum(1)
        x = torch.zeros(B, S, self.model.config.hidden_size)
        choices = torch.zeros(B, S, len(self.layers), dtype=torch.int16)
        for part in real.nonzero().split(self.piece):           # of all tokens, one row after the other
            here = part.unbind(1)
            slot = self.slot[here[0]]
            x[here], choices[here] = self.read(input_ids[here], slot, position[here])
        if routing is not None:
            routing.extend(choices.permute(2, 0, 1))
        return self.model.norm(x)

    def read(self, tokens, slot, position):
        """Tokens (N,), several of a slot in order -> the stream behind the last layer (N, E), choices (N, L) int16."""
        model, config, N = self.model, self.model.config, len(tokens)
        rope = config.rope_parameters["hybrid"]
        rotated = int(config.head_dim * rope["partial_rotary_factor"])
        cos, sin = zaya.CCA.rope_table(position, rope["rope_theta"], rotated)
        x = model.embed_tokens(tokens) + model.input_hidden_states_bias
        x = x * model.input_hidden_states_scale
        known = torch.cat([x, cos, sin], 1)
        token_floats = ctypes.c_int.in_dll(self.library, "token_floats")
        work = torch.empty(N, token_floats.value)
        work[:, :known.shape[1]] = known
        choices = torch.empty(N, len(self.layers), dtype=torch.int16)
        memory = [self.layers, slot.int(), position.int(), work, choices]

        def addresses(tensors):
            return (ctypes.c_void_p * len(tensors))(*[tensor.data_ptr() for tensor in tensors])

        self.library.step(N, len(self.layers), self.room, config.rms_norm_eps,
                          addresses(self.kv), addresses(self.recent), *addresses(memory))
        return work[:, :config.hidden_size], choices


# ---- Triton, for CUDA and ROCm from one source ----------------------------------------------------------------------
# Each @triton.jit function lives in a cached function, so that Triton is imported at the first call and not with this
# file.  Sums are accumulated in fp32 and in a fixed order, without atomics: two runs give the same bits.  The block
# sizes fit an H100 and an MI300X; nobody has tuned them.  In `mix` to `weight_gradient`, token indices are columns.

def import_triton():
    """-> the modules triton and triton.language.  Raises RuntimeError, saying what to do, where there is no Triton."""
    try:
        import triton
        import triton.language as tl
    except ImportError as error:
        raise RuntimeError(f"the Triton kernels need Triton ({error}): pip install triton, or use the other paths of "
                           "this file, which need only PyTorch") from None
    return triton, tl


def cdiv(a, b):
    return -(-a // b)


@functools.cache
def norm_kernels():
    """-> forward, backward of `triton_residual_norm`; a program holds whole rows, E channels in a power of two."""
    triton, tl = import_triton()

    @triton.jit
    def norm_forward(x, y, vectors, out, normed, eps, E, BLOCK: tl.constexpr):
        c = tl.arange(0, BLOCK)
        here, at = c < E, tl.program_id(0).to(tl.int64) * E + c
        a_r, b_r = tl.load(vectors + c, here, 0.), tl.load(vectors + E + c, here, 0.)
        a_o, b_o = tl.load(vectors + 2 * E + c, here, 0.), tl.load(vectors + 3 * E + c, here, 0.)
        new = (tl.load(x + at, here, 0.) + b_r) * a_r + (tl.load(y + at, here, 0.).to(tl.float32) + b_o) * a_o
        tl.store(out + at, new, here)
        tl.store(normed + at, tl.load(vectors + 4 * E + c, here, 0.) * new * tl.rsqrt(tl.sum(new * new, 0) / E + eps),
                 here)

    @triton.jit
    def norm_backward(x, y, vectors, d_out, d_normed, dx, dy, sums, eps, N, E, ROWS: tl.constexpr, BLOCK: tl.constexpr):
        program, c = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
        here = c < E
        a_r, b_r = tl.load(vectors + c, here, 0.), tl.load(vectors + E + c, here, 0.)
        a_o, b_o = tl.load(vectors + 2 * E + c, here, 0.), tl.load(vectors + 3 * E + c, here, 0.)
        w = tl.load(vectors + 4 * E + c, here, 0.)
        sum_d = tl.zeros((BLOCK,), tl.float32)
        sum_x, sum_y, sum_unit = sum_d, sum_d, sum_d
        for row in range(program * ROWS, tl.minimum((program + 1) * ROWS, N)):
            at = row * E + c
            stream = tl.load(x + at, here, 0.) + b_r                                # cheaper to redo than to keep
            update = tl.load(y + at, here, 0.).to(tl.float32) + b_o
            new = stream * a_r + update * a_o
            rms = tl.rsqrt(tl.sum(new * new, 0) / E + eps)
            unit, d = new * rms, tl.load(d_normed + at, here, 0.).to(tl.float32)
            sum_unit += d * unit
            d *= w
            d = tl.load(d_out + at, here, 0.) + rms * (d - unit * (tl.sum(d * unit, 0) / E))
            tl.store(dx + at, d * a_r, here)
            tl.store(dy + at, d * a_o, here)
            sum_d += d
            sum_x += d * stream
            sum_y += d * update
        sums += program * 5 * E + c
        tl.store(sums, sum_x, here)
        tl.store(sums + E, sum_d * a_r, here)
        tl.store(sums + 2 * E, sum_y, here)
        tl.store(sums + 3 * E, sum_d * a_o, here)
        tl.store(sums + 4 * E, sum_unit, here)

    return norm_forward, norm_backward


ROWS = 16                                                               # of which a program sums the five gradients


@torch.library.custom_op("zaya::norm_forward", mutates_args=())
def norm_forward(x: torch.Tensor, y: torch.Tensor, vectors: torch.Tensor, dtype: torch.dtype,
                 eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """`vectors` (5, E) fp32 are a_r, b_r, a_o, b_o, w."""
    (kernel, _), E = norm_kernels(), x.shape[-1]
    out, normed = torch.empty_like(x), torch.empty_like(x, dtype=dtype)
    kernel[(x.numel() // E,)](x, y, vectors, out, normed, eps, E, BLOCK=1 << (E - 1).bit_length())
    return out, normed


@norm_forward.register_fake
def _(x, y, vectors, dtype, eps):
    return torch.empty_like(x), torch.empty_like(x, dtype=dtype)


@torch.library.custom_op("zaya::norm_backward", mutates_args=())
def norm_backward(x: torch.Tensor, y: torch.Tensor, vectors: torch.Tensor, d_out: torch.Tensor, d_normed: torch.Tensor,
                  eps: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    (_, kernel), E = norm_kernels(), x.shape[-1]
    N = x.numel() // E
    dx, dy, sums = torch.empty_like(x), torch.empty_like(y), x.new_empty(cdiv(N, ROWS), 5, E)
    kernel[(len(sums),)](x, y, vectors, d_out.contiguous(), d_normed.contiguous(), dx, dy, sums, eps, N, E, ROWS=ROWS,
                         BLOCK=1 << (E - 1).bit_length(), num_warps=8)
    return dx, dy, sums.sum(0)


@norm_backward.register_fake
def _(x, y, vectors, d_out, d_normed, eps):
    return torch.empty_like(x), torch.empty_like(y), torch.empty_like(vectors)


def save_norm(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3])
    ctx.eps = inputs[4]


def differentiate_norm(ctx, d_out, d_normed):
    return *norm_backward(*ctx.saved_tensors, d_out, d_normed, ctx.eps), None, None


norm_forward.register_autograd(differentiate_norm, setup_context=save_norm)


def triton_residual_norm(x, y, residual_scale, residual_bias, hidden_states_scale, hidden_states_bias, weight,
                         eps=1e-5):
    """Join a sublayer's output to the stream and norm the result for the next sublayer, in one pass.

        x <- (x + b_r) * a_r + (y + b_o) * a_o,    normed = w * x / sqrt(mean(x^2) + eps)

    x (…, E) fp32, y (…, E) any float, five vectors (E,) any float -> x (…, E) fp32, normed (…, E) in weight's dtype.
    Equals zaya.py's ResidualScaling followed by RMSNorm.  Raises ValueError unless x is fp32 and of y's shape.
    """
    if x.dtype != torch.float32 or x.shape != y.shape:
        raise ValueError(f"triton_residual_norm: x must be fp32 and of y's shape {tuple(y.shape)}, not {x.dtype} "
                         f"{tuple(x.shape)}")
    vectors = residual_scale, residual_bias, hidden_states_scale, hidden_states_bias, weight
    return norm_forward(x.contiguous(), y.contiguous(), torch.stack([v.float() for v in vectors]),
                                    weight.dtype, eps)


@functools.cache
def mix_kernels():
    """-> mix (forward, and backward up to the second convolution's output), unmix (the rest of backward).

    A program works on BT of the N = B * S tokens and one of the H + K heads; the head's D channels are one block, and
    both dimensions of the convolution inside it.  `link` (N,) int8: does the token see the one before it.
    """
    triton, tl = import_triton()

    @triton.jit
    def mix(packed, current, delayed, w0, b0, w1, b1, temp, cos, sin, link, q, k, v, dz, taps, sums, N,
            H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, BACKWARD: tl.constexpr,
            BT: tl.constexpr, BI: tl.constexpr):
        C: tl.constexpr = (H + K) * D
        GROUP: tl.constexpr = H // K
        V: tl.constexpr = K * D // 2                                                # half of the value channels
        head, c = tl.program_id(1), tl.arange(0, D)[None, :]
        is_key = head >= H
        group = tl.where(is_key, head - H, head // GROUP)
        t = (tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT))[:, None]
        real = t < N
        one = tl.load(link + t, real, 0) != 0                                       # t sees t - 1
        two = one & (tl.load(link + t - 1, one, 0) != 0)                            # and t - 1 sees t - 2
        channel = head * D + c
        z = tl.zeros((BT, D), tl.float32) + tl.load(b1 + channel).to(tl.float32)
        for i in range(0, D, BI):                                                   # a few channels in: few registers
            inner = i + tl.arange(0, BI)
            channel_in = head * D + inner[None, :]
            at_in = t * C + channel_in                                              # (BT, BI)
            p0 = tl.load(packed + at_in, real, 0.).to(tl.float32)
            p1 = tl.load(packed + at_in - C, one, 0.).to(tl.float32)
            p2 = tl.load(packed + at_in - 2 * C, two, 0.).to(tl.float32)
            old, new = tl.load(w0 + channel_in).to(tl.float32), tl.load(w0 + C + channel_in).to(tl.float32)
            bias = tl.load(b0 + channel_in).to(tl.float32)
            y0 = (bias + p0 * new + p1 * old).to(packed.dtype.element_ty)           # the first convolution at t
            y1 = (bias + p1 * new + p2 * old).to(packed.dtype.element_ty)           # at t - 1; its bias at a border
            matrix = w1 + channel * D + inner[:, None]                              # (BI in, D out)
            z = tl.dot(y0, tl.load(matrix + C * D), z, input_precision="ieee")
            z = tl.dot(y1, tl.load(matrix), z, input_precision="ieee")
            if BACKWARD:
                tl.store(taps + at_in + t * C, y1, real)                            # (N, 2, C)
                tl.store(taps + at_in + t * C + C, y0, real)

        first = tl.where(is_key, group * GROUP, head)                               # q-k-mean: a key and the mean of
        count = tl.where(is_key, GROUP, 1)                                          # its queries, a query and its key
        mean = tl.zeros((BT, D), tl.float32)
        for h in range(first, first + count):
            mean += tl.load(packed + t * C + h * D + c, real, 0.).to(tl.float32)
        z += (mean / count + tl.load(packed + t * C + (H + group) * D + c, real, 0.).to(tl.float32)) / 2

        norm = tl.sqrt(tl.sum(z * z, 1, keep_dims=True))
        scale = D ** 0.5 / tl.maximum(norm, 1.1920929e-7)
        unit = z * scale
        gain = tl.where(is_key, tl.load(temp + group).to(tl.float32), 1.)
        turned, angle = real & (c < 2 * HALF), t * HALF + tl.where(c < HALF, c, c - HALF)
        cosine = tl.load(cos + angle, turned, 1.)
        sine = tl.load(sin + angle, turned, 0.) * tl.where(c < HALF, -1., 1.)
        partner = tl.where(c < HALF, c + HALF, tl.where(c < 2 * HALF, c - HALF, c))
        partner = tl.broadcast_to(partner, (BT, D))
        at_q, at_k = t * (H * D) + head * D + c, t * (K * D) + group * D + c
        if BACKWARD:                                                                # q and k hold their gradients
            if is_key:
                d = tl.load(k + at_k, real, 0.).to(tl.float32)
            else:
                d = tl.load(q + at_q, real, 0.).to(tl.float32)
            d = d * cosine - tl.gather(d, partner, 1) * sine                        # turn back
            sums += tl.program_id(0) * 2 * C + channel
            tl.store(sums + C, tl.sum(d * unit, 0, keep_dims=True))                 # for the temperature
            d *= gain
            along = tl.sum(d * unit, 1, keep_dims=True) / D
            d = scale * (d - tl.where(norm > 1.1920929e-7, unit * along, 0.))
            tl.store(sums, tl.sum(d, 0, keep_dims=True))                            # for the second bias
            tl.store(dz + t * C + channel, d, real)
        else:
            d = unit * gain
            d = d * cosine + tl.gather(d, partner, 1) * sine
            if is_key:
                e = group * D + c
                now = tl.load(current + t * V + e, real & (e < V), 0.).to(tl.float32)
                before = tl.load(delayed + (t - 1) * V + e - V, one & (e >= V), 0.).to(tl.float32)
                tl.store(v + at_k, now + before, real)
                tl.store(k + at_k, d, real)
            else:
                tl.store(q + at_q, d, real)

    @triton.jit
    def unmix(packed, w0, w1, link, dz, d_packed, sums, N, H: tl.constexpr, K: tl.constexpr, D: tl.constexpr,
              BT: tl.constexpr):
        C: tl.constexpr = (H + K) * D
        GROUP: tl.constexpr = H // K
        head, c, outer = tl.program_id(1), tl.arange(0, D)[None, :], tl.arange(0, D)[:, None]
        is_key = head >= H
        group = tl.where(is_key, head - H, head // GROUP)
        t = (tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT))[:, None]
        one = tl.load(link + t + 1, t + 1 < N, 0) != 0                              # t + 1 sees t
        two = one & (tl.load(link + t + 2, t + 2 < N, 0) != 0)                      # and t + 2 sees t + 1
        channel = head * D + c
        at = t * C + channel
        d0 = tl.load(dz + at, t < N, 0.)
        d1 = tl.load(dz + at + C, one, 0.)
        d2 = tl.load(dz + at + 2 * C, two, 0.)
        matrix = w1 + (head * D + outer) * D + c                                    # (D out, D in)
        w_old, w_new = tl.load(matrix), tl.load(matrix + C * D)
        dy0 = tl.dot(d1, w_old, tl.dot(d0, w_new, input_precision="ieee"), input_precision="ieee")
        dy1 = tl.dot(d2, w_old, tl.dot(d1, w_new, input_precision="ieee"), input_precision="ieee")
        old, new = tl.load(w0 + channel).to(tl.float32), tl.load(w0 + C + channel).to(tl.float32)

        first = tl.where(is_key, group * GROUP, H + group)                          # the heads whose mean it is part of
        others = tl.zeros((BT, D), tl.float32)
        for h in range(first, first + tl.where(is_key, GROUP, 1)):
            others += tl.load(dz + t * C + h * D + c, t < N, 0.).to(tl.float32)
        mean = (d0.to(tl.float32) + others / tl.where(is_key, 1, GROUP)) / 2
        tl.store(d_packed + at, dy0 * new + dy1 * old + mean, t < N)

        p0 = tl.load(packed + at, t < N, 0.).to(tl.float32)
        p1 = tl.load(packed + at - C, tl.load(link + t, t < N, 0) != 0, 0.).to(tl.float32)
        sums += tl.program_id(0) * 2 * C + channel
        tl.store(sums, tl.sum(dy0 * p1, 0, keep_dims=True))                         # for the first weight
        tl.store(sums + C, tl.sum(dy0 * p0, 0, keep_dims=True))

    return mix, unmix


TOKENS = 32                                                             # of one program of `mix` and `unmix`


@torch.library.custom_op("zaya::mix_forward", mutates_args=())
def mix_forward(packed: torch.Tensor, current: torch.Tensor, delayed: torch.Tensor, w0: torch.Tensor, b0: torch.Tensor,
                w1: torch.Tensor, b1: torch.Tensor, temp: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
                link: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Both convolutions' weights are (2, …), the older token's first."""
    (B, S, C), D, K = packed.shape, w1.shape[2], len(temp)
    H = C // D - K
    q, k, v = packed.new_empty(B, S, H, D), packed.new_empty(B, S, K, D), packed.new_empty(B, S, K, D)
    mix, _ = mix_kernels()
    mix[(cdiv(B * S, TOKENS), H + K)](
        packed, current, delayed, w0, b0, w1, b1, temp, cos, sin, link, q, k, v, q, q, q, B * S,
        H=H, K=K, D=D, HALF=cos.shape[-1], BACKWARD=False, BT=TOKENS, BI=min(D, 32))
    return q, k, v


@mix_forward.register_fake
def _(packed, current, delayed, w0, b0, w1, b1, temp, cos, sin, link):
    (B, S, C), D, K = packed.shape, w1.shape[2], temp.shape[0]
    return packed.new_empty(B, S, C // D - K, D), packed.new_empty(B, S, K, D), packed.new_empty(B, S, K, D)


@torch.library.custom_op("zaya::mix_backward", mutates_args=())
def mix_backward(packed: torch.Tensor, w0: torch.Tensor, b0: torch.Tensor, w1: torch.Tensor, b1: torch.Tensor,
                 temp: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, link: torch.Tensor, dq: torch.Tensor,
                 dk: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> gradients of packed and of the second convolution's output; sums (2, 2, C) over tokens; taps (N, 2, C)."""
    (B, S, C), D, K = packed.shape, w1.shape[2], len(temp)
    H, N, dq, dk = C // D - K, B * S, dq.contiguous(), dk.contiguous()
    dz, d_packed, taps = torch.empty_like(packed), torch.empty_like(packed), packed.new_empty(N, 2, C)
    sums = packed.new_empty(2, cdiv(N, TOKENS), 2, C, dtype=torch.float32)
    mix, unmix = mix_kernels()
    mix[(cdiv(N, TOKENS), H + K)](
        packed, packed, packed, w0, b0, w1, b1, temp, cos, sin, link, dq, dk, packed, dz, taps, sums[0], N,
        H=H, K=K, D=D, HALF=cos.shape[-1], BACKWARD=True, BT=TOKENS, BI=min(D, 32))
    unmix[(cdiv(N, TOKENS), H + K)](packed, w0, w1, link, dz, d_packed, sums[1], N, H=H, K=K, D=D, BT=TOKENS)
    return d_packed, dz, sums.sum(1), taps


@mix_backward.register_fake
def _(packed, w0, b0, w1, b1, temp, cos, sin, link, dq, dk):
    B, S, C = packed.shape
    return (torch.empty_like(packed), torch.empty_like(packed), packed.new_empty(2, 2, C, dtype=torch.float32),
            packed.new_empty(B * S, 2, C))


def save_mix(ctx, inputs, output):
    packed, _, _, *rest = inputs
    ctx.save_for_backward(packed, *rest)                        # backward convolves again


def differentiate_mix(ctx, dq, dk, dv):
    packed, w0, b0, w1, b1, temp, cos, sin, link = ctx.saved_tensors
    (B, S, C), D, K = packed.shape, w1.shape[2], temp.shape[0]
    heads, queries = C // D, C - K * D
    d_packed, dz, sums, taps = mix_backward(*ctx.saved_tensors, dq, dk)
    (db1, d_temp), dw0 = sums                                                       # (C,) each, (2, C)
    dw1 = torch.einsum("nho,nkhi->khoi", dz.view(-1, heads, D), taps.view(-1, 2, heads, D)).reshape(2, C, D)
    # Both taps of the second convolution see the first one's bias, at a border too.
    db0 = torch.einsum("ho,hoi->hi", db1.view(heads, D), w1.float().sum(0).view(heads, D, D)).flatten()
    gradients = zip((dw0, db0, dw1, db1, d_temp[queries:].view(K, D).sum(1)), (w0, b0, w1, b1, temp))
    current, delayed = dv.flatten(2).chunk(2, -1)                                   # (B, S, K*D/2)
    delayed = F.pad((delayed * link.view(B, S, 1))[:, 1:], (0, 0, 0, 1))
    return d_packed, current, delayed, *(g.to(w.dtype) for g, w in gradients), None, None, None


mix_forward.register_autograd(differentiate_mix, setup_context=save_mix)


def triton_cca_mix(packed, current, delayed, depthwise_weight, depthwise_bias, grouped_weight, grouped_bias, temp, cos,
                   sin, position_ids=None):
    """What CCA does between its projections and attention.

        [q; k] = conv_in_head(conv_per_channel(packed)) + q-k-mean(packed),   v_t = [current_t ; delayed_(t-1)]
        q, k  <- rope(sqrt(D) q / |q|), rope(temp_k sqrt(D) k / |k|)

    packed (B, S, C), current and delayed (B, S, K*D/2), fp32 or bf16; the weights and biases of the two nn.Conv1d,
    temp (K,); cos and sin (B, S, R/2) fp32, position_ids (B, S) int64 or None -> q (B, S, H, D), k, v (B, S, K, D)
    in packed's dtype.  Equals zaya.py's CCA.mix without a cache: rows start here.
    Raises ValueError for a D that is no power of two and for mixed dtypes.
    """
    D = grouped_weight.shape[1]
    if D < 16 or D & (D - 1):
        raise ValueError(f"triton_cca_mix: head_dim must be a power of two of at least 16, not {D}")
    if not packed.dtype == current.dtype == delayed.dtype == grouped_weight.dtype:
        raise ValueError(f"triton_cca_mix: packed ({packed.dtype}), current ({current.dtype}), delayed "
                         f"({delayed.dtype}) and grouped_weight ({grouped_weight.dtype}) must have one dtype")
    B, S, _ = packed.shape
    cos, sin = (table.expand(B, S, -1) for table in (cos, sin))                     # one row serves all without ids
    link = (torch.arange(S, device=packed.device) > 0).expand(B, S)
    link = (link if position_ids is None else link & (position_ids >= 1)).flatten().to(torch.int8)
    tensors = (packed, current, delayed, depthwise_weight[:, 0].T, depthwise_bias, grouped_weight.permute(2, 0, 1),
               grouped_bias, temp, cos, sin, link)
    return mix_forward(*(tensor.contiguous() for tensor in tensors))


@functools.cache
def expert_kernels():
    """-> product, weight_gradient of `triton_experts`.

    Rows are the tokens sorted by expert, `order` says which token a row is; programs work on BLOCK x BLOCK outputs.
    """
    triton, tl = import_triton()

    @triton.jit
    def product(a, w, out, gate_up, hidden, d_weight, weight, order, tiles, N, X, I, J, to_expert, to_j, to_i,
                STEP: tl.constexpr, BLOCK: tl.constexpr):
        tiles += 3 * tl.program_id(1)
        expert, start, end = tl.load(tiles), tl.load(tiles + 1), tl.load(tiles + 2)
        row, j = start + tl.arange(0, BLOCK)[:, None], tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
        mine, wide = row < end, (row < end) & (j < J)
        token = tl.load(order + row, mine, 0)
        read = token if STEP == "up" or STEP == "down_gradient" else row            # where `a` has it
        total = tl.zeros((BLOCK, BLOCK), tl.float32)
        total_up = total
        for i in range(0, tl.where(expert < X, I, 0), BLOCK):                       # the skip expert has no weights
            i_a, i_w = i + tl.arange(0, BLOCK)[None, :], i + tl.arange(0, BLOCK)[:, None]
            left = tl.load(a + read * I + i_a, mine & (i_a < I), 0.)
            right, here = w + expert * to_expert + i_w * to_i + j * to_j, (i_w < I) & (j < J)
            total = tl.dot(left, tl.load(right, here, 0.), total, input_precision="ieee")
            if STEP == "up":
                total_up = tl.dot(left, tl.load(right + J * to_j, here, 0.), total_up, input_precision="ieee")
        scale = tl.load(weight + token, mine, 0.).to(tl.float32)
        gates = row * 2 * J + j
        if STEP == "up":
            tl.store(gate_up + gates, total, wide)
            tl.store(gate_up + gates + J, total_up, wide)
            tl.store(hidden + row * J + j, total * tl.sigmoid(total) * total_up, wide)
        elif STEP == "down":
            tl.store(out + token * J + j, total * scale, wide)
        elif STEP == "down_gradient":                                               # of `hidden`, but for the weight
            gate = tl.load(gate_up + gates, wide, 0.).to(tl.float32)
            up = tl.load(gate_up + gates + J, wide, 0.).to(tl.float32)
            s = tl.sigmoid(gate)
            tl.store(d_weight + tl.program_id(0) * N + token, tl.sum(total * gate * s * up, 1, keep_dims=True), mine)
            tl.store(hidden + row * J + j, gate * s * up * scale, wide)
            tl.store(out + gates, total * scale * up * s * (1 + gate * (1 - s)), wide)
            tl.store(out + gates + J, total * scale * gate * s, wide)
        else:
            tl.store(out + token * J + j, total, wide)

    @triton.jit
    def weight_gradient(a, b, out, order, starts, I, J, TOKENS_IN_A: tl.constexpr, BLOCK: tl.constexpr):
        expert = tl.program_id(2).to(tl.int64)                                      # out[expert] = a^T b over its rows
        i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[:, None]
        j = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
        end = tl.load(starts + expert + 1)
        total = tl.zeros((BLOCK, BLOCK), tl.float32)
        for start in range(tl.load(starts + expert), end, BLOCK):
            row_a, row_b = start + tl.arange(0, BLOCK)[None, :], start + tl.arange(0, BLOCK)[:, None]
            here_a, here_b = row_a < end, row_b < end
            if TOKENS_IN_A:
                row_a = tl.load(order + row_a, here_a, 0)
            else:
                row_b = tl.load(order + row_b, here_b, 0)
            total = tl.dot(tl.load(a + row_a * I + i, here_a & (i < I), 0.),
                           tl.load(b + row_b * J + j, here_b & (j < J), 0.), total, input_precision="ieee")
        tl.store(out + (expert * I + i) * J + j, total, (i < I) & (j < J))

    return product, weight_gradient


def expert_tiles(choice, experts, block):
    """Which rows of the tokens sorted by expert each tile has, computed on the device: nothing waits for it.

    choice (N,) int64 -> order (N,), starts (X + 2,), tiles (N / block + X, 3), all int64.  A tile (expert, start, end)
    has at most `block` rows from start; expert X is the skip expert; the tiles left over have none.
    """
    order = choice.argsort(stable=True)
    starts = torch.searchsorted(choice[order], torch.arange(experts + 2, device=choice.device))
    last = ((starts.diff() + block - 1) // block).cumsum(0)                         # tiles up to and with each expert
    tile = torch.arange(cdiv(len(choice), block) + experts, device=choice.device)
    expert = torch.searchsorted(last, tile, right=True).clamp_max(experts)
    start = starts[expert] + (tile - F.pad(last, (1, 0))[expert]) * block
    return order, starts, torch.stack([expert, start, starts[expert + 1]], 1)


BLOCK = 64                                                              # rows and columns of a tile of products


def grouped_product(step, a, w, out, gate_up, hidden, d_weight, weight, order, tiles, I, J, to_j, to_i):
    product, _ = expert_kernels()
    product[cdiv(J, BLOCK), len(tiles)](a, w, out, gate_up, hidden, d_weight, weight, order, tiles, len(order), len(w),
                                        I, J, w[0].numel(), to_j, to_i, STEP=step, BLOCK=BLOCK)


@torch.library.custom_op("zaya::experts_forward", mutates_args=())
def experts_forward(x: torch.Tensor, weight: torch.Tensor, gate_up_proj: torch.Tensor, down_proj: torch.Tensor,
                    order: torch.Tensor, starts: torch.Tensor,
                    tiles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """-> y (N, E), and the products before SwiGLU (N, 2F), which backward needs."""
    (N, E), width = x.shape, down_proj.shape[2]
    gate_up, hidden, y = x.new_empty(N, 2 * width), x.new_empty(N, width), torch.empty_like(x)
    grouped_product("up", x, gate_up_proj, y, gate_up, hidden, y, weight, order, tiles, E, width, E, 1)
    grouped_product("down", hidden, down_proj, y, y, y, y, weight, order, tiles, width, E, width, 1)
    return y, gate_up


@experts_forward.register_fake
def _(x, weight, gate_up_proj, down_proj, order, starts, tiles):
    return torch.empty_like(x), x.new_empty(x.shape[0], gate_up_proj.shape[1])


@torch.library.custom_op("zaya::experts_backward", mutates_args=())
def experts_backward(x: torch.Tensor, weight: torch.Tensor, gate_up_proj: torch.Tensor, down_proj: torch.Tensor,
                     order: torch.Tensor, starts: torch.Tensor, tiles: torch.Tensor, gate_up: torch.Tensor,
                     dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    (N, E), (X, _, width), dy = x.shape, down_proj.shape, dy.contiguous()
    d_gate_up, hidden, dx = torch.empty_like(gate_up), x.new_empty(N, width), torch.empty_like(x)
    d_weight = x.new_empty(cdiv(width, BLOCK), N, dtype=torch.float32)
    grouped_product("down_gradient", dy, down_proj, d_gate_up, gate_up, hidden, d_weight, weight, order, tiles, E,
                    width, 1, width)
    grouped_product("up_gradient", d_gate_up, gate_up_proj, dx, dx, dx, dx, weight, order, tiles, 2 * width, E, 1, E)
    gradients, (_, weight_gradient) = (torch.empty_like(gate_up_proj), torch.empty_like(down_proj)), expert_kernels()
    for a, b, out, tokens_in_a in ((d_gate_up, x, gradients[0], False), (dy, hidden, gradients[1], True)):
        weight_gradient[cdiv(b.shape[1], BLOCK), cdiv(a.shape[1], BLOCK), X](
            a, b, out, order, starts, a.shape[1], b.shape[1], TOKENS_IN_A=tokens_in_a, BLOCK=BLOCK)
    return dx, d_weight.sum(0).to(weight.dtype), *gradients


@experts_backward.register_fake
def _(x, weight, gate_up_proj, down_proj, order, starts, tiles, gate_up, dy):
    return tuple(torch.empty_like(t) for t in (x, weight, gate_up_proj, down_proj))


def save_experts(ctx, inputs, output):
    ctx.save_for_backward(*inputs, output[1])
    ctx.set_materialize_grads(False)                            # nobody asks for a gradient of `gate_up`


def differentiate_experts(ctx, dy, _):
    return *experts_backward(*ctx.saved_tensors, dy), None, None, None


experts_forward.register_autograd(differentiate_experts, setup_context=save_experts)


def triton_experts(x, gate_up_proj, down_proj, choice, weight):
    """X SwiGLU networks as grouped matrix products; each token visits the one it was sent to.

        y = weight * W_down(silu(g) * u),  [g; u] = W_gu x

    x (N, E) fp32 or bf16, choice (N,) int64 in 0 … X, weight (N,) fp32, gate_up_proj (X, 2F, E) and down_proj (X, E, F)
    in x's dtype -> (N, E) in x's dtype.  A choice of X, the skip expert, gives 0, and its weight gets no gradient.
    Equals zaya.py's Experts.forward.  Raises ValueError for mixed dtypes and for shapes that do not fit.
    """
    if not x.dtype == gate_up_proj.dtype == down_proj.dtype:
        raise ValueError(f"triton_experts: x ({x.dtype}), gate_up_proj ({gate_up_proj.dtype}) and down_proj "
                         f"({down_proj.dtype}) must have one dtype")
    X, E, width = down_proj.shape
    if x.shape != (len(choice), E) or weight.shape != choice.shape or gate_up_proj.shape != (X, 2 * width, E):
        raise ValueError(f"triton_experts: x {tuple(x.shape)}, choice {tuple(choice.shape)}, weight "
                         f"{tuple(weight.shape)}, gate_up_proj {tuple(gate_up_proj.shape)} and down_proj "
                         f"{tuple(down_proj.shape)} do not fit together")
    tensors = [t.contiguous() for t in (x, weight, gate_up_proj, down_proj)]
    return experts_forward(*tensors, *expert_tiles(choice, X, BLOCK))[0]


# ---- python kernels.py ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def plain_errors():
    """Around a program's main: what the system refuses, and a damaged file, end it with one sentence.

    A character that stdout's encoding lacks is printed as "?".
    """
    from safetensors import SafetensorError
    if hasattr(sys.stdout, "reconfigure"):                      # not where a notebook or a test took its place
        sys.stdout.reconfigure(errors="replace")
    try:
        yield
        sys.stdout.flush()
    except (OSError, SafetensorError) as error:
        place = getattr(error, "filename", None)
        said = str(error) if place is None else f"{place}: {error.strerror}"
        raise SystemExit(f"{said}; put that right and give the same command again") from None


def medians(*functions, rounds=9):
    """Median milliseconds of each, measured in turns, so that what else the machine does hits all alike."""
    def wait():
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    for function in functions:
        function()
    times = [[] for _ in functions]
    for _ in range(rounds):
        for function, some in zip(functions, times):
            wait()
            begun = time.perf_counter()
            function()
            wait()
            some.append(1e3 * (time.perf_counter() - begun))
    return [sorted(some)[rounds // 2] for some in times]


def worst(got, expected):
    """The largest error over several tensors, each relative to its largest value."""
    errors = [(a.float() - b.float()).abs().max() / b.float().abs().max().clamp_min(1e-20)
              for a, b in zip(got, expected, strict=True)]
    return torch.stack(errors).max().item()                                         # NaN, if one is


def with_gradients(function, inputs, modules):
    """-> a function that runs forward and backward and returns the outputs and all gradients."""
    leaves = [x.clone().requires_grad_() if x.is_floating_point() else x for x in inputs]
    wanted = [*(x for x in leaves if x.requires_grad), *modules.parameters()]

    def run():
        for tensor in wanted:
            tensor.grad = None
        outputs = function(*leaves)
        sum((o.float() ** 2).sum() for o in outputs).backward()
        return [*outputs, *(tensor.grad for tensor in wanted)]
    return run


def machine_limits(device="cpu"):
    """GFLOP/s of fp32 matrix products and GB/s of a copy: how far a path could go at most."""
    a, b = torch.randn(2048, 1024, device=device), torch.randn(1024, 1024, device=device)
    big, other = torch.empty(2, 2**25, device=device)
    product, copy_time = medians(lambda: a @ b, lambda: other.copy_(big))
    return {"matmul_gflops": 2 * 2048 * 1024 * 1024 / product / 1e6, "copy_gb_per_s": 2 * 4 * 2**25 / copy_time / 1e6}


def measured_shape(**changes):
    """The shape of all measurements here."""
    shape = dict(vocab_size=512, hidden_size=256, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=1,
                 head_dim=32, num_experts=8, moe_intermediate_size=256, router_hidden_size=32, initializer_range=0.06)
    return zaya.ZayaConfig(**{**shape, **changes})


class DenseLayer(FusedLayer):
    """A layer whose first expert serves all tokens, without a router: beside it one sees what top-1 experts cost."""

    def forward(self, x, r, positions=None, cache=None, choice=None, count=None):
        y = self.self_attn(self.input_layernorm(x), positions, cache)
        x, h = residual_norm(x, y, self.post_attention_residual_scale, self.post_attention_layernorm)
        gate, up = F.linear(h, self.experts.gate_up_proj[0]).chunk(2, -1)
        y = F.linear(F.silu(gate) * up, self.experts.down_proj[0])
        return self.post_mlp_residual_scale(x, y), r, choice


def benchmark(device="cpu", B=16, S=256, compiled=False):
    """Every path beside what it equals -> rows of {"path", "error", "plain_ms", "fused_ms", "ratio"}.

    `compiled` adds the compiled training step, in bf16, beside the eager fused one in bf16.
    """
    config = measured_shape()
    torch.manual_seed(0)
    plain = zaya.Zaya(config).to(device).train()
    fused = fuse(copy.deepcopy(plain))
    layer, fast, rows = plain.layers[1], fused.layers[1], []
    ids, targets = torch.randint(0, config.vocab_size, (2, B, S), device=device)
    position_ids = torch.arange(S, device=device).remainder(S // 4).expand(B, S).contiguous()   # four samples a row
    positions = layer.self_attn.locate(ids, position_ids)
    x, y = torch.randn(2, B, S, config.hidden_size, device=device)
    tokens, flat = x.flatten(0, 1), targets.flatten()
    choice, weight = torch.randint(0, 8, (B * S,), device=device), torch.rand(B * S, device=device)

    def add(path, error, slow, quick, rounds=7):
        slow, quick = medians(slow, quick, rounds=rounds)
        rows.append({"path": path, "error": error, "plain_ms": slow, "fused_ms": quick, "ratio": slow / quick})

    def compare(path, modules, reference, ours, *inputs):
        slow, quick = with_gradients(reference, inputs, modules[0]), with_gradients(ours, inputs, modules[1])
        add(path, worst(quick(), slow()), slow, quick)

    if on_gpu(x):                                               # on a CPU these are the plain code
        pairs = [torch.nn.ModuleList([one.post_attention_residual_scale, one.post_attention_layernorm])
                 for one in (layer, fast)]

        def joined(x, y):
            x = pairs[0][0](x, y)
            return x, pairs[0][1](x)

        compare("residual scaling + norm", pairs, joined, lambda x, y: residual_norm(x, y, *pairs[1]), x, y)
    compare("CCA, packed rows", (layer.self_attn, fast.self_attn), lambda x: [layer.self_attn(x, positions)],
            lambda x: [fast.self_attn(x, positions)], x)
    path, matrices = (triton_experts if on_gpu(x) else grouped_experts), (fast.experts.gate_up_proj,
                                                                          fast.experts.down_proj)
    compare("experts, grouped", (layer.experts, fast.experts), lambda x, w: [layer.experts(x, choice, w)],
            lambda x, w: [path(x, *matrices, choice, w)], tokens, weight)
    head = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False, device=device)
    compare("LM head + cross-entropy", (head, head), lambda h: [F.cross_entropy(head(h), flat, reduction="sum")],
            lambda h: [linear_cross_entropy(h, head.weight, flat)], tokens)

    def step(model, loss_of=summed_loss, dtype=torch.float32):
        def run():
            model.zero_grad()
            (loss_of(model, ids, targets, position_ids, dtype) / targets.numel()).backward()
            return [p.grad for p in model.parameters() if p.grad is not None]
        return run

    add(f"training step, {B} x {S}", worst(step(fused)(), step(plain)()), step(plain), step(fused))
    if compiled:
        eager, graph = step(fused, dtype=torch.bfloat16), step(fused, compile_loss(), torch.bfloat16)
        add("training step in bf16, compiled", worst(graph(), eager()), eager, graph)
    prompt = ids[:1, :32].expand(64, -1) + torch.arange(64, device=device)[:, None] % 8
    prompt = prompt.remainder(config.vocab_size)
    slow, quick = (functools.partial(model.generate, prompt, 64, temperature=0) for model in (plain, fused))
    different = (slow() != quick()).float().mean().item()
    add("generate, 64 rows, 64 new tokens (error: share of other tokens)", different, slow, quick, rounds=3)

    dense = fuse(zaya.Zaya(measured_shape(num_experts=1))).to(device).train()
    for layer in dense.layers:
        layer.__class__ = DenseLayer
    add("top-1 of 8 experts (fused) beside a dense model of the active size (plain)", 0.0, step(dense), step(fused))
    return rows


def table(head, rows):
    """Lists of cells -> a Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in (head, *rows)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


# ---- the 8B shape: speed of decoding --------------------------------------------------------------------------------


def make_random_checkpoint(folder):
    """Write a random ZAYA1-8B in bf16 in the official layout, a file a layer: never more than a layer in memory."""
    from safetensors.torch import save_file
    config = zaya.ZayaConfig.preset("zaya1-8b")
    os.makedirs(folder, exist_ok=True)
    with torch.device("meta"):
        state = zaya.Zaya(config).state_dict()
    groups, places = collections.defaultdict(dict), {}
    for name, tensor in state.items():
        layer = name.split(".")[1] if name.startswith("layers.") else "rest"
        groups[layer][zaya.Zaya.official_name(name)] = tensor
    for layer, group in tqdm(groups.items(), desc="random weights", disable=None):
        file = f"model-{layer}.safetensors"
        for name, tensor in group.items():
            group[name] = torch.ones(tensor.shape, dtype=torch.bfloat16)
            if tensor.ndim > 1:
                group[name].normal_(std=config.initializer_range)
            elif name.endswith(("bias", "biases")):
                group[name].zero_()
            places[name] = file
        save_file(group, os.path.join(folder, file), metadata={"format": "pt"})
        group.clear()
    # config.json comes last: a folder without it is no checkpoint yet, and is made again.
    texts = {"model.safetensors.index.json": {"weight_map": places},
             "config.json": {**config.to_dict(), "dtype": "bfloat16"}}
    for name, text in texts.items():
        with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
            json.dump(text, file)


def gb_per_token(model):
    """What one token reads: of the experts one, of the embedding the LM head, of everything else all."""
    total = sum(tensor.nbytes for tensor in model.state_dict().values())
    experts = sum(tensor.nbytes for layer in model.layers for tensor in layer.experts.state_dict().values())
    return (total - experts * (1 - 1 / model.config.num_experts)) / 1e9


def mv_bandwidth():
    """GB/s at which torch.mv reads 1 GB of bf16."""
    big, vector = torch.ones(2**18, 2048, dtype=torch.bfloat16), torch.ones(2048, dtype=torch.bfloat16)
    return big.nbytes / 1e6 / medians(lambda: torch.mv(big, vector), rounds=5)[0]


def logit_error(logits, reference):
    """(N, V) each -> {"error": of the root mean square; "kl": nats a token; "same": share of equal argmax}."""
    p, q = reference.log_softmax(-1), logits.log_softmax(-1)
    return {"error": ((logits - reference).norm() / reference.norm()).item(),
            "kl": (p.exp() * (p - q)).sum(-1).mean().item(),
            "same": (logits.argmax(-1) == reference.argmax(-1)).float().mean().item()}


@torch.no_grad()
def decode(model, prompt, count):
    """Greedy -> the ids (1, S + count), the logits they were chosen from (count, V), seconds a token after prefill."""
    cache, ids, logits, times = zaya.Cache(len(model.layers)), prompt, [], []
    for _ in range(count):
        begun = time.perf_counter()
        logits.append(model(ids[:, cache.columns:], cache=cache)[0, -1])
        ids = torch.cat([ids, logits[-1].argmax().view(1, 1)], 1)
        times.append(time.perf_counter() - begun)
    return ids, torch.stack(logits), times[1:]


@torch.no_grad()
def decoding(folder, count=32):
    """The checkpoint in `folder` and its int8 form, decoding one row -> rows of what they read, reach and get wrong.

    Where `folder` does not exist, a random ZAYA1-8B (17.7 GB) is put there; the int8 form goes into `folder`-int8.
    The limit is what a token reads at the speed of torch.mv on 1 GB of bf16.
    """
    rounded, rows, prompt = folder + "-int8", [], torch.arange(1, 9)[None]
    if not os.path.exists(os.path.join(folder, "config.json")):
        make_random_checkpoint(folder)
    if not os.path.exists(os.path.join(rounded, "config.json")):
        quantize_checkpoint(folder, rounded)
    for name in (folder, rounded):
        model = load(name)
        for tensor in model.state_dict().values():              # map every page once
            tensor.view(-1)[::1024].sum(dtype=torch.float32)
        decode(model, prompt, 4)
        bandwidth, size = mv_bandwidth(), gb_per_token(model)
        ids, logits, times = decode(model, prompt, count)
        speed = len(times) / sum(times)
        rows.append({"checkpoint": name, "gb_per_token": size, "bandwidth": bandwidth, "tokens_per_s": speed,
                     "share": speed * size / bandwidth})
        if name == folder:
            tokens, reference = ids[:, :-1], logits
        else:                                                   # over the same tokens
            rows[-1] |= logit_error(model(tokens)[0, prompt.shape[1] - 1:], reference)
        del model
    return rows


def print_decoding(rows):
    numbers = ["gb_per_token", "bandwidth", "tokens_per_s", "share"]
    errors = ["error", "kl", "same"]
    cells = []
    for row in rows:
        measured = [f"{row[key]:.2f}" for key in numbers]
        wrong = [f"{row[key]:.3g}" if key in row else "" for key in errors]
        cells.append([row["checkpoint"], *measured, *wrong])
    print(table(["checkpoint", "GB a token", "GB/s of torch.mv", "tokens/s", "of the limit", "logit error", "KL, nats",
                 "same argmax"], cells))


def print_benchmark(device, threads, limits, rows, memory):
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {threads} threads"
    print(f"{name}: fp32 matrix products at {limits['matmul_gflops']:.0f} GFLOP/s, copies at "
          f"{limits['copy_gb_per_s']:.1f} GB/s; medians\n")
    *paths, dense = rows
    cells = [[row["path"], f"{row['error']:.0e}", f"{row['plain_ms']:.1f}", f"{row['fused_ms']:.1f}",
              f"{row['ratio']:.2f}"] for row in paths]
    print(table(["path", "error", "plain, ms", "fused, ms", "ratio"], cells))
    print(f"\nA step with top-1 of 8 experts takes {dense['fused_ms']:.0f} ms, of a dense model of the same active "
          f"size {dense['plain_ms']:.0f} ms: {1 / dense['ratio']:.2f} times.")
    print(f"The cache grows by {memory['kv_bytes']} bytes a token; multi-head attention of this width: "
          f"{memory['kv_bytes_mha']}.")


def main(arguments=None):
    parser = argparse.ArgumentParser(description="Equality and speed of every fast path on this machine.")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--compile", action="store_true", help="also the compiled training step: minutes of compiling")
    parser.add_argument("--full-size", metavar="FOLDER", help="instead: decoding speed of the checkpoint in FOLDER and "
                        "of its int8 form in FOLDER-int8; a random ZAYA1-8B is made if there is none")
    parser.add_argument("--quantize", nargs=2, metavar=("FOLDER", "TARGET"), help="instead: write FOLDER's int8 form")
    given = parser.parse_args(arguments)
    if given.quantize:
        return quantize_checkpoint(*given.quantize)
    threads = torch.get_num_threads()
    if given.full_size:
        rows = decoding(given.full_size)
        if given.json:
            return print(json.dumps({"threads": threads, "decoding": rows}, indent=1))
        return print_decoding(rows)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    limits, rows, config = machine_limits(device), benchmark(device, compiled=given.compile), measured_shape()
    # Keys and values in fp32; multi-head attention keeps them at the full width.
    memory = {"kv_bytes": config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim * 4,
              "kv_bytes_mha": config.num_hidden_layers * 2 * config.hidden_size * 4}
    if given.json:
        print(json.dumps({"device": device, "threads": threads, **limits, "paths": rows, **memory}, indent=1))
    else:
        print_benchmark(device, threads, limits, rows, memory)


if __name__ == "__main__":
    with plain_errors():
        main()
