"""What does partial LoRA cost, against the share of image tokens? A table.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_partial_lora.py

One linear layer with frozen weights, forward and backward, in CPU seconds relative to the layer
alone. "ours" gathers the image tokens; "masked" computes the small matrices on all tokens and
keeps those of the image tokens. Both sides run in turn, the fastest of each counts, and their
outputs and gradients have to be equal.
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from connectors.token_routed_linear import LowRank, TokenRoutedLinear

SHARES = (0.0, 0.125, 0.25, 0.5, 0.75, 1.0)


def masked(layer: TokenRoutedLinear, x: Tensor, mask: Tensor) -> Tensor:
    """Return the same as `layer`, computing the small matrices on every token."""
    return layer.base(x) + torch.where(mask[:, None], layer.expert(x), 0.0)


def gradients(layer: TokenRoutedLinear, run: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    """Return output and gradients of one pass."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    out = run(x)
    out.backward(torch.ones_like(out))
    assert x.grad is not None
    return [
        out.detach(),
        x.grad,
        *(p.grad for p in layer.expert.parameters() if p.grad is not None),
    ]


def fastest(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Return the CPU seconds of the fastest pass of each, run in turn."""
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(repeats):
        for name, run in runs.items():
            started = time.process_time()
            run()
            best[name] = min(best[name], time.process_time() - started)
    return best


def main() -> None:
    """Measure every share, print a Markdown table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--rank", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    base = nn.Linear(args.width, args.width, bias=False).requires_grad_(False)
    low_rank = LowRank(args.width, args.width, args.rank, args.rank)
    nn.init.normal_(low_rank.up.weight, std=0.02)
    layer = TokenRoutedLinear(base, low_rank)
    x = torch.randn(args.tokens, args.width)
    order = torch.randperm(args.tokens)
    print("| image tokens | ours / layer alone | masked / layer alone | ours / masked |")
    print("|---|---|---|---|")
    for share in SHARES:
        rows = order[: round(share * args.tokens)].sort().values
        mask = torch.zeros(args.tokens, dtype=torch.bool).index_fill(0, rows, True)
        sides = {
            "ours": lambda x, rows=rows: layer(x, rows),
            "masked": lambda x, mask=mask: masked(layer, x, mask),
        }
        ours, theirs = (gradients(layer, side, x) for side in sides.values())
        assert len(ours) == len(theirs) == 4
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
        sides["alone"] = base
        best = fastest(
            {n: lambda side=side: gradients(layer, side, x) for n, side in sides.items()},
            args.repeats,
        )
        cells = (
            best["ours"] / best["alone"],
            best["masked"] / best["alone"],
            best["ours"] / best["masked"],
        )
        print(f"| {share:.1%} |" + "".join(f" {cell:.2f} |" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
