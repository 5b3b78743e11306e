"""What a GPU would hold and how long a step would take at zaya1-8b's shape: arithmetic, nothing here was measured.

    python notebooks/cluster.py          # a Markdown table for 1, 8 and 1,024 MI300X

It counts what train.py keeps and sends under torchrun ("many processes" there), with the real parameters (on the meta
device), their real owners, and the tensors that one real layer saves for its backward pass on this CPU.
"""
import argparse
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch  # noqa: E402

import train  # noqa: E402
from kernels import fuse  # noqa: E402
from zaya import Zaya, ZayaConfig  # noqa: E402

CONFIG, STAGE = ZayaConfig.preset("zaya1-8b"), train.PRESETS["zaya1-8b"]["stages"]["pretrain"]
TOKENS = train.PRESETS["zaya1-8b"]["tokens_per_step"]
BF16, FP32 = 1307e12, 163.4e12          # peak FLOP/s of an MI300X: dense bf16, and fp32 as the LM head's products are
MFU = 0.35                              # assumed share of both that is reached
LINK = {1: float("inf"), 8: 300e9, 1024: 40e9}      # assumed bytes/s a GPU sends: within a node, 80 % of 400 Gbit/s


def saved_bytes(tokens):
    """What one fused layer keeps for its backward pass under bf16 autocast, its weights' bf16 copies included."""
    shape = ZayaConfig.preset("zaya1-8b", num_hidden_layers=1, vocab_size=264, num_experts=2)
    with torch.device("meta"):
        layer = fuse(Zaya(shape)).layers[0]
    layer, kept = layer.to_empty(device="cpu"), {}
    for tensor in (*layer.parameters(), *layer.buffers()):
        torch.nn.init.zeros_(tensor)
    own = {p.untyped_storage().data_ptr() for p in layer.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    position = torch.arange(tokens)[None]
    # No mask: the row is one sample, which the packed path finds by its position ids.
    rope = layer.self_attn.rope_table(position, 1e4, CONFIG.head_dim // 2)
    positions = layer.self_attn.Positions(position, *rope, None)
    x = torch.randn(1, tokens, CONFIG.hidden_size, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", torch.bfloat16):
        out = layer(x, None, positions)
    return sum(kept.values()), out                              # `out` keeps the storages alive until here


def plan(gpus, activation):
    """-> {row of the table: its text} for one number of GPUs; bytes in decimal GB."""
    with torch.device("meta"):
        model = Zaya(CONFIG)
    muon, adamw = train.make_optimizers(model, 1e-3)
    V, E, L = CONFIG.vocab_size, CONFIG.hidden_size, CONFIG.num_hidden_layers
    P, active = model.parameter_counts()["total"], model.parameter_counts()["active"]
    M = sum(p.numel() for p in muon.param_groups[0]["params"])
    train.place = lambda: (0, gpus)                             # what train.owners asks
    momentum, adam, newton, stacks = [0] * gpus, [0] * gpus, [0] * gpus, [{} for _ in range(gpus)]
    for parameter, rank in train.owners(muon).items():
        momentum[rank] += 4 * parameter.numel()
        m, n = sorted(parameter.shape[-2:])
        newton[rank] += 5 * (4 * m * m * n + 2 * m ** 3) * (parameter.numel() // (m * n))
        stacks[rank][m, n] = stacks[rank].get((m, n), 0) + parameter.numel()
    for parameter, rank in train.owners(adamw).items():
        adam[rank] += 8 * parameter.numel()
    state = max(map(sum, zip(momentum, adam)))
    gradients = max(m + a // 2 for m, a in zip(momentum, adam))                     # of a GPU's own parameters
    micro = STAGE.context                                       # --micro-batch: one row at a time
    backward = 8 * P + state + 2 * M + L * micro * activation + 4 * V * E           # the last: the LM head's gradient
    largest = max(max(held.values(), default=0) for held in stacks)                # Muon works on one shape at a time:
    step = 4 * P + gradients + state + 14 * largest             # update, its copy, a bf16 one, and the fp32 result
    learning = backward - state + max(adam) + 4 * P             # no momentum, but a sampler
    attention = 6 * L * CONFIG.num_attention_heads * CONFIG.head_dim * STAGE.context
    compute = TOKENS / gpus * (6 * active + attention) / BF16 / MFU
    head = TOKENS / gpus * 6 * V * E / FP32 / MFU
    muon_time, network = max(newton) / BF16 / MFU, 8 * P / LINK[gpus]
    total = compute + head + muon_time + network
    return {"GPUs": f"{gpus:,}", "tokens a GPU and step": f"{TOKENS // gpus:,}",
            "weights 4P + gradients 4P": f"{8 * P / 1e9:.1f} GB",
            "optimizer state, 4M + 8R over all": f"{state / 1e9:.1f} GB",
            "bf16 copies 2M": f"{2 * M / 1e9:.1f} GB",
            f"activations of {micro:,} tokens": f"{L * micro * activation / 1e9:.1f} GB",
            "**peak in the backward pass**": f"**{backward / 1e9:.0f} GB**",
            "**peak in Muon's step**": f"**{step / 1e9:.0f} GB**",
            "peak of an RL stage's backward pass": f"{learning / 1e9:.0f} GB",
            "layers, bf16": f"{compute:.2f} s", "LM head, fp32": f"{head:.2f} s", "Newton-Schulz": f"{muon_time:.2f} s",
            "network 8P / link": f"{network:.2f} s",
            "**a step**": f"**{total:.2f} s**", "tokens a second": f"{TOKENS / total:,.0f}"}


def main(arguments=None):
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
                            ).parse_args(arguments)
    torch.manual_seed(0)
    activation = (saved_bytes(256)[0] - saved_bytes(128)[0]) // 128
    columns = [plan(gpus, activation) for gpus in LINK]
    print(f"Arithmetic, not measurement: {TOKENS:,} tokens a step, context {STAGE.context:,}, {MFU:.0%} of "
          f"{BF16 / 1e12:,.0f} (bf16) and {FP32 / 1e12:.0f} TFLOP/s (fp32), links of {LINK[8] / 1e9:.0f} and "
          f"{LINK[1024] / 1e9:.0f} GB/s, {activation:,} bytes of activations a token and layer.\n")
    for number, name in enumerate(columns[0]):
        print("| " + " | ".join([name, *(column[name] for column in columns)]) + " |")
        if number == 0:
            print("|---" * (len(columns) + 1) + "|")


if __name__ == "__main__":
    main()
