"""Fast paths for zaya.py: fuse(model) gives the same numbers in fewer passes over memory.

Every path is a plain function, usable alone, that says in one line what it equals in zaya.py.  `fuse` swaps the classes
of a model's modules for subclasses that call them; parameters, checkpoints and call forms stay what they were.

    residual_norm     residual scaling + RMSNorm                    forward and backward in one function each
    cca_mix           both convolutions, q-k-mean, QK norm, temperature, RoPE, with packed-sample borders
    packed_attention  attention sample by sample instead of under a dense mask
    expert_mlp        tokens sorted by expert, products into one buffer, SwiGLU, weighted return
    linear_cross_entropy   LM head and loss in chunks, never holding (N, V) logits

Why it is faster on a CPU: the model's matrices are small, so most of a training step goes into elementwise passes over
activations and into dispatching them.  Written by hand, a backward pass reads each of them once.
Featuring: eager functions that need no compiler and work for any shape.  Does NOT include: the model (zaya.py).
"""
import torch
import torch.nn.functional as F

import zaya

# ---- 1. residual scaling + RMSNorm ----------------------------------------------------------------------------------


class ResidualNorm(torch.autograd.Function):
    """The Function behind `residual_norm`; its backward recomputes nothing but two products."""

    @staticmethod
    def forward(ctx, x, y, a_r, b_r, a_o, b_o, weight, eps):
        shape, E = x.shape, x.shape[-1]
        x, y = x.reshape(-1, E), y.reshape(-1, E).float()
        out = torch.addcmul(a_r * b_r + a_o * b_o, x, a_r)                          # (N, E)
        out.addcmul_(y, a_o)
        rms = torch.linalg.vector_norm(out, dim=-1, keepdim=True).square_().div_(E).add_(eps).rsqrt_()     # (N, 1)
        unit = out * rms
        ctx.save_for_backward(x, y, a_r, b_r, a_o, b_o, weight, unit, rms)
        return out.view(shape), (unit * weight.float()).to(weight.dtype).view(shape)

    @staticmethod
    def backward(ctx, g_out, g_normed):
        x, y, a_r, b_r, a_o, b_o, weight, unit, rms = ctx.saved_tensors
        shape, E = g_out.shape, x.shape[-1]
        g_normed = g_normed.reshape(-1, E).float()
        product = g_normed * unit
        g_weight = product.sum(0)
        inner = (product @ weight.float()[:, None]).div_(E)                         # (N, 1)
        g = torch.addcmul(g_normed * weight.float(), unit, inner, value=-1).mul_(rms).add_(g_out.reshape(-1, E))
        total = g.sum(0)
        g_a_r, g_a_o = (g * x).sum(0).addcmul_(b_r, total), (g * y).sum(0).addcmul_(b_o, total)
        return ((g * a_r).view(shape), (g * a_o).view(shape), g_a_r, total * a_r, g_a_o, total * a_o,
                g_weight.to(weight.dtype), None)


def residual_norm(x, y, scaling, norm):
    """zaya.ResidualScaling, then zaya.RMSNorm:  x (…, E) fp32, y (…, E) any float -> the new x fp32, norm(x)."""
    with torch.autocast(x.device.type, enabled=False):
        return ResidualNorm.apply(x, y, scaling.residual_scale, scaling.residual_bias, scaling.hidden_states_scale,
                                  scaling.hidden_states_bias, norm.weight, norm.eps)


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
    if depthwise.kernel_size[0] != 2 or grouped.kernel_size[0] != 2:
        raise ValueError(f"this path is written for cca_time0 = cca_time1 = 2, not {depthwise.kernel_size[0]} and "
                         f"{grouped.kernel_size[0]}; use zaya.CCA itself")
    return (depthwise.weight[:, 0].float(), depthwise.bias.float(),
            grouped.weight.unflatten(0, (-1, cca.head_dim)).float(), grouped.bias.float(), cca.temp.float())


def cca_mix(packed, cca, rope, reach=None):
    """What zaya.CCA.forward does from `packed` to the rotated q (B, S, H, D) and k (B, S, K, D), fp32, without a cache.

    packed (B, S, C) any float; rope: two tables (B, S, R/2); reach (B, S) as in CCA.
    """
    link = torch.ones(packed.shape[:2], device=packed.device) if reach is None else (reach >= 1).float()
    with torch.autocast(packed.device.type, enabled=False):
        return CCAMix.apply(packed, *mixing_weights(cca), *rope, link, cca.kv_heads)


def cca_mix_step(seen, cca, rope, reach=None):
    """`cca_mix` for the newest of three tokens, seen (B, 3, C), the others from the cache -> q (B, 1, H, D), k."""
    w, *weights = mixing_weights(cca)
    oldest, older, newest = seen.float().split(1, 1)                                # (B, 1, C) each
    if reach is not None:
        oldest, older = oldest * (reach >= 2)[..., None], older * (reach >= 1)[..., None]
    u = torch.addcmul(newest * w[:, 1], older, w[:, 0])
    u_before = torch.addcmul(older * w[:, 1], oldest, w[:, 0])
    return cca_heads(newest, u, u_before, *weights, *rope, cca.kv_heads)[:2]


def sample_lengths(reach):
    """(B, S) reach -> the lengths of the samples in the flattened batch, a list; None if they are no clean packing."""
    before = F.pad(reach, (1, 0), value=-2)[:, :-1]
    starts = (reach == 0) | ((reach != before + 1) & ((reach != -1) | (before != -1)))      # padding is one sample
    starts[:, 0] = True
    if (starts[:, 1:] & (reach[:, 1:] > 0)).any():
        return None
    bounds = starts.flatten().nonzero()[:, 0]
    return torch.diff(bounds, append=bounds.new_tensor([reach.numel()])).tolist()


def packed_attention(q, k, v, lengths):
    """Causal attention within each sample: equals scaled_dot_product_attention under CCA.attention_mask(reach, S).

    q (B, S, H, D), k and v (B, S, K, D) with samples of `lengths` (they sum to B * S) -> (B, S, H * D).
    The work is the samples' squares instead of the row's.
    """
    B, S = q.shape[:2]
    parts = [F.scaled_dot_product_attention(*(t.transpose(0, 1)[None] for t in part), is_causal=True, enable_gqa=True)
             for part in zip(*(t.flatten(0, 1).split(lengths) for t in (q, k, v)))]             # (1, H, n, D) each
    return torch.cat([part[0].transpose(0, 1) for part in parts]).reshape(B, S, -1)


class FusedCCA(zaya.CCA):
    """zaya.CCA for whole samples and for one new token a row; everything else is zaya.CCA's own forward."""

    def forward(self, x, rope, reach=None, mask=None, cache=None):
        B, S, _ = x.shape
        step = cache is not None and S == 1 and cache.packed is not None and not torch.is_grad_enabled()
        taps = self.conv_qk_depthwise.kernel_size[0], self.conv_qk_grouped.kernel_size[0]
        if taps != (2, 2) or (cache is not None and not step):
            return super().forward(x, rope, reach, mask, cache)
        projections = (self.q_proj, self.k_proj, self.v_proj_current, self.v_proj_delayed)
        q_size, k_size, *v_sizes = (m.weight.shape[0] for m in projections)
        together = F.linear(x, torch.cat([m.weight for m in projections]))
        packed, current, delayed = together.split([q_size + k_size, *v_sizes], -1)
        if step:
            return self.step(packed, current, delayed, rope, reach, mask, cache)
        shifted = F.pad(delayed[:, :-1], (0, 0, 1, 0))
        if reach is not None:
            shifted = shifted * (reach >= 1)[..., None]
        v = torch.cat([current, shifted], -1).view(B, S, self.kv_heads, self.head_dim)
        q, k = (t.to(v.dtype) for t in cca_mix(packed, self, rope, reach))
        lengths = sample_lengths(reach) if reach is not None and x.device.type == "cpu" else None
        if lengths and not (self.sliding_window and max(lengths) > self.sliding_window):
            return self.o_proj(packed_attention(q, k, v, lengths))
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None and S > 1, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).reshape(B, S, -1))

    def step(self, packed, current, delayed, rope, reach, mask, cache):
        """One new token a row.  The query heads of a KV head are queries on the same keys, so they go as one block."""
        B = len(packed)
        shifted = cache.delayed.to(delayed.dtype)
        if reach is not None:
            shifted = shifted * (reach >= 1)[..., None]
        v = torch.cat([current, shifted], -1).view(B, self.kv_heads, 1, self.head_dim)
        seen = torch.cat([cache.packed.to(packed.dtype), packed], 1)                # (B, 3, C)
        cache.packed, cache.delayed = seen[:, 1:].float(), delayed.float()
        q, k = (t.to(v.dtype) for t in cca_mix_step(seen, self, rope, reach))
        k, v = cache.append(k.transpose(1, 2), v, self.sliding_window)              # (B, K, T, D)
        out = F.scaled_dot_product_attention(q.view(B, self.kv_heads, -1, self.head_dim), k, v, mask)
        return self.o_proj(out.reshape(B, 1, -1))


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
        g_weight = (g * y).sum(-1).to(weight.dtype)
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
        return ExpertMLP.apply(x.to(dtype), gate_up_proj.to(dtype), down_proj.to(dtype), choice, weight).to(x.dtype)


class FusedExperts(zaya.Experts):
    """zaya.Experts with its loops over slices of two buffers instead of lists of new tensors."""

    def forward(self, x, choice, weight):
        return expert_mlp(x, self.gate_up_proj, self.down_proj, choice, weight)


# ---- 4. LM head + cross-entropy -------------------------------------------------------------------------------------


class LinearCrossEntropy(torch.autograd.Function):
    """The Function behind `linear_cross_entropy`: the gradient of a chunk is made while its logits are there."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, chunk):
        total, wide = hidden.new_zeros((), dtype=torch.float32), weight.float()
        g_hidden, g_weight = torch.zeros(hidden.shape, device=hidden.device), torch.zeros_like(wide)
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            h, y = hidden[part].float(), targets[part]
            counts = y >= 0
            logits = h @ wide.t()                                                   # (chunk, V), overwritten below
            chosen = y.clamp_min(0)[:, None]
            log_total = logits.logsumexp(-1, keepdim=True)
            total += ((log_total - logits.gather(1, chosen))[:, 0] * counts).sum()
            probability = logits.sub_(log_total).exp_()
            probability.scatter_add_(1, chosen, probability.new_full(chosen.shape, -1.0)).mul_(counts[:, None])
            torch.mm(probability, wide, out=g_hidden[part])
            g_weight.addmm_(probability.t(), h)
        ctx.save_for_backward(g_hidden.to(hidden.dtype), g_weight.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx, g):
        g_hidden, g_weight = ctx.saved_tensors
        return g_hidden * g, g_weight * g, None, None


def linear_cross_entropy(hidden, weight, targets, chunk=1024):
    """F.cross_entropy(model.logits(hidden), targets, reduction="sum"), fp32, with `chunk` rows of logits at a time.

    hidden (N, E) any float, weight (V, E), targets (N,) int64, negative where nothing is asked -> () fp32.
    """
    with torch.autocast(hidden.device.type, enabled=False):                         # fp32, whatever else is not
        return LinearCrossEntropy.apply(hidden, weight, targets, chunk)


# ---- the model ------------------------------------------------------------------------------------------------------


class FusedLayer(zaya.Layer):
    """zaya.Layer with path 1 between its two halves."""

    def forward(self, x, r, rope, reach=None, mask=None, cache=None, choice=None, count=None):
        y = self.self_attn(self.input_layernorm(x), rope, reach, mask, cache)
        x, h = residual_norm(x, y, self.post_attention_residual_scale, self.post_attention_layernorm)
        weight, choice, r = self.gate(h, r, choice, count)
        y = self.experts(h.flatten(0, 1), choice.flatten(), weight.flatten()).view_as(h)
        return self.post_mlp_residual_scale(x, y), r, choice


def fuse(model):
    """Give a Zaya's layers their fast paths, in place -> the model.  Same parameters, same checkpoints."""
    for layer in model.layers:
        layer.__class__, layer.self_attn.__class__, layer.experts.__class__ = FusedLayer, FusedCCA, FusedExperts
    return model
