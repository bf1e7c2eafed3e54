"""Which maps does VMamba give a vision-language model?

Shapes: B batch, S S' picture size, H W grid, D width.

The last stage is coarse (7 x 7 at 224 pixels), the one before has the density of a ViT's patches
(14 x 14) at half the width. Joined, they are one map: the last stage repeated on the finer grid
beside the other, each normalised. The norm of the last stage is the classifier's, which published
weights have; the other, `outnorm{i}` as in the reference's `Backbone_VSSM`, they do not have: it
begins as the identity of a LayerNorm (weights 1, bias 0).

Surprise: a place of the last stage is repeated on the 2 x 2 places that its convolution is centred
at or next to, and an odd grid's surplus is cut; there is no interpolation between places.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from vlm.encoders.drop_path import drop_rates
from vlm.encoders.vmamba_blocks import (
    Stage,
    VMambaArchitecture,
    VSSBlock,
    make_downsample,
    make_stem,
    next_side,
    stem_side,
)

Output = Literal["joined", "normed"] | tuple[int, ...]
NAMED: dict[Literal["joined", "normed"], tuple[int, ...]] = {"joined": (-2, -1), "normed": (-1,)}


class VMamba(nn.Module):
    """VMamba without its classifier's head."""

    def __init__(
        self, architecture: VMambaArchitecture, output: Output, drop_path_rate: float = 0.0
    ) -> None:
        """Draw new weights.

        Args:
            architecture: its stages include those that are not built.
            output: "joined", the last two stages as one map; "normed", the last stage through its
                norm; or stages, negative, from the end, without norms. Later stages are not built.
            drop_path_rate: of the last block, in training.
        """
        super().__init__()
        a = architecture
        count = len(a.depths)
        stages = NAMED[output] if isinstance(output, str) else output
        self.output = output
        self.entries = [count + stage for stage in stages]
        self.patch_embed = make_stem(a)
        rates = iter(drop_rates(drop_path_rate, sum(a.depths)))
        last = max(self.entries)
        self.layers = nn.ModuleList()
        for i in range(last + 1):
            blocks = [VSSBlock(a.dims[i], a, next(rates)) for _ in range(a.depths[i])]
            down = nn.Identity()
            if i < last:
                down = make_downsample(a.dims[i], a.dims[i + 1], a.downsample)
            self.layers.append(Stage(blocks, down, a.scan_mode))
        if isinstance(output, str):
            # Published as `classifier.norm`.
            self.classifier = nn.ModuleDict({"norm": nn.LayerNorm(a.dims[-1])})
        if output == "joined":
            self.add_module(f"outnorm{count - 2}", nn.LayerNorm(a.dims[-2]))

    def stages(self, images: Tensor) -> list[Tensor]:
        """Return the outputs (B, H, W, D) of the stages built, of images (B, 3, S, S')."""
        # Channels innermost in memory from the first convolution on.
        x = self.patch_embed(images.permute(0, 2, 3, 1).contiguous())
        outputs = []
        for stage in self.layers:
            outputs.append(stage(x))
            x = stage.get_submodule("downsample")(outputs[-1])
        return outputs

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the feature maps (B, H, W, D) asked for, of images (B, 3, S, S')."""
        stages = self.stages(images)
        if not isinstance(self.output, str):
            return [stages[entry] for entry in self.entries]
        last = self.classifier["norm"](stages[-1])
        if self.output == "normed":
            return [last]
        before = self.get_submodule(f"outnorm{len(stages) - 2}")(stages[-2])
        return [torch.cat([before, repeat_to(last, before.shape[1:3])], dim=-1)]


def repeat_to(x: Tensor, grid: Sequence[int]) -> Tensor:
    """Return x (B, H, W, D) with places repeated 2 x 2, cut to `grid`: (B, *grid, D).

    A grid of (5, 9) was halved to (3, 5): its place (4, 8) lies in place (2, 4).
    """
    # Downsampling that drops an odd last row leaves it no place; the last one serves it too.
    rows, columns = (
        (torch.arange(side, device=x.device) // 2).clamp(max=x.shape[axis] - 1)
        for axis, side in ((1, grid[0]), (2, grid[1]))
    )
    return x.index_select(1, rows).index_select(2, columns)


def map_shapes(
    a: VMambaArchitecture, output: Output, size: tuple[int, int]
) -> list[tuple[int, int, int]]:
    """Return (H, W, D) of each feature map of pictures of `size` pixels (S, S')."""
    grid = [stem_side(side, a) for side in size]
    shapes = []
    for dim in a.dims:
        shapes.append((grid[0], grid[1], dim))
        grid = [next_side(side, a.downsample) for side in grid]
    if output == "joined":
        height, width, dim = shapes[-2]
        return [(height, width, dim + a.dims[-1])]
    return [shapes[-1]] if output == "normed" else [shapes[stage] for stage in output]
