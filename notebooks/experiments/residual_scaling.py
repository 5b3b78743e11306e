"""Residual scaling against plain residuals: the loss, the norm of the stream over depth and training, what was learned.

    python notebooks/experiments/residual_scaling.py --seeds 3

Both models have the width of preset tiny and 12 layers.  04_residual_scaling.ipynb runs a smaller pair live.
"""
import time

import arms
import torch

from zaya import ResidualScaling, Zaya


class PlainResidual(ResidualScaling):
    """x <- x + y: what residual scaling is before the first step, for good."""

    def forward(self, x, y):
        return x + y.float()


def plain(model):
    """Swap the joins of a Zaya for plain ones, and freeze the scale and bias of its embeddings."""
    for module in model.modules():
        if type(module) is ResidualScaling:
            module.__class__ = PlainResidual
    model.input_hidden_states_scale.requires_grad_(False)
    model.input_hidden_states_bias.requires_grad_(False)
    return model


KINDS = {"residual scaling": lambda model: model, "plain residual": plain}


@torch.no_grad()
def norms(model, ids, positions):
    """Mean norm over the tokens of the stream before the first layer and after each: L + 1 numbers."""
    found, real = [], positions >= 0

    def note(layer, arguments, out):
        if not found:                                           # what goes into the first layer
            found.append(arguments[0].norm(dim=-1)[real].mean().item())
        found.append(out[0].norm(dim=-1)[real].mean().item())

    hooks = [layer.register_forward_hook(note) for layer in model.layers]
    model.eval().hidden_states(ids, position_ids=positions)
    for hook in hooks:
        hook.remove()
    return found


def learned(model):
    """Per sublayer, CCA and MoE in turn: the mean of both scales, the root mean square of both biases."""
    found = {"residual scale": [], "output scale": [], "residual bias": [], "output bias": []}
    for layer in model.layers:
        for join in (layer.post_attention_residual_scale, layer.post_mlp_residual_scale):
            found["residual scale"].append(join.residual_scale.mean().item())
            found["output scale"].append(join.hidden_states_scale.mean().item())
            found["residual bias"].append(join.residual_bias.square().mean().sqrt().item())
            found["output bias"].append(join.hidden_states_bias.square().mean().sqrt().item())
    return {**found, "embedding scale": model.input_hidden_states_scale.mean().item()}


def fit(kind, setting):
    """Train one kind -> "loss" of each step, "held out", "norms" after a tenth, a third and all steps, "learned"."""
    config, stage, tokenizer, sources, shape = setting
    torch.manual_seed(config.seed)
    model, begun = KINDS[kind](Zaya(shape)), time.perf_counter()
    probe = arms.train.Loader(sources, stage, 8 * stage.context, 0, tokenizer.pad, held_out=True).next()
    losses, seen = [], {"0": norms(model, probe[0], probe[2])}
    for row in arms.pretrain(model, setting, name=kind):
        losses.append(row["loss"])
        if len(losses) in (stage.steps // 10, stage.steps // 3, stage.steps):
            seen[str(len(losses))] = norms(model, probe[0], probe[2])
    return {"loss": losses, "held out": arms.held_out(model, setting), "norms": seen, "learned": learned(model),
            "seconds": time.perf_counter() - begun}


def measure(seed, steps, layers=12):
    found = arms.Seed("residual_scaling", seed, "kinds", layers=layers, steps=steps)
    setting = arms.prepare("tiny", seed, steps, num_hidden_layers=layers)
    for kind in found.missing(KINDS):
        found.add(kind, fit(kind, setting))


def read_results():
    return arms.read_results("residual_scaling", "kinds")


def table(results):
    def norm(layer):                                            # after the last step
        return lambda kind: list(kind["norms"].values())[-1][layer]

    return arms.table(results, {"residual scaling": "plain residual", "plain residual": None}, {
        "held-out loss": (arms.loss, ".3f"), "norm before the first layer": (norm(0), ".1f"),
        "norm after the last layer": (norm(-1), ".1f")}, "kinds")


if __name__ == "__main__":
    arms.main(__doc__, lambda: table(read_results()), measure, steps=500)
