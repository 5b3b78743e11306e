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

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import kernels                                                                      # noqa: E402
import zaya                                                                         # noqa: E402

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None,
                                  reason="Triton is not installed: pip install triton")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


# A case is a name -> (inputs and parameters, the reference in zaya.py, ours).

def noise(*shape, device, seed=0):
    """Random numbers that bf16 can hold, so that every dtype computes the same thing."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).bfloat16().float().to(device)


def norm_case(E, rows):
    def make(device):
        x, y = noise(*rows, E, device=device, seed=1), noise(*rows, E, device=device, seed=2)
        return [x, y], [1 + 0.5 * noise(E, device=device, seed=seed) for seed in range(3, 8)]

    def reference(x, y, *vectors):
        scaling, norm = zaya.ResidualScaling(1), zaya.RMSNorm(1)
        names = "residual_scale", "residual_bias", "hidden_states_scale", "hidden_states_bias"
        new = torch.func.functional_call(scaling, dict(zip(names, vectors)), (x.float(), y))
        return new, torch.func.functional_call(norm, {"weight": vectors[4]}, (new,))

    def ours(x, y, *vectors):
        return kernels.triton_residual_norm(x.float(), y, *vectors)

    return make, reference, ours


class Mix(zaya.CCA):
    forward = zaya.CCA.mix


def mix_case(B, S, H, K, D, rotated, ids=None):
    C, V = (H + K) * D, K * D // 2
    ids = None if ids is None else torch.tensor(ids)
    names = [f"conv_qk_{conv}.{kind}" for conv in ("depthwise", "grouped") for kind in ("weight", "bias")] + ["temp"]

    def latents(x):
        positions = zaya.CCA.positions(x, None if ids is None else ids.to(x.device), 100.0, rotated)
        return *x.split([C, V, V], -1), positions

    def make(device):
        return [noise(B, S, C + 2 * V, device=device)], [
            noise(C, 1, 2, device=device), noise(C, device=device), noise(C, D, 2, device=device) / D ** 0.5,
            noise(C, device=device), 1 + 0.5 * noise(K, device=device)]

    def reference(x, *parameters):
        return torch.func.functional_call(Mix(1, H, K, D), dict(zip(names, parameters)), (*latents(x), None))

    def ours(x, *parameters):
        *parts, here = latents(x)
        return kernels.triton_cca_mix(*parts, *parameters, here.cos, here.sin, here.position_ids)

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

    def reference(x, weight, *matrices):
        named = dict(zip(("gate_up_proj", "down_proj"), matrices))
        return (torch.func.functional_call(zaya.Experts(1, 1, X), named, (x, choice.to(x.device), weight.float())),)

    def ours(x, weight, *matrices):
        return (kernels.grouped_experts(x, *matrices, choice.to(x.device), weight.float()),)

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
    "experts, more rows than a turn of programs": experts_case(16, 16, [0, 600, 1]),
    "experts, all skipped": experts_case(16, 16, [0, 0, 7]),
}
OPERATIONS = ["norm, E 64, a batch", "mix, packed and padded", "experts, ragged"]


def run(function, make, dtype, device):
    """-> every output and every gradient of one case, by name, in fp32."""
    inputs, parameters = make(device)
    leaves = [tensor.to(dtype).requires_grad_() for tensor in (*inputs, *parameters)]
    outputs = function(*leaves)
    grads = [noise(*o.shape, device=device, seed=9 + i).to(o.dtype) for i, o in enumerate(outputs)]
    torch.autograd.backward(outputs, grads)
    named = {f"output {i} {o.dtype} {tuple(o.shape)}": o for i, o in enumerate(outputs)}
    named |= {f"gradient {i}": leaf.grad for i, leaf in enumerate(leaves)}
    return {name: value.detach().float() for name, value in named.items()}


def error(got, expected):
    return ((got - expected).norm() / expected.norm().clamp_min(1e-20)).item()


def check(case, dtype, device="cpu"):
    """fp32: as good as equal.  bf16: as near to the exact fp32 result as zaya.py's own bf16 is, within a third."""
    make, reference, ours = CASES[case]
    exact = run(reference, make, torch.float32, device)
    theirs, got = run(reference, make, DTYPES[dtype], device), run(ours, make, DTYPES[dtype], device)
    assert list(got) == list(theirs), f"dtypes or shapes differ: {list(got)}, {list(theirs)}"
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
    assert called
    for function, args in called:
        torch.library.opcheck(function, args, test_utils=("test_schema", "test_faketensor"))
    graph = run(torch.compile(ours, fullgraph=True, backend="aot_eager"), make, torch.float32, "cpu")
    for name, value in graph.items():
        assert error(value, eager[name]) < 1e-6, f"{name}: compiled it is {error(value, eager[name]):.2e} off"


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
            [kernels.grouped_experts(empty(N, E), empty(X, 2 * width, E), empty(X, E, width),
                                     torch.zeros(N, dtype=torch.long), empty(N, dtype=fp32))]):
        torch.autograd.backward(outputs, [torch.empty_like(o) for o in outputs])


MACHINES = {"sm_90": ("cuda", 90, 32, "cubin", 227), "gfx942": ("hip", "gfx942", 64, "hsaco", 64)}    # KiB shared


def compile_all(dtype, found):
    """Compile for both machines what `full_size` launches, with its very arguments.  Nothing is run."""
    import triton
    from triton.backends.compiler import GPUTarget
    pointers = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int32: "*i32", torch.int8: "*i8"}

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
        for machine, (backend, arch, warp, binary, memory) in MACHINES.items():
            if (dtype, machine) == ("fp32", "sm_90"):                               # works, but takes longest
                continue
            compiled = triton.compile(source, target=GPUTarget(backend, arch, warp), options=options)
            found.setdefault(f"{machine} {kernel.fn.__name__}", []).append(
                [len(compiled.asm[binary]), compiled.metadata.shared, memory * 1024])

    triton.runtime.JITFunction.run = launch
    full_size(DTYPES[dtype])


def main(job):
    """Run one job and print a JSON: case -> "" or what went wrong; machine and kernel -> sizes."""
    torch.set_num_threads(1)
    kernels.on_gpu = lambda x: True                             # grouped_mm asks
    found = {}
    if job == "interpret":
        repair_bf16()
        jobs = {f"{case} {dtype}": functools.partial(check, case, dtype) for case in CASES for dtype in DTYPES}
        jobs |= {f"{case} operation": functools.partial(check_operation, case) for case in OPERATIONS}
        for name, checked in jobs.items():
            try:
                checked()
                found[name] = ""
            except Exception:
                found[name] = traceback.format_exc()
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
@pytest.mark.parametrize("case, how", [(case, dtype) for case in CASES for dtype in DTYPES]
                         + [(case, "operation") for case in OPERATIONS])
def test_equality_in_the_interpreter(process, case, how):
    """Values and gradients in both dtypes; that torch.compile takes the pass as operations."""
    wrong = process("interpret")[f"{case} {how}"]
    assert not wrong, wrong


@needs_triton
@pytest.mark.parametrize("dtype, machine", [("bf16", "sm_90"), ("bf16", "gfx942"), ("fp32", "gfx942")])
def test_every_kernel_compiles(process, dtype, machine):
    found = {name: sizes for name, sizes in process(dtype).items() if name.startswith(machine)}
    launches = dict(norm_forward=1, norm_backward=1, mix=1, product=4, weight_gradient=2)
    assert {name.split()[1]: len(sizes) for name, sizes in found.items()} == launches
    for name, sizes in found.items():
        for binary, shared, memory in sizes:
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


@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here: neither CUDA nor ROCm is available")
@pytest.mark.parametrize("dtype", DTYPES)
def test_decoding_as_a_graph_on_a_gpu(dtype, monkeypatch):
    """The tokens of decoding operation by operation, rows ending at times of their own, also under autocast."""
    torch.manual_seed(0)
    config = zaya.ZayaConfig.preset("smoke", vocab_size=300)
    model = kernels.fuse(zaya.Zaya(config).to("cuda"))
    prompt, found, captured, capture = torch.randint(3, 300, (64, 16), device="cuda"), [], [], kernels.capture
    monkeypatch.setattr(kernels, "capture", lambda step: captured.append(step) or capture(step))
    for model.graphed_step in (False, None):
        with torch.autocast("cuda", DTYPES[dtype], enabled=dtype == "bf16"):
            uniform = torch.rand(300, 64, generator=torch.Generator().manual_seed(1))
            found.append(model.generate(prompt, 300, eos_token_id=5, uniform=uniform))
    assert len(captured) > 1
    same = (found[0] == found[1]).float().mean().item() if found[0].shape == found[1].shape else 0
    assert same > (0.95 if dtype == "fp32" else 0.5)            # rounding turns a choice now and then, for good


def test_importing_needs_no_triton():
    code = "import sys; sys.modules['triton'] = None\nimport kernels\nprint(kernels.HAS_TRITON)"
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_shapes_that_would_be_read_beyond_their_end_are_refused():
    for x, y in ((torch.ones(2, 48).bfloat16(), torch.ones(2, 48)), (torch.ones(2, 48), torch.ones(1, 48))):
        with pytest.raises(ValueError, match="must be fp32"):
            kernels.triton_residual_norm(x, y, *[torch.ones(48)] * 5)


if __name__ == "__main__":
    main(sys.argv[1])
