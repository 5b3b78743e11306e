"""Routers and balancers: how soon and how evenly the experts are used, and what that costs in loss.

    python notebooks/experiments/router.py --seeds 3

Arms: three routers under ZAYA1's balancer, five balancers under ZAYA1's router, and three ways to spend an expert's
multiplications on two of half the width.  Then the step response: the recipe's trained model is frozen, the data
change from one step to the next, and each controller works on the same loads.  03_router_and_balancing.ipynb runs a
smaller one live.
"""
import time
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import arms
import numpy as np
import torch

from kernels import fuse, summed_loss
from zaya import Experts, PIDBalancer, Router, Zaya

# Preset tiny at half the width and 4 layers: 8 experts, 512 tokens.
SHAPE = dict(num_hidden_layers=4, hidden_size=64, num_attention_heads=2, moe_intermediate_size=64,
             router_hidden_size=16, initializer_range=0.125)
WINDOW, LEVELS = 10, (0.9, 0.95, 0.99)      # "reached": the mean entropy of the last 10 steps is at least this
BLOCK, LAST = 5, 50                 # files keep curves as means of 5 steps; "at the end": the mean of the last 50
ALPHA = 0.01                        # Switch's weight of the auxiliary loss
GAINS = dict(kp=0.02, ki=0.05, kd=0.005)        # chosen on the notebook's toy plant before any model was trained
SETTLE, RESPOND = 60, 100           # forward passes before the data change, and after

# ---- routers and experts --------------------------------------------------------------------------------------------


def tally(router, choice, count):
    """Add choices (B, S) to the router's load in training, as zaya.Router does."""
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
        if choice is None:
            choice = (scores.detach() + self.balancing_biases).argmax(-1)           # (B, S)
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
        first = None if choice is None else choice[..., 0]
        _, first, r = super().forward(x, previous, first, count)
        scores = self.out_proj.seen.float().softmax(-1)                             # (B, S, classes)
        if choice is None:
            choice = (scores.detach() + self.balancing_biases).topk(2).indices      # (B, S, 2)
        tally(self, choice[..., 1], count)
        return self.weigh(scores.gather(-1, choice)), choice, r

    def weigh(self, scores):
        return scores


class WeighedToOne(TopTwoRouter):
    """As GShard and Mixtral do it: the two weights (B, S, 2) sum to one."""

    def weigh(self, scores):
        return scores / scores.sum(-1, keepdim=True)


class TopTwoExperts(Experts):
    """Each token visits two: x (N, E), choice and weight (2N,), a token's two side by side -> (N, E)."""

    def forward(self, x, choice, weight):
        return super().forward(x.repeat_interleave(2, 0), choice, weight).view(-1, 2, x.shape[-1]).sum(1)


class ResidualExperts(Experts):
    """One more expert, `always`, that every token visits besides the one it was sent to."""

    def forward(self, x, choice, weight):
        return super().forward(x, choice, weight) + self.always(x, torch.zeros_like(choice), torch.ones_like(weight))


def recipe(shape):
    return fuse(Zaya(shape))


def without_eda(shape):
    model = recipe(shape)
    for layer in model.layers[1:]:
        del layer.gate.router_states_scale
    return model


def linear(shape):
    model = recipe(shape)
    for layer in model.layers:
        layer.gate = LinearRouter(shape.hidden_size, shape.num_experts + 1, shape.initializer_range)
    return model


def with_logits(shape):
    """The recipe's model, whose routers keep their logits for the auxiliary loss."""
    model = recipe(shape)
    for layer in model.layers:
        layer.gate.out_proj.__class__ = Seen
    return model


def halved(shape, experts):
    """Experts of half the width; 16 of them have the weights of 8 whole ones, and two the multiplications of one."""
    return replace(shape, num_experts=experts, moe_intermediate_size=shape.moe_intermediate_size // 2)


def top_two(shape, router=TopTwoRouter):
    model = with_logits(halved(shape, 2 * shape.num_experts))
    for layer in model.layers:
        layer.gate.__class__, layer.experts.__class__ = router, TopTwoExperts
    return model


def with_residual_expert(shape):
    shape = halved(shape, 2 * shape.num_experts - 1)
    model = recipe(shape)
    for layer in model.layers:
        layer.experts.__class__ = ResidualExperts
        layer.experts.always = Experts(shape.hidden_size, shape.moe_intermediate_size, 1)
        for weight in layer.experts.always.parameters():
            torch.nn.init.normal_(weight, std=shape.initializer_range)
    return model


# ---- balancers: an optimizer of the biases, whose gradient is the error p_e - 1 / experts ---------------------------


class SignUpdate(torch.optim.Optimizer):
    """DeepSeek-V3: b <- b - lr sign(error), one small step whatever the error's size."""

    def __init__(self, params, lr):
        super().__init__(params, dict(lr=lr))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for bias in group["params"]:
                bias.sub_(bias.grad.sign(), alpha=group["lr"])


class PID(torch.optim.Optimizer):
    """The textbook's controller: b = b_0 - (kp e + ki sum of e + kd (e - e before)), e the error of this step."""

    def __init__(self, params, kp, ki, kd):
        super().__init__(params, dict(kp=kp, ki=ki, kd=kd))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for bias in group["params"]:
                error, state = bias.grad, self.state[bias]
                if not state:
                    state.update(start=bias.clone(), sum=torch.zeros_like(bias), last=error.clone())
                state["sum"] += error
                output = group["kp"] * error + group["ki"] * state["sum"] + group["kd"] * (error - state["last"])
                bias.copy_(state["start"] - output)
                state["last"] = error.clone()


def balancer(make):
    """-> a function like PIDBalancer(model, lr), its AdamW swapped for make([biases], lr)."""
    def build(model, lr):
        built = PIDBalancer(model, lr)
        built.optimizer = make([built.biases], lr)
        return built
    return build


sign_update = balancer(SignUpdate)
explicit_pid = balancer(lambda biases, lr: PID(biases, **GAINS))
no_balancing = balancer(lambda biases, lr: SignUpdate(biases, 0.0))
CONTROLLERS = {"AdamW update": PIDBalancer, "sign update": sign_update, "PID, three gains": explicit_pid,
               "none": no_balancing}


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
    model.extra = extra.item()
    return loss + extra * (targets >= 0).sum()


# ---- one arm --------------------------------------------------------------------------------------------------------


class Arm(NamedTuple):
    build: Callable
    balancer: Callable = PIDBalancer
    loss: Callable = summed_loss


ARMS = {"MLP + EDA": Arm(recipe),
        "MLP, no EDA": Arm(without_eda),
        "linear": Arm(linear),
        "no balancing": Arm(recipe, no_balancing),
        "auxiliary loss": Arm(with_logits, no_balancing, auxiliary_loss),
        "sign update": Arm(recipe, sign_update),
        "PID, three gains": Arm(recipe, explicit_pid),
        "top-2": Arm(top_two),
        "top-2, weights sum to 1": Arm(lambda shape: top_two(shape, WeighedToOne)),
        "residual expert": Arm(with_residual_expert)}


def prepare(seed, steps):
    return arms.prepare("tiny", seed, steps, **SHAPE)


def parameters(model):
    """{"total", "active"}: weights outside of the embeddings, and those of them that one token passes through."""
    total = active = 0
    visited = 2 if isinstance(model.layers[0].experts, TopTwoExperts) else 1
    for name, parameter in model.named_parameters():
        if "embed_tokens" not in name:
            stack = "experts." in name and "always" not in name                     # (X, …), a slice for each expert
            total += parameter.numel()
            active += visited * parameter[0].numel() if stack else parameter.numel()
    return {"total": total, "active": active}


def fit(name, setting):
    """Train an arm -> the model, {"loss", "entropy", "load" of each step, "parameters", "seconds"}."""
    arm, begun = ARMS[name], time.perf_counter()
    torch.manual_seed(setting.config.seed)
    model, curves = arm.build(setting.shape), {"loss": [], "entropy": [], "load": []}
    keeper = arm.balancer(model, setting.config.balancer_lr)
    for row in arms.pretrain(model, setting, balancer=keeper, name=name, loss_of=arm.loss):
        row["loss"] -= getattr(model, "extra", 0.0)             # the auxiliary loss is no part of the language's
        for key, curve in curves.items():
            curve.append(round(row[key], 4))
    return model, {**curves, "parameters": parameters(model), "seconds": time.perf_counter() - begun}


@torch.no_grad()
def routing(model, setting, tokens=2048):
    """Which experts held-out samples of each kind are sent to: the kinds, and their shares (kinds, layers, classes)."""
    config, stage, tokenizer, sources, _ = setting
    kinds = {source.name: source for source in sources if not source.is_traces}
    for task in arms.train.TASKS:
        kinds[task] = arms.train.TaskSource([task], stage, tokenizer, config.seed)
    model.eval()
    shares = []
    for kind in kinds.values():
        inputs, _, positions, _ = arms.train.Loader([kind], stage, tokens, 0, tokenizer.pad, held_out=True).next()
        choices = []
        model.hidden_states(inputs, position_ids=positions, routing=choices)
        counts = torch.nn.functional.one_hot(torch.stack(choices), len(model.layers[0].gate.balancing_biases))
        shares.append(counts[:, positions >= 0].double().mean(1).numpy().round(4).tolist())     # (layers, classes)
    return list(kinds), shares


def told(shares):
    """How much an expert's name tells about the kind of text: mutual information over the entropy of the kinds (all
    alike often), 0 … 1, mean over layers.  shares (kinds, layers, classes)."""
    shares = np.asarray(shares, float)
    mixed = shares.mean(0)                                                          # (layers, classes)
    bits = (shares * np.log(np.maximum(shares, 1e-20) / np.maximum(mixed, 1e-20))).sum(-1).mean(0)
    return float(bits.mean() / np.log(len(shares)))


def respond(model, setting, before=SETTLE, after=RESPOND):
    """Each controller on the same frozen model and batches: first the mixture it was trained on, then sums alone
    -> {controller: {"entropy", "load" of each forward pass}}."""
    config, stage, tokenizer, sources, _ = setting
    sums = [arms.train.TaskSource(["column_sums", "add"], stage, tokenizer, config.seed)]
    begin, found = [layer.gate.balancing_biases.clone() for layer in model.layers], {}
    model.train()                                               # so that the routers count, as gradients are on
    for name, make in CONTROLLERS.items():
        for layer, biases in zip(model.layers, begin):
            layer.gate.balancing_biases.copy_(biases)
            layer.gate.load.zero_()
        keeper, found[name] = make(model, config.balancer_lr), {"entropy": [], "load": []}
        for kinds, steps in ((sources, before), (sums, after)):
            loader = arms.train.Loader(kinds, stage, config.tokens_per_step, config.seed + 1, tokenizer.pad)
            for _ in range(steps):
                inputs, _, positions, _ = loader.next()
                model.hidden_states(inputs, position_ids=positions)
                row = keeper.step()
                for key, curve in found[name].items():
                    curve.append(round(row[key], 4))
    return found


# ---- a seed, and the tables -----------------------------------------------------------------------------------------


def reached(entropy, level=LEVELS[-1]):
    """The number of steps after which the mean of the last WINDOW is at least `level`; None: never.

    >>> reached([0.5] * 10 + [1.0] * 20), reached([0.5] * 30)
    (20, None)
    """
    means = np.convolve(entropy, np.ones(WINDOW) / WINDOW, "valid")
    return int(np.argmax(means >= level)) + WINDOW if (means >= level).any() else None


def condensed(row):
    """What a file keeps of fit's curves: their shape, their end, and the steps to an even load."""
    short = {**row, "end": {}, "reached": {str(level): reached(row["entropy"], level) for level in LEVELS}}
    for key in ("loss", "entropy", "load"):
        short["end"][key] = float(np.mean(row[key][-LAST:]))
        blocks = row[key][:len(row[key]) // BLOCK * BLOCK]
        short[key] = np.reshape(blocks, (-1, BLOCK)).mean(1).round(4).tolist()
    return short


def measure(seed, steps):
    found = arms.Seed("router", seed, steps=steps)
    setting = prepare(seed, steps)
    for name in found.missing(ARMS):
        model, row = fit(name, setting)
        kinds, shares = routing(model, setting)
        row, beside = {**condensed(row), "held out": arms.held_out(model, setting), "told": told(shares)}, {}
        if name == "MLP + EDA":
            beside = {"response": respond(model, setting), "kinds": kinds, "routing": shares}
        found.add(name, row, **beside)


def read_results():
    return arms.read_results("router", "arms")


def table(results):
    """How soon and how even the load gets, and what that costs, beside the recipe."""
    columns = {"held-out loss": (arms.loss, ".3f"), "entropy at the end": (arms.of("end", "entropy"), ".3f"),
               "worst load": (arms.of("end", "load"), ".2f"), "told by the expert": (arms.of("told"), ".3f")}
    for level in LEVELS:
        columns[f"steps to {level}"] = (arms.of("reached", str(level)), ".0f")
    bases = {name: "MLP + EDA" if name != "MLP + EDA" else None for name in ARMS}
    return arms.table(results, bases, columns)


def response_table(results):
    """What each controller did in the frozen model after the data changed."""
    columns = {"steps back to 0.99": (lambda run: reached(run["entropy"][SETTLE:]), ".0f"),
               "worst load in the first 10 steps": (lambda run: np.mean(run["load"][SETTLE:SETTLE + 10]), ".2f"),
               "… in the last 20": (lambda run: np.mean(run["load"][-20:]), ".2f")}
    return arms.table(results, dict.fromkeys(CONTROLLERS), columns, "response")


if __name__ == "__main__":
    arms.main(__doc__, lambda: table(read_results()) + "\n\n" + response_table(read_results()), measure, steps=300)
