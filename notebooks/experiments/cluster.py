"""What a GPU would hold and how long a step would take at zaya1-8b's shape: arithmetic, nothing here was measured.

    python notebooks/experiments/cluster.py          # a Markdown table for 1, 8 and 1,024 MI300X

Layout: weights, gradients and optimizer states sharded in fp32 over the 8 GPUs of a node, replicated between nodes
(FSDP2 on a two-dimensional mesh).  The parameters are counted on the meta device.
"""
import arms
import torch
from arms import train

from zaya import Zaya, ZayaConfig

CONFIG, PRESET = ZayaConfig.preset("zaya1-8b"), train.PRESETS["zaya1-8b"]
TOKENS, CONTEXT = PRESET["tokens_per_step"], PRESET["stages"]["pretrain"].context
SAVED = 111_500                 # bytes that a layer keeps for its backward pass a token, under bf16 autocast (counted)
BF16, FP32 = 1307e12, 163.4e12  # peak FLOP/s of an MI300X: dense bf16, and fp32 as the LM head's products are
MFU = 0.35                      # assumed share of both that is reached
NODE, BETWEEN = 300e9, 40e9     # assumed bytes/s a GPU sends within a node, and beyond: 80 % of 400 Gbit/s


def column(gpus):
    """One number of GPUs -> {row: its text}; bytes in decimal GB."""
    with torch.device("meta"):
        model = Zaya(CONFIG)
    matrices = train.make_optimizers(model, 1e-3)[0].param_groups[0]["params"]      # Muon's
    M = newton = 0
    for parameter in matrices:
        m, n = sorted(parameter.shape[-2:])
        M += parameter.numel()
        newton += 5 * (4 * m * m * n + 2 * m ** 3) * (parameter.numel() // (m * n))
    counts = model.parameter_counts()
    P, active, L = counts["total"], counts["active"], CONFIG.num_hidden_layers
    head = CONFIG.vocab_size * CONFIG.hidden_size
    shards, nodes = min(gpus, 8), max(1, gpus // 8)
    size = {"weights 4P + gradients 4P, sharded": 8 * P / shards,
            "optimizer states 4M + 8R, sharded": (4 * M + 8 * (P - M)) / shards,
            "two whole layers in fp32 and bf16, LM head and its gradient": 12 * (P - head) / L + 8 * head,
            f"activations of {CONTEXT:,} tokens": L * CONTEXT * SAVED}
    attention = 6 * L * CONFIG.num_attention_heads * CONFIG.head_dim * CONTEXT
    time = {"layers, bf16": TOKENS / gpus * (6 * active + attention) / BF16 / MFU,
            "LM head, fp32": TOKENS / gpus * 6 * head / FP32 / MFU,
            "Newton-Schulz, each GPU its shard": newton / shards / BF16 / MFU,
            "network in the node: weights twice, gradients once": 12 * P * (1 - 1 / shards) / NODE,
            "network between nodes: the gradients of a shard": 8 * P / shards * (1 - 1 / nodes) / BETWEEN}
    size["**peak in the backward pass**"] = sum(size.values())
    time["**a step**, nothing overlapping"] = step = sum(time.values())
    rows = {"GPUs": f"{gpus:,}", "tokens a GPU and step": f"{TOKENS // gpus:,}"}
    for name, count in size.items():
        rows[name] = f"{count / 1e9:.1f} GB"
    for name, seconds in time.items():
        rows[name] = f"{seconds:.2f} s"
    return {**rows, "tokens a second": f"{TOKENS / step:,.0f}"}


def table():
    one, node, cluster = column(1), column(8), column(1024)
    said = f"Arithmetic, not measurement: {TOKENS:,} tokens a step, {MFU:.0%} of the peaks; P parameters, M of them in "
    said += "matrices, R others.\n\n"
    return said + arms.markdown([[name, one[name], node[name], cluster[name]] for name in one])


if __name__ == "__main__":
    arms.main(__doc__, table)
