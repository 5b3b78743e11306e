"""Fast paths for zaya.py: fuse(model) gives the same numbers, by other means.

    from kernels import fuse
    model = fuse(model)                     same parameters, same checkpoints, same call forms

Every path is a plain function, usable alone, that says in one line what it equals in zaya.py:

    packed_attention      attention sample by sample instead of under a dense mask        CPU, eager
    grouped_experts       the experts as two grouped matrix products                      under torch.compile, GPU
    linear_cross_entropy  LM head and loss in chunks, never holding (N, V) logits         any device
    triton_residual_norm, triton_cca_mix, grouped_mm        one source for CUDA and ROCm  GPU
    compile_loss          one graph for a training step                                   CPU, GPU
    GraphedStep           a decoding step as one CUDA graph                               GPU
    quantize, load        weights rounded to 8 or 4 bits
    Slots                 `generate` with one C function a step                     CPU, small models in fp32

Importing this file needs neither Triton nor a GPU.  `python kernels.py` prints how equal and how fast each path is on
this machine.  Does NOT include: hand-written backward passes where PyTorch's own are nearly as fast; the model.
"""
import argparse
import copy
import concurrent.futures
import contextlib
import ctypes
import functools
import gc
import hashlib
import importlib.util
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import tempfile
import time

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import zaya

# ---- attention ------------------------------------------------------------------------------------------------------


# Asked once, here: torch.compile could not follow the question.
HAS_TRITON = importlib.util.find_spec("triton") is not None


def on_gpu(x):
    """Whether the Triton kernels below are to be used: CUDA and ROCm builds of PyTorch bring Triton."""
    return x.is_cuda and HAS_TRITON


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
    """Causal attention within each sample: equals scaled_dot_product_attention under CCA.positions' mask.

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
def grouped_mm(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    """F.grouped_mm, in Triton on a GPU.  As an operation of ours torch.compile takes it in any dtype (else bf16 alone).

    a (N, I), b (X, I, J), ends (X,) int32: rows up to ends[x] times b[x] -> (N, J).  a (I, N), b (N, J): a product for
    each group of the N -> (X, I, J), which is what the weights' gradient needs.  Rows after the last end are garbage.
    """
    return triton_grouped_mm(a, b, ends) if on_gpu(a) else F.grouped_mm(a, b, offs=ends)


@grouped_mm.register_fake
def empty_product(a, b, ends):
    if b.ndim == 3:
        return a.new_empty(a.shape[0], b.shape[2])
    return a.new_empty(ends.shape[0], a.shape[0], b.shape[1])


def save_inputs(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def differentiate_grouped_mm(ctx, grad):
    a, b, ends = ctx.saved_tensors
    grad = grad.contiguous()
    return grouped_mm(grad, b.mT, ends), grouped_mm(a.mT, grad, ends), None


grouped_mm.register_autograd(differentiate_grouped_mm, setup_context=save_inputs)


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
    gate, up = grouped_mm(tokens, gate_up_proj.mT, ends).chunk(2, -1)               # (N, F) each
    y = grouped_mm(F.silu(gate) * up, down_proj.mT, ends).masked_fill(skipped, 0)
    return (y.index_select(0, order.argsort()) * weight[:, None]).to(x.dtype)


class FusedExperts(zaya.Experts):
    """zaya.Experts by grouped products on a GPU and under torch.compile; the products' dtype is autocast's."""

    def forward(self, x, choice, weight):
        device = x.device.type
        dtype = self.down_proj.dtype
        # The plain loop asks how many tokens each expert has: a graph break, or a wait for the GPU.  An eager CPU has
        # neither, and there the loop is as fast.
        if device == "cpu" and not torch.compiler.is_compiling():
            return super().forward(x, choice, weight)
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            y = grouped_experts(x.to(dtype), self.gate_up_proj.to(dtype), self.down_proj.to(dtype), choice, weight)
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

# ---- torch.compile and CUDA graphs ----------------------------------------------------------------------------------


@functools.cache
def compile_loss(backend="inductor"):
    """-> summed_loss of a `fuse`d model as one graph forward and one backward, for any number of rows.

    The first call costs tens of seconds, later processes some: Inductor keeps what it compiled on disk.
    """
    compiled = torch.compile(summed_loss, fullgraph=True, backend=backend)

    def loss(model, input_ids, targets, position_ids, dtype=torch.float32):
        for tensor in (input_ids, targets, position_ids):
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return compiled(model, input_ids, targets, position_ids, dtype)
    return loss


def should_compile(model, tokens, passes):
    """Whether a stage of so many tokens, in so many passes, gets back what compiling its step costs -> bool, and why.

    Decided from sizes and not from the clock: a run that is taken up again computes what it would have computed.
    """
    active, layers = model.parameter_counts()["active"], len(model.layers)
    if model.norm.weight.device.type == "cpu":
        try:
            from torch._inductor.cpp_builder import get_cpp_compiler
            get_cpp_compiler()
        except Exception:                                       # Inductor raises its own, and others
            return False, "the training step is not compiled: there is no C++ compiler here"
        if any(size % 8 for size in model.layers[0].experts.down_proj.shape[1:]):
            return False, ("the training step is not compiled: grouped products need sizes (hidden, "
                           "moe_intermediate) in multiples of 8")
        # As measured with preset tiny on one core; elsewhere that is rough, so the saving must be three times the cost.
        seconds = 6 * active * tokens / 7e10                                        # forward and backward
        saved, cost, least = 0.3 * seconds, 20 * layers, 3
    else:
        # As measured on an H200: to launch a layer's operations takes some 10 ms a pass, and compiling halves a step.
        seconds = max(0.01 * layers * passes, 6 * active * tokens / 1e13)
        saved, cost, least = seconds / 2, 20 + 6 * layers, 1
    compiled = saved > least * cost
    return compiled, (f"the training step is {'' if compiled else 'not '}compiled: that might save {saved:.0f} of "
                      f"{seconds:.0f} s and cost {cost} s")


class Slot:
    """What stands for a zaya.LayerCache in a decode step: buffers (B, K, T, D) and the column to write."""

    def __init__(self, column, k, v, packed, delayed):
        self.column, self.k, self.v, self.packed, self.delayed = column, k, v, packed, delayed

    def append(self, k, v):
        return self.k.index_copy_(2, self.column, k), self.v.index_copy_(2, self.column, v)


def decode_step(model, token, position_ids, column, buffers):
    """zaya.Zaya.hidden_states for one new token a row, with nothing in it that changes from step to step but tensors.

    token (B, 1), position_ids (B, 1), column (1,) int64; buffers: per layer k, v (B, K, T, D), packed, delayed, all
    written in place -> hidden (B, 1, E), choices (L, B, 1).
    """
    rope = model.config.rope_parameters["hybrid"]
    rotated = int(model.config.head_dim * rope["partial_rotary_factor"])
    positions = zaya.CCA.positions(token, position_ids, rope["rope_theta"], rotated)
    back = column - torch.arange(buffers[0][0].shape[2], device=token.device)                       # (T,)
    positions.mask = ((back >= 0) & (back <= position_ids))[:, None, None]                          # (B, 1, 1, T)
    x = (model.embed_tokens(token).float() + model.input_hidden_states_bias) * model.input_hidden_states_scale
    r = None
    choices = []
    for layer, (k, v, packed, delayed) in zip(model.layers, buffers):
        slot = Slot(column, k, v, packed, delayed)
        x, r, choice = layer(x, r, positions, slot)
        packed.copy_(slot.packed)
        delayed.copy_(slot.delayed)
        choices.append(choice)
    return model.norm(x), torch.stack(choices)


def capture(step):
    """Note what `step()` launches on a GPU, without running it -> (a function that launches it all, step's outputs)."""
    graph = torch.cuda.CUDAGraph()
    # Autocast must not lend the graph a weight that it has cast outside: that copy is gone when autocast ends.
    dtype, cast = torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda")
    with torch.autocast("cuda", dtype, cast, cache_enabled=False), \
            torch.cuda.graph(graph, capture_error_mode="thread_local"):
        outputs = step()
    return graph.replay, outputs


class GraphedStep:
    """`decode_step` as one CUDA graph, in place of the hundreds of launches that a GPU waits for.

    A graph knows addresses: it serves while weights and buffers stay where they are, so fewer rows and every BLOCK-th
    token ask for a new one.  The first step after that runs as it is, the second is captured, and all others replay it.
    Of the weights the embedding's address alone is looked at.  Who gives a model other new weights, instead of writing
    into the old, sets its `graphed_step` to None.
    """
    BLOCK = 256
    key = replay = None

    def __deepcopy__(self, memo):
        return GraphedStep()

    def __call__(self, model, token, position_ids, column, buffers):
        given = token, position_ids, column
        autocast = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda")
        rope = dict(model.config.rope_parameters["hybrid"])     # numbers, which the graph keeps
        key = [autocast, torch.is_inference_mode_enabled(), rope, token.shape, model.embed_tokens.weight.data_ptr()]
        for tensor in itertools.chain(*buffers):
            key += [tensor.data_ptr(), tensor.shape]
        if key != self.key:
            self.key, self.replay = key, None
            return decode_step(model, *given, buffers)
        if self.replay is None:
            self.given = [tensor.clone() for tensor in given]
            self.replay, self.outputs = capture(lambda: decode_step(model, *self.given, buffers))
        for own, new in zip(self.given, given):
            own.copy_(new)
        self.replay()
        return [output.clone() for output in self.outputs]


class FusedZaya(zaya.Zaya):
    """zaya.Zaya whose LM head, outside of training, reads bf16 or int8 weights as they are, and which decodes as one
    CUDA graph a step, or by one C function."""
    graphed_step = None                                         # on a GPU a GraphedStep, once needed; False: never

    def logits(self, hidden):
        weight = self.output_weight
        if weight.dtype == torch.float32 or (torch.is_grad_enabled() and weight.requires_grad):
            return super().logits(hidden)
        head = self.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        with torch.autocast(hidden.device.type, enabled=False):
            if weight.dtype == torch.int8:
                return rounded_product(hidden.float(), weight, head.scale)
            bf16 = hidden.dtype == weight.dtype == torch.bfloat16
            if bf16 and hidden.is_cuda and not torch.version.hip and not torch.is_grad_enabled():
                # Products of bf16 numbers are exact in fp32, in which they are added up.
                logits = torch.mm(hidden.reshape(-1, weight.shape[1]), weight.mT, out_dtype=torch.float32)
                return logits.view(*hidden.shape[:-1], len(weight))
            # An fp32 copy of a slice stays in a CPU's cache, one of the whole (V, E) would be read from memory again.
            slices = weight.split(2**15 if hidden.is_cuda else 1024)
            return torch.cat([hidden.float() @ part.float().mT for part in slices], -1)

    def hidden_states(self, input_ids, attention_mask=None, position_ids=None, cache=None, routing=None):
        if isinstance(cache, Slots):
            return cache.hidden_states(input_ids, attention_mask, routing)
        one_token = cache is not None and cache.columns and input_ids.shape[1] == 1
        plain = attention_mask is None and position_ids is None and not routing and not torch.is_grad_enabled()
        if not (one_token and plain and self.has_graph(input_ids)):
            return super().hidden_states(input_ids, attention_mask, position_ids, cache, routing)
        position_ids = torch.full_like(input_ids, cache.columns)
        if cache.position is not None:
            position_ids = cache.position[:, None]
            cache.position = cache.position + 1
        buffers = [self.static_buffers(slot, self.graphed_step.BLOCK) for slot in cache.layers]
        column = torch.full((1,), cache.columns, device=input_ids.device)
        hidden, choices = self.graphed_step(self, input_ids, position_ids, column, buffers)
        for slot in cache.layers:
            slot.columns += 1
        if routing is not None:
            routing.extend(choices)
        return hidden

    def has_graph(self, input_ids):
        """Whether decoding steps are to be a CUDA graph: on a GPU, if nothing in the layers might wait for it."""
        if type(self) is not FusedZaya:                         # FSDP2 makes a class of its own: there weights move
            return False
        if self.graphed_step is None and on_gpu(input_ids):
            known = all((type(layer), type(layer.self_attn), type(layer.experts))
                        == (FusedLayer, FusedCCA, FusedExperts) for layer in self.layers)
            self.graphed_step = known and "hybrid_sliding" not in self.config.layer_types and GraphedStep()
        return bool(self.graphed_step)

    def _apply(self, *given, **more):                           # what .to(), .cpu() and .half() do
        if self.graphed_step:
            self.graphed_step = None
        return super()._apply(*given, **more)

    def new_cache(self):
        library, _ = decoding_in_c(self)
        return Slots(self, library) if library else super().new_cache()

    @staticmethod
    def static_buffers(slot, block):
        """-> k, v, packed, delayed of a LayerCache; k and v end with the block of columns that its next token needs."""
        room = block - slot.columns % block
        if slot.k.shape[2] != slot.columns + room:
            # Zeros: columns not yet written are read, masked, and 0 times garbage may be NaN.
            slot.k = F.pad(slot.k[:, :, :slot.columns], (0, 0, 0, room))
            slot.v = F.pad(slot.v[:, :, :slot.columns], (0, 0, 0, room))
        slot.packed = slot.packed.contiguous()                  # a graph keeps strides
        slot.delayed = slot.delayed.contiguous()
        return slot.k, slot.v, slot.packed, slot.delayed


def fuse(model):
    """Give a Zaya and its layers their fast paths, in place -> the model.  Same parameters, same checkpoints."""
    if not isinstance(model, FusedZaya):                        # a rounded one is
        model.__class__ = FusedZaya
    for layer in model.layers:
        layer.__class__ = FusedLayer
        layer.self_attn.__class__ = FusedCCA
        if isinstance(layer.experts, zaya.Experts):             # rounded ones have their own
            layer.experts.__class__ = FusedExperts
    return model


# ---- weights of 8 and of 4 bits -------------------------------------------------------------------------------------
# A rounded matrix (N, K) is a pair of tensors.  In 8 bits: int8 (N, K), and a scale a row, (N,) fp32.  In 4 bits: uint8
# (N, K/2), two neighbours of a row in a byte, and for every GROUP of a row its scale and its middle, (K/GROUP, N, 2)
# bf16: w = (q - 8) scale + middle, with q in 0 … 15.
GROUP = 64


def round_weight(weight, bits):
    """(…, N, K) any float -> the pair of tensors that stands for it in so many bits."""
    weight = weight.float()
    if bits == 8:
        scale = weight.abs().amax(-1).clamp_min(1e-30) / 127
        return (weight / scale[..., None]).round_().to(torch.int8), scale
    groups = weight.unflatten(-1, (-1, GROUP))                                      # (…, N, K/GROUP, GROUP)
    low, high = groups.amin(-1), groups.amax(-1)
    # Rounded to bf16 before they are used: q makes good a part of that error.
    scale = ((high - low) / 15).clamp_min(1e-30).bfloat16()
    middle = (low + 8 * scale.float()).bfloat16()
    q = ((groups - middle.float()[..., None]) / scale.float()[..., None]).round_().add_(8).clamp_(0, 15)
    q = q.flatten(-2).to(torch.uint8)
    return q[..., ::2] | q[..., 1::2] << 4, torch.stack([scale, middle], -1).transpose(-3, -2).contiguous()


def restore_weight(weight, scale, dtype=torch.float32):
    """The matrix (N, K) that such a pair stands for."""
    if weight.dtype == torch.int8:
        return weight.to(dtype) * scale.to(dtype)[:, None]
    q = torch.stack([weight & 15, weight >> 4], -1).flatten(1).unflatten(1, (-1, GROUP))     # (N, K/GROUP, GROUP)
    scale, middle = scale.to(dtype).transpose(0, 1)[..., None].unbind(2)                            # (N, K/GROUP, 1)
    return torch.addcmul(middle, q.to(dtype) - 8, scale).flatten(1)


@functools.cache
def packed_layout():
    """How this CPU's 4-bit product wants a matrix, which PyTorch does not say -> (rows in a block, whether a byte holds
    rows that are half a block apart, or neighbours); None where it has no such product, or another way."""
    rows = torch.arange(128, dtype=torch.int32)[:, None] * 7 + torch.arange(64, dtype=torch.int32) ** 2
    try:
        wanted = torch.ops.aten._convert_weight_to_int4pack_for_cpu(rows % 16, 1)
    except (AttributeError, RuntimeError, NotImplementedError):
        return None
    plain = (rows % 16).to(torch.uint8)
    plain = plain[:, ::2] | plain[:, 1::2] << 4
    for layout in itertools.product((64, 32, 16), (True, False)):                   # halves with AVX-512 and AVX2
        if torch.equal(pack(plain, layout).flatten(), wanted.flatten()):
            return layout
    return None


def pack(weight, layout):
    """A 4-bit matrix (N, K/2) -> the same in this CPU's order: block after block, there column after column the block's
    rows, two in a byte."""
    rows, halves = layout
    q = torch.stack([weight & 15, weight >> 4], -1).flatten(1).unflatten(0, (-1, rows)).mT          # (N/rows, K, rows)
    low, high = q.chunk(2, -1) if halves else (q[..., ::2], q[..., 1::2])
    return (low | high << 4).reshape(weight.shape)


def unpack(weight, layout):
    """The inverse of `pack`."""
    rows, halves = layout
    weight = weight.view(-1, 2 * weight.shape[1], rows // 2)                        # (N/rows, K, rows/2)
    low, high = weight & 15, weight >> 4
    q = torch.cat([low, high], -1) if halves else torch.stack([low, high], -1).flatten(2)
    q = q.mT.flatten(0, 1)                                                          # (N, K)
    return q[:, ::2] | q[:, 1::2] << 4


def rounded_product(x, weight, scale, layout=None):
    """x @ restore_weight(weight, scale)^T: (…, K) any float -> (…, N).  layout: the one in which 4 bits are packed.

    A few rows on a CPU read the rounded weights as they are; many rows, and a GPU, unpack them first.
    """
    rows = x.reshape(-1, x.shape[-1])
    few = len(rows) <= 32 and x.device.type == "cpu"
    if weight.dtype == torch.int8:
        # The packed product walks a row in whole vectors: a K that is no multiple of them is read beyond its end.
        if few and weight.shape[1] % 32 == 0:
            y = torch.ops.aten._weight_int8pack_mm(rows.contiguous(), weight, scale.to(x.dtype))
        else:
            y = (rows @ weight.to(x.dtype).mT) * scale.to(x.dtype)
    elif few and layout:
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(rows.contiguous(), weight, GROUP, scale.to(x.dtype))
    else:
        plain = unpack(weight, layout) if layout else weight
        y = rows @ restore_weight(plain, scale, x.dtype).mT
    return y.view(*x.shape[:-1], len(weight))


class Rounded(torch.nn.Module):
    """A module with rounded weights; its 4-bit ones are in the file's order, or in `layout`, this CPU's."""
    layout = None

    def set_layout(self, layout):
        if layout == self.layout:
            return
        for name, tensor in self.named_buffers(recurse=False):
            if tensor.dtype == torch.uint8:
                moved = []
                for matrix in tensor.view(-1, *tensor.shape[-2:]):
                    plain = unpack(matrix, self.layout) if self.layout else matrix
                    moved.append(pack(plain, layout) if layout else plain)
                setattr(self, name, torch.stack(moved).view_as(tensor))
        self.layout = layout


class RoundedLinear(Rounded):
    """nn.Linear without a bias: (…, K) -> (…, N) in x's dtype."""

    def __init__(self, weight, scale):
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)

    def forward(self, x):
        return rounded_product(x, self.weight, self.scale, self.layout)


class RoundedEmbedding(RoundedLinear):
    """nn.Embedding in 8 bits; tied, it is the LM head as well."""

    def forward(self, ids):
        return self.weight[ids].float() * self.scale[ids, None]


class RoundedExperts(Rounded):
    """zaya.Experts: gate_up and down are pairs of stacks, one matrix an expert."""

    def __init__(self, gate_up, down):
        super().__init__()
        for name, (weight, scale) in dict(gate_up=gate_up, down=down).items():
            self.register_buffer(name + "_proj", weight)
            self.register_buffer(name + "_scale", scale)

    def forward(self, x, choice, weight):
        y = torch.zeros_like(x)                                                     # as the skip expert leaves it
        for e in set(choice.tolist()) - {len(self.down_proj)}:
            here = (choice == e).nonzero()[:, 0]
            gate_up = rounded_product(x[here], self.gate_up_proj[e], self.gate_up_scale[e], self.layout)
            gate, up = gate_up.chunk(2, -1)
            y[here] = rounded_product(F.silu(gate) * up, self.down_proj[e], self.down_scale[e], self.layout)
        return (y * weight[:, None]).to(x.dtype)


class Int8Zaya(FusedZaya):
    """A fused model whose experts, attention projections, embedding and LM head are rounded to 8 bits.

    Routers, convolutions, norms and scales stay as they are: 1 % of the weights.  Made by `quantize`, not for training.
    """
    bits = 8
    ROUNDED = re.compile(r"((embed_tokens|lm_head|[qko]_proj|v_proj_\w+)\.weight|experts\.\w+_proj)$")

    def __init__(self, config):
        super().__init__(config)
        for layer in self.layers:
            for name in ("q_proj", "k_proj", "v_proj_current", "v_proj_delayed", "o_proj"):
                weight = getattr(layer.self_attn, name).weight
                setattr(layer.self_attn, name, RoundedLinear(*self.rounded(name, weight)))
            layer.experts = RoundedExperts(self.rounded("", layer.experts.gate_up_proj),
                                           self.rounded("", layer.experts.down_proj))
        self.embed_tokens = RoundedEmbedding(*self.rounded("embed_tokens", self.embed_tokens.weight))
        if not config.tie_word_embeddings:
            self.lm_head = RoundedLinear(*self.rounded("lm_head", self.lm_head.weight))
        fuse(self)

    @classmethod
    @torch.no_grad()
    def rounded(cls, name, weight):
        """The pair of tensors for a weight of this name.  Embedding and LM head have 8 bits, and so has what does not
        divide into the 4-bit product's blocks."""
        N, K = weight.shape[-2:]
        keep = name.startswith(("embed_tokens", "lm_head")) or N % 64 or K % GROUP
        return round_weight(weight, 8 if keep else cls.bits)

    @property
    def stored_dtype(self):
        return f"int{self.bits}"

    def set_layout(self, layout):
        rounded = [module for module in self.modules() if isinstance(module, Rounded)]
        for module in tqdm(rounded, desc="packing 4 bits", leave=False, disable=None):
            module.set_layout(layout)

    def save_pretrained(self, directory, state_dict=None):
        layout = self.layers[0].experts.layout
        self.set_layout(None)                                   # in a file they have every CPU's order
        try:
            super().save_pretrained(directory, state_dict)
        finally:
            self.set_layout(layout)


class Int4Zaya(Int8Zaya):
    """The same with 4 bits, in groups of 64 weights, for experts and attention projections."""
    bits = 4


ROUNDED = {8: Int8Zaya, 4: Int4Zaya}


@torch.no_grad()
def quantize(model, bits=8):
    """Zaya -> Int8Zaya or Int4Zaya.  Of memory-mapped weights no more than one is in memory beside the result."""
    kind = ROUNDED[bits]
    with torch.device("meta"):
        quantized = kind(model.config)
    state = {}
    for name, tensor in tqdm(model.state_dict().items(), desc="rounding", unit=" tensors", leave=False, disable=None):
        if kind.ROUNDED.search(name):
            state[name], state[re.sub("(weight|proj)$", "scale", name)] = kind.rounded(name, tensor)
        else:
            state[name] = tensor
    quantized.load_state_dict(state, assign=True)
    for new, old in zip(quantized.layers, model.layers):
        new.gate.load = old.gate.load                           # not in the state: born on the meta device
    return quantized.requires_grad_(False).eval()


def stored_bits(folder):
    """8 or 4 for a folder that `quantize_checkpoint` wrote, else None."""
    path = os.path.join(folder, "config.json")
    dtype = zaya.read_json(path).get("dtype") if os.path.exists(path) else None
    return {"int8": 8, "int4": 4}.get(dtype)


def quantize_checkpoint(source, target, bits=8):
    """Write the checkpoint in `source`, rounded, to `target`, and its tokenizer.  Raises OSError, ValueError."""
    if stored_bits(source):
        raise FileExistsError(f"this is an int{stored_bits(source)} form already")
    if os.path.exists(target) and os.path.samefile(source, target):
        raise FileExistsError(f"its int{bits} form would overwrite it: name another folder")
    quantize(zaya.Zaya.from_pretrained(source), bits).save_pretrained(target)
    for name in os.listdir(source):
        weights = name in ("config.json", "model.safetensors.index.json")
        if name.endswith((".json", ".jinja")) and not weights:
            copied = os.path.join(target, name)
            shutil.copyfile(os.path.join(source, name), copied + ".tmp")
            os.replace(copied + ".tmp", copied)


def load(folder, bits=None, device="cpu"):
    """A checkpoint, fused: as it is stored, or rounded to 8 or 4 bits.  Raises OSError, ValueError.

    A small model in half precision is widened on a CPU: its weights fit into the cache, and C decodes it."""
    if stored_bits(folder):
        model = ROUNDED[stored_bits(folder)].from_pretrained(folder, device=device).requires_grad_(False)
    else:
        model = fuse(zaya.Zaya.from_pretrained(folder, device=device))
        if bits:
            model = quantize(model, bits)
        elif device == "cpu" and model.parameter_counts()["total"] <= SMALL:
            model = model.float()
    if isinstance(model, Int4Zaya) and device == "cpu" and packed_layout():
        model.set_layout(packed_layout())
        model._apply(torch.clone)                               # one tensor left in the mapped file keeps all of it
    return model


# ---- decoding on a CPU: one C function ------------------------------------------------------------------------------
# A decoding step in PyTorch is hundreds of small operations, in C one call.  A call may hold several tokens of a row:
# so prompts are read, of any lengths and without padding.  For small models in fp32; `decoding_in_c` says when.

SMALL = 2**27           # parameters: at more, each call of generate would wait for `folded`

STEP = r"""
#include <math.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

// SIZES: E, H, K, D, X, F, R as in zaya.py; RoPE turns 2 HALF channels.  V: half of the values.
enum { SIZES, G = H + K, Q = H / K, C = G * D, V = K * D / 2, ROUTES = X + 1, SCORES = (ROUTES + 15) / 16 * 16 };
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


def panels(matrix):
    """(…, out, in) -> (…, out / 16, in, 16)."""
    return matrix.unflatten(-2, (-1, 16)).mT


def folded(layer):
    """A layer's weights -> (numbers,) fp32, in the order of the struct Layer.

    The matrices that read a norm have its weight in them, those that write to the stream its scale."""
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
        panels(project * norm1),
        panels(taps),
        panels(cca.o_proj.weight * scale1.hidden_states_scale[:, None]),
        panels(router.down_proj.weight * norm2),
        panels(router.fc1.weight * router.norm.weight),
        panels(router.fc2.weight),
        panels(routes),
        panels(experts.gate_up_proj * norm2),
        panels(experts.down_proj * scale2.hidden_states_scale[:, None])]
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


def build_step(sizes, compiler, capability=None):
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
    told = STEP + str(command) + run("-dM", "-E", source="")
    name = hashlib.sha256(told.encode()).hexdigest()[:24] + ".so"
    folder = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "zaya")
    path = os.path.join(folder, name)
    if not os.path.exists(path):
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            built = os.path.join(scratch, name)
            run("-shared", "-fPIC", "-o", built, "-lm")
            os.replace(built, path)
    library = ctypes.CDLL(path)
    library.step.argtypes = [ctypes.c_int] * 3 + [ctypes.c_float] + [ctypes.c_void_p] * 7
    return library


@functools.cache
def built_step(sizes, compiler, capability):
    """-> build_step's library or None, and a sentence: what fails once is not tried again in this process."""
    try:
        return build_step(sizes, compiler, capability), "C decodes"
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
    elif model.graphed_step:
        problem = "a CUDA graph is asked for"
    elif "hybrid_sliding" in config.layer_types:
        problem = "a sliding window forgets columns"
    elif any(type(layer) is not FusedLayer for layer in model.layers):
        problem = "the layers are of a class of their own"
    elif any(size % 16 for size in sizes.values()):
        problem = f"{sizes} must be multiples of 16"
    elif sum(tensor.numel() for tensor in state) > SMALL:
        problem = "at more than 2^27 parameters each call of generate would wait for `folded`"
    if problem:
        return None, f"PyTorch decodes: {problem}"
    rotated = int(config.head_dim * config.rope_parameters["hybrid"]["partial_rotary_factor"])
    sizes |= dict(H=config.num_attention_heads, K=config.num_key_value_heads, X=config.num_experts, HALF=rotated // 2)
    text = ",".join(f"{name}={size}" for name, size in sizes.items())
    return built_step(text, os.environ.get("CC") or "cc", os.environ.get("ATEN_CPU_CAPABILITY"))


class Slots:
    """What stands for a zaya.Cache while C decodes: rows live in slots, and a step names the slots that go on.

    slot, position (B,) int64: where each row lives, and how many tokens it has.  For each layer kv, keys and values
    (slots, 2, K, T / 16, 16 * D), and recent (slots, 2 C + K*D/2), LayerCache's packed and delayed.
    """
    piece = 1024                                                # tokens that are read in one call

    def __init__(self, model, library):
        self.model, self.library = model, library
        K, D = model.config.num_key_value_heads, model.config.head_dim
        latents = (model.config.num_attention_heads + K) * D
        self.columns = self.room = 0                            # T: those in use, and those there are
        self.kv = [torch.zeros(1, 2, K, 0, 16 * D) for _ in model.layers]
        self.recent = [torch.zeros(1, 2 * latents + K * D // 2) for _ in model.layers]
        self.pool = concurrent.futures.ThreadPoolExecutor(torch.get_num_threads())
        # Made for each call of generate: the weights may have changed since the last one.
        self.layers = torch.stack([folded(layer) for layer in model.layers])

    def select(self, rows):
        """As zaya.Cache.select.  Rows that leave cost nothing; where rows are copied, each gets a slot of its own."""
        self.slot, self.position = self.slot[rows], self.position[rows]
        if len(self.slot.unique()) < len(self.slot):
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
        if not self.columns:                                    # until they are spread, all rows live in an empty slot
            self.slot = self.position = torch.zeros(B, dtype=torch.long)
        self.columns += S
        if self.columns > self.room:
            self.spread(2 * self.columns + 128)
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
        position = self.position[:, None] + real.cumsum(1) - 1
        self.position = self.position + real.sum(1)
        x = torch.zeros(B, S, self.model.config.hidden_size)
        choices = torch.zeros(B, S, len(self.layers), dtype=torch.int16)
        for part in real.nonzero().split(self.piece):           # of all tokens, one row after the other
            here = part.unbind(1)
            x[here], choices[here] = self.read(input_ids[here], self.slot[here[0]], position[here])
        if routing is not None:
            routing.extend(choices.permute(2, 0, 1))
        return self.model.norm(x)

    def read(self, tokens, slot, position):
        """Tokens (N,), several of a slot in order -> the stream behind the last layer (N, E), choices (N, L) int16."""
        model, config, N = self.model, self.model.config, len(tokens)
        rope = config.rope_parameters["hybrid"]
        rotated = int(config.head_dim * rope["partial_rotary_factor"])
        turn = zaya.CCA.positions(tokens[:, None], position[:, None], rope["rope_theta"], rotated)
        x = (model.embed_tokens(tokens) + model.input_hidden_states_bias) * model.input_hidden_states_scale
        known = torch.cat([x, turn.cos[:, 0], turn.sin[:, 0]], 1)
        work = torch.empty(N, ctypes.c_int.in_dll(self.library, "token_floats").value)
        work[:, :known.shape[1]] = known
        choices = torch.empty(N, len(self.layers), dtype=torch.int16)
        memory = [slot.int(), position.int(), work, choices]

        def addresses(tensors):
            return (ctypes.c_void_p * len(tensors))(*[tensor.data_ptr() for tensor in tensors])

        def step(begin, end):
            part = addresses([tensor[begin:end] for tensor in memory])
            self.library.step(end - begin, len(self.layers), self.room, config.rms_norm_eps, addresses(self.kv),
                              addresses(self.recent), self.layers.data_ptr(), *part)

        # A thread takes about as many tokens as the others, but all of a slot, whose tokens must come in order.
        threads = torch.get_num_threads()
        middles = slot[torch.arange(1, threads) * N // threads]
        cuts = sorted({0, *(slot == middles[:, None]).int().argmax(1).tolist()})
        list(self.pool.map(step, cuts, [*cuts[1:], N]))
        return work[:, :config.hidden_size], choices


# ---- Triton, for CUDA and ROCm from one source ----------------------------------------------------------------------
# Each @triton.jit function lives in a cached function, so that Triton is imported at the first call and not with this
# file.  Sums are accumulated in fp32 and in a fixed order, without atomics: two runs give the same bits.  The block
# sizes fit an H100 and an MI300X; nobody has tuned them.  In `mix` token indices are columns.

ROWS = 16       # of which a program of `norm_backward` sums the five gradients
TOKENS = 32     # of one program of `mix`
BLOCK = 64      # rows and columns of a tile of `product` and `weight_gradient`
SHARE = 8       # programs that share an expert's rows


def cdiv(a, b):
    return -(-a // b)


@functools.cache
def norm_kernels():
    """-> forward, backward of `triton_residual_norm`; a program holds whole rows, E channels in a power of two."""
    import triton
    import triton.language as tl

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
        program = tl.program_id(0).to(tl.int64)
        c = tl.arange(0, BLOCK)
        here = c < E
        a_r = tl.load(vectors + c, here, 0.)
        b_r = tl.load(vectors + E + c, here, 0.)
        a_o = tl.load(vectors + 2 * E + c, here, 0.)
        b_o = tl.load(vectors + 3 * E + c, here, 0.)
        w = tl.load(vectors + 4 * E + c, here, 0.)
        sum_d = tl.zeros((BLOCK,), tl.float32)
        sum_x, sum_y, sum_unit = sum_d, sum_d, sum_d
        for row in range(program * ROWS, tl.minimum((program + 1) * ROWS, N)):
            at = row * E + c
            stream = tl.load(x + at, here, 0.) + b_r                                # cheaper to redo than to keep
            update = tl.load(y + at, here, 0.).to(tl.float32) + b_o
            new = stream * a_r + update * a_o
            rms = tl.rsqrt(tl.sum(new * new, 0) / E + eps)
            unit = new * rms
            d = tl.load(d_normed + at, here, 0.).to(tl.float32)
            sum_unit += d * unit
            d *= w
            d = rms * (d - unit * (tl.sum(d * unit, 0) / E))
            d += tl.load(d_out + at, here, 0.)
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



@torch.library.custom_op("zaya::norm_forward", mutates_args=())
def norm_forward(x: Tensor, y: Tensor, vectors: Tensor, dtype: torch.dtype, eps: float) -> tuple[Tensor, Tensor]:
    """`vectors` (5, E) fp32 are a_r, b_r, a_o, b_o, w."""
    kernel, _ = norm_kernels()
    E = x.shape[-1]
    out, normed = torch.empty_like(x), torch.empty_like(x, dtype=dtype)
    kernel[(x.numel() // E,)](x, y, vectors, out, normed, eps, E, BLOCK=1 << (E - 1).bit_length())
    return out, normed


@norm_forward.register_fake
def _(x, y, vectors, dtype, eps):
    return torch.empty_like(x), torch.empty_like(x, dtype=dtype)


@torch.library.custom_op("zaya::norm_backward", mutates_args=())
def norm_backward(x: Tensor, y: Tensor, vectors: Tensor, d_out: Tensor, d_normed: Tensor,
                  eps: float) -> tuple[Tensor, Tensor, Tensor]:
    _, kernel = norm_kernels()
    E = x.shape[-1]
    N = x.numel() // E
    dx, dy = torch.empty_like(x), torch.empty_like(y)
    sums = x.new_empty(cdiv(N, ROWS), 5, E)
    d_out, d_normed = d_out.contiguous(), d_normed.contiguous()
    kernel[(len(sums),)](x, y, vectors, d_out, d_normed, dx, dy, sums, eps, N, E,
                         ROWS=ROWS, BLOCK=1 << (E - 1).bit_length(), num_warps=8)
    return dx, dy, sums.sum(0)


@norm_backward.register_fake
def _(x, y, vectors, d_out, d_normed, eps):
    return torch.empty_like(x), torch.empty_like(y), torch.empty_like(vectors)


def save_norm(ctx, inputs, output):
    *tensors, _, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


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
    if x.dtype != torch.float32 or x.shape != y.shape:          # else the kernel would read beyond y's end
        raise ValueError(f"triton_residual_norm: x must be fp32 and of y's shape, not {x.dtype} {tuple(x.shape)}")
    vectors = torch.stack([residual_scale, residual_bias, hidden_states_scale, hidden_states_bias, weight]).float()
    return norm_forward(x.contiguous(), y.contiguous(), vectors, weight.dtype, eps)


@functools.cache
def mix_kernel():
    """-> the kernel of `triton_cca_mix`.  A program works on BT of the N = B * S tokens and one of the H + K heads,
    whose D channels are one block, and both dimensions of its convolution.  `link` (N,) int8: does t see t - 1."""
    import triton
    import triton.language as tl

    @triton.jit
    def mix(packed, current, delayed, vectors, weight, temp, cos, sin, link, q, k, v, N, H: tl.constexpr,
            K: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, BT: tl.constexpr, BI: tl.constexpr):
        C: tl.constexpr = (H + K) * D
        GROUP: tl.constexpr = H // K
        V: tl.constexpr = K * D // 2                                                # half of the value channels
        head = tl.program_id(1)
        is_key = head >= H
        group = tl.where(is_key, head - H, head // GROUP)
        c = tl.arange(0, D)[None, :]
        channel = head * D + c
        t = (tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT))[:, None]
        real = t < N
        one = tl.load(link + t, real, 0) != 0                                       # t sees t - 1
        two = one & (tl.load(link + t - 1, one, 0) != 0)                            # and t - 1 sees t - 2

        # Both convolutions, a few of the inner channels at a time: few registers.
        z = tl.zeros((BT, D), tl.float32) + tl.load(vectors + 3 * C + channel)
        for i in range(0, D, BI):
            inner = i + tl.arange(0, BI)
            channel_in = head * D + inner[None, :]
            at_in = t * C + channel_in                                              # (BT, BI)
            p0 = tl.load(packed + at_in, real, 0.).to(tl.float32)
            p1 = tl.load(packed + at_in - C, one, 0.).to(tl.float32)
            p2 = tl.load(packed + at_in - 2 * C, two, 0.).to(tl.float32)
            old = tl.load(vectors + channel_in)
            new = tl.load(vectors + C + channel_in)
            bias = tl.load(vectors + 2 * C + channel_in)
            y0 = (bias + p0 * new + p1 * old).to(packed.dtype.element_ty)           # the first convolution at t
            y1 = (bias + p1 * new + p2 * old).to(packed.dtype.element_ty)           # at t - 1; its bias at a border
            matrix = weight + channel * D + inner[:, None]                          # (BI in, D out)
            z = tl.dot(y0, tl.load(matrix + C * D), z, input_precision="ieee")
            z = tl.dot(y1, tl.load(matrix), z, input_precision="ieee")

        # q-k-mean: a key and the mean of its queries, a query and its key.
        first = tl.where(is_key, group * GROUP, head)
        count = tl.where(is_key, GROUP, 1)
        mean = tl.zeros((BT, D), tl.float32)
        for h in range(first, first + count):
            mean += tl.load(packed + t * C + h * D + c, real, 0.)
        key = tl.load(packed + t * C + (H + group) * D + c, real, 0.)
        z += (mean / count + key) / 2

        # To length sqrt(D), a key times its temperature, then RoPE: channel c turns with its partner.
        norm = tl.sqrt(tl.sum(z * z, 1, keep_dims=True))
        z *= D ** 0.5 / tl.maximum(norm, 1.1920929e-7)
        z *= tl.where(is_key, tl.load(temp + group).to(tl.float32), 1.)
        turned = real & (c < 2 * HALF)
        angle = t * HALF + tl.where(c < HALF, c, c - HALF)
        partner = tl.where(c < HALF, c + HALF, c - HALF)
        other = tl.gather(z, tl.broadcast_to(partner, (BT, D)), 1) * tl.where(c < HALF, -1., 1.)
        z = z * tl.load(cos + angle, turned, 1.) + other * tl.load(sin + angle, turned, 0.)

        # A key's program also makes the values: the first half of their channels from t, the others from t - 1.
        if is_key:
            e = group * D + c
            now = tl.load(current + t * V + e, real & (e < V), 0.)
            before = tl.load(delayed + (t - 1) * V + e - V, one & (e >= V), 0.)
            tl.store(v + t * K * D + e, now + before, real)
            tl.store(k + t * K * D + e, z, real)
        else:
            tl.store(q + t * H * D + channel, z, real)

    return mix


@torch.library.custom_op("zaya::mix_forward", mutates_args=())
def mix_forward(packed: Tensor, current: Tensor, delayed: Tensor, vectors: Tensor, weight: Tensor, temp: Tensor,
                cos: Tensor, sin: Tensor, link: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`vectors` (4, C) fp32: the first convolution's weights, both biases.  weight (2, C, D).  Older tokens first."""
    tensors = packed, current, delayed, vectors, weight, temp, cos, sin, link
    q, k, v = empty_heads(*tensors)
    B, S, H, D = q.shape
    K = len(temp)
    mix_kernel()[cdiv(B * S, TOKENS), H + K](
        *tensors, q, k, v, B * S, H=H, K=K, D=D, HALF=cos.shape[-1], BT=TOKENS, BI=min(D, 32))
    return q, k, v


@mix_forward.register_fake
def empty_heads(packed, current, delayed, vectors, weight, temp, cos, sin, link):
    B, S, C = packed.shape
    K, D = temp.shape[0], weight.shape[2]
    q, k, v = (packed.new_empty(B, S, heads, D) for heads in (C // D - K, K, K))
    return q, k, v


def plain_mix(packed, current, delayed, vectors, weight, temp, cos, sin, link):
    """`mix_forward` in PyTorch, which knows how to differentiate it."""
    K, dtype = len(temp), packed.dtype
    by_head = -1, weight.shape[2]
    link = link.view(*packed.shape[:2], 1) != 0                                     # (B, S, 1)

    def previous(x, border):
        return torch.where(link, F.pad(x, (0, 0, 1, -1)), border)

    v = torch.cat([current, previous(delayed, 0.)], -1).unflatten(-1, by_head)
    old, new, bias, z = vectors
    packed = packed.float()
    first = bias + packed * new + previous(packed, 0.) * old
    z = z.unflatten(0, by_head)                                                     # (H + K, D)
    for tap, matrices in zip((previous(first, bias), first), weight):
        tap = tap.to(dtype).unflatten(-1, by_head)
        z = z + torch.einsum("bshi,hoi->bsho", tap, matrices.unflatten(0, by_head))
    q, k = packed.unflatten(-1, by_head).tensor_split((-K,), 2)
    mean = (q.unflatten(2, (K, -1)) + k[:, :, :, None]) / 2                         # (B, S, K, H / K, D)
    z = z + torch.cat([mean.flatten(2, 3), mean.mean(3)], 2)                        # (B, S, H + K, D)
    q, k = zaya.CCA.apply_rotary(zaya.CCA.unit(z), cos, sin).tensor_split((-K,), 2)
    return q.to(dtype), (k * temp.float()[:, None]).to(dtype), v


def differentiate_mix(ctx, *gradients):
    # PyTorch convolves again and differentiates that; torch.compile fuses it.
    *tensors, cos, sin, link = ctx.saved_tensors
    with torch.enable_grad():
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        outputs = plain_mix(*leaves, cos, sin, link)
    return *torch.autograd.grad(outputs, leaves, gradients), None, None, None


mix_forward.register_autograd(differentiate_mix, setup_context=save_inputs)


def triton_cca_mix(packed, current, delayed, depthwise_weight, depthwise_bias, grouped_weight, grouped_bias, temp, cos,
                   sin, position_ids=None):
    """What CCA does between its projections and attention.

        [q; k] = conv_in_head(conv_per_channel(packed)) + q-k-mean(packed),   v_t = [current_t ; delayed_(t-1)]
        q, k  <- rope(sqrt(D) q / |q|), rope(temp_k sqrt(D) k / |k|)

    packed (B, S, C), current and delayed (B, S, K*D/2), fp32 or bf16; the weights and biases of the two nn.Conv1d,
    temp (K,); cos and sin (B, S, R/2) fp32, position_ids (B, S) int64 or None -> q (B, S, H, D), k, v (B, S, K, D)
    in packed's dtype.  Equals zaya.py's CCA.mix without a cache: rows start here.  D: a power of two, 16 or more.
    """
    B, S, _ = packed.shape
    cos, sin = (table.expand(B, S, -1) for table in (cos, sin))                     # one row serves all without ids
    link = (torch.arange(S, device=packed.device) > 0).expand(B, S)
    if position_ids is not None:
        link = link & (position_ids >= 1)
    old, new = depthwise_weight[:, 0].unbind(1)
    vectors = torch.stack([old, new, depthwise_bias, grouped_bias]).float()
    tensors = (packed, current, delayed, vectors, grouped_weight.permute(2, 0, 1), temp, cos, sin, link.to(torch.int8))
    return mix_forward(*(tensor.contiguous() for tensor in tensors))


@functools.cache
def product_kernels():
    """-> product, weight_gradient of `grouped_mm`: both kinds of groups, which the field calls 2D-3D and 2D-2D.

    A program works on BLOCK x BLOCK outputs.  `ends` (X,) int32 says where an expert's rows end.
    """
    import triton
    import triton.language as tl

    @triton.jit
    def product(a, b, out, ends, I, J, a_row, a_in, b_expert, b_in, b_out, BLOCK: tl.constexpr):
        expert = tl.program_id(2).to(tl.int64)
        end = tl.load(ends + expert)
        begin = tl.load(ends + expert - 1, expert > 0, 0) + tl.program_id(1) * BLOCK
        j = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
        # How many rows an expert has only the GPU knows: a few programs share them, each taking every so many blocks.
        for start in range(begin, end, tl.num_programs(1) * BLOCK):
            row = start + tl.arange(0, BLOCK)[:, None].to(tl.int64)
            total = tl.zeros((BLOCK, BLOCK), tl.float32)
            for i in range(0, I, BLOCK):
                left_i = i + tl.arange(0, BLOCK)[None, :]
                right_i = i + tl.arange(0, BLOCK)[:, None]
                left = tl.load(a + row * a_row + left_i * a_in, (row < end) & (left_i < I), 0.)
                right = tl.load(b + expert * b_expert + right_i * b_in + j * b_out, (right_i < I) & (j < J), 0.)
                total = tl.dot(left, right, total, input_precision="ieee")
            tl.store(out + row * J + j, total, (row < end) & (j < J))

    @triton.jit
    def weight_gradient(a, b, out, ends, I, J, a_in, a_row, b_row, b_out, BLOCK: tl.constexpr):
        expert = tl.program_id(2).to(tl.int64)                                      # out[expert] = a b over its rows
        end = tl.load(ends + expert)
        i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[:, None]
        j = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
        total = tl.zeros((BLOCK, BLOCK), tl.float32)
        for start in range(tl.load(ends + expert - 1, expert > 0, 0), end, BLOCK):
            left_row = start + tl.arange(0, BLOCK)[None, :].to(tl.int64)
            right_row = start + tl.arange(0, BLOCK)[:, None].to(tl.int64)
            left = tl.load(a + i * a_in + left_row * a_row, (i < I) & (left_row < end), 0.)
            right = tl.load(b + right_row * b_row + j * b_out, (right_row < end) & (j < J), 0.)
            total = tl.dot(left, right, total, input_precision="ieee")
        tl.store(out + (expert * I + i) * J + j, total, (i < I) & (j < J))

    return product, weight_gradient


def triton_grouped_mm(a, b, ends):
    """F.grouped_mm in any dtype, layout and size: see `grouped_mm`."""
    product, weight_gradient = product_kernels()
    out = empty_product(a, b, ends)
    rows, J = len(a), out.shape[-1]
    strides = *a.stride(), *b.stride()
    if b.ndim == 3:
        grid = cdiv(J, BLOCK), min(SHARE, cdiv(rows, BLOCK)), len(ends)
        product[grid](a, b, out, ends, a.shape[1], J, *strides, BLOCK=BLOCK)
    else:
        grid = cdiv(J, BLOCK), cdiv(rows, BLOCK), len(ends)
        weight_gradient[grid](a, b, out, ends, rows, J, *strides, BLOCK=BLOCK)
    return out


# ---- python kernels.py ----------------------------------------------------------------------------------------------


def medians(*functions, rounds=9):
    """Median milliseconds of each, measured in turns, so that what else the machine does hits all alike."""
    def wait():
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    times = [[] for _ in functions]
    for count in range(rounds + 1):
        for function, some in zip(functions, times):
            wait()
            begun = time.perf_counter()
            function()
            wait()
            if count > 0:                                       # the first round warms up
                some.append(1e3 * (time.perf_counter() - begun))
    return [sorted(some)[rounds // 2] for some in times]


def worst(got, expected):
    """The largest error over several tensors, each relative to its largest value."""
    errors = []
    for a, b in zip(got, expected, strict=True):
        b = b.float()
        errors.append((a.float() - b).abs().max() / b.abs().max().clamp_min(1e-20))
    return torch.stack(errors).max().item()                                         # NaN, if one is


def with_gradients(function, inputs, modules):
    """-> a function that runs forward and backward and returns the outputs and all gradients."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    wanted = [*leaves, *modules.parameters()]

    def run():
        for tensor in wanted:
            tensor.grad = None
        outputs = function(*leaves)
        sum(o.float().square().sum() for o in outputs).backward()
        return [*outputs, *(tensor.grad for tensor in wanted)]
    return run


def machine_limits(device="cpu"):
    """GFLOP/s of fp32 matrix products and GB/s of a copy: how far a path could go at most."""
    a, b = torch.randn(2, 1024, 1024, device=device)
    big, other = torch.empty(2, 2**25, device=device)
    product, copied = medians(lambda: a @ b, lambda: other.copy_(big))
    return {"matmul_gflops": 2 * 1024**3 / product / 1e6, "copy_gb_per_s": 2 * big.nbytes / copied / 1e6}


def measured_shape():
    """The shape of all measurements here."""
    return zaya.ZayaConfig(
        vocab_size=512, hidden_size=256, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=1,
        head_dim=32, num_experts=8, moe_intermediate_size=256, router_hidden_size=32, initializer_range=0.06)


def benchmark(device="cpu", B=16, S=256, compiled=False):
    """Every path beside what it equals -> a dict each.  `compiled`: also the compiled step beside the eager one."""
    config = measured_shape()
    rows = []
    torch.manual_seed(0)
    plain = zaya.Zaya(config).to(device).train()
    fused = fuse(copy.deepcopy(plain))
    layer = plain.layers[1]
    fast = fused.layers[1]
    ids, targets = torch.randint(0, config.vocab_size, (2, B, S), device=device)
    position_ids = torch.arange(S, device=device).remainder(S // 4).expand(B, S).contiguous()   # four samples a row
    positions = zaya.CCA.positions(ids, position_ids, 5e6, config.head_dim // 2)
    x = torch.randn(B, S, config.hidden_size, device=device)
    tokens = x.flatten(0, 1)
    weight = torch.rand(B * S, device=device)
    choice = torch.randint(0, config.num_experts, (B * S,), device=device)
    head = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False, device=device)
    prompt = ids.view(-1, 32)[:64]

    def add(path, slow, quick):
        error = worst(quick(), slow())
        slow, quick = medians(slow, quick, rounds=5)
        rows.append({"path": path, "error": error, "plain_ms": slow, "fused_ms": quick, "ratio": slow / quick})

    def joined(x, y):
        x = layer.post_attention_residual_scale(x, y)
        return x, layer.post_attention_layernorm(x)

    def grouped(x, weight):
        return [grouped_experts(x, fast.experts.gate_up_proj, fast.experts.down_proj, choice, weight)]

    def loss(x):
        return [F.cross_entropy(head(x), targets.flatten(), reduction="sum")]

    def chunked_loss(x):
        return [linear_cross_entropy(x, head.weight, targets.flatten())]

    def step(model, loss_of=summed_loss, dtype=torch.float32):
        def run():
            model.zero_grad()
            (loss_of(model, ids, targets, position_ids, dtype) / targets.numel()).backward()
            return [p.grad for p in model.parameters() if p.grad is not None]
        return run

    if on_gpu(x):                                               # on a CPU it is the plain code
        pair = torch.nn.ModuleList([layer.post_attention_residual_scale, layer.post_attention_layernorm])
        add("residual scaling + norm", with_gradients(joined, [x, x], pair),
            with_gradients(lambda x, y: residual_norm(x, y, *pair), [x, x], pair))
    add("CCA, packed rows", with_gradients(lambda x: [layer.self_attn(x, positions)], [x], layer.self_attn),
        with_gradients(lambda x: [fast.self_attn(x, positions)], [x], fast.self_attn))
    add("experts, grouped",
        with_gradients(lambda x, weight: [layer.experts(x, choice, weight)], [tokens, weight], layer.experts),
        with_gradients(grouped, [tokens, weight], fast.experts))
    add("LM head + cross-entropy", with_gradients(loss, [tokens], head), with_gradients(chunked_loss, [tokens], head))
    add(f"training step, {B} x {S}", step(plain), step(fused))
    if compiled:
        half = torch.bfloat16
        add("training step, compiled", step(plain), step(fused, compile_loss()))
        add("… in bf16 (error: some tokens choose another expert)", step(plain, dtype=half),
            step(fused, compile_loss(), half))
    add(f"generate, {len(prompt)} rows, 64 new tokens (error 0: the same)",
        lambda: [plain.generate(prompt, 64, temperature=0)], lambda: [fused.generate(prompt, 64, temperature=0)])
    return rows


def table(rows):
    """Dictionaries with the same keys -> a Markdown table."""
    head = " | ".join(rows[0]).replace("_", " ")
    lines = [f"| {head} |", "|---" * len(rows[0]) + "|"]
    for row in rows:
        cells = [f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def make_random_checkpoint(folder):
    """Write a random ZAYA1-8B in bf16 in the official layout, a file a layer: never more than a layer in memory."""
    from safetensors.torch import save_file
    config = zaya.ZayaConfig.preset("zaya1-8b")
    places = {}
    os.makedirs(folder, exist_ok=True)
    with torch.device("meta"):
        state = zaya.Zaya(config).state_dict()
    groups = itertools.groupby(state, key=lambda name: ".".join(name.split(".")[:2]))           # a layer's are together
    for group, names in tqdm(groups, desc="random weights", unit=" files", disable=None):
        tensors = {}
        for name in names:
            tensor = torch.ones(state[name].shape, dtype=torch.bfloat16)
            if tensor.ndim > 1:
                tensor.normal_(std=config.initializer_range)
            elif name.endswith(("bias", "biases")):
                tensor.zero_()
            tensors[zaya.Zaya.official_name(name)] = tensor
        file = f"model-{group}.safetensors"
        save_file(tensors, os.path.join(folder, file), metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, file)
    # config.json comes last: a folder without it is no checkpoint yet, and is made again.
    zaya.write_json(os.path.join(folder, "model.safetensors.index.json"), {"weight_map": places})
    zaya.write_json(os.path.join(folder, "config.json"), {**config.to_dict(), "dtype": "bfloat16"})


def gb_per_token(model):
    """What one token reads: of the experts one, of the embedding the LM head, of everything else all."""
    total = 0
    for name, tensor in model.state_dict().items():
        total += tensor.nbytes / (model.config.num_experts if ".experts." in name else 1)
    return total / 1e9


def logit_error(logits, reference):
    """(N, V) each -> {"error": of the root mean square; "kl": nats a token; "same": share of equal argmax}."""
    p, q = reference.log_softmax(-1), logits.log_softmax(-1)
    return {"error": ((logits - reference).norm() / reference.norm()).item(),
            "kl": (p.exp() * (p - q)).sum(-1).mean().item(),
            "same": (logits.argmax(-1) == reference.argmax(-1)).float().mean().item()}


def decoding_speed(model, prompt, count):
    """-> tokens/s of one row's greedy reply after its first, GB/s at which torch.mv reads 0.5 GB of bf16 meanwhile."""
    big = torch.ones(2**17, 2048, dtype=torch.bfloat16)
    vector = torch.ones(2048, dtype=torch.bfloat16)
    # The tokens are the same in each round, so the first one, which warms up, has mapped all that the others read.
    first, whole, product = medians(lambda: model.generate(prompt, 1, temperature=0),
                                    lambda: model.generate(prompt, 1 + count, temperature=0),
                                    lambda: torch.mv(big, vector), rounds=3)
    return 1e3 * count / (whole - first), big.nbytes / 1e6 / product


def resident_gb():
    """What of this process is in memory, with the pages of mapped files; None where Linux does not tell."""
    with contextlib.suppress(OSError), open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e9


@torch.no_grad()
def decoding(folder, count=32):
    """The checkpoint in `folder` and its int8 and int4 forms, decoding one row -> rows of what they take, read, reach
    and get wrong.

    Where `folder` has no checkpoint, a random ZAYA1-8B (17.7 GB) is put there; the others go into `folder`-int8 and
    -int4.  share: of the tokens/s that torch.mv's speed would allow.  error, kl, same: of the logits over the same
    tokens, each with the experts of its own choice.
    """
    prompt, rows = torch.arange(1, 9)[None], []
    if not os.path.exists(os.path.join(folder, "config.json")):
        make_random_checkpoint(folder)
    for bits in (None, 8, 4):
        name = f"{folder}-int{bits}" if bits else folder
        if not os.path.exists(os.path.join(name, "config.json")):
            quantize_checkpoint(folder, name, bits)
        model = load(name)
        if bits is None:
            tokens = model.generate(prompt, count, temperature=0)
            reference = model(tokens)[0]                                            # (S, V)
        speed, bandwidth = decoding_speed(model, prompt, count)
        size = gb_per_token(model)
        disk = sum(entry.stat().st_size for entry in os.scandir(name) if entry.name.endswith(".safetensors")) / 1e9
        rows.append({"checkpoint": name, "gb_on_disk": disk, "gb_resident": resident_gb(), "gb_per_token": size,
                     "torch.mv_gb_per_s": bandwidth, "tokens_per_s": speed, "share": speed * size / bandwidth,
                     **logit_error(model(tokens)[0], reference)})
        del model
        gc.collect()
    return rows


def main(arguments=None):
    parser = argparse.ArgumentParser(description="Equality and speed of every fast path on this machine.")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--compile", action="store_true", help="also the compiled training step: minutes of compiling")
    parser.add_argument("--full-size", metavar="FOLDER", help="instead: size and decoding speed of the checkpoint in "
                        "FOLDER, and of FOLDER-int8 and FOLDER-int4; a random ZAYA1-8B is made if there is none")
    parser.add_argument("--quantize", nargs=2, metavar=("FOLDER", "TARGET"), help="instead: round FOLDER's weights")
    parser.add_argument("--bits", type=int, choices=(8, 4), default=8, help="… to so many bits (default 8)")
    given = parser.parse_args(arguments)
    device, machine = "cpu", {"device": "cpu", "threads": torch.get_num_threads()}
    if given.quantize or given.full_size:
        from safetensors import SafetensorError
        try:
            if given.quantize:
                return quantize_checkpoint(*given.quantize, given.bits)
            found = {"decoding": decoding(given.full_size)}
        except (OSError, ValueError, SafetensorError) as error:                     # missing, damaged, a full disk
            raise SystemExit(f"{given.full_size or given.quantize[0]}: {error}") from None
    else:
        if torch.cuda.is_available():
            device, machine["device"] = "cuda", torch.cuda.get_device_name()
        machine |= machine_limits(device)
        found = {"paths": benchmark(device, compiled=given.compile)}
    if given.json:
        print(json.dumps({**machine, **found}, indent=1))
    else:
        print(table([machine]), *map(table, found.values()), sep="\n\n")


if __name__ == "__main__":
    main()
