"""Residual scaling against plain residuals: the loss, and the norm of the stream over depth and training.

    python notebooks/experiments/residual_scaling.py --seeds 3
    python notebooks/experiments/residual_scaling.py --seeds 1 --steps 900 --name residual_scaling_long

Both models have 16 narrow layers.  04_residual_scaling.ipynb runs a smaller pair live.
"""
from functools import partial

import arms
import torch

from zaya import ResidualScaling, Zaya

# Preset tiny at half the width, four times as deep.
SHAPE = dict(num_hidden_layers=16, hidden_size=64, num_attention_heads=2, moe_intermediate_size=64,
             router_hidden_size=16, initializer_range=0.125)


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


def kept(model):
    """Of what the embedding puts into the stream, the share that all residual scales leave of it: the median over
    channels of their product.  The trained 8B's is 7e-6."""
    product = model.input_hidden_states_scale.detach().clone()
    for module in model.modules():
        if isinstance(module, ResidualScaling):
            product *= module.residual_scale.detach()
    return product.abs().median().item()


def fit(setting, kind):
    """Train one kind -> the model, {"loss" of each step, "held out", "norms" after a tenth, a third and all steps,
    "kept"}."""
    config, stage, tokenizer, sources, shape = setting
    torch.manual_seed(config.seed)
    model = plain(Zaya(shape)) if kind == "plain residual" else Zaya(shape)
    ids, _, positions, _ = arms.train.Loader(sources, stage, 8 * stage.context, 0, tokenizer.pad, held_out=True).next()
    losses, seen = [], {"0": norms(model, ids, positions)}
    for row in arms.practise(model, setting, name=kind):
        losses.append(round(row["loss"], 4))
        if len(losses) in (stage.steps // 10, stage.steps // 3, stage.steps):
            seen[str(len(losses))] = norms(model, ids, positions)
    held_out = arms.held_out(model, setting)
    return model, {"loss": losses, "held out": held_out, "norms": seen, "kept": kept(model)}


def measure(setting, kind, rows):
    return fit(setting, kind)[1]


def last_norm(kind):
    """A measure: the norm after the last layer and the last step."""
    return list(kind["norms"].values())[-1][-1]


ARMS = {"residual scaling": "plain residual", "plain residual": None}       # each kind and what it is compared with
COLUMNS = {"held-out loss": (arms.loss, ".3f"), "norm after the last layer": (last_norm, ".1f"),
           "of the embedding kept": (arms.of("kept"), ".2g")}

if __name__ == "__main__":
    arms.main(__doc__, "residual_scaling", partial(arms.prepare, **SHAPE), measure, ARMS, COLUMNS, 300)
