"""Residual scaling against plain residuals: the loss, the norm of the stream over depth and training, what was learned.

    python notebooks/residual_scaling.py --seed 0 1 2    # writes notebooks/results/residual_scaling/seed-N.json
    python notebooks/residual_scaling.py --table         # the table, over all seeds that are there

Both models have the width of preset tiny and 12 layers, the same first weights, batches, rates and balancer.  A seed
that was stopped goes on with the model that is missing.  04_residual_scaling.ipynb runs a smaller one live.
"""
import os
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "notebooks")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

import train  # noqa: E402
from evidence import command_line, resume, seeds  # noqa: E402
from zaya import PIDBalancer, ResidualScaling, Zaya, ZayaConfig  # noqa: E402



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
        streams = [out[0]] if found else [arguments[0], out[0]]
        found.extend(x.norm(dim=-1)[real].mean().item() for x in streams)

    hooks = [layer.register_forward_hook(note) for layer in model.layers]
    model.eval().hidden_states(ids, position_ids=positions)
    for hook in hooks:
        hook.remove()
    return found


def learned(model):
    """Per sublayer, CCA and MoE in turn: the mean of both scales, the root mean square of both biases."""
    joins = [join for layer in model.layers
             for join in (layer.post_attention_residual_scale, layer.post_mlp_residual_scale)]
    return {"residual scale": [j.residual_scale.mean().item() for j in joins],
            "output scale": [j.hidden_states_scale.mean().item() for j in joins],
            "residual bias": [j.residual_bias.square().mean().sqrt().item() for j in joins],
            "output bias": [j.hidden_states_bias.square().mean().sqrt().item() for j in joins],
            "embedding scale": model.input_hidden_states_scale.mean().item()}


def prepare(preset, seed, layers, steps):
    """Settings, tokenizer, data and shape that both models share."""
    config = train.parse_arguments(["--preset", preset, "--seed", str(seed), "--steps", str(steps)])[0]
    stage, tokenizer = train.stage_settings(config, "pretrain"), train.make_tokenizer(config, None)
    shape = ZayaConfig.preset(preset, num_hidden_layers=layers, vocab_size=tokenizer.vocab_size)
    shape.rope_parameters["hybrid"]["rope_theta"] = stage.rope_theta
    return config, stage, tokenizer, train.make_sources(config, stage, tokenizer), shape


def fit(kind, shared, watched=()):
    """Train one kind -> {"loss" of each step, "held out", "norms" after the watched steps, "learned", "seconds"}."""
    config, stage, tokenizer, sources, shape = shared
    torch.manual_seed(config.seed)
    model, begun = KINDS[kind](Zaya(shape)), time.perf_counter()
    loader = train.Loader(sources, stage, config.tokens_per_step, config.seed, tokenizer.pad)
    probe, _, positions, _ = train.Loader(sources, stage, 8 * stage.context, 0, tokenizer.pad, held_out=True).next()
    optimizers = train.make_optimizers(model, stage.lr, config.weight_decay)
    balancer = PIDBalancer(model, config.balancer_lr)
    losses, seen = [], {}
    for step in tqdm(range(stage.steps + 1), desc=kind, unit=" steps", leave=False, disable=None):
        if step in watched or step in (0, stage.steps):
            seen[str(step)] = norms(model, probe, positions)
        if step < stage.steps:
            lr = train.learning_rate(step, stage.steps, stage.lr, stage.lr_end)
            losses.append(train.train_step(model, optimizers, balancer, loader.next()[:3], config, torch.float32,
                                           lr)["loss"])
    with torch.no_grad():
        held = train.held_out_loss(model, sources, stage, tokenizer.pad, stage.context)
    return {"loss": losses, "held out": {name: row["loss"] for name, row in held.items()}, "norms": seen,
            "learned": learned(model), "seconds": time.perf_counter() - begun}


def measure(seed, layers, steps):
    command = f"python notebooks/residual_scaling.py --seed {seed} --layers {layers} --steps {steps}"
    path, result = resume("residual_scaling", seed, {"command": command, "seed": seed, "layers": layers, "steps": steps,
                                                     "kinds": {}})
    shared = prepare("tiny", seed, layers, steps)
    for kind in KINDS:
        if kind not in result["kinds"]:
            result["kinds"][kind] = fit(kind, shared, (steps // 10, steps // 3))
            train.write_json(path, result)
            print(f"seed {seed}, {kind}: held-out loss {result['kinds'][kind]['held out']}, "
                  f"{result['kinds'][kind]['seconds']:.0f} s", flush=True)


def read_results():
    """All seeds that both models were trained for."""
    return [result for result in seeds("residual_scaling") if set(result["kinds"]) == set(KINDS)]


def table(results):
    """Markdown: mean, sd over seeds, each seed; the loss is the mean of the held-out sources."""
    def row(what, values, form="{:.3f}"):
        spread = f" ± {form.replace('+', '').format(np.std(values, ddof=1))}" if len(values) > 1 else ""
        return f"| {what} | {form.format(np.mean(values))}{spread} | {', '.join(map(form.format, values))} |"

    lines, losses = ["| after pretraining | mean (± sd over seeds) | each seed |", "|---|---|---|"], {}
    for kind in KINDS:
        runs = [result["kinds"][kind] for result in results]
        losses[kind] = [np.mean(list(run["held out"].values())) for run in runs]
        last = [list(run["norms"].values())[-1] for run in runs]
        lines += [row(f"held-out loss, {kind}", losses[kind]),
                  row("… norm of the stream before the first layer", [norm[0] for norm in last], "{:.1f}"),
                  row("… after the last layer", [norm[-1] for norm in last], "{:.1f}")]
    difference = [a - b for a, b in zip(*losses.values())]
    return "\n".join([*lines, row("held-out loss, scaling minus plain", difference, "{:+.3f}")])


if __name__ == "__main__":
    command_line(__doc__, measure, lambda: read_results() and table(read_results()), layers=12, steps=500)
