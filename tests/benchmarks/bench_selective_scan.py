"""How fast is the selective scan on one CPU thread, and how much memory does it take?

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_selective_scan.py --shape vim_224
    ... --into docs/encoders.md   # each shape's table between its markers, `<!-- scan vim_224 -->`

Times are CPU milliseconds of this process, the best of the runs that fit into `--seconds` (one at
least), all methods in one process: trust their ratios. Memory is how far the resident set grew at
its peak, in a process of its own for each method. Every method's numbers are held against the
others'. Shapes and the estimate of the floor are those of specs/backbones.md 5: softplus, z and
bias are left out, D is in.

`published` is the loop that the reference publishes; its backward takes time quadratic in L and is
run up to a length of 512 only. `fair` is the same loop, with what keeps it slow taken out.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vlm.encoders.selective_scan import selective_scan, selective_scan_channels_last
from vlm.errors import UserError

sys.path.append(str(Path(__file__).parents[1]))
from marked_pages import put

# Batch, channels, length, states and groups.
SHAPES = {
    "vim_224": (4, 768, 197, 16, 1),
    "vim_1248": (1, 768, 6084, 16, 1),
    "vmamba_stage1": (4, 192, 3136, 1, 4),
    "tiny": (2, 8, 33, 4, 2),  # to see that all runs
}
TITLES = {
    "vim_224": "Vim-S at 224 pixels",
    "vim_1248": "Vim-S at 1248 pixels",
    "vmamba_stage1": "VMamba-T, stage 1, at 224 pixels",
    "tiny": "To see that all runs",
}
LONGEST_PUBLISHED_BACKWARD = 512
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]  # u, delta, A, B, C, D
LIMIT_KB = 64  # glibc maps larger pieces by themselves, so that freeing them shows


def published(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """Follow `selective_scan_ref` (mamba_ssm/ops/selective_scan_interface.py), operation by one."""
    B, C = (x.repeat_interleave(u.shape[1] // x.shape[1], dim=1) for x in (B, C))
    decay = torch.exp(torch.einsum("bdl,dn->bdln", delta, A))
    added = torch.einsum("bdl,bdnl,bdl->bdln", delta, B, u)
    state, outputs = u.new_zeros(*u.shape[:2], A.shape[1]), []
    for t in range(u.shape[2]):
        state = decay[:, :, t] * state + added[:, :, t]
        outputs.append(torch.einsum("bdn,bdn->bd", state, C[:, :, :, t]))
    return torch.stack(outputs, dim=2) + u * D[:, None]


def fair(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """Do the same with time outermost, views instead of slices, and one operation a step."""
    B, C = (x.repeat_interleave(u.shape[1] // x.shape[1], dim=1) for x in (B, C))
    step = delta.permute(2, 0, 1).unsqueeze(-1)
    decay = torch.exp(step * A)
    added = step * B.permute(3, 0, 1, 2) * u.permute(2, 0, 1).unsqueeze(-1)
    state, states = u.new_zeros(*u.shape[:2], A.shape[1]), []
    for factor, term in zip(decay.unbind(), added.unbind(), strict=True):
        state = torch.addcmul(term, factor, state)
        states.append(state)
    y = (torch.stack(states) * C.permute(3, 0, 1, 2)).sum(-1)
    return y.permute(1, 2, 0) + u * D[:, None]


def ours(backend: str, layout: str) -> Callable[..., Tensor]:
    def first(*inputs: Tensor) -> Tensor:
        y = selective_scan(*inputs, backend=backend)
        assert isinstance(y, Tensor)
        return y

    def last(*inputs: Tensor) -> Tensor:
        y = selective_scan_channels_last(*inputs, backend=backend)
        assert isinstance(y, Tensor)
        return y

    return first if layout == "first" else last


METHODS: dict[str, tuple[Callable[..., Tensor], str]] = {
    "published": (published, "first"),
    "fair": (fair, "first"),
    "chunked": (ours("chunked", "last"), "last"),
    "chunked first": (ours("chunked", "first"), "first"),
    "compiled": (ours("compiled", "last"), "last"),
    "compiled first": (ours("compiled", "first"), "first"),
}


def make_inputs(shape: str, layout: str) -> Inputs:
    """Return the same random numbers in the layout that a method takes."""
    batch, channels, length, states, groups = SHAPES[shape]
    torch.manual_seed(0)
    u = torch.randn(batch, channels, length)
    delta = torch.rand(batch, channels, length) * 0.1
    A = -torch.arange(1.0, states + 1).repeat(channels, 1)
    B, C = torch.randn(2, batch, groups, states, length).unbind()
    if layout == "last":
        u, delta = (x.transpose(1, 2).contiguous() for x in (u, delta))
        B, C = (x.permute(0, 3, 1, 2).contiguous() for x in (B, C))
    return u, delta, A, B, C, torch.randn(channels)


def call(method: str, inputs: Inputs, backward: bool) -> list[Tensor]:
    """Run once; return y and the gradients, channels first."""
    function, layout = METHODS[method]
    if not backward:
        with torch.no_grad():
            results = [function(*inputs)]
    else:
        inputs = tuple(x.detach().requires_grad_() for x in inputs)  # type: ignore[assignment]
        y = function(*inputs)
        results = [y.detach(), *torch.autograd.grad(y, inputs, torch.ones_like(y))]
    if layout == "last":
        turn = {3: (0, 2, 1), 4: (0, 2, 3, 1)}
        results = [x.permute(turn[x.ndim]) if x.ndim in turn else x for x in results]
    return results


def milliseconds(method: str, inputs: Inputs, backward: bool, seconds: float) -> float:
    """Return the CPU time of the fastest of the runs that fit into `seconds`, one at least."""
    best, begin = float("inf"), time.monotonic()
    while True:
        start = time.process_time()
        call(method, inputs, backward)
        best = min(best, time.process_time() - start)
        if time.monotonic() - begin + best > seconds:
            return 1000 * best


def peak_megabytes(method: str, shape: str, backward: bool) -> float:
    """Return how far one run raised the resident set, measured in a process of its own."""
    command = [sys.executable, __file__, "--peak", method, "--shape", shape]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(LIMIT_KB * 1024)}
    process = subprocess.run(
        [*command, "--backward"] if backward else command,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return float(process.stdout)


def print_peak(method: str, shape: str, backward: bool) -> None:
    """Print the growth of this process's peak resident set during one run."""
    inputs = make_inputs(shape, METHODS[method][1])
    small = make_inputs(shape, METHODS[method][1])
    length = 2 if METHODS[method][1] == "last" else -1
    cut = [x[:, :length] if length == 2 and x.ndim > 2 else x for x in small]
    cut = [x[..., :2] if length == -1 and x.ndim > 2 else x for x in cut]
    call(method, tuple(cut), backward)  # type: ignore[arg-type]
    del small, cut
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = resident("VmRSS")
    call(method, inputs, backward)
    print((resident("VmHWM") - before) / 1024)


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(field)))


def best_of(function: Callable[[], object], count: int) -> float:
    """Return the seconds of CPU time of one call, the best of ten batches of `count`."""
    times = []
    for _ in range(10):
        start = time.process_time()
        for _ in range(count):
            function()
        times.append((time.process_time() - start) / count)
    return min(times)


def floor(shape: str, backward: bool) -> float:
    """Estimate in ms what no CPU program of torch's speed goes below: exps, flops and traffic."""
    x, y = torch.rand(1 << 14), torch.empty(1 << 14)
    exp = best_of(lambda: torch.exp(x, out=y), 100) / x.numel()
    matrix = torch.rand(512, 512)
    flop = best_of(lambda: matrix @ matrix, 3) / (2 * 512**3)
    source, target = torch.rand(1 << 24), torch.empty(1 << 24)
    byte = best_of(lambda: target.copy_(source), 1) / (8 * source.numel())
    batch, channels, length, states, _ = SHAPES[shape]
    elements, rows = batch * channels * length * states, batch * channels * length
    exps, flops, moved = (2, 9 + 25, 8) if backward else (1, 9, 3)
    return 1000 * (elements * (exps * exp + flops * flop) + rows * 4 * moved * byte)


def available(method: str) -> bool:
    """Say whether a backend is installed; if not, say why."""
    try:
        call(method, make_inputs("tiny", METHODS[method][1]), False)
    except UserError as error:
        print(f"{method}: {error}", file=sys.stderr)
        return False
    return True


@dataclass(frozen=True)
class Cell:
    """What one method took: CPU milliseconds, and megabytes, None where they are not measured."""

    milliseconds: float
    megabytes: float | None


def measure(shape: str, backward: bool, seconds: float, memory: bool) -> dict[str, Cell]:
    """Return what every method takes at a shape.

    Raises:
        AssertionError: two methods' numbers differ.
    """
    methods = [m for m in METHODS if m in ("published", "fair") or available(m)]
    if backward and SHAPES[shape][2] > LONGEST_PUBLISHED_BACKWARD:
        methods.remove("published")
    cells: dict[str, Cell] = {}
    expected: list[Tensor] | None = None
    for method in methods:
        inputs = make_inputs(shape, METHODS[method][1])
        results = call(method, inputs, backward)
        expected = expected or results
        for got, want in zip(results, expected, strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=2e-6 * want.abs().max().item())
        del results
        took = milliseconds(method, inputs, backward, seconds)
        cells[method] = Cell(took, peak_megabytes(method, shape, backward) if memory else None)
        print(f"  {method:16}{cells[method]}", file=sys.stderr, flush=True)
    return cells


def rows(cells: dict[str, Cell], lowest: float) -> list[list[str]]:
    """Return a table's cells: of each method, and of the floor, `lowest` milliseconds."""
    lines = []
    for method, cell in cells.items():
        faster = [
            f"{cells[base].milliseconds / cell.milliseconds:.1f}x" if base in cells else "-"
            for base in ("published", "fair")
        ]
        over, megabytes, share = f"{cell.milliseconds / lowest:.1f}x", "-", "-"
        if cell.megabytes is not None:
            megabytes = f"{cell.megabytes:.0f}"
            base = cells["published"].megabytes if "published" in cells else None
            share = f"{100 * cell.megabytes / base:.0f}%" if base else "-"
        lines.append([method, f"{cell.milliseconds:.1f}", *faster, over, megabytes, share])
    return [*lines, ["floor (estimate)", f"{lowest:.1f}", "-", "-", "1x", "-", "-"]]


def table(shape: str, seconds: float, memory: bool) -> str:
    """Measure a shape; return its table, forward and forward with backward, as Markdown."""
    batch, channels, length, states, groups = SHAPES[shape]
    several = f"; {groups} groups" if groups > 1 else ""
    heading = "method | ms | against published | against fair | over the floor | MB | of published"
    lines = [
        f"{TITLES[shape]}: batch {batch}, {channels} channels, length {length}, "
        f"{states} state{'s' if states > 1 else ''}{several}.",
        "",
        f"| pass | {heading} |",
        "|---" * 8 + "|",
    ]
    for backward in (False, True):
        name = "forward and backward" if backward else "forward"
        print(f"{shape}, {name}", file=sys.stderr)
        cells = measure(shape, backward, seconds, memory)
        for row in rows(cells, floor(shape, backward)):
            lines.append(f"| {name} | {' | '.join(row)} |")
        if "published" not in cells:
            lines += [
                "",
                "The published loop's backward takes time quadratic in the length: not run here.",
            ]
    return "\n".join(lines)


def main() -> None:
    """Measure, and print the tables or put them into a page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, help="measure this one; without it, all three")
    parser.add_argument("--seconds", type=float, default=20.0, help="for each method and pass")
    parser.add_argument("--no-memory", action="store_true", help="do not measure memory")
    parser.add_argument("--into", type=Path, help="put the tables into this page, at their markers")
    parser.add_argument("--peak", choices=METHODS, help=argparse.SUPPRESS)
    parser.add_argument("--backward", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.peak:
        return print_peak(options.peak, options.shape, options.backward)
    shapes = [options.shape] if options.shape else [s for s in SHAPES if s != "tiny"]
    for shape in shapes:
        made = table(shape, options.seconds, not options.no_memory)
        print(f"\n{made}\n", flush=True)
        if options.into:
            put(options.into, {f"scan {shape}": made})
    return None


if __name__ == "__main__":
    main()
