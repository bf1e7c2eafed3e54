"""Do the Triton kernels compute the scan? On a CPU in Triton's interpreter, and on a GPU."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from vlm.encoders.scan_backends import triton_backend
from vlm.encoders.selective_scan import selective_scan_channels_last

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="triton is not installed (the CPU build of torch comes without)",
)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="run by test_in_the_interpreter")

CASES = [  # length, directions, states, channels
    (1, (False,), 1, 2),
    (4, (True,), 2, 3),
    (7, (False, True), 3, 6),
    (13, (True,), 4, 5),
]


def results(tensors, backend, **options):
    """Return y, the last state and the gradients of a weighted sum of both."""
    tensors = {k: v.detach().clone().requires_grad_() for k, v in tensors.items()}
    outputs = selective_scan_channels_last(
        **tensors, return_last_state=True, backend=backend, **options
    )
    weights = [torch.cos(torch.arange(x.numel())).view(x.shape).to(x) for x in outputs]
    grads = torch.autograd.grad(outputs, list(tensors.values()), weights)
    return dict(zip(["y", "state", *tensors], [*outputs, *grads], strict=True))


def problem(length, groups, states, channels, device="cpu"):
    generator = torch.Generator().manual_seed(length)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(device)

    rows = {name: normal(2, length, channels) for name in ("u", "delta", "z")}
    mixes = {name: normal(2, length, groups, states) for name in ("B", "C")}
    rest = {"A": -normal(channels, states).exp(), "D": normal(channels)}
    return rows | mixes | rest | {"delta_bias": normal(channels) - 1}


def check(tensors, **options):
    double = {name: x.double() for name, x in tensors.items()}
    expected = results(double, "reference", **options)
    got = results(tensors, "triton", **options)
    for name, want in expected.items():
        bound = 2e-5 if name in ("y", "state") else 1e-4
        torch.testing.assert_close(got[name].double(), want, rtol=1e-5, atol=bound, msg=name)


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles that even short scans fill."""
    monkeypatch.setattr(triton_backend, "TILE_ROWS", 4)
    monkeypatch.setattr(triton_backend, "TILE_CHANNELS", 2)


@pytest.mark.slow
@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="this is the process that it starts")
def test_in_the_interpreter():
    """Triton reads the variable while it is imported, so its tests below run in another process."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-k", "interpreted"]
    process = subprocess.run(
        [*command, __file__],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stdout[-3000:]
    assert f"{len(CASES) + 2} passed" in process.stdout


@interpreted
@pytest.mark.parametrize(("length", "reverse", "states", "channels"), CASES)
def test_interpreted(small_tiles, length, reverse, states, channels):
    tensors = problem(length, len(reverse), states, channels)
    check(tensors, reverse=reverse, delta_softplus=True)


@interpreted
def test_interpreted_without_options(small_tiles):
    tensors = problem(6, 1, 2, 4)
    tensors["delta"] = tensors["delta"].abs()
    check({k: v for k, v in tensors.items() if k not in ("z", "D", "delta_bias")})


@interpreted
def test_interpreted_with_extreme_deltas(small_tiles):
    tensors = problem(9, 1, 2, 2)
    tensors["delta"] = tensors["delta"] * torch.tensor([1e-4, 1e4])
    check(tensors, delta_softplus=True)


@pytest.mark.slow
@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="the kernels are not for a GPU here")
@pytest.mark.parametrize("gate", [False, True])
def test_compiles_for_a_gpu_that_is_not_there(gate):
    """The interpreter lets pass what the compiler refuses: a type that changes in a loop."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from vlm.encoders.scan_backends import triton_kernels

    inputs, sizes = (*("*fp32",) * 8, "*i32"), ("i32",) * 4
    sizes_in = {"SOFTPLUS": True, "GATE": gate, "STATES": 16, "T": 64, "W": 32}
    tensors = {"inputs": inputs, "results": ("*fp32",) * 3, "sizes": sizes}
    back = {"given": ("*fp32",) * 3, "shares": ("*fp32",) * 5}
    for kernel, arguments, constants in (
        (triton_kernels.forward_kernel, tensors, sizes_in | {"KEEP": True}),
        (triton_kernels.backward_kernel, tensors | back, sizes_in),
    ):
        places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
        signature = arguments | dict.fromkeys(constants, "constexpr")
        source = ASTSource(kernel, signature, places)
        assert triton.compile(source, target=GPUTarget("cuda", 80, 32)).asm["cubin"]


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("length", [1, 63, 197, 513])
@pytest.mark.parametrize("reverse", [(False,), (False, True)])
@pytest.mark.parametrize("states", [1, 16])
def test_on_a_gpu(length, reverse, states):
    tensors = problem(length, len(reverse), states, 80, "cuda")
    check(tensors, reverse=reverse, delta_softplus=True)
    one, two = (results(tensors, "triton", reverse=reverse, delta_softplus=True) for _ in "12")
    assert all(torch.equal(one[name], two[name]) for name in one)
