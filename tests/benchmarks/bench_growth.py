"""How do time and memory of whole encoders grow with the picture? A table, and a plot in docs/.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_growth.py --out docs/growth.png

One forward pass of one picture on one CPU thread, without gradients: CPU seconds (other jobs on the
machine disturb them less than wall seconds), and how far the resident set grew at its peak, each
encoder and size in a process of its own. L is the number of 16 x 16 patches in the picture,
whatever the encoder makes of them: 196 at 224 pixels, 24,336 at 2,496.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SIZES = (224, 448, 896, 1248, 2496)
# The published models about as large as DeiT-S (22 M): width 384 all through, or in stage 3 of 4.
ENCODERS: dict[str, dict[str, Any]] = {
    "ViT (DeiT-S)": {"type": "timm", "architecture": "deit_small_patch16_224", "layer": "last"},
    "Vim-S": {"type": "vim", "architecture": "vim_small"},
    "VMamba-T": {"type": "vmamba", "architecture": "vmamba_tiny_s1l8", "layer": -1},
    "MambaOut-T": {"type": "timm", "architecture": "mambaout_tiny", "layer": -1},
}


def measure(name: str, size: int) -> dict[str, float]:
    """Return CPU seconds and megabytes of one forward pass; meant for a process of its own."""
    import torch

    from vlm.encoders import build_vision_encoder

    torch.set_num_threads(1)
    config = {**ENCODERS[name], "image_size": size}
    encoder = build_vision_encoder(config).eval()
    picture = torch.rand(1, 3, size, size)
    with torch.inference_mode():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        started = time.process_time()
        encoder(picture)
        seconds = time.process_time() - started
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    parameters = sum(p.numel() for p in encoder.parameters()) / 1e6
    return {"seconds": seconds, "mb": grown / 1024, "parameters_m": parameters}


def measure_apart(name: str, size: int) -> dict[str, float]:
    """Run `measure` in a new process."""
    words = [sys.executable, __file__, "--one", name, str(size)]
    return json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout)


def plot(rows: dict[str, dict[int, dict[str, float]]], path: Path) -> None:
    """Draw seconds and megabytes against L, both axes logarithmic."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), dpi=110)
    for axis, key, label in zip(axes, ("seconds", "mb"), ("CPU seconds", "MB"), strict=True):
        for name, cells in rows.items():
            lengths = [(size // 16) ** 2 for size in cells]
            axis.plot(lengths, [max(c[key], 1e-3) for c in cells.values()], "o-", label=name)
        axis.set(xscale="log", yscale="log", xlabel="L, patches of 16 x 16 pixels", ylabel=label)
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    """Measure all, print a Markdown table, draw the plot."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--one", nargs=2, metavar=("NAME", "SIZE"))
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one[0], int(args.one[1]))))
        return
    measure_apart("Vim-S", 224)  # compiles the scan's kernel, where there is a compiler
    rows: dict[str, dict[int, dict[str, float]]] = {}
    print("| encoder | M parameters |" + "".join(f" L {(s // 16) ** 2:,} |" for s in args.sizes))
    print("|---|---|" + "---|" * len(args.sizes))
    for name in ENCODERS:
        rows[name] = {size: measure_apart(name, size) for size in args.sizes}
        cells = [f" {c['seconds']:.2f} s, {c['mb']:.0f} MB |" for c in rows[name].values()]
        parameters = rows[name][args.sizes[0]]["parameters_m"]
        print(f"| {name} | {parameters:.1f} |" + "".join(cells), flush=True)
    if args.out:
        plot(rows, args.out)


if __name__ == "__main__":
    main()
