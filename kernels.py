"""Fast paths for zaya.py: fuse(model) gives the same numbers, by other means.

Every path is a plain function, usable alone, that says in one line what it equals in zaya.py.  `fuse` swaps the classes
of a model's modules for subclasses that call them; parameters, checkpoints and call forms stay what they were.

    residual_norm     residual scaling + RMSNorm                    forward and backward in one function each
    cca_mix           both convolutions, q-k-mean, QK norm, temperature, RoPE, with packed-sample borders
    packed_attention  attention sample by sample instead of under a dense mask
    expert_mlp        tokens sorted by expert, products into one buffer, SwiGLU, weighted return
    linear_cross_entropy   LM head and loss in chunks, never holding (N, V) logits
    wide_linear       bf16 or int8 weights read once, at the memory's speed: decoding, and quantize(model)

On a CPU much of a training step of a small model goes into elementwise passes over activations; written by hand, the
backward passes save some of them.  `python kernels.py` prints how equal and how fast each path is on this machine.  On
CUDA and ROCm residual_norm, cca_mix and expert_mlp are Triton kernels, from one source; importing this file needs
neither Triton nor a GPU.
Featuring: eager functions that need no compiler and work for any shape.  Does NOT include: the model (zaya.py).
"""
import argparse
import collections
import contextlib
import copy
import ctypes
import functools
import importlib.util
import json
import math
import os
import platform
import re
import subprocess
import sys
import tempfile
import time

import torch
import torch.nn.functional as F
from tqdm import tqdm

import zaya

# ---- 1. residual scaling + RMSNorm ----------------------------------------------------------------------------------


def columns(x):
    """(…, S, E) -> (E,), one axis after the other: each pass adds up rows that are still in the cache."""
    while x.ndim > 1:
        x = x.sum(-2)
    return x


class ResidualNorm(torch.autograd.Function):
    """The Function behind `residual_norm`; its backward recomputes nothing but two products."""

    @staticmethod
    def forward(ctx, x, y, a_r, b_r, a_o, b_o, weight, eps):
        out = torch.addcmul(a_r * b_r + a_o * b_o, x, a_r)                          # (…, E)
        out.addcmul_(y.float(), a_o)
        rms = torch.linalg.vector_norm(out, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        unit = out * rms
        ctx.save_for_backward(x, y, a_r, b_r, a_o, b_o, weight, unit, rms)
        return out, (unit * weight.float()).to(weight.dtype)

    @staticmethod
    def backward(ctx, g_out, g_normed):
        x, y, a_r, b_r, a_o, b_o, weight, unit, rms = ctx.saved_tensors
        g_normed = g_normed.float()
        product = g_normed * unit
        inner = (product * weight.float()).sum(-1, keepdim=True).div_(x.shape[-1])  # (…, 1)
        g = torch.addcmul(g_normed * weight.float(), unit, inner, value=-1).mul_(rms).add_(g_out)
        total = columns(g)
        g_a_r, g_a_o = columns(g * x).addcmul_(b_r, total), columns(g * y.float()).addcmul_(b_o, total)
        return (g * a_r, (g * a_o).to(y.dtype), g_a_r, total * a_r, g_a_o, total * a_o,
                columns(product).to(weight.dtype), None)


def residual_norm(x, y, scaling, norm):
    """zaya.ResidualScaling, then zaya.RMSNorm:  x (…, E) fp32, y (…, E) any float -> the new x fp32, norm(x)."""
    if traced(x):
        x = scaling(x, y)
        return x, norm(x)
    function = triton_residual_norm if on_gpu(x) else ResidualNorm.apply
    with torch.autocast(x.device.type, enabled=False):
        return function(x, y, scaling.residual_scale, scaling.residual_bias, scaling.hidden_states_scale,
                        scaling.hidden_states_bias, norm.weight, norm.eps)


@functools.cache
def has_triton():
    return importlib.util.find_spec("triton") is not None


def on_gpu(x):
    """Whether the Triton kernels below are to be used: CUDA and ROCm builds of PyTorch bring Triton."""
    return x.is_cuda and has_triton()


def traced(x):
    """Whether torch.compile is tracing a path for the CPU."""
    return torch.compiler.is_compiling() and not on_gpu(x)


# ---- 2. CCA: from the projections to attention ----------------------------------------------------------------------


def back(x, link):
    """x (B, S, …) one token later, 0 where `link` (B, S) says that the token before is not this sample's."""
    moved = x.new_zeros(x.shape)
    torch.mul(x[:, :-1], link[:, 1:].view(*link[:, 1:].shape, *[1] * (x.ndim - 2)), out=moved[:, 1:])
    return moved


def ahead(x, link):
    """The transpose of `back`: each token gets what its successor has."""
    moved = x.new_zeros(x.shape)
    torch.mul(x[:, 1:], link[:, 1:].view(*link[:, 1:].shape, *[1] * (x.ndim - 2)), out=moved[:, :-1])
    return moved


class CCAMix(torch.autograd.Function):
    """The Function behind `cca_mix`.

    With m_t = 1 where the token before belongs to the sample:  u_t = w_1 p_t + m_t w_0 p_(t-1),
    out_t = W_1 u_t + m_t W_0 u_(t-1) + c,  c = bias_1 + (W_0 + W_1) bias_0:  the first convolution's bias reaches the
    second one at every token, also before a sample's first, so it is a constant.
    """

    @staticmethod
    def forward(ctx, packed, w, b, weight, bias, temp, cos, sin, link, kv_heads):
        p = packed.float()
        before = back(p, link)
        u = torch.addcmul(p * w[:, 1], before, w[:, 0])
        q, k, *kept = cca_heads(p, u, back(u, link), b, weight, bias, temp, cos, sin, kv_heads)
        ctx.save_for_backward(p, before, w, b, *kept, cos, sin, link)
        ctx.dtype = packed.dtype
        return q, k

    @staticmethod
    def backward(ctx, g_q, g_k):
        p, before, w, b, both, z, s, scale, gain, cos, sin, link = ctx.saved_tensors
        B, S, C = p.shape
        G, D, _ = both.shape
        K, H = g_k.shape[2], g_q.shape[2]
        g = torch.cat([g_q, g_k], 2)
        turn(g, cos, -sin, cos.shape[-1])
        inner = (g * s).sum(-1, keepdim=True).mul_(scale)                           # (B, S, G, 1): g . s / |s| sqrt(D)
        g_temp = inner[:, :, H:].sum((0, 1, 3))
        # s scale has the length sqrt(D), so the part of g along s is (g . s) scale^2 / D times s.
        g = torch.addcmul(g, s, inner.mul_(scale), value=-1 / D).mul_(scale * gain)
        g_p = torch.empty_like(p).view(B, S, G, D)
        g_heads = g[:, :, :H].unflatten(2, (K, -1))
        torch.add(g_heads.sum(3), g[:, :, H:], out=g_p[:, :, H:])
        g_p[:, :, H:].mul_(0.5)
        torch.mul(g_heads, 0.5, out=g_p[:, :, :H].unflatten(2, (K, -1)))
        g_p[:, :, :H].unflatten(2, (K, -1)).add_(g[:, :, H:, None], alpha=0.5 / (H // K))
        by_head = g.view(B * S, G, D).transpose(0, 1)                               # (G, N, D)
        g_c = g.sum((0, 1))                                                         # (G, D)
        g_both = torch.bmm(by_head.mT, z.transpose(0, 1)).view(G, D, 2, D)
        g_both += (g_c[..., None] * b.view(G, 1, D))[:, :, None]
        g_b = (both.view(G, D, 2, D).sum(2).mT @ g_c[..., None]).flatten()
        g_z = torch.bmm(by_head, both).transpose(0, 1).reshape(B, S, G, 2 * D)
        g_u = ahead(g_z[..., D:], link).add_(g_z[..., :D]).view(B, S, C)
        g_w = torch.stack([(g_u * before).sum((0, 1)), (g_u * p).sum((0, 1))], -1)
        g_p = g_p.view(B, S, C).addcmul_(g_u, w[:, 1]).add_(ahead(g_u * w[:, 0], link))
        return (g_p.to(ctx.dtype), g_w, g_b, torch.stack([g_both[:, :, 1], g_both[:, :, 0]], -1), g_c.flatten(), g_temp,
                None, None, None, None)


def cca_heads(p, u, u_before, b, weight, bias, temp, cos, sin, kv_heads):
    """Latents p, their first convolution u without its bias and the token before's, (B, S, C) fp32 each -> q, k, and
    what the backward pass needs."""
    B, S, _ = p.shape
    G, D, _, _ = weight.shape
    H = G - kv_heads
    z = torch.cat([u.view(B, S, G, D), u_before.view(B, S, G, D)], -1).view(B * S, G, 2 * D)
    both = torch.cat([weight[..., 1], weight[..., 0]], -1)                          # (G, D out, 2 D in)
    c = bias.view(G, D) + (both.view(G, D, 2, D).sum(2) @ b.view(G, D, 1))[..., 0]
    s = torch.bmm(z.transpose(0, 1), both.mT).transpose(0, 1).reshape(B, S, G, D).add_(c)
    latents = p.view(B, S, G, D)
    q_latent, k_latent = latents[:, :, :H].unflatten(2, (kv_heads, -1)), latents[:, :, H:]
    s[:, :, :H].unflatten(2, (kv_heads, -1)).add_(q_latent, alpha=0.5).add_(k_latent[:, :, :, None], alpha=0.5)
    s[:, :, H:].add_(q_latent.mean(3), alpha=0.5).add_(k_latent, alpha=0.5)
    scale = torch.linalg.vector_norm(s, dim=-1, keepdim=True).clamp_(min=torch.finfo(s.dtype).eps).reciprocal_()
    scale.mul_(D ** 0.5)                                                            # (B, S, G, 1)
    gain = torch.cat([temp.new_ones(H), temp]).view(G, 1)
    out = s * (scale * gain)
    turn(out, cos, sin, cos.shape[-1])
    return out[:, :, :H], out[:, :, H:], both, z, s, scale, gain


def turn(x, cos, sin, half):
    """RoPE in place on the first 2 * half channels of x (B, S, heads, D); -sin turns back."""
    a, b = x[..., :half], x[..., half:2 * half]
    cos, sin = cos[:, :, None], sin[:, :, None]
    kept = a * sin
    a.mul_(cos).addcmul_(b, sin, value=-1)
    b.mul_(cos).add_(kept)


def mixing_weights(cca):
    """A CCA's convolutions and temperature, fp32: w (C, 2), b (C,), weight (G, D out, D in, 2), bias (C,), temp (K,).
    """
    depthwise, grouped = cca.conv_qk_depthwise, cca.conv_qk_grouped
    return (depthwise.weight[:, 0].float(), depthwise.bias.float(),
            grouped.weight.unflatten(0, (-1, cca.head_dim)).float(), grouped.bias.float(), cca.temp.float())


def cca_mix(packed, cca, positions):
    """What zaya.CCA.forward does from `packed` to the rotated q (B, S, H, D) and k (B, S, K, D), fp32, without a cache.

    packed (B, S, C) any float; positions: CCA.Positions.
    """
    ids = positions.position_ids
    link = torch.ones(packed.shape[:2], device=packed.device) if ids is None else (ids >= 1).float()
    with torch.autocast(packed.device.type, enabled=False):
        return CCAMix.apply(packed, *mixing_weights(cca), positions.cos, positions.sin, link, cca.kv_heads)


def cca_mix_step(seen, cca, positions):
    """`cca_mix` for the newest of three tokens, seen (B, 3, C), the others from the cache -> q (B, 1, H, D), k."""
    B, H, K, D = len(seen), cca.heads, cca.kv_heads, cca.head_dim
    depthwise, grouped = cca.conv_qk_depthwise, cca.conv_qk_grouped
    ids, rope = positions.position_ids, (positions.cos, positions.sin)
    if ids is not None:
        seen = seen * (ids >= ids.new_tensor([2, 1, 0]))[..., None]
    if one_row(seen[:, 2], depthwise.weight):
        seen, out = seen.float().contiguous(), torch.empty(1, 1, H + K, D)
        weights = depthwise.weight, depthwise.bias, grouped.weight, grouped.bias, cca.temp, *rope, out
        c_code().mix_row(seen.data_ptr(), *(t.data_ptr() for t in weights), H, K, D, rope[0].shape[-1])
        return out[:, :, :H], out[:, :, H:]
    with torch.autocast(seen.device.type, enabled=False):
        w, seen = depthwise.weight, seen.to(depthwise.weight.dtype)                 # (C, 1, 2): no fp32 copy a token
        u = torch.addcmul(torch.addcmul(depthwise.bias, seen[:, :2], w[:, 0, 0]), seen[:, 1:], w[:, 0, 1])  # (B, 2, C)
        z = u.view(B, 2, H + K, D).permute(2, 0, 3, 1).reshape(H + K, B, 2 * D)     # taps innermost, as in the weight
        s = torch.bmm(z, grouped.weight.view(H + K, D, 2 * D).mT).transpose(0, 1)   # (B, H + K, D)
        s = s.float() + grouped.bias.view(H + K, D)
        latents = seen[:, 2].float().view(B, H + K, D)
        mean = torch.add(latents[:, :H].unflatten(1, (K, -1)), latents[:, H:, None]) / 2
        s[:, :H] += mean.flatten(1, 2)
        s[:, H:] += mean.mean(2)
        s *= D ** 0.5 / torch.linalg.vector_norm(s, dim=-1, keepdim=True).clamp_min(torch.finfo(s.dtype).eps)
        s[:, H:] *= cca.temp.view(K, 1)
        s = s[:, None]
        turn(s, *rope, rope[0].shape[-1])
        return s[:, :, :H], s[:, :, H:]


def sample_lengths(ids):
    """(B, S) position ids -> the lengths of the samples in the flattened batch, a list; None if they are no packing."""
    before = F.pad(ids, (1, 0), value=-2)[:, :-1]
    starts = (ids == 0) | ((ids != before + 1) & ((ids != -1) | (before != -1)))    # padding is one sample
    starts[:, 0] = True
    if (starts[:, 1:] & (ids[:, 1:] > 0)).any():
        return None
    bounds = starts.flatten().nonzero()[:, 0]
    return torch.diff(bounds, append=bounds.new_tensor([ids.numel()])).tolist()


def packed_attention(q, k, v, lengths):
    """Causal attention within each sample: equals scaled_dot_product_attention under CCA.attention_mask.

    q (B, S, H, D), k and v (B, S, K, D) with samples of `lengths` (they sum to B * S) -> (B, S, H * D).
    The work is the samples' squares instead of the row's.
    """
    B, S = q.shape[:2]
    parts = [F.scaled_dot_product_attention(*(t.transpose(0, 1)[None] for t in part), is_causal=True, enable_gqa=True)
             for part in zip(*(t.flatten(0, 1).split(lengths) for t in (q, k, v)))]             # (1, H, n, D) each
    return torch.cat([part[0].transpose(0, 1) for part in parts]).reshape(B, S, -1)


class FusedCCA(zaya.CCA):
    """zaya.CCA for whole samples and for one new token a row; everything else is zaya.CCA's own forward."""

    def forward(self, x, positions=None, cache=None):
        B, S, _ = x.shape
        positions = self.locate(x, positions, cache)
        if cache is not None and S == 1 and cache.packed is not None and not torch.is_grad_enabled():
            return self.step(x, positions, cache)
        if cache is not None or isinstance(self.q_proj, Int8Linear):
            return super().forward(x, positions, cache)
        ids, mask = positions.position_ids, positions.mask
        projections = (self.q_proj, self.k_proj, self.v_proj_current, self.v_proj_delayed)
        q_size, k_size, *v_sizes = (m.weight.shape[0] for m in projections)
        together = F.linear(x, torch.cat([m.weight for m in projections]))
        packed, current, delayed = together.split([q_size + k_size, *v_sizes], -1)
        if traced(x):
            return self.o_proj(traced_cca(self, packed, current, delayed, positions))
        if on_gpu(x) and self.head_dim >= 16 and self.head_dim & (self.head_dim - 1) == 0:
            depthwise, grouped = self.conv_qk_depthwise, self.conv_qk_grouped
            q, k, v = triton_cca_mix(packed, current, delayed, depthwise.weight, depthwise.bias,
                                     grouped.weight.to(packed.dtype), grouped.bias, self.temp, positions.cos,
                                     positions.sin, ids)
            out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None and S > 1, enable_gqa=True)
            return self.o_proj(out.transpose(1, 2).reshape(B, S, -1))
        shifted = F.pad(delayed[:, :-1], (0, 0, 1, 0))
        if ids is not None:
            shifted = shifted * (ids >= 1)[..., None]
        v = torch.cat([current, shifted], -1).view(B, S, self.kv_heads, self.head_dim)
        q, k = (t.to(v.dtype) for t in cca_mix(packed, self, positions))
        lengths = sample_lengths(ids) if ids is not None and x.device.type == "cpu" else None
        if lengths and not (self.sliding_window and max(lengths) > self.sliding_window):
            return self.o_proj(packed_attention(q, k, v, lengths))
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None and S > 1, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).reshape(B, S, -1))

    def step(self, x, positions, cache):
        """One new token a row.  The query heads of a KV head are queries on the same keys, so they go as one block."""
        B = len(x)
        packed = torch.cat([linear(self.q_proj, x), linear(self.k_proj, x)], -1)    # (B, 1, C)
        current, delayed = linear(self.v_proj_current, x), linear(self.v_proj_delayed, x)
        shifted = cache.delayed.to(delayed.dtype)
        if positions.position_ids is not None:
            shifted = shifted * (positions.position_ids >= 1)[..., None]
        v = torch.cat([current, shifted], -1).view(B, self.kv_heads, 1, self.head_dim)
        seen = torch.cat([cache.packed.to(packed.dtype), packed], 1)                # (B, 3, C)
        cache.packed, cache.delayed = seen[:, 1:].float(), delayed.float()
        q, k = (t.to(v.dtype) for t in cca_mix_step(seen, self, positions))
        k, v = cache.append(k.transpose(1, 2), v, self.sliding_window)              # (B, K, T, D)
        out = F.scaled_dot_product_attention(q.view(B, self.kv_heads, -1, self.head_dim), k, v, positions.mask)
        return linear(self.o_proj, out.reshape(B, 1, -1))


# ---- 3. experts -----------------------------------------------------------------------------------------------------


class ExpertMLP(torch.autograd.Function):
    """The Function behind `expert_mlp`."""

    @staticmethod
    def forward(ctx, x, gate_up, down, choice, weight):
        N, (X, E, Fm) = len(x), down.shape
        order = choice.argsort(stable=True)
        bounds = [0, *torch.bincount(choice, minlength=X + 1).cumsum(0).tolist()]
        spans = [(e, slice(start, end)) for e, (start, end) in enumerate(zip(bounds[:X], bounds[1:])) if end > start]
        tokens = x.index_select(0, order)                                           # (N, E), by expert
        hidden, y = x.new_empty(N, 2 * Fm), x.new_empty(N, E)
        for e, span in spans:
            torch.mm(tokens[span], gate_up[e].t(), out=hidden[span])
        active = F.silu(hidden[:, :Fm]).mul_(hidden[:, Fm:])
        for e, span in spans:
            torch.mm(active[span], down[e].t(), out=y[span])
        y[bounds[X]:] = 0                                                           # the skip expert's tokens
        place = torch.empty_like(order).scatter_(0, order, torch.arange(N, device=x.device))
        y = y.index_select(0, place)
        ctx.save_for_backward(tokens, gate_up, down, order, place, weight, hidden, active, y)
        ctx.spans, ctx.routed = spans, bounds[X]
        return (y * weight[:, None]).to(x.dtype)

    @staticmethod
    def backward(ctx, g):
        tokens, gate_up, down, order, place, weight, hidden, active, y = ctx.saved_tensors
        Fm = active.shape[1]
        g_weight = (g.float() * y.float()).sum(-1).to(weight.dtype)
        g = (g * weight[:, None]).to(tokens.dtype).index_select(0, order)
        g_active, g_down, g_gate_up = torch.empty_like(active), torch.zeros_like(down), torch.zeros_like(gate_up)
        for e, span in ctx.spans:
            torch.mm(g[span], down[e], out=g_active[span])
            torch.mm(g[span].t(), active[span], out=g_down[e])
        gate, up = hidden[:, :Fm], hidden[:, Fm:]
        g_hidden, g_tokens = torch.empty_like(hidden), torch.empty_like(tokens)
        torch.mul(F.silu(gate), g_active, out=g_hidden[:, Fm:])
        g_hidden[:, :Fm] = torch.ops.aten.silu_backward(g_active.mul_(up), gate)
        for e, span in ctx.spans:
            torch.mm(g_hidden[span], gate_up[e], out=g_tokens[span])
            torch.mm(g_hidden[span].t(), tokens[span], out=g_gate_up[e])
        g_tokens[ctx.routed:] = 0
        return g_tokens.index_select(0, place), g_gate_up, g_down, None, g_weight


def expert_mlp(x, gate_up_proj, down_proj, choice, weight):
    """zaya.Experts.forward: x (N, E), choice (N,) int64, weight (N,) fp32 -> (N, E) in x's dtype."""
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else gate_up_proj.dtype
    with torch.autocast(device, enabled=False):
        inputs = x.to(dtype), gate_up_proj.to(dtype), down_proj.to(dtype), choice, weight
        return (triton_experts if on_gpu(x) else ExpertMLP.apply)(*inputs).to(x.dtype)


class FusedExperts(zaya.Experts):
    """zaya.Experts with its loops over slices of two buffers instead of lists of new tensors."""

    def forward(self, x, choice, weight):
        if traced(x):
            return grouped_experts(x, self.gate_up_proj, self.down_proj, choice, weight)
        if one_row(x, self.down_proj):
            return self.one_token(x, choice.item(), weight)
        return expert_mlp(x, self.gate_up_proj, self.down_proj, choice, weight)

    def one_token(self, x, e, weight):
        if e == len(self.down_proj):                                                # the skip expert
            return torch.zeros_like(x)
        gate, up = torch.mv(self.gate_up_proj[e], x[0]).chunk(2)
        return (torch.mv(self.down_proj[e], F.silu(gate) * up) * weight).to(x.dtype)[None]


# ---- 4. LM head + cross-entropy -------------------------------------------------------------------------------------


@torch.library.custom_op("zaya::loss_and_gradients", mutates_args=())
def loss_and_gradients(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor,
                       chunk: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The summed loss and its gradients by hidden and weight; one operation for torch.compile, whose trace would fix
    the number of chunks."""
    total, wide = hidden.new_zeros((), dtype=torch.float32), weight.float()
    g_hidden, g_weight = torch.zeros(hidden.shape, device=hidden.device), torch.zeros_like(wide)
    for start in range(0, len(hidden), chunk):
        part = slice(start, start + chunk)
        h, y = hidden[part].float(), targets[part]
        counts = y >= 0
        logits = h @ wide.t()                                                       # (chunk, V), overwritten below
        chosen = y.clamp_min(0)[:, None]
        log_total = logits.logsumexp(-1, keepdim=True)
        total += ((log_total - logits.gather(1, chosen))[:, 0] * counts).sum()
        probability = logits.sub_(log_total).exp_()
        probability.scatter_add_(1, chosen, probability.new_full(chosen.shape, -1.0)).mul_(counts[:, None])
        torch.mm(probability, wide, out=g_hidden[part])
        g_weight.addmm_(probability.t(), h)
    return total, g_hidden.to(hidden.dtype), g_weight.to(weight.dtype)


@loss_and_gradients.register_fake
def _(hidden, weight, targets, chunk):
    return hidden.new_empty((), dtype=torch.float32), torch.empty_like(hidden), torch.empty_like(weight)


class LinearCrossEntropy(torch.autograd.Function):
    """The Function behind `linear_cross_entropy`: the gradient of a chunk is made while its logits are there."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, chunk):
        total, *gradients = loss_and_gradients(hidden, weight, targets, chunk)
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    def backward(ctx, g):
        g_hidden, g_weight = ctx.saved_tensors
        return g_hidden * g, g_weight * g, None, None


def linear_cross_entropy(hidden, weight, targets, chunk=None):
    """F.cross_entropy(model.logits(hidden), targets, reduction="sum") in fp32, `chunk` rows of logits at a time.

    hidden (N, E) any float, weight (V, E), targets (N,) int64, negative where nothing is asked -> () fp32.  By default
    a chunk's logits are 64 MiB.
    """
    chunk = chunk or max(1, 2**24 // len(weight))
    with torch.autocast(hidden.device.type, enabled=False):                         # fp32, whatever else is not
        return LinearCrossEntropy.apply(hidden, weight, targets, chunk)


# ---- 5. decoding: every weight read once a token, at the memory's speed ---------------------------------------------
# One row's matrix products do little but read weights.  torch.mv reads bf16 about as fast as the memory is, but a CPU
# has no product of bf16 weights with an fp32 result, for the LM head, and none of int8 weights that is much faster
# than bf16's; and a step of small operations spends as long between the products as in them.  What is missing is C
# here, as the GPU's kernels are Triton: `cc` compiles it at the first use, in a moment.

C_SOURCE = r"""
#include <math.h>
#include <stdint.h>

typedef union { uint32_t bits; float value; } word;
static inline float widen(uint16_t bf16) { return ((word){(uint32_t)bf16 << 16}).value; }
static inline uint16_t narrow(float value) {                    /* to the nearest, ties to even */
    uint32_t bits = ((word){.value = value}).bits;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

/* y[m][n] = step[m] * scale[n] * sum over k of w[n][k] x[m][k]; a row of w comes from memory once, for all m */
#define PRODUCT(name, weight, wide, input, total) \
void name(const weight *w, const float *scale, const input *x, const float *step, float *y, long M, long N, long K, \
          long threads) { \
    _Pragma("omp parallel for num_threads(threads) schedule(dynamic, 64)") \
    for (long n = 0; n < N; n++) { \
        const weight *row = w + n * K; \
        for (long k = 0; k < K; k += 64 / sizeof(weight)) __builtin_prefetch(row + K + k); \
        for (long m = 0; m < M; m++) { \
            total sum = 0; \
            for (long k = 0; k < K; k++) sum += wide(row[k]) * x[m * K + k]; \
            y[m * N + n] = scale ? sum * scale[n] * step[m] : sum; \
        } \
    } \
}
PRODUCT(bf16_product, uint16_t, widen, float, float)
PRODUCT(int8_product, int8_t, (int32_t), int16_t, int32_t)

/* x (M, K) ~ step[m] * rounded[m][k], the largest of a row as +-most */
void round_rows(const float *x, int16_t *rounded, float *step, long M, long K, long most) {
    for (long m = 0; m < M; m++, x += K, rounded += K) {
        float peak = 1e-30f;
        for (long k = 0; k < K; k++) peak = fmaxf(peak, fabsf(x[k]));
        step[m] = peak / most;
        for (long k = 0; k < K; k++) rounded[k] = rintf(x[k] * (most / peak));
    }
}

/* residual_norm of one row; y = 0: only the norm, of x; weight = 0: only the new x, into out */
void norm_row(const float *x, const uint16_t *y, const uint16_t *a_r, const uint16_t *b_r, const uint16_t *a_o,
              const uint16_t *b_o, const uint16_t *weight, float *out, uint16_t *normed, long E, float eps) {
    float sum = 0;
    for (long i = 0; i < E; i++) {
        out[i] = y ? (x[i] + widen(b_r[i])) * widen(a_r[i]) + (widen(y[i]) + widen(b_o[i])) * widen(a_o[i]) : x[i];
        sum += out[i] * out[i];
    }
    float scale = 1 / sqrtf(sum / E + eps);
    for (long i = 0; weight && i < E; i++) normed[i] = narrow(widen(weight[i]) * out[i] * scale);
}

/* cca_mix of the newest of three tokens: seen (3, C), w (C, 2), weight (C, D, 2) -> out (C) */
void mix_row(const float *seen, const uint16_t *w, const uint16_t *b, const uint16_t *weight, const uint16_t *bias,
             const uint16_t *temp, const float *cosine, const float *sine, float *out, long H, long K, long D,
             long half) {
    long C = (H + K) * D, group = H / K;
    const float *p = seen + 2 * C;
    float u[2 * C];
    for (long c = 0; c < C; c++)
        for (long t = 0; t < 2; t++) {
            const float *older = seen + t * C + c, *newer = older + C;
            u[2 * c + t] = widen(b[c]) + widen(w[2 * c]) * *older + widen(w[2 * c + 1]) * *newer;
        }
    for (long c = 0; c < C; c++) {
        float sum = 0;
        for (long i = 0; i < 2 * D; i++) sum += widen(weight[c * 2 * D + i]) * u[c / D * 2 * D + i];
        out[c] = sum + widen(bias[c]);
    }
    for (long h = 0; h < H; h++)
        for (long d = 0; d < D; d++) {
            float mean = (p[h * D + d] + p[(H + h / group) * D + d]) / 2;
            out[h * D + d] += mean;
            out[(H + h / group) * D + d] += mean / group;
        }
    for (long h = 0; h < H + K; h++) {
        float *s = out + h * D, sum = 0;
        for (long d = 0; d < D; d++) sum += s[d] * s[d];
        float scale = sqrtf(D) / fmaxf(sqrtf(sum), 1.1920929e-07f) * (h < H ? 1 : widen(temp[h - H]));
        for (long d = 0; d < D; d++) s[d] *= scale;
        for (long d = 0; d < half; d++) {
            float first = s[d];
            s[d] = first * cosine[d] - s[d + half] * sine[d];
            s[d + half] = s[d + half] * cosine[d] + first * sine[d];
        }
    }
}
"""


@functools.cache
def c_code():
    """-> the compiled C_SOURCE; None without a C compiler that knows OpenMP: then everything goes through PyTorch."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "products")
        with open(path + ".c", "w", encoding="utf-8") as file:
            file.write(C_SOURCE)
        sums = ["-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math"]    # in any order: without, no vectors
        wide = ["-mprefer-vector-width=512"] if platform.machine() in ("x86_64", "AMD64") else []
        try:
            subprocess.run([os.environ.get("CC", "cc"), "-O3", "-march=native", *sums, *wide, "-funroll-loops",
                            "-fopenmp", "-shared", "-fPIC", path + ".c", "-o", path + ".so"],
                           check=True, capture_output=True)
            library = ctypes.CDLL(path + ".so")                 # the file may go, the code stays
        except (OSError, subprocess.CalledProcessError):
            return None
    signatures = (("bf16_product", 5, 4, 0), ("int8_product", 5, 4, 0), ("round_rows", 3, 3, 0), ("norm_row", 9, 1, 1),
                  ("mix_row", 9, 4, 0))
    for name, pointers, sizes, numbers in signatures:
        function = getattr(library, name)
        function.restype, function.argtypes = None, [*[ctypes.c_void_p] * pointers, *[ctypes.c_long] * sizes,
                                                     *[ctypes.c_float] * numbers]
    return library


def wide_linear(x, weight, scale=None):
    """F.linear(x, weight.float() * scale[:, None]) without ever having that matrix; (…, K) -> (…, N) in x's dtype.

    weight (N, K) bf16 or int8, scale (N,) fp32 or None.  Sums are fp32.  With int8, up to 8 rows of x are rounded to
    int16, as finely as lets sums of K products fit int32: at K = 2048 to 1/8255 of the row's largest value.
    """
    rows, (N, K) = x.reshape(-1, x.shape[-1]), weight.shape
    if len(rows) > 8 or weight.device.type != "cpu" or c_code() is None or not weight.is_contiguous():
        parts = [rows @ part.to(x.dtype).t() for part in weight.split(max(256, len(rows)))]
        y = torch.cat(parts, -1) if scale is None else (torch.cat(parts, -1) * scale).to(x.dtype)
        return y.view(*x.shape[:-1], N)
    rows, y, M, threads = rows.float().contiguous(), torch.empty(len(rows), N), len(rows), torch.get_num_threads()
    if weight.dtype == torch.int8:
        rounded, step = torch.empty(rows.shape, dtype=torch.int16), torch.empty(M)
        most = min(32767, (2**31 - 1) // (127 * K))
        c_code().round_rows(rows.data_ptr(), rounded.data_ptr(), step.data_ptr(), M, K, most)
        c_code().int8_product(weight.data_ptr(), scale.data_ptr(), rounded.data_ptr(), step.data_ptr(),
                                  y.data_ptr(), M, N, K, threads)
    else:
        c_code().bf16_product(weight.data_ptr(), None, rows.data_ptr(), None, y.data_ptr(), M, N, K, threads)
    return y.to(x.dtype).view(*x.shape[:-1], N)


def one_row(x, weight):
    """Whether this is a step of one row with bf16 weights that the C code is for."""
    return not torch.compiler.is_compiling() and not torch.is_grad_enabled() and x.device.type == "cpu" and \
        weight.dtype == torch.bfloat16 and x.numel() == x.shape[-1] and c_code() is not None


def linear(module, x):
    """module(x) for an nn.Linear or an Int8Linear; one row of bf16 by the product that reads fastest."""
    if isinstance(module, Int8Linear) or not one_row(x, module.weight):
        return module(x)
    y = torch.mv(module.weight, x.flatten()) if module.bias is None else \
        torch.addmv(module.bias, module.weight, x.flatten())
    return y.view(*x.shape[:-1], -1)


def norm_row(x, y=None, scaling=None, norm=None):
    """`residual_norm` of one row with bf16 weights, or without y only the norm, or without norm only the new x."""
    out, normed = torch.empty_like(x), torch.empty(x.shape, dtype=torch.bfloat16)
    names = "residual_scale", "residual_bias", "hidden_states_scale", "hidden_states_bias"
    vectors = [None] * 5 if y is None else [y.data_ptr(), *(getattr(scaling, name).data_ptr() for name in names)]
    c_code().norm_row(x.data_ptr(), *vectors, norm.weight.data_ptr() if norm else None, out.data_ptr(),
                          normed.data_ptr(), x.numel(), norm.eps if norm else 0)
    return out, normed


def route_row(gate, h, previous):
    """zaya.Router outside of training, for one row with bf16 weights."""
    r = linear(gate.down_proj, h)
    if previous is not None and hasattr(gate, "router_states_scale"):
        r = torch.addcmul(r, previous, gate.router_states_scale)
    z = F.gelu(linear(gate.fc1, norm_row(r.float(), norm=gate.norm)[1]))
    scores = linear(gate.out_proj, F.gelu(linear(gate.fc2, z))).float().softmax(-1)
    choice = (scores + gate.balancing_biases).argmax(-1)
    return scores.gather(-1, choice[..., None])[..., 0], choice, r


class FusedZaya(zaya.Zaya):
    """zaya.Zaya whose LM head, outside of training, reads bf16 or int8 weights as they are: same fp32 logits."""
    decoding_backend = None                                     # or the one that `compile_decoding` was asked for

    def logits(self, hidden):
        weight = self.output_weight
        if weight.dtype == torch.float32 or (torch.is_grad_enabled() and weight.requires_grad):
            return super().logits(hidden)
        head = self.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        with torch.autocast(hidden.device.type, enabled=False):
            return wide_linear(hidden.float(), weight, getattr(head, "scale", None))

    def hidden_states(self, input_ids, attention_mask=None, position_ids=None, cache=None, routing=None):
        if not (self.decoding_backend and cache is not None and cache.columns and input_ids.shape[1] == 1
                and attention_mask is None and position_ids is None and not routing and not torch.is_grad_enabled()):
            return super().hidden_states(input_ids, attention_mask, position_ids, cache, routing)
        position_ids = cache.position
        position_ids = torch.full_like(input_ids, cache.columns) if position_ids is None else position_ids[:, None]
        for slot in cache.layers:
            self.make_room(slot)
        column = torch.full((1,), cache.layers[0].end, device=input_ids.device)
        buffers = [(slot.k, slot.v, slot.packed, slot.delayed) for slot in cache.layers]
        for tensor in (input_ids, position_ids, *(tensor for layer in buffers for tensor in layer)):
            torch._dynamo.maybe_mark_dynamic(tensor, [0, 2] if tensor.ndim == 4 else 0)
        # Two sizes that happen to be equal at the first call, rows and columns, are not the same size.
        with torch.fx.experimental._config.patch(use_duck_shape=False):
            hidden, choices = compiled_decode_step(self.decoding_backend)(self, input_ids, position_ids, column,
                                                                              buffers)
        cache.position = None if cache.position is None else cache.position + 1
        for slot in cache.layers:
            slot.end += 1
            slot.columns += 1
        if routing is not None:
            routing.extend(choices)
        return hidden

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


# ---- 6. int8 weights ------------------------------------------------------------------------------------------------


def int8_rows(weight):
    """(…, N, K) -> int8 of the same shape, scale (…, N) fp32, with weight ~ int8 * scale[…, None]: a scale a row."""
    weight = weight.float()
    scale = weight.abs().amax(-1).clamp_min(1e-30) / 127
    return (weight / scale[..., None]).round_().to(torch.int8), scale


class Int8Linear(torch.nn.Module):
    """nn.Linear without a bias; weight (N, K) int8, scale (N,) fp32.  (…, K) -> (…, N) in x's dtype."""

    def __init__(self, shape):
        super().__init__()
        self.register_buffer("weight", torch.zeros(shape, dtype=torch.int8))
        self.register_buffer("scale", torch.zeros(shape[:-1]))

    def forward(self, x):
        return wide_linear(x, self.weight, self.scale)


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
            here = (choice == e).nonzero()[:, 0] if len(x) > 1 else slice(None)
            gate, up = wide_linear(x[here], self.gate_up_proj[e], self.gate_up_scale[e]).chunk(2, -1)
            y[here] = wide_linear(F.silu(gate) * up, self.down_proj[e], self.down_scale[e])
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


def quantize_checkpoint(source, target):
    """The int8 form of a folder in the official layout, shard by shard; everything else of it is copied."""
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import save_file
    places, names = {}, sorted(os.listdir(source))
    if "config.json" not in names:
        raise FileNotFoundError(f"{source!r} has no config.json: no checkpoint in the official layout")
    if read_json(os.path.join(source, "config.json")).get("dtype") == "int8":
        raise FileExistsError(f"{source!r} is an int8 form already")
    os.makedirs(target, exist_ok=True)
    if os.path.samefile(source, target):
        raise FileExistsError(f"the int8 form of {source!r} would overwrite it: name another folder")
    for name in tqdm([name for name in names if name.endswith(".safetensors")], desc="int8", disable=None):
        tensors = {}
        try:
            opened = safe_open(os.path.join(source, name), "pt")
        except SafetensorError as error:
            raise Damaged(f"{os.path.join(source, name)} is damaged: {error}") from None
        with opened as file:
            for key in file.keys():
                tensors |= Int8Zaya.tensors(key, file.get_tensor(key))
        save_file(tensors, os.path.join(target, name), metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, name)
    for name in names:
        if name.endswith((".json", ".jinja")):
            with open(os.path.join(source, name), encoding="utf-8") as file:
                text = file.read()
            if name == "config.json":
                text = json.dumps({**json.loads(text), "dtype": "int8"}, indent=2)
            elif name == "model.safetensors.index.json":
                text = json.dumps({"metadata": {}, "weight_map": places})
            with open(os.path.join(target, name), "w", encoding="utf-8") as file:
                file.write(text)


def load(folder, int8=False, device="cpu"):
    """A checkpoint in the official layout, or its int8 form, fused; int8: also rounds the former."""
    path = os.path.join(folder, "config.json")
    if os.path.exists(path) and read_json(path).get("dtype") == "int8":
        return Int8Zaya.from_pretrained(folder, device=device).requires_grad_(False)
    model = fuse(zaya.Zaya.from_pretrained(folder, device=device))
    return quantize(model) if int8 else model


# ---- under torch.compile: 2 and 3 again, in operations that Inductor fuses well --------------------------------------
# Eager code wants few operations, compiled code wants no strided writes, no masks in inner loops and no sum over 4,096
# rows at once.  `compile_loss` is the entry; `fuse`d modules take these paths by themselves while they are traced.


class Spread(torch.autograd.Function):
    """A vector (E,) as (B, S, E).  Its gradient adds up 16 rows at a time, which are still in the cache; Inductor would
    walk down all rows once for every 16 columns."""

    @staticmethod
    def forward(ctx, vector, B, S):
        ctx.few = math.gcd(S, 16)
        return vector.expand(B, S, -1)

    @staticmethod
    def backward(ctx, g):
        return g.unflatten(1, (-1, ctx.few)).sum(2).sum((0, 1)), None, None


class FusedScaling(zaya.ResidualScaling):
    """zaya.ResidualScaling with `Spread` vectors while it is traced."""

    def forward(self, x, y):
        if not traced(x):
            return super().forward(x, y)
        a_r, b_r, a_o, b_o = (Spread.apply(v, *x.shape[:2]) for v in (
            self.residual_scale, self.residual_bias, self.hidden_states_scale, self.hidden_states_bias))
        return torch.addcmul((x + b_r) * a_r, y.float() + b_o, a_o)


class FusedNorm(zaya.RMSNorm):
    """zaya.RMSNorm, likewise."""

    def forward(self, x):
        if not traced(x):
            return super().forward(x)
        x = x.float()
        unit = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return (unit * Spread.apply(self.weight.float(), *x.shape[:2])).to(self.weight.dtype)


class Reorder(torch.autograd.Function):
    """x[order] for a permutation whose inverse is `back`: the gradient is a gather too, not a scatter."""

    @staticmethod
    def forward(ctx, x, order, back):
        ctx.save_for_backward(order, back)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx, g):
        order, back = ctx.saved_tensors
        return g.index_select(0, back), None, None


@torch.library.custom_op("zaya::grouped_products", mutates_args=())
def grouped_products(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Rows up to ends[0] times weight[0], up to ends[1] times weight[1], …; 0 for the rest.  x (N, I), weight
    (X, I, O), ends (X,) int64 -> (N, O).  F.grouped_mm would do, but can be traced in bf16 only."""
    out, start = x.new_empty(len(x), weight.shape[2]), 0
    for w, end in zip(weight, ends.tolist()):
        torch.mm(x[start:end], w, out=out[start:end])
        start = end
    out[start:] = 0
    return out


@grouped_products.register_fake
def _(x, weight, ends):
    return x.new_empty(x.shape[0], weight.shape[2])


@torch.library.custom_op("zaya::grouped_gradients", mutates_args=())
def grouped_gradients(x: torch.Tensor, g: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """The gradients of `grouped_products` by its weights: x (N, I), g (N, O), ends (X,) -> (X, I, O)."""
    out, start = x.new_empty(len(ends), x.shape[1], g.shape[1]), 0
    for w, end in zip(out, ends.tolist()):
        torch.mm(x[start:end].t(), g[start:end], out=w)
        start = end
    return out


@grouped_gradients.register_fake
def _(x, g, ends):
    return x.new_empty(ends.shape[0], x.shape[1], g.shape[1])


class GroupedProducts(torch.autograd.Function):
    """`grouped_products` with gradients, weight (X, O, I) as the experts' parameters are."""

    @staticmethod
    def forward(ctx, x, weight, ends):
        ctx.save_for_backward(x, weight, ends)
        return grouped_products(x, weight.mT, ends)

    @staticmethod
    def backward(ctx, g):
        x, weight, ends = ctx.saved_tensors
        return grouped_products(g, weight, ends), grouped_gradients(g, x, ends), None


def grouped_experts(x, gate_up_proj, down_proj, choice, weight):
    """zaya.Experts.forward for tracing; the loops over experts are inside of two operations.

    x (N, E), choice (N,) int64, weight (N,) fp32 -> (N, E) in x's dtype.
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else gate_up_proj.dtype
    order = choice.argsort(stable=True)
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(x), device=x.device))
    ends = (choice[:, None] <= torch.arange(len(down_proj), device=x.device)).sum(0)               # (X,)
    tokens = Reorder.apply(x.to(dtype), order, back)                                # (N, E), by expert
    gate, up = GroupedProducts.apply(tokens, gate_up_proj.to(dtype), ends).chunk(2, -1)
    active = (F.silu(gate.float()) * up.float()).to(dtype)
    y = GroupedProducts.apply(active, down_proj.to(dtype), ends)
    return (Reorder.apply(y, back, order) * weight[:, None]).to(x.dtype)


@torch.library.custom_op("zaya::attention_bias", mutates_args=())
def attention_bias(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A bool mask as 0 and -inf: opaque to the compiler, which would else compare positions anew in every kernel."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)


@attention_bias.register_fake
def _(mask, dtype):
    return torch.empty_like(mask, dtype=dtype)


@torch.library.custom_op("zaya::wide_rope", mutates_args=())
def wide_rope(cos: torch.Tensor, sin: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tables (B, S, R/2) for all `width` channels of a head, (B, S, 1, D): those that RoPE leaves alone turn by 0."""
    rest = 0, width - 2 * cos.shape[-1]
    cos, sin = torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)
    return F.pad(cos, rest, value=1.0)[:, :, None], F.pad(sin, rest)[:, :, None]


@wide_rope.register_fake
def _(cos, sin, width):
    return [cos.new_empty(*cos.shape[:2], 1, width) for _ in range(2)]


class Attention(torch.autograd.Function):
    """F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=True) on a CPU, traced.

    Forward is PyTorch's flash kernel; its backward kernel makes no use of the matrix unit in bf16, so backward is
    written out in matrix products over (S, S), with the probabilities recomputed from the row sums that flash kept.
    q (B, H, S, D), k and v (B, K, S, D), bias (B or 1, 1, S, S) of `attention_bias`.
    """

    @staticmethod
    def forward(ctx, q, k, v, bias, causal):
        out, log_total = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, attn_mask=None if causal else bias)
        ctx.save_for_backward(q, k, v, out, log_total, bias)
        return out

    @staticmethod
    def backward(ctx, g):
        q, k, v, out, log_total, bias = ctx.saved_tensors
        (B, H, S, D), K = q.shape, k.shape[1]
        along = (g.float() * out.float()).sum(-1, keepdim=True)                     # (B, H, S, 1)
        k, v, parts, block = k.reshape(B * K, S, D), v.reshape(B * K, S, D), [], max(64, S // 4)
        for start in range(0, S, block):                        # nobody looks ahead: fewer keys for early queries
            rows, T = slice(start, start + block), min(S, start + block)
            q_, g_ = (t[:, :, rows].reshape(B * K, -1, D) for t in (q, g))          # a group's queries are one block
            scores, g_p = (torch.bmm(a, b[:, :T].mT).view(B, H, -1, T) for a, b in ((q_, k), (g_, v)))
            p = torch.exp(scores.float() * D ** -0.5 + bias[:, :, rows, :T].float() - log_total[:, :, rows, None])
            g_scores = (p * (g_p.float() - along[:, :, rows]) * D ** -0.5).to(q.dtype).view(B * K, -1, T)
            p = p.to(q.dtype).view(B * K, -1, T)
            parts.append((torch.bmm(g_scores, k[:, :T]).view(B, H, -1, D),
                          *(F.pad(torch.bmm(a.mT, b), (0, 0, 0, S - T)) for a, b in ((g_scores, q_), (p, g_)))))
        g_q, g_k, g_v = zip(*parts)
        return torch.cat(g_q, 2), sum(g_k).view(B, K, S, D), sum(g_v).view(B, K, S, D), None, None


def traced_cca(cca, packed, current, delayed, positions):
    """zaya.CCA.forward between its projections, without a cache: packed (B, S, C), current and delayed (B, S, K*D/2)
    -> (B, S, H*D)."""
    (B, S, _), H, K, D, dtype = packed.shape, cca.heads, cca.kv_heads, cca.head_dim, packed.dtype
    ids, mask, rope = positions.position_ids, positions.mask, (positions.cos, positions.sin)
    link = torch.ones(1, S, device=packed.device) if ids is None else (ids >= 1).float()
    link = torch.cat([torch.zeros_like(link[:, :1]), link[:, 1:]], 1)               # nothing is before a row's start

    def before(x):
        return F.pad(x[:, :-1], (0, 0) * (x.ndim - 2) + (1, 0)) * link.view(-1, S, *[1] * (x.ndim - 2)).to(x.dtype)

    v = torch.cat([current, before(delayed)], -1).view(B, S, K, D)
    with torch.autocast(packed.device.type, enabled=False):
        w, b, weight, bias, temp = mixing_weights(cca)
        p, C = packed.float(), (H + K) * D
        constant = bias + (weight.sum(-1) @ b.view(H + K, D, 1)).flatten()
        first, second, constant = (Spread.apply(t, B, S) for t in (w[:, 0], w[:, 1], constant))
        u = (p * second + before(p) * first).to(dtype).view(B * S, C)
        # Both taps of all heads as one product with zeros between the heads: H + K times the operations, and still
        # faster for heads of 32, whose own products are too small to be fast.
        heads = torch.eye(H + K, device=packed.device, dtype=dtype)[:, None, None, :, None]
        dense = (weight.to(dtype).permute(0, 2, 3, 1)[:, :, :, None] * heads).reshape(C, 2 * C)     # (in, tap x out)
        last, now = (u @ dense).view(B, S, 2 * C).float().chunk(2, -1)
        mixed, (q_mean, k_mean) = (now + before(last) + constant).view(B, S, H + K, D), cca.qk_mean(p)
        cos, sin = wide_rope(*rope, D)
        channel, half = torch.arange(D, device=packed.device), rope[0].shape[-1]
        partner = torch.where(channel < 2 * half, (channel + half) % (2 * half), channel)
        swap = (channel[:, None] == partner).float()                                # (D, D), a permutation: exact

        def turn(x):
            return (x * cos + (x.reshape(-1, D) @ swap).view(x.shape) * sin).to(dtype).transpose(1, 2)

        q, k, v = turn(cca.unit(mixed[:, :, :H] + q_mean)), turn(cca.unit(mixed[:, :, H:] + k_mean) * temp[:, None]), \
            v.transpose(1, 2)
        if S > 1024:                                            # squares of S would no longer fit
            out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=True)
        else:
            seen = torch.ones(1, 1, S, S, dtype=torch.bool, device=packed.device).tril() if mask is None else mask
            out = Attention.apply(q, k, v, attention_bias(seen, dtype), mask is None)
    return out.transpose(1, 2).reshape(B, S, H * D)


def summed_loss(model, input_ids, targets, position_ids, dtype=torch.float32):
    """The summed cross-entropy of a batch, everything below the LM head under autocast to `dtype`."""
    with torch.autocast(input_ids.device.type, dtype, enabled=dtype != torch.float32):
        hidden = model.hidden_states(input_ids, position_ids=position_ids)
    return linear_cross_entropy(hidden.flatten(0, 1), model.output_weight, targets.flatten())


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
    computed.  The constants are rough (20 s a layer for compiling and a third of the time saved, at preset tiny on one
    core), so the saving must be three times the cost.
    """
    if model.norm.weight.device.type != "cpu":
        return False, "the training step is not compiled: the fast paths of a GPU are Triton kernels already"
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler
        get_cpp_compiler()
    except Exception:
        return False, "the training step is not compiled: there is no C++ compiler here"
    seconds = 6 * model.parameter_counts()["active"] * tokens / 7e10                # forward and backward
    saved, warm_up = 0.3 * seconds, 20 * len(model.layers)
    worth = saved > 3 * warm_up
    return worth, f"the training step is {'' if worth else 'not '}compiled: that might save {saved:.0f} of " \
        f"{seconds:.0f} s and cost {warm_up} s"


# ---- Triton: 1, 2 and 3 for CUDA and ROCm, from one source ----------------------------------------------------------
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


def power_of_2(n):
    return 1 << (n - 1).bit_length()


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


class TritonResidualNorm(torch.autograd.Function):
    """The Function behind `triton_residual_norm`; `vectors` (5, E) fp32 are a_r, b_r, a_o, b_o, w."""
    ROWS = 16                                                           # of which a program sums the five gradients

    @staticmethod
    def forward(ctx, x, y, vectors, dtype, eps):
        (kernel, _), E = norm_kernels(), x.shape[-1]
        out, normed = torch.empty_like(x), torch.empty_like(x, dtype=dtype)
        kernel[(x.numel() // E,)](x, y, vectors, out, normed, eps, E, BLOCK=power_of_2(E))
        ctx.save_for_backward(x, y, vectors)
        ctx.eps = eps
        return out, normed

    @staticmethod
    def backward(ctx, d_out, d_normed):
        (_, kernel), (x, y, vectors), ROWS = norm_kernels(), ctx.saved_tensors, TritonResidualNorm.ROWS
        E, N = x.shape[-1], x.shape[:-1].numel()
        dx, dy, sums = torch.empty_like(x), torch.empty_like(y), x.new_empty(cdiv(N, ROWS), 5, E)
        kernel[(len(sums),)](x, y, vectors, d_out.contiguous(), d_normed.contiguous(), dx, dy, sums, ctx.eps, N, E,
                             ROWS=ROWS, BLOCK=power_of_2(E), num_warps=8)
        return dx, dy, sums.sum(0), None, None


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
    return TritonResidualNorm.apply(x.contiguous(), y.contiguous(), torch.stack([v.float() for v in vectors]),
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


class TritonMix(torch.autograd.Function):
    """The Function behind `triton_cca_mix`, with both convolutions' weights as (2, …), the older token's first.

    Only the inputs are kept: backward convolves again.
    """
    BT = 32

    @staticmethod
    def forward(ctx, packed, current, delayed, w0, b0, w1, b1, temp, cos, sin, link):
        (B, S, C), D, K, BT = packed.shape, w1.shape[2], len(temp), TritonMix.BT
        q, k, v = packed.new_empty(B, S, C // D - K, D), *packed.new_empty(2, B, S, K, D).unbind()
        mix, _ = mix_kernels()
        mix[(cdiv(B * S, BT), C // D)](
            packed, current, delayed, w0, b0, w1, b1, temp, cos, sin, link, q, k, v, q, q, q, B * S,
            H=C // D - K, K=K, D=D, HALF=cos.shape[-1], BACKWARD=False, BT=BT, BI=min(D, 32))
        ctx.save_for_backward(packed, w0, b0, w1, b1, temp, cos, sin, link)
        return q, k, v

    @staticmethod
    def backward(ctx, dq, dk, dv):
        packed, w0, b0, w1, b1, temp, cos, sin, link = ctx.saved_tensors
        (B, S, C), D, K, BT = packed.shape, w1.shape[2], len(temp), TritonMix.BT
        H, N, dq, dk = C // D - K, B * S, dq.contiguous(), dk.contiguous()
        dz, d_packed, taps = torch.empty_like(packed), torch.empty_like(packed), packed.new_empty(N, 2, C)
        sums = packed.new_empty(2, cdiv(N, BT), 2, C, dtype=torch.float32)
        mix, unmix = mix_kernels()
        mix[(cdiv(N, BT), C // D)](
            packed, packed, packed, w0, b0, w1, b1, temp, cos, sin, link, dq, dk, packed, dz, taps, sums[0], N,
            H=H, K=K, D=D, HALF=cos.shape[-1], BACKWARD=True, BT=BT, BI=min(D, 32))
        unmix[(cdiv(N, BT), C // D)](packed, w0, w1, link, dz, d_packed, sums[1], N, H=H, K=K, D=D, BT=BT)
        (db1, d_temp), dw0 = sums.sum(1)                                            # (C,) each, (2, C)
        dw1 = torch.einsum("nho,nkhi->khoi", dz.view(N, H + K, D), taps.view(N, 2, H + K, D)).reshape(2, C, D)
        # Both taps of the second convolution see the first one's bias, at a border too.
        db0 = torch.einsum("ho,hoi->hi", db1.view(H + K, D), w1.float().sum(0).view(H + K, D, D)).flatten()
        gradients = zip((dw0, db0, dw1, db1, d_temp[H * D:].view(K, D).sum(1)), (w0, b0, w1, b1, temp))
        current, delayed = dv.flatten(2).chunk(2, -1)                               # (B, S, K*D/2)
        delayed = F.pad((delayed * link.view(B, S, 1))[:, 1:], (0, 0, 0, 1))
        return d_packed, current, delayed, *(g.to(w.dtype) for g, w in gradients), None, None, None


def triton_cca_mix(packed, current, delayed, depthwise_weight, depthwise_bias, grouped_weight, grouped_bias, temp, cos,
                   sin, position_ids=None):
    """What CCA does between its projections and attention.

        [q; k] = conv_in_head(conv_per_channel(packed)) + q-k-mean(packed),   v_t = [current_t ; delayed_(t-1)]
        q, k  <- rope(sqrt(D) q / |q|), rope(temp_k sqrt(D) k / |k|)

    packed (B, S, C), current and delayed (B, S, K*D/2), fp32 or bf16; the weights and biases of the two nn.Conv1d,
    temp (K,); cos and sin (B, S, R/2) fp32, position_ids (B, S) int64 or None -> q (B, H, S, D), k, v (B, K, S, D)
    in packed's dtype.  Equals zaya.py's CCA.forward from `packed` to the cache; it takes no cache: rows start here.
    Raises ValueError for kernels other than the published 2 and 2, a D that is no power of two, and mixed dtypes.
    """
    taps, D = (depthwise_weight.shape[-1], grouped_weight.shape[-1]), grouped_weight.shape[1]
    if taps != (2, 2):
        raise ValueError(f"triton_cca_mix: convolutions of {taps[0]} and {taps[1]} taps are not implemented, only of 2 "
                         "and 2 (cca_time0 = cca_time1 = 2, as published)")
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
    return tuple(out.transpose(1, 2) for out in TritonMix.apply(*(tensor.contiguous() for tensor in tensors)))


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


class TritonExperts(torch.autograd.Function):
    """The Function behind `triton_experts`.  Kept are the inputs and the (N, 2F) products before SwiGLU."""
    BLOCK = 64

    @staticmethod
    def product(step, a, w, out, gate_up, hidden, d_weight, weight, order, tiles, I, J, to_j, to_i):
        expert_kernels()[0][cdiv(J, TritonExperts.BLOCK), len(tiles)](
            a, w, out, gate_up, hidden, d_weight, weight, order, tiles, len(order), len(w), I, J, w[0].numel(), to_j,
            to_i, STEP=step, BLOCK=TritonExperts.BLOCK)

    @staticmethod
    def forward(ctx, x, choice, weight, gate_up_proj, down_proj):
        (N, E), (X, _, width), product = x.shape, down_proj.shape, TritonExperts.product
        order, starts, tiles = expert_tiles(choice, X, TritonExperts.BLOCK)
        gate_up, hidden, y = x.new_empty(N, 2 * width), x.new_empty(N, width), torch.empty_like(x)
        product("up", x, gate_up_proj, y, gate_up, hidden, y, weight, order, tiles, E, width, E, 1)
        product("down", hidden, down_proj, y, y, y, y, weight, order, tiles, width, E, width, 1)
        ctx.save_for_backward(x, weight, gate_up_proj, down_proj, gate_up, order, starts, tiles)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, gate_up_proj, down_proj, gate_up, order, starts, tiles = ctx.saved_tensors
        (N, E), (X, _, width), product, dy = x.shape, down_proj.shape, TritonExperts.product, dy.contiguous()
        d_gate_up, hidden, dx = torch.empty_like(gate_up), x.new_empty(N, width), torch.empty_like(x)
        d_weight = x.new_empty(cdiv(width, TritonExperts.BLOCK), N, dtype=torch.float32)
        product("down_gradient", dy, down_proj, d_gate_up, gate_up, hidden, d_weight, weight, order, tiles, E, width, 1,
                width)
        product("up_gradient", d_gate_up, gate_up_proj, dx, dx, dx, dx, weight, order, tiles, 2 * width, E, 1, E)
        gradients = torch.empty_like(gate_up_proj), torch.empty_like(down_proj)
        for a, b, out, tokens_in_a in ((d_gate_up, x, gradients[0], False), (dy, hidden, gradients[1], True)):
            grid = cdiv(b.shape[1], TritonExperts.BLOCK), cdiv(a.shape[1], TritonExperts.BLOCK), X
            expert_kernels()[1][grid](a, b, out, order, starts, a.shape[1], b.shape[1],
                                      TOKENS_IN_A=tokens_in_a, BLOCK=TritonExperts.BLOCK)
        return dx, None, d_weight.sum(0).to(weight.dtype), *gradients


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
    return TritonExperts.apply(*(t.contiguous() for t in (x, choice, weight, gate_up_proj, down_proj)))


# ---- the model ------------------------------------------------------------------------------------------------------


class FusedLayer(zaya.Layer):
    """zaya.Layer with path 1 between its two halves."""

    def forward(self, x, r, positions=None, cache=None, choice=None, count=None):
        if one_row(x, self.input_layernorm.weight) and choice is None and not self.gate.training:
            return self.step(x, r, positions, cache)
        y = self.self_attn(self.input_layernorm(x), positions, cache)
        x, h = residual_norm(x, y, self.post_attention_residual_scale, self.post_attention_layernorm)
        weight, choice, r = self.gate(h, r, choice, count)
        y = self.experts(h.flatten(0, 1), choice.flatten(), weight.flatten()).view_as(h)
        return self.post_mlp_residual_scale(x, y), r, choice

    def step(self, x, r, positions, cache):
        """One token of one row with bf16 weights: of 200 small operations, those that C does not do."""
        y = self.self_attn(norm_row(x, norm=self.input_layernorm)[1], positions, cache)
        x, h = norm_row(x, y, self.post_attention_residual_scale, self.post_attention_layernorm)
        weight, choice, r = route_row(self.gate, h, r)
        y = self.experts(h[0], choice[0], weight[0])
        return norm_row(x, y, self.post_mlp_residual_scale)[0], r, choice


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
    theta, share = (model.config.rope_parameters["hybrid"][key] for key in ("rope_theta", "partial_rotary_factor"))
    rope = zaya.CCA.rope_table(position_ids, theta, int(model.config.head_dim * share))
    back = column - torch.arange(buffers[0][0].shape[2], device=token.device)                       # (T,)
    mask = ((back >= 0) & (back <= position_ids))[:, None, None]                                    # (B, 1, 1, T)
    positions = zaya.CCA.Positions(position_ids, *rope, mask)
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
    return torch.compile(decode_step, fullgraph=True, backend=backend)



def compile_decoding(model, backend="inductor"):
    """Let a fused model's `generate`, and all that decodes one token at a time, run its steps compiled -> the model.

    Raises ValueError for sliding windows: their columns are forgotten, which moves what a static buffer would hold.
    """
    if "hybrid_sliding" in model.config.layer_types:
        raise ValueError("compile_decoding: this model has layers with sliding windows; use it as it is")
    model.decoding_backend = backend
    return model


def fuse(model):
    """Give a Zaya and its layers their fast paths, in place -> the model.  Same parameters, same checkpoints."""
    if not isinstance(model, FusedZaya):                        # an Int8Zaya is one
        model.__class__ = FusedZaya
    model.norm.__class__ = FusedNorm
    for layer in model.layers:
        layer.__class__, layer.self_attn.__class__ = FusedLayer, FusedCCA
        layer.post_attention_residual_scale.__class__ = layer.post_mlp_residual_scale.__class__ = FusedScaling
        layer.input_layernorm.__class__ = layer.post_attention_layernorm.__class__ = FusedNorm
        if isinstance(layer.experts, zaya.Experts):             # int8 ones have their own
            layer.experts.__class__ = FusedExperts
    return model


# ---- python kernels.py ----------------------------------------------------------------------------------------------


def medians(*functions, rounds=9):
    """Median milliseconds of each, measured in turns, so that what else the machine does hits all alike."""
    for function in functions:
        function()
    times = [[] for _ in functions]
    for _ in range(rounds):
        for function, some in zip(functions, times):
            begun = time.perf_counter()
            function()
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

    def run():
        for tensor in (*leaves, *modules.parameters()):
            tensor.grad = None
        outputs = function(*leaves)
        sum((o.float() ** 2).sum() for o in outputs).backward()
        return [*outputs, *(x.grad for x in leaves if x.requires_grad), *(p.grad for p in modules.parameters())]
    return run


def machine_limits():
    """GFLOP/s of fp32 matrix products and GB/s of a copy: how far a path could go at most."""
    a, b = torch.randn(2048, 1024), torch.randn(1024, 1024)
    big, other = torch.empty(2**25), torch.empty(2**25)
    product, copy = medians(lambda: a @ b, lambda: other.copy_(big))
    return {"matmul_gflops": 2 * 2048 * 1024 * 1024 / product / 1e6, "copy_gb_per_s": 2 * 4 * 2**25 / copy / 1e6}


def measured_shape(**changes):
    """The shape of all measurements here."""
    return zaya.ZayaConfig(**{**dict(
        vocab_size=512, hidden_size=256, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=1, head_dim=32,
        num_experts=8, moe_intermediate_size=256, router_hidden_size=32, initializer_range=0.06), **changes})


class DenseLayer(FusedLayer):
    """A layer whose one SwiGLU network serves all tokens, without a router: what top-1 experts cost is measured by it.
    """

    def forward(self, x, r, positions=None, cache=None, choice=None, count=None):
        y = self.self_attn(self.input_layernorm(x), positions, cache)
        x, h = residual_norm(x, y, self.post_attention_residual_scale, self.post_attention_layernorm)
        gate, up = F.linear(h, self.experts.gate_up_proj[0]).chunk(2, -1)
        return self.post_mlp_residual_scale(x, F.linear(F.silu(gate) * up, self.experts.down_proj[0])), r, choice


def fused_dense(config):
    """A fused model whose layers are as wide as one expert of config's."""
    model = fuse(zaya.Zaya(zaya.ZayaConfig.from_dict({**config.to_dict(), "num_experts": 1})))
    for layer in model.layers:
        layer.__class__ = DenseLayer
    return model


def kv_bytes(model):
    """Bytes that a token adds to a model's cache, counted in the cache's tensors."""
    caches = [zaya.Cache(len(model.layers)) for _ in range(2)]
    with torch.no_grad():
        for cache, tokens in zip(caches, (8, 9)):
            model(torch.zeros(1, tokens, dtype=torch.long), cache=cache)
    totals = [sum(part[:, :, slot.start:slot.end].nbytes for slot in cache.layers for part in (slot.k, slot.v))
              + sum(part.nbytes for slot in cache.layers for part in (slot.packed, slot.delayed)) for cache in caches]
    return totals[1] - totals[0]


def kv_bytes_of_mha(config, size=4):
    """The same for multi-head attention of the same width: keys and values of hidden_size channels each a layer."""
    return config.num_hidden_layers * 2 * config.hidden_size * size


def benchmark(B=16, S=256):
    """Every path beside what it equals: rows of {"path", "error", "plain_ms", "fused_ms", "ratio"} and a training and a
    decoding step beside transformers', where that is installed."""
    config = measured_shape()
    torch.manual_seed(0)
    plain = zaya.Zaya(config).train()
    fused = fuse(copy.deepcopy(plain))
    layer, fast, rows = plain.layers[1], fused.layers[1], []
    position_ids = torch.arange(S).remainder(S // 4).expand(B, S).contiguous()      # four samples a row
    x, y = torch.randn(B, S, 256), torch.randn(B, S, 256)
    positions = layer.self_attn.locate(x, position_ids)
    choice, weight = torch.randint(0, 8, (B * S,)), torch.rand(B * S)
    ids, targets = torch.randint(0, 512, (B, S)), torch.randint(0, 512, (B * S,))
    bar = tqdm(total=6, desc="paths", leave=False, disable=None)

    def compare(path, modules, reference, ours, inputs):
        a, b = with_gradients(reference, inputs, modules[0]), with_gradients(ours, inputs, modules[1])
        error = worst(b(), a())
        slow, quick = medians(a, b)
        rows.append({"path": path, "error": error, "plain_ms": slow, "fused_ms": quick, "ratio": slow / quick})
        bar.update()

    def pair(layer):
        return torch.nn.ModuleList([layer.post_attention_residual_scale, layer.post_attention_layernorm])

    def joined(x, y):
        x = layer.post_attention_residual_scale(x, y)
        return x, layer.post_attention_layernorm(x)

    compare("residual scaling + norm", (pair(layer), pair(fast)), joined,
            lambda x, y: residual_norm(x, y, *pair(fast)), (x, y))
    compare("CCA, packed rows", (layer.self_attn, fast.self_attn), lambda x: [layer.self_attn(x, positions)],
            lambda x: [fast.self_attn(x, positions)], (x,))
    compare("experts", (layer.experts, fast.experts), lambda x, w: [layer.experts(x, choice, w)],
            lambda x, w: [fast.experts(x, choice, w)], (x.flatten(0, 1), weight))
    heads = [torch.nn.Linear(256, 512, bias=False) for _ in range(2)]
    heads[1].load_state_dict(heads[0].state_dict())
    compare("LM head + cross-entropy", heads, lambda h: [F.cross_entropy(heads[0](h), targets, reduction="sum")],
            lambda h: [linear_cross_entropy(h, heads[1].weight, targets)], (x.flatten(0, 1),))

    def step(model):
        def run():
            model.zero_grad()
            hidden = model.hidden_states(ids, position_ids=position_ids).flatten(0, 1)
            (F.cross_entropy(model.logits(hidden), targets) if model is plain else
             linear_cross_entropy(hidden, model.output_weight, targets) / len(targets)).backward()
            return [p.grad for p in model.parameters()]
        return run

    theirs = official(config)
    def add(path, error, functions, rounds):
        slow, quick, *other = medians(*functions, rounds=rounds)
        rows.append({"path": path, "error": error, "plain_ms": slow, "fused_ms": quick, "ratio": slow / quick,
                     **({"transformers_ms": other[0], "over_transformers": other[0] / quick} if other else {})})
        bar.update()

    functions = [step(plain), step(fused)] + ([theirs["step"](ids, targets.view(B, S))] if theirs else [])
    add(f"training step, {B} x {S}, forward and backward", worst(functions[1](), functions[0]()), functions, 7)
    prompt = ids[:1, :32].expand(64, -1).contiguous() + torch.arange(64)[:, None] % 8
    functions = [lambda m=m: m.generate(prompt, 64, temperature=0) for m in (plain, fused)]
    functions += [theirs["generate"](prompt, 64)] if theirs else []
    same = (functions[0]() != functions[1]()).float().mean().item()
    add("generate, 64 rows, 64 new tokens (error: share of other tokens)", same, functions, 3)
    bar.close()
    return rows


def official(config, dtype=torch.float32, experts="eager", compiled=False):
    """transformers' model of the same shape: {"step", "generate"}; None where it is not installed."""
    if importlib.util.find_spec("transformers") is None:
        return None
    from transformers import AutoConfig, AutoModelForCausalLM
    shape = {key: value for key, value in config.to_dict().items()
             if key not in ("architectures", "model_type", "dtype")}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("zaya", **shape), experts_implementation=experts)
    model = model.to(dtype)

    def logits(ids):
        return model(ids, use_cache=False).logits

    forward = torch.compile(logits) if compiled else logits

    def step(ids, labels):
        def run():
            model.zero_grad()
            # Whole rows: it cannot keep packed samples apart, which would save it no work either.
            F.cross_entropy(forward(ids).float().flatten(0, 1), labels.flatten()).backward()
        return run

    def generate(prompt, count):
        mask = torch.ones_like(prompt)
        return lambda: model.generate(prompt, attention_mask=mask, max_new_tokens=count, min_new_tokens=count,
                                      do_sample=False, pad_token_id=0)
    return {"step": step, "generate": generate}


def make_random_checkpoint(folder, config=None):
    """A random bf16 model in the official layout, a shard a layer: never more than a layer in memory.

    Every matrix is a piece, from a place of its own, of 2^26 normal numbers: drawing 9e9 would take minutes.
    """
    from safetensors.torch import save_file
    config = config or zaya.ZayaConfig.preset("zaya1-8b")
    os.makedirs(folder, exist_ok=True)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in zaya.Zaya(config).state_dict().items()}
    shards = collections.defaultdict(list)
    for name in shapes:
        shards[name.split(".")[1] if name.startswith("layers.") else "rest"].append(name)
    pool, places = torch.empty(2**26, dtype=torch.bfloat16).normal_(std=config.initializer_range), {}
    for i, names in enumerate(tqdm(shards.values(), desc="random weights", disable=None)):
        file, tensors = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors", {}
        for name in names:
            tensor = torch.ones(shapes[name], dtype=torch.bfloat16)
            if tensor.ndim > 1:
                start = torch.randint(2**25, ()).item()
                for part in tensor.flatten().split(2**25):
                    part.copy_(pool[start:start + len(part)])
            elif not name.endswith(("scale", "norm.weight", "temp")):
                tensor.zero_()
            tensors[zaya.Zaya.official_name(name)] = tensor
        save_file(tensors, os.path.join(folder, file), metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, file)
    for name, text in (("model.safetensors.index.json", {"metadata": {}, "weight_map": places}),
                       ("config.json", {**config.to_dict(), "dtype": "bfloat16"})):
        with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
            json.dump(text, file)


def memory_gb():
    """{"anonymous", "mapped"} GB of this process that are in memory now; NaN where there is no /proc."""
    try:
        with open("/proc/self/status", encoding="utf-8", errors="replace") as file:
            kb = dict(line.split(":", 1) for line in file)
        return {name: int(kb[key].split()[0]) / 1e6 for name, key in (("anonymous", "RssAnon"), ("mapped", "RssFile"))}
    except (OSError, KeyError):
        return {"anonymous": float("nan"), "mapped": float("nan")}


def gb_per_token(model):
    """What one token reads: of the experts one, of the embedding the LM head, of everything else all."""
    experts = sum(t.nbytes for layer in model.layers for t in layer.experts.state_dict().values())
    return (sum(t.nbytes for t in model.state_dict().values()) - experts * (1 - 1 / model.config.num_experts)) / 1e9


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
    if not os.path.exists(os.path.join(folder, "config.json")):
        make_random_checkpoint(folder)
    if not os.path.exists(os.path.join(folder + "-int8", "config.json")):
        quantize_checkpoint(folder, folder + "-int8")
    rows, prompt, reference = [], torch.arange(1, 9)[None], None
    for name in (folder, folder + "-int8"):
        try:
            model = load(name)
        except ValueError as error:                             # of a damaged checkpoint, and of nothing later
            raise Damaged(f"{name}: {error}") from None
        for tensor in model.state_dict().values():                                  # map every page once
            tensor.view(-1)[::1024].sum(dtype=torch.float32)
        decode(model, prompt, 4)
        bandwidth = mv_bandwidth()
        ids, logits, times = decode(model, prompt, count)
        row = {"checkpoint": name, **memory_gb(), "gb_per_token": gb_per_token(model), "bandwidth": bandwidth,
               "tokens_per_s": len(times) / sum(times)}
        row["share"] = row["tokens_per_s"] * row["gb_per_token"] / bandwidth
        if reference is None:
            reference = ids, logits
        else:                                                                       # over the same tokens
            logits = model(reference[0][:, :-1])[0, prompt.shape[1] - 1:]
            row |= logit_error(logits, reference[1])
        rows.append(row)
        del model
    return rows


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


def at_its_best(B=16, S=256, new=128, rounds=7):
    """Training step and generation, each side by what it does fastest: {"training": {name: ms}, "generation": …}.

    Whole rows, as transformers knows no others.  Compiling, which takes minutes, happens before anything is timed.
    """
    config = measured_shape()
    torch.manual_seed(0)
    plain = zaya.Zaya(config).train()
    fused = fuse(copy.deepcopy(plain))
    half = compile_decoding(fuse(copy.deepcopy(plain).bfloat16()))
    ids, targets = torch.randint(0, config.vocab_size, (2, B, S))
    prompt = torch.randint(0, config.vocab_size, (64, 32))

    def step(model, loss_of, dtype):
        def run():
            model.zero_grad()
            (loss_of(model, ids, targets, None, dtype) / targets.numel()).backward()
        return run

    kinds = {"eager, fp32": (torch.float32,), "grouped_mm, bf16": (torch.bfloat16, "grouped_mm"),
             "compiled, grouped_mm, bf16": (torch.bfloat16, "grouped_mm", True)}
    theirs = {name: model for name, kind in kinds.items() if (model := official(config, *kind))}
    training = {"zaya.py, fp32": step(plain, summed_loss, torch.float32),
                "fused, fp32": step(fused, summed_loss, torch.float32),
                "fused and compiled, bf16": step(fused, compile_loss(), torch.bfloat16),
                **{f"transformers, {name}": model["step"](ids, targets) for name, model in theirs.items()}}
    generation = {"zaya.py, fp32": lambda: plain.generate(prompt, new, 0), "fused, fp32": lambda: fused.generate(
        prompt, new, 0), "fused and compiled, bf16": lambda: half.generate(prompt, new, 0),
        **{f"transformers, {name}": model["generate"](prompt, new) for name, model in theirs.items()
           if "compiled" not in name}}
    result = {}
    for what, functions in (("training", training), ("generation", generation)):
        for name in (bar := tqdm(functions, desc=f"warming up, {what}", leave=False, disable=None)):
            bar.set_postfix_str(name)
            functions[name]()
        result[what] = dict(zip(functions, medians(*functions.values(), rounds=rounds if what == "training" else 3)))
    result["tokens"] = {"training": B * S, "generation": 64 * new}
    return result


def costs(B=16, S=256):
    """What experts and the cache cost: a step with top-1 of 8 experts beside one of a dense model of the same active
    size, both fused, and the cache's bytes a token beside multi-head attention's."""
    config = measured_shape()
    torch.manual_seed(0)
    models = [fuse(zaya.Zaya(config)).train(), fused_dense(config).train()]
    ids, targets = torch.randint(0, config.vocab_size, (2, B, S))

    def step(model):
        def run():
            model.zero_grad()
            loss = summed_loss(model, ids, targets, None)
            loss.backward()
            return loss
        return run

    moe, dense = medians(*map(step, models), rounds=7)
    return {"moe_ms": moe, "dense_ms": dense, "moe_over_dense": moe / dense, "kv_bytes": kv_bytes(models[0].eval()),
            "kv_bytes_mha": kv_bytes_of_mha(config)}


class MultiHead(torch.nn.Module):
    """Multi-head attention as wide as its input: what CCA is compared with over context."""

    def __init__(self, size, head_dim):
        super().__init__()
        self.heads, self.qkv, self.out = size // head_dim, torch.nn.Linear(size, 3 * size), torch.nn.Linear(size, size)

    def forward(self, x, positions):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        q, k = (zaya.CCA.apply_rotary(t, positions.cos, positions.sin) for t in (q, k))
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


@torch.no_grad()
def context_times(lengths=(1024, 2048, 4096, 8192, 16384), size=256, rounds=5):
    """Prefill of one attention layer, fp32: rows of {"tokens", "cca_ms", "mha_ms"}; CCA has half of the heads and an
    eighth of the keys and values, as in ZAYA1-8B."""
    cca, mha, rows = zaya.CCA(size, size // 64, size // 256, 32), MultiHead(size, 32), []
    cca.__class__ = FusedCCA
    for S in tqdm(lengths, desc="prefill", leave=False, disable=None):
        x = torch.randn(1, S, size)
        where = cca.locate(x)
        times = medians(lambda: cca(x, where), lambda: mha(x, where), rounds=rounds)    # noqa: B023, called here
        rows.append({"tokens": S, **dict(zip(("cca_ms", "mha_ms"), times))})
    return rows


def draw_context(rows, path, size=256):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    tokens = [row["tokens"] for row in rows]
    for key, label, color, marker in (("mha_ms", "multi-head attention", "tab:gray", "s"),
                                      ("cca_ms", "CCA, 1/8 of the KV cache", "tab:blue", "o")):
        axes.plot(tokens, [row[key] for row in rows], color=color, marker=marker, label=label)
    for row in rows:
        axes.annotate(f"{row['mha_ms'] / row['cca_ms']:.1f}×", (row["tokens"], row["cca_ms"]), (0, -14),
                      textcoords="offset points", ha="center", fontsize=9, color="tab:blue")
    axes.set(xscale="log", yscale="log", xlabel="context, tokens", ylabel="prefill of one attention layer, ms",
             title=f"What context costs: width {size}, fp32, CPU, threads: {torch.get_num_threads()}")
    axes.set_xticks(tokens, [f"{n // 1024}K" for n in tokens])
    axes.minorticks_off()
    axes.margins(y=0.12)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path + ".tmp", format="png", dpi=150)
    os.replace(path + ".tmp", path)


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


def main(arguments=None):
    parser = argparse.ArgumentParser(description="Equality and speed of every fast path on this machine.")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--compile", action="store_true",
                        help="also ours at its best against transformers at its best: minutes of compiling")
    parser.add_argument("--picture", metavar="FILE", help="also prefill times over context, drawn into this PNG")
    parser.add_argument("--full-size", metavar="FOLDER", help="instead: memory and decoding speed of the checkpoint in "
                        "FOLDER and of its int8 form in FOLDER-int8; a random ZAYA1-8B is made if there is none")
    parser.add_argument("--quantize", nargs=2, metavar=("FOLDER", "TARGET"), help="instead: write FOLDER's int8 form")
    given = parser.parse_args(arguments)
    if given.picture and (os.path.isdir(given.picture) or not os.path.isdir(os.path.dirname(given.picture) or ".")):
        parser.error(f"--picture {given.picture}: that is a folder, or in none")        # minutes before it is drawn
    if given.quantize:
        return quantize_checkpoint(*given.quantize)
    if given.full_size:
        rows = decoding(given.full_size)
        if given.json:
            return print(json.dumps({"threads": torch.get_num_threads(), "decoding": rows}, indent=1))
        print("| checkpoint | anonymous, GB | mapped, GB | GB a token | GB/s of torch.mv | tokens/s | of the limit | "
              "logit error | KL, nats | same argmax |")
        print("|---" * 10 + "|")
        for row in rows:
            error = [f"{row[key]:.3g}" for key in ("error", "kl", "same")] if "error" in row else [""] * 3
            print("| " + " | ".join([row["checkpoint"], *(f"{row[key]:.2f}" for key in (
                "anonymous", "mapped", "gb_per_token", "bandwidth", "tokens_per_s", "share")), *error]) + " |")
        return
    limits, rows, cost = machine_limits(), benchmark(), costs()
    best = at_its_best() if given.compile else {}
    context = context_times() if given.picture else []
    if given.picture:
        draw_context(context, given.picture)
    if given.json:
        print(json.dumps({"threads": torch.get_num_threads(), **limits, "paths": rows, "costs": cost, "best": best,
                          "context": context}, indent=1))
        return
    print(f"{torch.get_num_threads()} threads: fp32 matrix products at {limits['matmul_gflops']:.0f} GFLOP/s, copies "
          f"at {limits['copy_gb_per_s']:.1f} GB/s; medians\n")
    print("| path | error | zaya.py, ms | fused, ms | ratio | transformers, eager fp32, ms | ratio |")
    print("|---" * 7 + "|")
    for row in rows:
        more = [f"{row['transformers_ms']:.1f}", f"{row['over_transformers']:.2f}"] if "transformers_ms" in row else \
            ["", ""]
        print("| " + " | ".join([row["path"], f"{row['error']:.0e}", f"{row['plain_ms']:.1f}", f"{row['fused_ms']:.1f}",
                                 f"{row['ratio']:.2f}", *more]) + " |")
    print("\nA step with top-1 of 8 experts takes {moe_ms:.0f} ms, of a dense model of the same active size "
          "{dense_ms:.0f} ms: {moe_over_dense:.2f} times.\nThe cache grows by {kv_bytes} bytes a token; multi-head "
          "attention of this width: {kv_bytes_mha}.".format(**cost))
    for what in ("training", "generation") if best else ():
        ours, count = best[what]["fused and compiled, bf16"], best["tokens"][what]
        print(f"\n| {what}, each side at its best | ms | tokens/s | over ours compiled |")
        print("|---" * 4 + "|")
        for name, ms in best[what].items():
            print(f"| {name} | {ms:.0f} | {1e3 * count / ms:,.0f} | {ms / ours:.2f} |")
    if context:
        print("\n| prefill of one attention layer, tokens | multi-head, ms | CCA, ms | ratio |")
        print("|---" * 4 + "|")
        for row in context:
            slow, quick = row["mha_ms"], row["cca_ms"]
            print(f"| {row['tokens']} | {slow:.1f} | {quick:.1f} | {slow / quick:.2f} |")


if __name__ == "__main__":
    with plain_errors():
        main()
