"""How does a resampler know where a feature stood? Two-dimensional sine and cosine tables.

Shapes: H W grid of the features, E channels.

Surprises:
- The first half of the channels encodes the COLUMN, the second the row: the references' `emb_h` is
  built from the grid's width (`np.meshgrid(grid_w, grid_h)`).
- Each half is all sines, then all cosines; they do not alternate.

Follows `get_2d_sincos_pos_embed` and `get_abs_pos` of `omnilmm/model/resampler.py` in
OpenBMB/MiniCPM-V, which Qwen-VL's `visual.py` has too.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from connectors.errors import UserError
from connectors.float32 import Float32Module


def sincos_2d(
    height: int, width: int, dim: int, *, device: torch.device | str | None = None
) -> Tensor:
    """Return the table (H, W, E) in float32; an entry depends on its row and column alone.

    Raises:
        UserError: 4 does not divide E.
    """
    if dim % 4:
        raise UserError(
            f"a two-dimensional sine and cosine table needs a width that 4 divides, not {dim}; "
            "choose another language model or connector"
        )
    columns = _sincos_1d(width, dim // 2, device)[None].expand(height, -1, -1)
    rows = _sincos_1d(height, dim // 2, device)[:, None].expand(-1, width, -1)
    return torch.cat([columns, rows], dim=-1)


def _sincos_1d(length: int, dim: int, device: torch.device | str | None) -> Tensor:
    """Return (length, dim): sin(p w_k), then cos(p w_k), w_k = 10000 ** (-k / (dim / 2))."""
    steps = torch.arange(dim // 2, dtype=torch.float32, device=device) / (dim / 2)
    places = torch.arange(length, dtype=torch.float32, device=device)
    angles = places[:, None] / 10000**steps
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def resize_table(table: Tensor, height: int, width: int) -> Tensor:
    """Return the square table (G * G, E) at another grid, (H * W, E): bicubic, in float32."""
    side = round(len(table) ** 0.5)
    if (height, width) == (side, side):
        return table
    picture = table.float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(picture, size=(height, width), mode="bicubic", align_corners=False)
    return resized.permute(0, 2, 3, 1).flatten(0, 2).to(table.dtype)


class StoredTable(Float32Module):
    """A square table that published checkpoints carry, though nothing trains it.

    It is a buffer, so that no optimiser and no sharding of parameters meets it.
    """

    table: Tensor

    def __init__(self, side: int, dim: int) -> None:
        """Build the table (side * side, dim)."""
        super().__init__()
        self.register_buffer("table", sincos_2d(side, side, dim).flatten(0, 1))

    def forward(self, height: int, width: int) -> Tensor:
        """Return the positions (H * W, E) of a grid, row-major."""
        return resize_table(self.table, height, width)
