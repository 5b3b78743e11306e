"""The Triton kernels: equality with zaya.py in Triton's interpreter, compilation for an H100 and an MI300X, a GPU.

Whether a kernel is interpreted is settled when Triton is imported, so the interpreter and the compilers run in
processes of their own, one each: `python tests/test_triton.py interpret` prints a JSON of case -> what is wrong.
"""
import functools
import importlib.util
import json
import os
import subprocess
import sys
import traceback

import pytest
import torch
from torch import nn

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import kernels                                                                      # noqa: E402
import zaya                                                                         # noqa: E402

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None,
                                  reason="Triton is not installed: pip install triton")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


# ---- cases: name -> (inputs and parameters, the reference in zaya.py, ours) -----------------------------------------

def noise(*shape, device, seed=0):
    """Random numbers that bf16 can hold, so that every dtype computes the same thing."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    values = torch.randn(shape, generator=generator).bfloat16().float()
    return values.to(device)


def norm_case(E, rows):
    def make(device):
        x, y = noise(*rows, E, device=device, seed=1), noise(*rows, E, device=device, seed=2)
        vectors = [1 + 0.5 * noise(E, device=device, seed=seed) for seed in range(3, 8)]
        return [x, y], vectors

    def reference(x, y, a_r, b_r, a_o, b_o, w):
        scaling, norm = zaya.ResidualScaling(1), zaya.RMSNorm(1)
        names = ("residual_scale", "residual_bias", "hidden_states_scale", "hidden_states_bias")
        new = torch.func.functional_call(scaling, dict(zip(names, (a_r, b_r, a_o, b_o))), (x.float(), y))
        return new, torch.func.functional_call(norm, {"weight": w}, (new,))

    def ours(x, y, *vectors):
        return kernels.triton_residual_norm(x.float(), y, *vectors)

    return make, reference, ours


class Columns(nn.Module):
    """A projection that takes some of its input's channels, so that CCA.forward works on latents we choose."""

    def __init__(self, start, end):
        super().__init__()
        self.start, self.end = start, end

    def forward(self, x):
        return x[..., self.start:self.end]


def mix_case(B, S, H, K, D, rotated, ids=None):
    C, V = (H + K) * D, K * D // 2
    ids = None if ids is None else torch.tensor(ids)

    def positions(x):
        return zaya.CCA.positions(x, None if ids is None else ids.to(x.device), 100.0, rotated)

    def make(device):
        inputs = [noise(B, S, C + 2 * V, device=device)]
        parameters = [noise(C, 1, 2, device=device), noise(C, device=device), noise(C, D, 2, device=device) / D ** 0.5,
                      noise(C, device=device), 1 + 0.5 * noise(K, device=device)]
        return inputs, parameters

    def reference(x, w0, b0, w1, b1, temp):
        cca, seen = zaya.CCA(1, H, K, D), []
        cca.q_proj, cca.k_proj = Columns(0, H * D), Columns(H * D, C)
        cca.v_proj_current, cca.v_proj_delayed = Columns(C, C + V), Columns(C + V, C + 2 * V)
        cca.o_proj = nn.Identity()
        names = ("conv_qk_depthwise.weight", "conv_qk_depthwise.bias", "conv_qk_grouped.weight",
                 "conv_qk_grouped.bias", "temp")

        def attend(q, k, v, positions, cache=None):
            seen.extend(x.transpose(1, 2) for x in (q, k, v))
            return q.transpose(1, 2).flatten(2)

        cca.attend = attend
        torch.func.functional_call(cca, dict(zip(names, (w0, b0, w1, b1, temp))), (x, positions(x)))
        return seen                                                                 # (B, S, H or K, D)

    def ours(x, *parameters):
        here = positions(x)
        return kernels.triton_cca_mix(x[..., :C], x[..., C:C + V], x[..., C + V:], *parameters, here.cos, here.sin,
                                      here.position_ids)

    return make, reference, ours


def experts_case(E, width, counts):
    """`counts`: tokens of each expert and, last, of the skip expert."""
    X = len(counts) - 1
    choice = torch.repeat_interleave(torch.arange(X + 1), torch.tensor(counts))
    choice = choice[torch.randperm(len(choice), generator=torch.Generator().manual_seed(0))]

    def make(device):
        weight = noise(len(choice), device=device).sigmoid().bfloat16().float()
        return ([noise(len(choice), E, device=device), weight],
                [noise(X, 2 * width, E, device=device) / 8, noise(X, E, width, device=device) / 8])

    def reference(x, weight, gate_up, down):
        experts = zaya.Experts(1, 1, X)
        return (torch.func.functional_call(experts, {"gate_up_proj": gate_up, "down_proj": down},
                                           (x, choice.to(x.device), weight.float())),)

    def ours(x, weight, gate_up, down):
        return (kernels.triton_experts(x, gate_up, down, choice.to(x.device), weight.float()),)

    return make, reference, ours


CASES = {
    "norm, E 40": norm_case(40, (37,)),
    "norm, E 64, a batch": norm_case(64, (2, 9)),
    "norm, one row": norm_case(16, (1,)),
    "mix, no ids": mix_case(2, 21, 4, 2, 16, 8),
    "mix, packed and padded": mix_case(2, 21, 4, 2, 16, 8, ids=[
        [*range(9), *range(1), *range(2), *range(9)], [-1, -1, -1, *range(4), *range(11), -1, -1, -1]]),
    "mix, one KV head, all rotated": mix_case(1, 50, 3, 1, 64, 64, ids=[[-1, *range(31), *range(18)]]),
    "mix, one token": mix_case(1, 1, 2, 2, 16, 8),
    "experts, ragged": experts_case(72, 40, [70, 0, 64, 3, 11]),
    "experts, wider than a block": experts_case(16, 80, [5, 130, 0]),
    "experts, all skipped": experts_case(16, 16, [0, 0, 7]),
}


def run(function, make, dtype, device):
    """-> every output and every gradient of one case, by name, in fp32."""
    leaves = [[t.to(dtype).requires_grad_() for t in group] for group in make(device)]
    outputs = function(*leaves[0], *leaves[1])
    grads = [noise(*o.shape, device=device, seed=9 + i).to(o.dtype) for i, o in enumerate(outputs)]
    torch.autograd.backward(outputs, grads)
    named = {f"output {i} {o.dtype} {tuple(o.stride())}": o for i, o in enumerate(outputs)}
    named |= {f"gradient {i}": leaf.grad for i, leaf in enumerate([*leaves[0], *leaves[1]])}
    return {name: value.detach().float() for name, value in named.items()}


def error(got, expected):
    return ((got - expected).norm() / expected.norm().clamp_min(1e-20)).item()


def check(case, dtype, device="cpu"):
    """fp32: as good as equal.  bf16: as near to the exact fp32 result as zaya.py's own bf16 is, within a third."""
    make, reference, ours = CASES[case]
    exact = run(reference, make, torch.float32, device)
    theirs, got = run(reference, make, DTYPES[dtype], device), run(ours, make, DTYPES[dtype], device)
    assert list(got) == list(theirs), f"dtypes or layouts differ: {list(got)}, {list(theirs)}"
    for name, a, b, c in zip(got, got.values(), theirs.values(), exact.values()):
        assert a.isfinite().all(), f"{name} is not finite"
        bound = (2e-6 if device == "cpu" else 1e-5) if dtype == "fp32" else 1.33 * error(b, c) + 1e-3
        assert error(a, c) <= bound, f"{name}: relative error {error(a, c):.2e} is above {bound:.2e}"
        if dtype == "bf16":
            assert error(a, c) < 0.02, f"{name}: relative error {error(a, c):.2e}"
        assert ((c == 0).all() and (a == 0).all()) or (a != 0).any(), f"{name} is zero"


def repair_bf16():
    """Triton's interpreter keeps bf16 as its bits, which tl.dot multiplies and a cast cuts off (triton issue 11584:
    not supported).  Widen the factors and round to the nearest, as GPUs do.
    """
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle
    dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def widen(builder, x):
        return cast(builder, x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x

    def rounding_cast(builder, x, dtype):
        if x.dtype.scalar != tl.float32 or dtype.scalar != tl.bfloat16:
            return cast(builder, x, dtype)
        bits = torch.tensor(x.data).bfloat16().view(torch.uint16)
        return TensorHandle(bits.numpy(), tl.bfloat16)

    InterpreterBuilder.create_dot = lambda self, a, b, *others: dot(self, widen(self, a), widen(self, b), *others)
    InterpreterBuilder.cast_impl = rounding_cast


def check_operation(case):
    """The pass is an operation that torch.compile takes as it is: schema, fakes, one graph, the same values."""
    make, _, ours = CASES[case]
    called = []

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.namespace == "zaya":
                called.append((function, args))
            return function(*args, **(kwargs or {}))

    with Record():
        eager = run(ours, make, torch.float32, "cpu")
    assert len(called) == 2                                                         # forward and backward
    for function, args in called:
        torch.library.opcheck(function, args, test_utils=("test_schema", "test_faketensor"))
    graph = run(torch.compile(ours, fullgraph=True, backend="aot_eager"), make, torch.float32, "cpu")
    for name, value in graph.items():
        assert error(value, eager[name]) < 1e-6, f"{name}: compiled it is {error(value, eager[name]):.2e} off"


OPERATIONS = ["norm, E 64, a batch", "mix, packed and padded", "experts, ragged"]


# ---- compilation ---------------------------------------------------------------------------------------------------

def full_size(dtype):
    """Forward and backward of the three at zaya1-8b's shape, on tensors that nobody fills."""
    def empty(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, requires_grad=dtype.is_floating_point)

    E, H, K, D, X, width, N = 2048, 8, 2, 128 if dtype == torch.bfloat16 else 32, 16, 2048, 1000
    C, fp32 = (H + K) * D, torch.float32
    for outputs in (
            kernels.triton_residual_norm(empty(N, E, dtype=fp32), *(empty(*s) for s in [(N, E)] + 5 * [(E,)])),
            kernels.triton_cca_mix(empty(1, N, C), *(empty(1, N, K * D // 2) for _ in range(2)), empty(C, 1, 2),
                                   empty(C), empty(C, D, 2), empty(C), empty(K),
                                   *(empty(1, N, D // 4, dtype=fp32) for _ in range(2))),
            [kernels.triton_experts(empty(N, E), empty(X, 2 * width, E), empty(X, E, width),
                                    torch.zeros(N, dtype=torch.long), empty(N, dtype=fp32))]):
        torch.autograd.backward(outputs, [torch.empty_like(o) for o in outputs])


MACHINES = {"sm_90": ("cuda", 90, 32, "cubin", 227), "gfx942": ("hip", "gfx942", 64, "hsaco", 64)}    # KiB shared


def compile_all(dtype, found):
    """Compile for both machines what `full_size` launches, with its very arguments.  Nothing is run."""
    import triton
    from triton.backends.compiler import GPUTarget
    pointers = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int64: "*i64", torch.int8: "*i8"}

    def launch(kernel, *args, grid, warmup, **constants):
        values, signature, hints = dict(zip(kernel.arg_names, args)) | constants, {}, {}
        for i, (name, parameter) in enumerate(zip(kernel.arg_names, kernel.params)):        # as a real launch would
            value = values[name]
            if isinstance(value, torch.Tensor) or isinstance(value, int) and value % 16 == 0:
                hints[i,] = [["tt.divisibility", 16]]
            signature[name] = "constexpr" if parameter.is_constexpr or type(value) is int and value == 1 else \
                pointers[value.dtype] if isinstance(value, torch.Tensor) else \
                "i32" if isinstance(value, int) else "fp32"
        fixed = {name: values[name] for name, kind in signature.items() if kind == "constexpr"}
        hints = {key: hint for key, hint in hints.items() if kernel.arg_names[key[0]] not in fixed}
        source = triton.compiler.ASTSource(kernel, signature, fixed, hints)
        options = {name: value for name, value in constants.items() if name not in signature}
        variant = [str(constants[name]) for name in ("BACKWARD", "STEP", "TOKENS_IN_A") if name in constants]
        for machine, (backend, arch, warp, binary, memory) in MACHINES.items():
            if (dtype, machine) == ("fp32", "sm_90"):                               # works, but takes longest
                continue
            compiled = triton.compile(source, target=GPUTarget(backend, arch, warp), options=options)
            found[" ".join([machine, kernel.fn.__name__, *variant])] = [
                len(compiled.asm[binary]), compiled.metadata.shared, memory * 1024]

    triton.runtime.JITFunction.run = launch
    full_size(DTYPES[dtype])


# ---- processes -----------------------------------------------------------------------------------------------------

def main(job):
    """Run one job and print a JSON: case -> "" or what went wrong; machine and kernel -> sizes."""
    torch.set_num_threads(1)
    found = {}
    if job == "interpret":
        repair_bf16()
        for case in CASES:
            for dtype in DTYPES:
                try:
                    check(case, dtype)
                    found[f"{case} {dtype}"] = ""
                except Exception:
                    found[f"{case} {dtype}"] = traceback.format_exc()
        for case in OPERATIONS:
            try:
                check_operation(case)
                found[f"{case} operation"] = ""
            except Exception:
                found[f"{case} operation"] = traceback.format_exc()
    else:
        compile_all(job, found)
    print(json.dumps(found))


@pytest.fixture(scope="module")
def process(tmp_path_factory):
    """-> a function: job -> what `main` found in a process of its own, run once."""
    @functools.cache
    def finished(job):
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1",
                       "TRITON_INTERPRET": "1" if job == "interpret" else "0",
                       "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
        return subprocess.run([sys.executable, __file__, job], env=environment, capture_output=True, text=True)

    def result(job):
        assert finished(job).returncode == 0, finished(job).stderr[-4000:]
        return json.loads(finished(job).stdout.splitlines()[-1])
    return result


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_equality_in_the_interpreter(process, case, dtype):
    wrong = process("interpret")[f"{case} {dtype}"]
    assert not wrong, wrong


@needs_triton
@pytest.mark.parametrize("case", OPERATIONS)
def test_each_pass_is_an_operation_for_torch_compile(process, case):
    wrong = process("interpret")[f"{case} operation"]
    assert not wrong, wrong


@needs_triton
@pytest.mark.parametrize("dtype, machine", [("bf16", "sm_90"), ("bf16", "gfx942"), ("fp32", "gfx942")])
def test_every_kernel_compiles(process, dtype, machine):
    found = {name: sizes for name, sizes in process(dtype).items() if name.startswith(machine)}
    assert {name[len(machine) + 1:] for name in found} == {
        "norm_forward", "norm_backward", "mix False", "mix True", "unmix", "product up", "product down",
        "product down_gradient", "product up_gradient", "weight_gradient False", "weight_gradient True"}
    for name, (binary, shared, memory) in found.items():
        assert binary > 1000 and shared <= memory, f"{name}: {binary} bytes of code, {shared} of shared memory"


@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here: neither CUDA nor ROCm is available")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_equality_on_a_gpu(case, dtype):
    check(case, dtype, "cuda")
    make, _, ours = CASES[case]
    first, second = (run(ours, make, DTYPES[dtype], "cuda") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first), "two runs differ"


# ---- without Triton ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("counts", [[3, 0, 64, 65, 1], [0, 0, 0, 5], [200, 0], [64] * 4, [1] * 9 + [0], [65] * 8])
def test_tiles_cover_every_row_once(counts):
    choice = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    choice = choice[torch.randperm(len(choice))]
    order, starts, tiles = kernels.expert_tiles(choice, len(counts) - 1, 64)
    assert starts.diff().tolist() == counts
    seen = []
    for expert, start, end in tiles.tolist():
        rows = range(start, min(end, start + 64))
        assert (choice[order[list(rows)]] == expert).all()
        seen += rows
    assert sorted(seen) == list(range(len(choice)))


def test_importing_needs_no_triton():
    code = ("import sys; sys.modules['triton'] = None\nimport torch, kernels\n"
            "try: kernels.triton_residual_norm(*[torch.ones(2, 4)] * 2, *[torch.ones(4)] * 5)\n"
            "except RuntimeError as error: print(error)")
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
                          capture_output=True, text=True)
    assert done.returncode == 0 and "pip install triton" in done.stdout, done.stderr


def test_what_is_not_implemented_says_so():
    x, y = torch.ones(1, 2, 48), torch.ones(1, 2, 8)
    weights = [torch.ones(48, 1, 2), torch.ones(48), torch.ones(48, 16, 2), torch.ones(48), torch.ones(1)]
    rope = torch.ones(1, 2, 4), torch.zeros(1, 2, 4)
    with pytest.raises(ValueError, match="head_dim must be a power of two of at least 16, not 12"):
        kernels.triton_cca_mix(x, y, y, *weights[:2], torch.ones(48, 12, 2), *weights[3:], *rope)
    with pytest.raises(ValueError, match="one dtype"):
        kernels.triton_cca_mix(x.bfloat16(), y, y, *weights, *rope)
    with pytest.raises(ValueError, match="must be fp32"):
        kernels.triton_residual_norm(x.bfloat16(), x, *[torch.ones(48)] * 5)
    tokens, choice = torch.ones(3, 4), torch.zeros(3, dtype=torch.long)
    with pytest.raises(ValueError, match="one dtype"):
        kernels.triton_experts(tokens, torch.ones(2, 10, 4).bfloat16(), torch.ones(2, 4, 5), choice, torch.ones(3))
    with pytest.raises(ValueError, match="do not fit"):
        kernels.triton_experts(tokens, torch.ones(2, 8, 4), torch.ones(2, 4, 5), choice, torch.ones(3))


if __name__ == "__main__":
    main(sys.argv[1])
