"""What every test file shares: the repository on the path, one thread, fixed seeds, and weights that hide nothing.

OMP_NUM_THREADS may ask for more threads.  Other CPUs and threads sum in another order, and weights that are mapped from
a file lie off the borders that vector code likes.  So bits are compared only where one process makes both sides from
memory laid out alike; all else, logits of the same weights too, is compared to within rounding.
"""
import json
import os
import random
import sys

import pytest
import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
os.environ.setdefault("OMP_NUM_THREADS", "1")       # on a busy 2-core machine two threads are several times slower
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"].split(",")[0]))


@pytest.fixture(autouse=True)
def seeds():
    random.seed(0)
    torch.manual_seed(0)


def trace_rows(path):
    """What `rsa.py --trace` wrote: the settings, and a dict for each rollout."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def unordered(rows):
    return sorted(json.dumps(row, sort_keys=True) for row in rows)


@torch.no_grad()
def randomise(model, seed=0, skip_bias=-1.0):
    """Give every parameter and balancing bias of a Zaya, ours or official, a value that shows up when it is misused.

    A fresh model has scales of 1, biases of 0 and a router that hardly prefers anything: half of what could be wrong
    with it would not change a number.  Embeddings well above the biases, and a sharp router whose MLP is mostly off,
    keep tokens different enough for the experts to share them.
    """
    generator = torch.Generator().manual_seed(seed)

    def noise(tensor):
        return torch.randn(tensor.shape, generator=generator)

    for name, parameter in model.named_parameters():
        if "embed" in name or "input_hidden_states_scale" in name:      # of mixed signs: a tied model whose stream
            parameter.copy_(noise(parameter))                           # starts as E[token] would repeat the token
        elif parameter.ndim > 1:
            fan_in = parameter[0].numel() if "conv" in name else parameter.shape[-1]
            parameter.copy_(noise(parameter) * (3 if ".gate." in name else 1) * fan_in ** -0.5)
        elif name.endswith("bias"):
            parameter.copy_(0.2 * noise(parameter) - 1.0 * (".fc" in name))
        else:                                                           # scales, norms, temperatures
            size = 0.3 if name in ("norm.weight", "model.norm.weight") else 1           # logits near 2
            parameter.copy_(size * (1 + 0.3 * noise(parameter)))
    for name, buffer in model.named_buffers():
        if name.endswith("balancing_biases"):
            buffer.copy_(0.1 * noise(buffer))
            if len(buffer) > model.config.num_experts:
                buffer[-1] += skip_bias
    return model
