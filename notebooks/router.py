"""Routers and balancers: how soon and how evenly the experts are used, and what that costs in loss.

    python notebooks/router.py --seed 1        # writes notebooks/results/router/seed-1.json, one arm after the other
    python notebooks/router.py --table         # the tables, over all seeds that are there

Arms: three routers under ZAYA1's balancer, five balancers under ZAYA1's router, and three ways to spend an expert's
multiplications on two of half the width.  All see the same batches at the same rates, and what two arms both have
begins with the same weights, except where the experts are of another width.  Then the step response: the recipe's
trained model is frozen, the data change from one step to the next, and each controller works on the same loads.  A
seed that was stopped goes on with what is missing.  03_router_and_balancing.ipynb runs a smaller one live.
"""
import collections
import dataclasses
import functools
import os
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "notebooks")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

import residual_scaling  # noqa: E402
import train  # noqa: E402
from evidence import command_line, interval, resume, seeds  # noqa: E402
from kernels import FusedExperts, fuse, summed_loss  # noqa: E402
from zaya import PIDBalancer, Router, Zaya  # noqa: E402

LAYERS, WIDTH = 4, dict(hidden_size=64, num_attention_heads=2, moe_intermediate_size=64, router_hidden_size=16,
                        initializer_range=0.125)                # preset tiny at half the width: 8 experts, 512 tokens
WINDOW, LEVELS = 10, (0.9, 0.95, 0.99)      # "reached": the mean entropy of the last 10 steps is at least this
EVEN = LEVELS[-1]
BLOCK, LAST = 5, 50                 # files keep curves as means of 5 steps; "at the end": the mean of the last 50
ALPHA = 0.01                        # Switch's weight of the auxiliary loss
GAINS = dict(kp=0.02, ki=0.05, kd=0.005)        # chosen on the notebook's toy plant before any model was trained
SETTLE, RESPOND = 60, 100           # forward passes before the data change, and after

# ---- routers --------------------------------------------------------------------------------------------------------


class LinearRouter(Router):
    """s = softmax(W x): one matrix instead of Router's states and MLP.  Chosen, weighted and counted as there."""

    def __init__(self, hidden_size, classes, std, skip_expert=True):
        super().__init__(hidden_size, 1, classes, eda=False, skip_expert=skip_expert)
        del self.down_proj, self.norm, self.fc1, self.fc2
        self.out_proj = torch.nn.Linear(hidden_size, classes, bias=False)
        torch.nn.init.normal_(self.out_proj.weight, std=std)

    def forward(self, x, previous=None, choice=None, count=None):
        scores = self.out_proj(x).float().softmax(-1)                               # (B, S, classes)
        if choice is None:
            choice = (scores.detach() + self.balancing_biases).argmax(-1)           # (B, S)
        tally(self, choice, count)
        return scores.gather(-1, choice[..., None]).squeeze(-1), choice, x.new_zeros(())


class TopTwoRouter(Router):
    """The two best classes instead of the best one; `weigh` makes the two weights of their scores (B, S, 2)."""
    weigh = staticmethod(lambda scores: scores)

    def forward(self, x, previous=None, choice=None, count=None):
        first = None if choice is None else choice[..., 0]
        _, first, r = super().forward(x, previous, first, count)
        scores = self.out_proj.seen.float().softmax(-1)                             # (B, S, classes)
        if choice is None:
            choice = (scores.detach() + self.balancing_biases).topk(2).indices      # (B, S, 2)
        tally(self, choice[..., 1], count)
        return self.weigh(scores.gather(-1, choice)), choice, r


class WeighedToOne(TopTwoRouter):
    """As GShard and Mixtral do it: the two weights sum to one."""
    weigh = staticmethod(lambda scores: scores / scores.sum(-1, keepdim=True))


class TopTwoExperts(FusedExperts):
    """Each token visits two: x (N, E), choice and weight (2N,), a token's two side by side -> (N, E)."""

    def forward(self, x, choice, weight):
        return super().forward(x.repeat_interleave(2, 0), choice, weight).view(-1, 2, x.shape[-1]).sum(1)


class ResidualExperts(FusedExperts):
    """One more expert, `always`, that every token visits besides the one it was sent to."""

    def forward(self, x, choice, weight):
        return super().forward(x, choice, weight) + self.always(x, torch.zeros_like(choice), torch.ones_like(weight))


class Seen(torch.nn.Linear):
    """A linear layer that keeps its last output."""

    def forward(self, x):
        self.seen = super().forward(x)
        return self.seen


def tally(router, choice, count):
    """Add choices (B, S) to the router's load in training mode, as Router does."""
    if router.training:
        ones = torch.ones_like(choice) if count is None else count.long()
        router.load.scatter_add_(0, choice.flatten(), ones.flatten())


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
        layer.gate = LinearRouter(shape.hidden_size, shape.router_classes, shape.initializer_range)
    return model


def with_logits(shape):
    """The recipe's model, whose routers keep their logits for the auxiliary loss."""
    model = recipe(shape)
    for layer in model.layers:
        layer.gate.out_proj.__class__ = Seen
    return model


def halved(shape, experts):
    """Experts of half the width; 16 of them have the weights of 8 whole ones, and two the multiplications of one."""
    return dataclasses.replace(shape, num_experts=experts, moe_intermediate_size=shape.moe_intermediate_size // 2)


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
        layer.experts.always = FusedExperts(shape.hidden_size, shape.moe_intermediate_size, 1)
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


def balancer(make=None):
    """-> a function like PIDBalancer(model, lr), its AdamW swapped for make([biases], lr)."""
    def build(model, lr):
        built = PIDBalancer(model, lr)
        if make:
            built.optimizer = make([built.biases], lr)
        return built
    return build


adamw_update = balancer()
sign_update = balancer(SignUpdate)
explicit_pid = balancer(lambda biases, lr: PID(biases, **GAINS))
no_balancing = balancer(lambda biases, lr: SignUpdate(biases, 0.0))
CONTROLLERS = {"AdamW update": adamw_update, "sign update": sign_update, "PID, three gains": explicit_pid,
               "none": no_balancing}


def auxiliary_loss(model, inputs, targets, positions, dtype=torch.float32):
    """The summed loss plus Switch's: ALPHA X sum over e of (share of tokens sent to e) (mean score of e), a layer.

    Times the targets, because train_step divides by them.  The skip expert is left out, as in PIDBalancer.
    """
    loss, real, extra = summed_loss(model, inputs, targets, positions, dtype), positions >= 0, 0.0
    for layer in model.layers:
        scores = layer.gate.out_proj.seen.float().softmax(-1)[real]                 # (tokens, classes)
        experts = scores.shape[-1] - layer.gate.skip_expert
        # The biases of this arm stay what they were, so the choice can be made again instead of being handed over.
        chosen = (scores.detach() + layer.gate.balancing_biases).argmax(-1)
        share = torch.bincount(chosen, minlength=scores.shape[-1]) / len(scores)
        extra = extra + ALPHA * experts * (share * scores.mean(0))[:experts].sum()
    model.extra = extra.detach()
    return loss + extra * (targets >= 0).sum()


# ---- arms -----------------------------------------------------------------------------------------------------------

Arm = collections.namedtuple("Arm", "build balancer loss", defaults=(adamw_update, summed_loss))
ARMS = {"MLP + EDA": Arm(recipe),
        "MLP, no EDA": Arm(without_eda),
        "linear": Arm(linear),
        "no balancing": Arm(recipe, no_balancing),
        "auxiliary loss": Arm(with_logits, no_balancing, auxiliary_loss),
        "sign update": Arm(recipe, sign_update),
        "PID, three gains": Arm(recipe, explicit_pid),
        "top-2": Arm(top_two),
        "top-2, weights sum to 1": Arm(functools.partial(top_two, router=WeighedToOne)),
        "residual expert": Arm(with_residual_expert)}


def prepare(seed, steps):
    """Settings, tokenizer, data and shape that all arms share."""
    config, stage, tokenizer, sources, shape = residual_scaling.prepare("tiny", seed, LAYERS, steps)
    return config, stage, tokenizer, sources, dataclasses.replace(shape, **WIDTH)


def counts(model):
    """{"total", "active"}: weights outside of the embeddings, and those of them that one token passes through."""
    stacks = [layer.experts for layer in model.layers]
    total = sum(p.numel() for name, p in model.named_parameters() if "embed_tokens" not in name)
    routed = sum(stack.gate_up_proj.numel() + stack.down_proj.numel() for stack in stacks)
    visited = 2 if isinstance(stacks[0], TopTwoExperts) else 1
    return {"total": total, "active": total - routed + visited * routed // len(stacks[0].down_proj)}


def fit(name, shared, steps=None):
    """Train an arm -> the model, {"loss", "entropy", "load" of each step, "parameters", "seconds"}."""
    config, stage, tokenizer, sources, shape = shared
    arm, begun = ARMS[name], time.perf_counter()
    torch.manual_seed(config.seed)
    model = arm.build(shape)
    loader = train.Loader(sources, stage, config.tokens_per_step, config.seed, tokenizer.pad)
    optimizers = train.make_optimizers(model, stage.lr, config.weight_decay)
    checkpointer, curves = arm.balancer(model, config.balancer_lr), {"loss": [], "entropy": [], "load": []}
    for step in tqdm(range(steps or stage.steps), desc=name, unit=" steps", leave=False, disable=None):
        lr = train.learning_rate(step, stage.steps, stage.lr, stage.lr_end)
        row = train.train_step(model, optimizers, checkpointer, loader.next()[:3], config, torch.float32, lr, arm.loss)
        row["loss"] -= float(getattr(model, "extra", 0.0))                          # what was added, not the language's
        for key, curve in curves.items():
            curve.append(round(row[key], 4))
    return model, {**curves, "parameters": counts(model), "seconds": time.perf_counter() - begun}


@torch.no_grad()
def held_out(model, shared):
    config, stage, tokenizer, sources, _ = shared
    return {name: row["loss"] for name, row in
            train.held_out_loss(model, sources, stage, tokenizer.pad, stage.context).items()}


@torch.no_grad()
def routing(model, shared, tokens=2048):
    """Which experts held-out samples of each kind are sent to: the kinds, and their shares (kinds, layers, classes)."""
    config, stage, tokenizer, sources, _ = shared
    kinds = [source for source in sources if not source.is_traces]
    kinds += [train.TaskSource([task], stage, tokenizer, config.seed) for task in train.TASKS]
    names = [kind.tasks[0] if kind.is_traces else kind.name for kind in kinds]
    model.eval()
    found = []
    for kind in kinds:
        inputs, _, positions, _ = train.Loader([kind], stage, tokens, 0, tokenizer.pad, held_out=True).next()
        choices = []
        model.hidden_states(inputs, position_ids=positions, routing=choices)
        classes = len(model.layers[0].gate.balancing_biases)
        found.append([torch.bincount(choice[positions >= 0].flatten(), minlength=classes).double()
                      .div_(choice[positions >= 0].numel()).numpy().round(4).tolist() for choice in choices])
    return names, found


def told(shares):
    """How much an expert's name tells about the kind of text: mutual information over the entropy of the kinds (all
    alike often), 0 … 1, mean over layers.  shares (kinds, layers, classes)."""
    shares = np.asarray(shares, float)
    mixed = shares.mean(0)                                                          # (layers, classes)
    bits = (shares * np.log(np.maximum(shares, 1e-20) / np.maximum(mixed, 1e-20))).sum(-1).mean(0)
    return float(bits.mean() / np.log(len(shares)))


# ---- the step response ----------------------------------------------------------------------------------------------


@torch.no_grad()
def observe(model, checkpointer, loader, steps):
    """Forward passes and balancer steps, the weights frozen -> {"entropy", "load"} of each."""
    rows = []
    model.train()
    for _ in range(steps):
        inputs, _, positions, _ = loader.next()
        model.hidden_states(inputs, position_ids=positions)
        rows.append(checkpointer.step())
    return {key: [round(row[key], 4) for row in rows] for key in ("entropy", "load")}


def respond(model, shared, before=SETTLE, after=RESPOND):
    """Each controller on the same frozen model and batches: first the mixture it was trained on, then sums alone."""
    config, stage, tokenizer, sources, _ = shared
    sums = [train.TaskSource(["column_sums", "add"], stage, tokenizer, config.seed)]
    begin, found = [layer.gate.balancing_biases.clone() for layer in model.layers], {}
    for name, make in CONTROLLERS.items():
        for layer, biases in zip(model.layers, begin):
            layer.gate.balancing_biases.copy_(biases)
            layer.gate.load.zero_()
        checkpointer, found[name] = make(model, config.balancer_lr), {}
        for kinds, steps in ((sources, before), (sums, after)):
            loader = train.Loader(kinds, stage, config.tokens_per_step, config.seed + 1, tokenizer.pad)
            for key, values in observe(model, checkpointer, loader, steps).items():
                found[name].setdefault(key, []).extend(values)
    return found


def reached(entropy, level=EVEN, window=WINDOW):
    """The number of steps after which the mean of the last `window` is at least `level`; None: never.

    >>> reached([0.5] * 10 + [1.0] * 20), reached([0.5] * 30)
    (20, None)
    """
    means = np.convolve(entropy, np.ones(window) / window, "valid")
    return int(np.argmax(means >= level)) + window if (means >= level).any() else None


# ---- a seed, and the tables -----------------------------------------------------------------------------------------


def condensed(row):
    """What a file keeps of fit's curves: their shape, their end, and the steps to an even load."""
    curves = {key: row[key] for key in ("loss", "entropy", "load")}
    short = {key: np.reshape(curve[:len(curve) // BLOCK * BLOCK], (-1, BLOCK)).mean(1).round(4).tolist()
             for key, curve in curves.items()}
    return {**row, **short, "end": {key: float(np.mean(curve[-LAST:])) for key, curve in curves.items()},
            "reached": {str(level): reached(row["entropy"], level) for level in LEVELS}}


def measure(seed, steps):
    path, result = resume("router", seed, {"command": f"python notebooks/router.py --seed {seed} --steps {steps}",
                                           "seed": seed, "steps": steps, "arms": {}})
    shared = prepare(seed, steps)
    for name in ARMS:
        if name in result["arms"]:
            continue
        model, row = fit(name, shared)
        row, (kinds, shares) = condensed(row), routing(model, shared)
        row |= {"held out": held_out(model, shared), "told": told(shares)}
        if name == "MLP + EDA":
            result |= {"response": respond(model, shared), "kinds": kinds, "routing": shares}
        result["arms"][name] = row
        train.write_json(path, result)
        print(f"seed {seed}, {name}: {EVEN} after {row['reached'][str(EVEN)]} steps, at the end worst load "
              f"{row['end']['load']:.2f}, entropy {row['end']['entropy']:.3f}; held-out loss {loss(row):.3f}, "
              f"{row['seconds']:.0f} s", flush=True)


def read_results():
    """All seeds whose arms are all there."""
    return [result for result in seeds("router") if set(result["arms"]) == set(ARMS)]


def loss(row):
    """The mean over the held-out sources."""
    return float(np.mean(list(row["held out"].values())))


def paired(differences):
    """Mean difference with its 95 % interval over seeds (t distribution): '+0.012 [-0.003, +0.027]'."""
    mean, low, high = interval(differences)
    return f"{mean:+.3f} " + (f"[{low:+.3f}, {high:+.3f}]" if len(differences) > 1 else "(one seed)")


def table(results):
    """Markdown, one line an arm: each seed's steps to an even load, else means over seeds and paired differences."""
    to = " | ".join(f"to {level}" for level in LEVELS)
    lines = [f"| arm | steps of each seed {to} | entropy at the end | worst load | held-out loss | minus MLP + EDA | "
             "told by the expert |", "|---" * (6 + len(LEVELS)) + "|"]
    for name in ARMS:
        rows = [result["arms"][name] for result in results]
        differ = [loss(row) - loss(result["arms"]["MLP + EDA"]) for row, result in zip(rows, results)]
        against = paired(differ) if name != "MLP + EDA" else "–"
        steps = " | ".join(", ".join(str(row["reached"][str(level)] or "never") for row in rows) for level in LEVELS)
        load, entropy = (np.mean([row["end"][key] for row in rows]) for key in ("load", "entropy"))
        lines.append(f"| {name} | {steps} | {entropy:.3f} | {load:.2f} | "
                     f"{np.mean([loss(row) for row in rows]):.3f} | {against} | "
                     f"{np.mean([row['told'] for row in rows]):.3f} |")
    return "\n".join(lines)


def response_table(results):
    """Markdown: what each controller did in the frozen model after the data changed."""
    lines = [f"| controller | steps back to {EVEN}, each seed | worst load in the first 10 steps | … in the last 20 |",
             "|---|---|---|---|"]
    for name in CONTROLLERS:
        runs = [result["response"][name] for result in results]
        back = [reached(run["entropy"][SETTLE:]) or "never" for run in runs]
        first, last = (np.mean([run["load"][part] for run in runs])
                       for part in (slice(SETTLE, SETTLE + 10), slice(-20, None)))
        lines.append(f"| {name} | {', '.join(map(str, back))} | {first:.2f} | {last:.2f} |")
    return "\n".join(lines)


def ratio(results, slow="linear", fast="MLP + EDA", level=EVEN):
    """How many times as many steps one arm needs as another to reach a level, each seed."""
    shown = []
    for result in results:
        steps = [result["arms"][name]["reached"][str(level)] for name in (slow, fast)]
        shown.append("one never got there" if steps[1] is None and steps[0] else "neither got there" if steps[1] is None
                     else f"{'' if steps[0] else 'more than '}{(steps[0] or result['steps']) / steps[1]:.1f}")
    return ", ".join(shown)


def tables():
    found = read_results()
    return "\n\n".join([table(found), response_table(found)]) if found else ""


if __name__ == "__main__":
    command_line(__doc__, measure, tables, steps=300)
