"""How is a curve made of B-splines, and how does it keep its shape when its knots change?

Shapes: M points, I inputs, O outputs, P order of the pieces (3 is cubic), G intervals of the grid,
C = G + P basis functions. Every input has knots of its own, (I, G + 2 P + 1): G + 1 on the grid and
P more on either side.

Surprise: where knots coincide, a term 0 / 0 of the recursion counts as 0 and the bases still sum to
one; pykan sets the whole basis function to 0 there.

Follows `kan/spline.py` of KindXiaoming/pykan (B_batch, extend_grid, curve2coef).
"""

import torch
from torch import Tensor


def uniform_grid(low: float, high: float, intervals: int) -> Tensor:
    """Return the grid points (G + 1,) from `low` to `high`, on the default device."""
    # Named, because a `with torch.device(...)` misses `linspace` in a process whose first tensor
    # under one was made by transformers' from_pretrained: it puts a function of its own in the
    # place of `torch.linspace`, and torch remembers for good which functions make tensors.
    device = torch.get_default_device()
    return torch.linspace(low, high, intervals + 1, device=device)


def add_outer_knots(grid: Tensor, order: int) -> Tensor:
    """Return knots (I, G + 2 P + 1) of grids (I, G + 1): P more on either side, evenly spaced."""
    step = (grid[:, -1:] - grid[:, :1]) / (grid.shape[1] - 1)
    steps = step * torch.arange(1, order + 1, dtype=grid.dtype, device=grid.device)
    return torch.cat([grid[:, :1] - steps.flip(1), grid, grid[:, -1:] + steps], dim=1)


def spline_basis(x: Tensor, knots: Tensor, order: int) -> Tensor:
    """Return the basis functions at points (M, I): (M, I, C), by the recursion of Cox and de Boor.

    Outside of the outermost knots all of them are 0.
    """
    x = x[..., None]
    # Half-open pieces: a point on a knot belongs to the piece on its right.
    basis = ((x >= knots[:, :-1]) & (x < knots[:, 1:])).to(x.dtype)
    for p in range(1, order + 1):
        rising = (x - knots[:, : -p - 1]) * _inverse(knots[:, p:-1] - knots[:, : -p - 1])
        falling = (knots[:, p + 1 :] - x) * _inverse(knots[:, p + 1 :] - knots[:, 1:-p])
        basis = rising * basis[..., :-1] + falling * basis[..., 1:]
    return basis


def interpolate_grid(grid: Tensor, intervals: int) -> Tensor:
    """Return grids (I, G' + 1) whose points lie evenly between those of (I, G + 1)."""
    old = grid.shape[1] - 1
    places = torch.arange(intervals + 1, dtype=torch.float64, device=grid.device) * old / intervals
    left = places.floor().long().clamp(max=old - 1)
    share = (places - left).to(grid.dtype)
    return torch.lerp(grid[:, left], grid[:, left + 1], share)


def sample_grid(samples: Tensor, intervals: int, uniform_share: float) -> Tensor:
    """Return grids (I, G + 1) with about as many of the samples (M, I) in each interval.

    As `update_grid_from_samples` in `kan/KANLayer.py`.

    Args:
        samples: the points that the curves are asked for.
        intervals: G.
        uniform_share: of an evenly spaced grid, mixed in (pykan's `grid_eps`).
    """
    ordered = samples.sort(dim=0).values
    count = len(samples)
    at = [int(count / intervals * i) for i in range(intervals)] + [count - 1]
    adaptive = ordered[at].T
    steps = torch.arange(intervals + 1, dtype=samples.dtype, device=samples.device)
    uniform = adaptive[:, :1] + (adaptive[:, -1:] - adaptive[:, :1]) / intervals * steps
    return uniform_share * uniform + (1 - uniform_share) * adaptive


def refit(coefficients: Tensor, points: Tensor, old: Tensor, new: Tensor, order: int) -> Tensor:
    """Return coefficients (I, O, C') on new knots whose curves are nearest to the old at `points`.

    Least squares in float64; of equally near ones, the smallest. The curves themselves, M * I * O
    numbers, are never computed: both sides are linear in the coefficients.

    Args:
        coefficients: (I, O, C).
        points: (M, I) where the curves shall agree; more than G' + P of them.
        old: knots (I, G + 2 P + 1).
        new: knots (I, G' + 2 P + 1).
        order: P.
    """
    points = points.double()
    before = spline_basis(points, old.double(), order).transpose(0, 1)  # (I, M, C)
    after = spline_basis(points, new.double(), order).transpose(0, 1)  # (I, M, C')
    # A basis function that hardly a point reaches would get any coefficient without the tolerance.
    moved = torch.linalg.pinv(after, rtol=1e-7) @ before  # (I, C', C)
    return (coefficients.double() @ moved.transpose(1, 2)).to(coefficients.dtype)


def _inverse(span: Tensor) -> Tensor:
    """Return 1 / span, and 0 where the span is empty."""
    empty = span <= 0
    return torch.where(empty, torch.zeros_like(span), 1 / torch.where(empty, 1, span))
