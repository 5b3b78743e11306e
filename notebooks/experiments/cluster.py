"""What a GPU would hold and how long a step would take at zaya1-8b's shape: arithmetic, nothing here was measured.

    python notebooks/experiments/cluster.py          # a Markdown table for 1, 8 and 1,024 MI300X

Layout: weights, gradients and optimizer states sharded in fp32 over the 8 GPUs of a node, replicated between nodes
(FSDP2 on a two-dimensional mesh).  The parameters are counted on the meta device.
"""
import arms
import numpy as np
import torch
from arms import train

from zaya import Zaya, ZayaConfig

CONFIG, PRESET = ZayaConfig.preset("zaya1-8b"), train.PRESETS["zaya1-8b"]
TOKENS, CONTEXT = PRESET["tokens_per_step"], PRESET["stages"]["pretrain"].context
SAVED = 111_500                 # bytes that a layer keeps for its backward pass a token, under bf16 autocast (counted)
MFU = 0.35                      # assumed share of the peaks that is reached
BF16, FP32 = MFU * 1307e12, MFU * 163.4e12      # FLOP/s of an MI300X: dense bf16, and fp32 as the LM head's products
NODE, BETWEEN = 300e9, 40e9     # assumed bytes/s a GPU sends within a node, and beyond: 80 % of 400 Gbit/s


def table():
    """Markdown: what a GPU holds, in decimal GB, then the seconds of a step; a column for each number of GPUs."""
    gpus = np.array([1, 8, 1024])
    shards, nodes, tokens = np.minimum(gpus, 8), np.maximum(gpus // 8, 1), TOKENS // gpus
    with torch.device("meta"):
        model = Zaya(CONFIG)
    # Muon keeps one moment for its M parameters, AdamW two for the rest.
    muon, _ = train.make_optimizers(model, 1e-3)
    M = newton = 0
    for matrices in muon.param_groups[0]["params"]:             # (m, n), or a stack of them
        m, n = sorted(matrices.shape[-2:])
        M += matrices.numel()
        newton += 5 * matrices.numel() * (4 * m + 2 * m ** 2 / n)
    counts, layers = model.parameter_counts(), CONFIG.num_hidden_layers
    P, head = counts["total"], CONFIG.vocab_size * CONFIG.hidden_size
    size = {"weights 4P + gradients 4P, sharded": 8 * P / shards,
            "optimizer states 4M + 8R, sharded": (8 * P - 4 * M) / shards,
            "two whole layers in fp32 and bf16, LM head and its gradient": 12 * (P - head) / layers + 8 * head,
            f"activations of {CONTEXT:,} tokens": layers * CONTEXT * SAVED}
    size["**peak in the backward pass**"] = sum(size.values())
    attention = 6 * layers * CONFIG.num_attention_heads * CONFIG.head_dim * CONTEXT
    time = {"layers, bf16": tokens * (6 * counts["active"] + attention) / BF16,
            "LM head, fp32": tokens * 6 * head / FP32,
            "Newton-Schulz, each GPU its shard": newton / shards / BF16,
            "network in the node: weights twice, gradients once": 12 * P * (1 - 1 / shards) / NODE,
            "network between nodes: the gradients of a shard": 8 * P / shards * (1 - 1 / nodes) / BETWEEN}
    time["**a step**, nothing overlapping"] = step = sum(time.values())
    rows = [["GPUs", "1", "8", "1,024"]]

    def add(quantities, form, unit=1):
        for name, numbers in quantities.items():
            rows.append([name, *map(form.format, np.broadcast_to(numbers / unit, 3))])

    add({"tokens a GPU and step": tokens}, "{:,.0f}")
    add(size, "{:.1f} GB", 1e9)
    add(time, "{:.2f} s")
    add({"tokens a second": TOKENS / step}, "{:,.0f}")
    said = f"Arithmetic, not measurement: {TOKENS:,} tokens a step, {MFU:.0%} of the peaks; P parameters, M of them in "
    return f"{said}matrices, R others.\n\n{arms.markdown(rows)}"


if __name__ == "__main__":
    print(table())
