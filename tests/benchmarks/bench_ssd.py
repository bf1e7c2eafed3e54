"""How fast are the SSD scan and the matrix LSTM in chunks, against a library and a quadratic form?

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_ssd.py [--length 196]

Times are CPU milliseconds of this process, the best of some runs, forward and forward with
backward, of all methods in one process: trust their ratios. The numbers of the methods are held
against each other, values and gradients.

The libraries' functions are the PyTorch paths of transformers, as they run without kernels:
`mamba2_chunk_scan` at its model's own chunk (256) and at ours (64), and xLSTM's chunked function.
`quadratic` is the form of vision_lstm2.py, without its copies of the running sum.
"""

import argparse
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

import vlm  # noqa: F401 (lets torchvision import beside a CPU torch)
from vlm.encoders.mlstm import mlstm
from vlm.encoders.ssd import ssd

Method = Callable[..., Tensor]
# Batch, heads, channels of a head, states: a mixer of Vim-S, and ViL-T and ViL-B.
SSD_SHAPES = {"vim_small": (4, 12, 64, 64)}
MLSTM_SHAPES = {"vil_tiny": (1, 4, 96), "vil_base": (1, 4, 384)}
LENGTHS = (196, 1024, 4096)
LONGEST_RUN = 1.5  # seconds; a run longer than that is not repeated


def ssd_inputs(shape: str, length: int) -> list[Tensor]:
    """Return x, dt, A, B, C, D."""
    batch, heads, channels, states = SSD_SHAPES[shape]
    torch.manual_seed(0)
    tensors = [
        torch.randn(batch, length, heads, channels),
        torch.rand(batch, length, heads) * 0.1,
        -1 - 15 * torch.rand(heads),
        torch.randn(batch, length, 1, states),
        torch.randn(batch, length, 1, states),
        torch.randn(heads),
    ]
    return [tensor.requires_grad_() for tensor in tensors]


def ssd_methods() -> dict[str, Method]:
    """Return what takes the inputs of SSD; the first is ours."""
    from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

    def library(chunk: int) -> Method:
        def run(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
            return mamba2_chunk_scan(x, dt, A, B, C, chunk, D=D)

        return run

    return {
        "chunks": lambda *inputs: ssd(*inputs)[0],
        "transformers, 64": library(64),
        "transformers, 256": library(256),
    }


def mlstm_inputs(shape: str, length: int) -> list[Tensor]:
    """Return q, k, v, input gate, forget gate; no normaliser comes near zero."""
    batch, heads, channels = MLSTM_SHAPES[shape]
    torch.manual_seed(0)
    tensors = [torch.randn(batch, length, heads, channels) for _ in range(3)]
    q, k = (tensor.abs() for tensor in tensors[:2])
    gates = torch.randn(2, batch, length, heads)
    return [t.requires_grad_() for t in (q, k, tensors[2], gates[0], gates[1] + 4)]


def quadratic(q: Tensor, k: Tensor, v: Tensor, input_gate: Tensor, forget_gate: Tensor) -> Tensor:
    """Return h (B, L, H, P) by (L, L) matrices."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    running = F.logsigmoid(forget_gate).transpose(1, 2).cumsum(-1)
    length = q.shape[2]
    later = torch.ones(length, length, dtype=torch.bool).triu(1)
    sums = (running[..., :, None] - running[..., None, :]).masked_fill(later, -torch.inf)
    weights = sums + input_gate.transpose(1, 2)[..., None, :]
    largest = weights.amax(-1, keepdim=True)
    scores = q @ (k * k.shape[-1] ** -0.5).transpose(-1, -2) * (weights - largest).exp()
    normaliser = torch.maximum(scores.sum(-1, keepdim=True).abs(), (-largest).exp()) + 1e-6
    return (scores / normaliser @ v).transpose(1, 2)


def mlstm_methods(length: int) -> dict[str, Method]:
    """Return what takes the inputs of the matrix LSTM; the first is ours."""
    from transformers.models.xlstm.modeling_xlstm import mlstm_chunkwise_native_autograd

    chunk = max(size for size in range(1, 65) if length % size == 0)

    def library(*inputs: Tensor) -> Tensor:
        q, k, v, i, f = (t.transpose(1, 2).contiguous() for t in inputs)
        h = mlstm_chunkwise_native_autograd(q, k, v, i, f, chunk_size=chunk)
        assert isinstance(h, Tensor)
        return h.transpose(1, 2)

    return {
        "chunks": lambda *inputs: mlstm(*inputs)[0],
        "quadratic": quadratic,
        f"transformers, {chunk}": library,
    }


def milliseconds(run: Callable[[], object], repeats: int = 3) -> float:
    """Return the CPU time of the fastest run."""
    best = float("inf")
    for _ in range(repeats + 1):  # the first one warms up
        start = time.process_time()
        run()
        taken = time.process_time() - start
        best = min(best, taken)
        if taken > LONGEST_RUN:
            break
    return best * 1000


def with_gradients(method: Method, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Return the output, and the gradients of its sum."""
    y = method(*inputs)
    return [y.detach(), *torch.autograd.grad(y.sum(), inputs)]


def compare(title: str, methods: dict[str, Method], inputs: Sequence[Tensor]) -> None:
    """Print a row for each method, and hold its numbers against the first one's."""
    print(f"{title}\n{'':24}{'fwd ms':>10}{'ratio':>8}{'f+b ms':>10}{'ratio':>8}{'difference':>12}")
    first: tuple[list[Tensor], float, float] | None = None
    for name, method in methods.items():
        results = with_gradients(method, inputs)
        with torch.no_grad():
            forward = milliseconds(lambda method=method: method(*inputs))
        both = milliseconds(lambda method=method: with_gradients(method, inputs))
        if first is None:
            first = results, forward, both
        error = max(
            ((a - b).abs().max() / b.abs().max()).item()
            for a, b in zip(results, first[0], strict=True)
        )
        print(
            f"  {name:22}{forward:10.1f}{forward / first[1]:8.1f}"
            f"{both:10.1f}{both / first[2]:8.1f}{error:12.1e}"
        )
        assert error < 1e-3, f"{name} gives other numbers"


def main() -> None:
    """Print all tables, or those of one length."""
    parser = argparse.ArgumentParser(description="Time SSD and the matrix LSTM.")
    parser.add_argument("--length", type=int, choices=LENGTHS, help="only this one")
    only = parser.parse_args().length
    torch.set_num_threads(1)
    for length in (only,) if only else LENGTHS:
        for shape in SSD_SHAPES:
            inputs = ssd_inputs(shape, length)
            compare(f"SSD, {shape}, {length} steps", ssd_methods(), inputs)
        for shape in MLSTM_SHAPES:
            inputs = mlstm_inputs(shape, length)
            compare(f"matrix LSTM, {shape}, {length} steps", mlstm_methods(length), inputs)


if __name__ == "__main__":
    main()
