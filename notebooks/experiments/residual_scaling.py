"""Residual scaling against plain residuals: the loss, and the norm of the stream over depth and training.

    python notebooks/experiments/residual_scaling.py --seeds 3

Both models have the width of preset tiny and 12 layers.  04_residual_scaling.ipynb runs a smaller pair live.
"""
from functools import partial

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


def fit(setting, kind):
    """Train one kind -> the model, {"loss" of each step, "held out", "norms" after a tenth, a third and all steps}."""
    config, stage, tokenizer, sources, shape = setting
    torch.manual_seed(config.seed)
    model = plain(Zaya(shape)) if kind == "plain residual" else Zaya(shape)
    ids, _, positions, _ = arms.train.Loader(sources, stage, 8 * stage.context, 0, tokenizer.pad, held_out=True).next()
    losses, seen = [], {"0": norms(model, ids, positions)}
    for row in arms.practise(model, setting, name=kind):
        losses.append(row["loss"])
        if len(losses) in (stage.steps // 10, stage.steps // 3, stage.steps):
            seen[str(len(losses))] = norms(model, ids, positions)
    return model, {"loss": losses, "held out": arms.held_out(model, setting), "norms": seen}


def last_norm(kind):
    """A measure: the norm after the last layer and the last step."""
    return list(kind["norms"].values())[-1][-1]


ARMS = {"residual scaling": "plain residual", "plain residual": None}       # each kind and what it is compared with
COLUMNS = {"held-out loss": (arms.loss, ".3f"), "norm after the last layer": (last_norm, ".1f")}

if __name__ == "__main__":
    arms.main(__doc__, "residual_scaling", partial(arms.prepare, num_hidden_layers=12),
              lambda setting, kind: fit(setting, kind)[1], ARMS, COLUMNS, 500, "kinds")
