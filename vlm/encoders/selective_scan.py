"""What does a selective state-space layer compute along its sequence, and which program does it?

Shapes: B batch, L sequence, D channels, G groups of D / G neighbouring channels, N states.
"""

from collections.abc import Mapping
from math import lcm

import torch
from torch import Tensor

from vlm.encoders.scan_backends import (
    chunked,
    compiled,
    mamba_ssm_backend,
    reference,
    triton_backend,
)
from vlm.encoders.scan_backends.problem import Backend, ScanProblem
from vlm.errors import UserError

BACKENDS: dict[str, Backend] = {
    "reference": reference,  # the plain loop, for tests
    "chunked": chunked,  # nothing but PyTorch: any device, float64 too
    "compiled": compiled,  # a C kernel for the CPU, built at first use
    "triton": triton_backend,
    "mamba_ssm": mamba_ssm_backend,
}
# What "auto" tries on a device before "chunked", the best first.
PREFERRED = {"cpu": ("compiled",), "cuda": ("mamba_ssm", "triton")}


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Scan channels-first tensors, as `selective_scan_fn` of state-spaces/mamba does.

    Args:
        u, delta, z: (B, D, L).
        A: (D, N), real.
        B, C: (D, N), (B, N, L) or (B, G, N, L); group g is channels g D / G to (g + 1) D / G.
        D, delta_bias: (D).
        delta_softplus: whether softplus is applied to delta + delta_bias.
        return_last_state: whether the state after the last step is returned as well.
        backend: "auto" or a name in BACKENDS.

    Returns:
        y (B, D, L) in u's type; with `return_last_state` also the state (B, D, N) in float32, or in
        float64 where an input is.

    Raises:
        UserError: shapes, types or devices that do not fit, a backend that is missing here.
    """
    u, delta = _channels_last(u), _channels_last(delta)
    z = None if z is None else _channels_last(z)
    B, C = (_sequence_first(x) for x in (B, C))
    y, state = _scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, (False,), backend)
    y = y.transpose(1, 2)
    return (y, state) if return_last_state else y


def selective_scan_channels_last(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    reverse: bool | tuple[bool, ...] = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Scan channels-last tensors, each group of channels in its own direction: the fast form.

    Several directions over one sequence are one call: put the directions' channels side by side, as
    groups. For Vim: u, delta (B, L, 2 E), A (2 E, N), D, delta_bias (2 E), B, C (B, L, 2, N) and
    `reverse=(False, True)`; y's halves are then added, and as both would be gated by the same z,
    the sum is gated after the call. For VMamba: four groups, two of them reversed.

    Args:
        u, delta, z: (B, L, D).
        A: (D, N), real.
        B, C: (B, L, G, N), or (D, N), constant in time.
        D, delta_bias: (D).
        delta_softplus: whether softplus is applied to delta + delta_bias.
        return_last_state: whether the state after the last step is returned as well.
        reverse: whether to scan from the end to the start: once for all channels, or one for each
            of as many equal parts of the channels. Inputs and y stay in the sequence's order.
        backend: "auto" or a name in BACKENDS.

    Returns:
        y (B, L, D) in u's type; with `return_last_state` also the state (B, D, N) after the step
        that the scan takes last, in float32, or in float64 where an input is.

    Raises:
        UserError: shapes, types or devices that do not fit, a backend that is missing here.
    """
    directions = (reverse,) if isinstance(reverse, bool) else tuple(reverse)
    y, state = _scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, directions, backend)
    return (y, state) if return_last_state else y


def _channels_last(x: Tensor) -> Tensor:
    """(B, D, L) -> (B, L, D); anything else as it is, for the checks to refuse."""
    return x.transpose(1, 2) if x.ndim == 3 else x


def _sequence_first(x: Tensor) -> Tensor:
    """(B, N, L) or (B, G, N, L) -> (B, L, G, N); (D, N) as it is."""
    x = x.unsqueeze(1) if x.ndim == 3 else x
    return x.permute(0, 3, 1, 2) if x.ndim == 4 else x


def _scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    softplus: bool,
    reverse: tuple[bool, ...],
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Check, bring to one floating type and one number of groups, choose a backend, run it."""
    tensors = {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z}
    given = {name: x for name, x in (tensors | {"delta_bias": delta_bias}).items() if x is not None}
    _check_kinds(given)
    _check_shapes(u, delta, A, B, C, D, z, delta_bias, reverse)
    double = any(x.dtype == torch.float64 for x in given.values())
    dtype = torch.float64 if double else torch.float32
    groups = lcm(len(reverse), *(x.shape[2] for x in (B, C) if x.ndim == 4))

    def prepared(x: Tensor) -> Tensor:
        x = x.to(dtype)
        return x.repeat_interleave(groups // x.shape[2], dim=2) if x.ndim == 4 else x

    if u.is_meta:  # a model is measured without being computed
        return torch.empty_like(u), A.new_empty(u.shape[0], *A.shape, dtype=dtype)
    if not u.shape[0]:
        backend = "chunked"  # no work; the kernels divide it among threads
    with torch.autocast(u.device.type, enabled=False):
        problem = ScanProblem(
            *(prepared(x) for x in (u, delta, A, B, C)),
            *(None if x is None else prepared(x) for x in (D, z, delta_bias)),
            softplus=softplus,
            reverse=tuple(r for r in reverse for _ in range(groups // len(reverse))),
        )
        y, state = choose_backend(backend, problem).scan(problem)
    return y.to(u.dtype), state


def choose_backend(name: str, problem: ScanProblem) -> Backend:
    """Return the program for `backend=name`; for "auto" the first of its device's that is there.

    Raises:
        UserError: there is no such backend, or it cannot run here, or not on this problem.
    """
    if name == "auto":
        candidates = PREFERRED.get(problem.u.device.type, ())
        name = next((n for n in candidates if not BACKENDS[n].missing(problem)), "chunked")
    if name not in BACKENDS:
        raise UserError(
            f"selective scan: backend must be auto or one of {', '.join(BACKENDS)}, not {name!r}"
        )
    if reason := BACKENDS[name].missing(problem):
        raise UserError(f"selective scan: backend {name!r} cannot be used: {reason}")
    return BACKENDS[name]


def _check_kinds(tensors: Mapping[str, Tensor]) -> None:
    """Raise UserError unless the tensors are real floating-point numbers on one device."""
    device = tensors["u"].device
    for name, x in tensors.items():
        if x.is_complex():
            raise UserError(f"selective scan: {name} is complex; only real numbers are supported")
        if not x.is_floating_point():
            raise UserError(
                f"selective scan: {name} must have a floating type, such as float32, not {x.dtype}"
            )
        if x.device != device:
            raise UserError(f"selective scan: u is on {device}, but {name} is on {x.device}")


def _check_shapes(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    reverse: tuple[bool, ...],
) -> None:
    """Raise UserError unless the shapes, channels last, are those of one scan."""
    if u.ndim != 3 or A.ndim != 2 or 0 in (*u.shape[1:], *A.shape):
        raise UserError(
            "selective scan: u must have three axes, batch, channels and sequence, and A two, "
            "channels and states, none of them empty but the batch, not "
            f"{tuple(u.shape)} and {tuple(A.shape)}"
        )
    batch, length, channels = u.shape
    states = A.shape[1]
    expected = {"delta": (delta, u.shape), "z": (z, u.shape), "A": (A, (channels, states))}
    expected |= {"D": (D, (channels,)), "delta_bias": (delta_bias, (channels,))}
    for name, x in (("B", B), ("C", C)):
        groups = x.shape[2] if x.ndim == 4 else 1
        grouped = (batch, length, groups, states)
        expected[name] = (x, grouped if x.ndim == 4 else (channels, states))
        if channels % groups:
            raise UserError(f"selective scan: {channels} channels are no {groups} equal groups")
    for name, (x, shape) in expected.items():
        if x is not None and tuple(x.shape) != tuple(shape):
            raise UserError(
                f"selective scan: with u (channels last) {tuple(u.shape)} and A {tuple(A.shape)}, "
                f"{name} must be {tuple(shape)}, not {tuple(x.shape)}"
            )
    if not reverse or channels % len(reverse):
        raise UserError(
            f"selective scan: reverse has {len(reverse)} directions for {channels} channels; "
            "give one, or one for each of several equal groups of channels"
        )
