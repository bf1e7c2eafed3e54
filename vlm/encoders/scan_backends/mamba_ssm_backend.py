"""When can mamba_ssm's own CUDA kernel run, and how does a problem look to it?

Shapes: B batch, L sequence, D channels, G groups, N states.
It takes channels first, forward in time only: reversed groups are flipped before and after. Written
from its published interface, `selective_scan_fn` of mamba_ssm/ops/selective_scan_interface.py.
"""

import functools
import importlib
import importlib.util

import torch
from torch import Tensor

from vlm.encoders.scan_backends.problem import ScanProblem
from vlm.encoders.scan_backends.reference import in_scan_order

INTERFACE = "mamba_ssm.ops.selective_scan_interface"
MOST_STATES = 256  # MAX_DSTATE of csrc/selective_scan/selective_scan.h


def missing(p: ScanProblem) -> str:
    """Return why the kernel cannot run this problem; "" if it can."""
    if importlib.util.find_spec("mamba_ssm") is None:
        return "mamba_ssm is not installed"
    if p.u.device.type != "cuda" or p.u.dtype != torch.float32:
        return f"it is for float32 on CUDA, not {p.u.dtype} on {p.u.device.type}"
    if p.A.shape[1] > MOST_STATES:
        return f"it takes up to {MOST_STATES} states, not {p.A.shape[1]}"
    return _broken()


@functools.cache
def _broken() -> str:
    """Return why mamba_ssm, which is installed, cannot be imported; "" if it can.

    Its kernels are built for one version of torch; another one does not find their symbols.
    """
    try:
        importlib.import_module(INTERFACE)
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        return f"mamba_ssm is installed, but importing it fails: {error}"
    return ""


def scan(p: ScanProblem) -> tuple[Tensor, Tensor]:
    """Return y (B, L, D) and the last state (B, D, N)."""
    selective_scan_fn = importlib.import_module(INTERFACE).selective_scan_fn

    def first(x: Tensor) -> Tensor:
        return in_scan_order(x, p.reverse).transpose(1, 2).contiguous()

    def mixed(x: Tensor) -> Tensor:
        if x.ndim == 2:
            return x.contiguous()
        return in_scan_order(x, p.reverse).permute(0, 2, 3, 1).contiguous()

    y, last = selective_scan_fn(
        *(first(p.u), first(p.delta), p.A.contiguous(), mixed(p.B), mixed(p.C)),
        D=p.D,
        z=None if p.z is None else first(p.z),
        delta_bias=p.delta_bias,
        delta_softplus=p.softplus,
        return_last_state=True,
    )
    return in_scan_order(y.transpose(1, 2), p.reverse), last
