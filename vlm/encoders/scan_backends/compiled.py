"""How does the scan's C kernel get its tensors? As pointers and strides, so that none is copied.

Shapes: B batch, L sequence, D channels, G groups, N states, W lanes of a vector, T rows of a block.
The kernel is scan_kernel.c. It takes float32; other problems go to another backend.
"""

import ctypes
from typing import Any, cast

import torch
from torch import Tensor

from vlm.encoders.scan_backends.build_kernel import load_kernel
from vlm.encoders.scan_backends.problem import ScanProblem, refuse_second_derivative

BLOCK_STATES = 512  # T * N: with a vector's lanes, a block's decays and states take 64 KB
BLOCK_ROWS = (8, 128)  # least and most T

# The kernel's arguments after the sizes, in the order of its struct `scan`.
STRIDED = ("u", "delta", "z", "y", "grad_y", "grad_u", "grad_delta", "grad_z", "B", "C")
CONTIGUOUS = (
    *("A", "D", "delta_bias", "grad_last", "reverse", "before", "last"),
    *("grad_A", "grad_D", "grad_delta_bias", "grad_B", "grad_C"),
)


def missing(p: ScanProblem) -> str:
    """Return why the kernel cannot run this problem; "" if it can."""
    if p.u.device.type != "cpu" or p.u.dtype != torch.float32:
        return f"it is for float32 on a CPU, not {p.u.dtype} on {p.u.device.type}"
    library = load_kernel()
    return library if isinstance(library, str) else ""


def scan(p: ScanProblem) -> tuple[Tensor, Tensor]:
    """Return y (B, L, D) and the last state (B, D, N), float32 on a CPU."""
    tensors = (p.u, p.delta, p.A, p.B, p.C, p.D, p.z, p.delta_bias)
    return cast("tuple[Tensor, Tensor]", _Scan.apply(p.softplus, p.reverse, *tensors))


class _Scan(torch.autograd.Function):
    """The kernel's two passes; tensors as in ScanProblem, in the order of `scan` above."""

    @staticmethod
    def forward(
        ctx: Any, softplus: bool, reverse: tuple[bool, ...], *tensors: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        call = _Call(softplus, reverse, *tensors)
        y, last = torch.empty_like(call.u), call.u.new_empty(call.batch, *call.A.shape)
        before = call.empty_before() if any(ctx.needs_input_grad) else None
        call.run({"y": y, "last": last, "before": before})
        ctx.save_for_backward(*tensors, before)
        ctx.settings = softplus, reverse
        return y, last

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        *tensors, before = ctx.saved_tensors
        call = _Call(*ctx.settings, *tensors)
        u, delta, A, B, C, D, z, bias = tensors
        grad_u, grad_delta = torch.empty_like(u), torch.empty_like(delta)
        grad_z = None if z is None else torch.empty_like(z)
        # One slice for each writer, added up below: (B, D, N), (parts, B, L, G, N) or (B, D).
        grad_A = u.new_empty(call.batch, *A.shape)
        grad_B, grad_C = (
            u.new_empty(call.parts if x.ndim == 4 else call.batch, *x.shape) for x in (B, C)
        )
        grad_D, grad_bias = u.new_empty(2, call.batch, u.shape[2]).unbind()
        results = {"grad_u": grad_u, "grad_delta": grad_delta, "grad_z": grad_z}
        sums = {"grad_A": grad_A, "grad_B": grad_B, "grad_C": grad_C}
        sums |= {"grad_D": grad_D, "grad_delta_bias": grad_bias}
        given = {"grad_y": grads[0], "grad_last": grads[1].contiguous(), "before": before}
        call.run(given | results | sums)
        A, B, C, D_, bias_ = (x[0] if len(x) == 1 else x.sum(0) for x in sums.values())
        return (
            *(None, None, grad_u, grad_delta, A, B, C),
            *(None if D is None else D_, grad_z, None if bias is None else bias_),
        )


class _Call:
    """The kernel's arguments for one problem."""

    def __init__(self, softplus: bool, reverse: tuple[bool, ...], *tensors: Tensor | None) -> None:
        u, delta, A, B, C, D, z, bias = tensors
        library = load_kernel()
        assert not isinstance(library, str), library
        assert u is not None and A is not None and B is not None and C is not None
        self.library, self.u, self.A = library, u, A
        self.batch, self.length, self.channels = u.shape
        self.groups, self.states = len(reverse), A.shape[1]
        least, most = BLOCK_ROWS
        self.block_rows = min(max(BLOCK_STATES // max(1, self.states), least), most)
        self.lanes = library.scan_lanes()
        self.tiles = -(-(self.channels // self.groups) // self.lanes)  # of a group
        self.threads = torch.get_num_threads()
        # Enough items of work for every thread, though each costs its own copy of B's gradient.
        wanted = 1 if self.threads == 1 else -(-2 * self.threads // (self.batch * self.groups))
        self.parts = min(self.tiles, wanted)
        self.switches = (softplus, B.ndim == 2, C.ndim == 2)
        contiguous = {"A": A, "D": D, "delta_bias": bias}
        contiguous |= {name: x for name, x in (("B", B), ("C", C)) if x.ndim == 2}
        self.inputs = {"u": u, "delta": delta, "z": z, "B": B, "C": C}
        self.inputs |= {k: None if x is None else x.contiguous() for k, x in contiguous.items()}
        self.inputs["reverse"] = torch.tensor(reverse, dtype=torch.uint8)

    def empty_before(self) -> Tensor:
        """Return room for the states before each block, (B, blocks, G, tiles, N, W)."""
        blocks = -(-self.length // self.block_rows)
        sizes = (self.batch, blocks, self.groups, self.tiles, self.states, self.lanes)
        return self.u.new_empty(sizes)

    def run(self, more: dict[str, Tensor | None]) -> None:
        """Call the kernel with the inputs and more tensors; it fills the results among them."""
        tensors = self.inputs | more
        numbers = [self.batch, self.length, self.channels, self.groups, self.states]
        numbers += [self.block_rows, self.parts, self.threads, *self.switches]
        for name in STRIDED:
            x = tensors.get(name)
            strides = () if x is None or x.ndim == 2 else x.stride()
            numbers += [0 if x is None else x.data_ptr(), *strides, *[0] * (4 - len(strides))]
        for name in CONTIGUOUS:
            x = tensors.get(name)
            numbers.append(0 if x is None else x.data_ptr())
        numbers += [0, 0]  # `next` and `failed`
        if self.library.scan_run((ctypes.c_int64 * len(numbers))(*numbers)):
            raise MemoryError("selective scan: the kernel could not allocate its working memory")
