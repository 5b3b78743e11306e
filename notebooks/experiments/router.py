"""Routers and balancers: how soon and how evenly the experts are used, and what that costs in loss.

    python notebooks/experiments/router.py --seeds 3

Arms: three routers under ZAYA1's balancer, four balancers under ZAYA1's router, and two ways to spend an expert's
multiplications on two of half the width.  03_router_and_balancing.ipynb runs some of them live.
"""
from dataclasses import replace
from functools import partial

import arms
import numpy as np
import torch

from kernels import fuse, summed_loss
from zaya import Experts, PIDBalancer, Router, Zaya

# Preset tiny at half the width and 4 layers: 8 experts, 512 tokens.
SHAPE = dict(num_hidden_layers=4, hidden_size=64, num_attention_heads=2, moe_intermediate_size=64,
             router_hidden_size=16, initializer_range=0.125)
WINDOW, LEVELS = 10, (0.9, 0.95, 0.99)      # "reached": the mean entropy of the last 10 steps is at least this
BLOCK, LAST = 5, 50         # files keep curves as means of 5 steps; "at the end": the mean of the last 50
ALPHA = 0.01                # Switch's weight of the auxiliary loss

# ---- routers and experts --------------------------------------------------------------------------------------------


def tally(router, choice, count):
    """Add choices (B, S) to the router's load in training mode, as zaya.Router does."""
    if router.training and torch.is_grad_enabled():
        ones = torch.ones_like(choice) if count is None else count.long()
        router.load.scatter_add_(0, choice.flatten(), ones.flatten())


class LinearRouter(Router):
    """s = softmax(W x): one matrix instead of Router's states and MLP.  Chosen, weighted and counted as there."""

    def __init__(self, hidden_size, classes, std):
        super().__init__(hidden_size, 1, classes, eda=False)
        del self.down_proj, self.norm, self.fc1, self.fc2
        self.out_proj = torch.nn.Linear(hidden_size, classes, bias=False)
        torch.nn.init.normal_(self.out_proj.weight, std=std)

    def forward(self, x, previous=None, choice=None, count=None):
        scores = self.out_proj(x).float().softmax(-1)                               # (B, S, classes)
        choice = (scores.detach() + self.balancing_biases).argmax(-1)               # (B, S)
        tally(self, choice, count)
        return scores.gather(-1, choice[..., None]).squeeze(-1), choice, x.new_zeros(())


class Seen(torch.nn.Linear):
    """A linear layer that keeps its last output."""

    def forward(self, x):
        self.seen = super().forward(x)
        return self.seen


class TopTwoRouter(Router):
    """The two best classes instead of the best one, weighted by their scores.  Its out_proj is a `Seen`."""

    def forward(self, x, previous=None, choice=None, count=None):
        _, first, r = super().forward(x, previous, None, count)                     # counts the best one
        scores = self.out_proj.seen.float().softmax(-1)                             # (B, S, classes)
        choice = (scores.detach() + self.balancing_biases).topk(2).indices          # (B, S, 2)
        tally(self, choice[..., 1], count)
        return scores.gather(-1, choice), choice, r


class TopTwoExperts(Experts):
    """Each token visits two: x (N, E), choice and weight (2N,), a token's two side by side -> (N, E)."""

    def forward(self, x, choice, weight):
        return super().forward(x.repeat_interleave(2, 0), choice, weight).view(-1, 2, x.shape[-1]).sum(1)


class ResidualExperts(Experts):
    """One more expert, `always`, that every token visits besides the one it was sent to."""

    def forward(self, x, choice, weight):
        return super().forward(x, choice, weight) + self.always(x, torch.zeros_like(choice), torch.ones_like(weight))


# ---- the arms -------------------------------------------------------------------------------------------------------

# Each arm and what it is compared with.
ARMS = {"MLP + EDA": None, **dict.fromkeys(("MLP, no EDA", "linear", "no balancing", "auxiliary loss", "sign update",
                                            "top-2", "residual expert"), "MLP + EDA")}


def build(arm, shape):
    """The recipe's model with the one change of this arm.

    16 experts of half the width have the weights of 8 whole ones, and two of them the multiplications of one.
    """
    if arm in ("top-2", "residual expert"):
        count = 2 * shape.num_experts - (arm == "residual expert")
        shape = replace(shape, num_experts=count, moe_intermediate_size=shape.moe_intermediate_size // 2)
    model = fuse(Zaya(shape))
    for layer in model.layers:
        if arm == "MLP, no EDA" and layer is not model.layers[0]:
            del layer.gate.router_states_scale
        if arm == "linear":
            layer.gate = LinearRouter(shape.hidden_size, shape.num_experts + 1, shape.initializer_range)
        if arm in ("auxiliary loss", "top-2"):
            layer.gate.out_proj.__class__ = Seen
        if arm == "top-2":
            layer.gate.__class__, layer.experts.__class__ = TopTwoRouter, TopTwoExperts
        if arm == "residual expert":
            layer.experts.__class__ = ResidualExperts
            layer.experts.always = Experts(shape.hidden_size, shape.moe_intermediate_size, 1)
            for weight in layer.experts.always.parameters():
                torch.nn.init.normal_(weight, std=shape.initializer_range)
    return model


class SignUpdate:
    """DeepSeek-V3's update in the place of a balancer's AdamW: b <- b - lr sign(error); the gradient is the error."""

    def __init__(self, biases, lr):
        self.biases, self.lr = biases, lr

    @torch.no_grad()
    def step(self):
        self.biases -= self.lr * self.biases.grad.sign()


def make_balancer(arm, model, lr):
    balancer = PIDBalancer(model, lr)
    if arm == "sign update":
        balancer.optimizer = SignUpdate(balancer.biases, lr)
    if arm in ("no balancing", "auxiliary loss"):               # it counts the load, and leaves the biases as they are
        balancer.optimizer = SignUpdate(balancer.biases, 0.0)
    return balancer


def auxiliary_loss(model, inputs, targets, positions, dtype=torch.float32):
    """The summed loss plus Switch's: ALPHA X sum over e of (share of tokens sent to e) (mean score of e), a layer.

    Times the targets, because train_step divides by them.  The skip expert is left out, as in PIDBalancer.
    """
    loss, extra = summed_loss(model, inputs, targets, positions, dtype), 0.0
    for layer in model.layers:
        scores = layer.gate.out_proj.seen.float().softmax(-1)[positions >= 0]       # (tokens, classes)
        # The biases of this arm stay what they were, so the choice can be made again instead of being handed over.
        chosen = (scores.detach() + layer.gate.balancing_biases).argmax(-1)
        share = torch.bincount(chosen, minlength=scores.shape[-1]) / len(scores)
        experts = scores.shape[-1] - layer.gate.skip_expert
        extra = extra + ALPHA * experts * (share * scores.mean(0))[:experts].sum()
    return loss + extra * (targets >= 0).sum()


def fit(setting, arm):
    """Train an arm -> the model, {"loss", "entropy", "load" of each step}; the loss is what was minimised."""
    torch.manual_seed(setting.config.seed)
    model, curves = build(arm, setting.shape), {"loss": [], "entropy": [], "load": []}
    balancer = make_balancer(arm, model, setting.config.balancer_lr)
    loss_of = auxiliary_loss if arm == "auxiliary loss" else summed_loss
    for row in arms.practise(model, setting, balancer, arm, loss_of=loss_of):
        for key, curve in curves.items():
            curve.append(round(row[key], 4))
    return model, curves


def reached(entropy, level=LEVELS[-1]):
    """The number of steps after which the mean of the last WINDOW is at least `level`; None: never.

    >>> reached([0.5] * 10 + [1.0] * 20), reached([0.5] * 30)
    (20, None)
    """
    means = np.convolve(entropy, np.ones(WINDOW) / WINDOW, "valid")
    return int(np.argmax(means >= level)) + WINDOW if (means >= level).any() else None


def condensed(curves):
    """What a file keeps of fit's curves: their shape, their end, and the steps to an even load."""
    short = {"end": {}, "reached": {str(level): reached(curves["entropy"], level) for level in LEVELS}}
    for key, curve in curves.items():
        short["end"][key] = float(np.mean(curve[-LAST:]))
        blocks = curve[:len(curve) // BLOCK * BLOCK]
        short[key] = np.reshape(blocks, (-1, BLOCK)).mean(1).round(4).tolist()
    return short


def measure(setting, arm, rows):
    """One arm's row of a file: how soon and how even the load gets, and what that costs."""
    model, curves = fit(setting, arm)
    return {**condensed(curves), "held out": arms.held_out(model, setting)}


COLUMNS = {"held-out loss": (arms.loss, ".3f"), "entropy at the end": (arms.of("end", "entropy"), ".3f"),
           "worst load": (arms.of("end", "load"), ".2f"), "steps to 0.9": (arms.of("reached", "0.9"), ".0f"),
           "steps to 0.95": (arms.of("reached", "0.95"), ".0f"), "steps to 0.99": (arms.of("reached", "0.99"), ".0f")}

if __name__ == "__main__":
    arms.main(__doc__, "router", partial(arms.prepare, **SHAPE), measure, ARMS, COLUMNS, steps=300)
