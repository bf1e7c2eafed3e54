"""What does Vim compute between pixels and tokens?

Shapes: B batch, S S' picture size, H W grid, P = H * W patches, c class tokens, L = P + c, D width.

Sources: Zhu et al. 2024 (arXiv 2401.09417); hustvl/Vim, vim/models_mamba.py. Names of weights are
the published ones.

Surprises:
- The reference hands (hidden, residual) from block to block and adds them at the start of the next;
  here a block returns their sum. The state after block i is the residual that block i + 1 sees.
- The residual is float32 whatever the weights are.
- The positions are added after the class token has been put in, so that token has one too.
- At stride 8 the patches are still 16 pixels wide and overlap: the grid at 224 is 27, not 28.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer

from vlm.encoders.drop_path import drop_path, drop_rates
from vlm.encoders.position_resize import Rule, class_token_places, insert_tokens, resize_positions
from vlm.encoders.ssd_mixer import Mamba2Mixer
from vlm.encoders.vim_mixer import Directions, MambaMixer
from vlm.errors import UserError

ClassToken = Literal["middle", "head", "double", "none"]

TOKEN_NAMES: dict[ClassToken, tuple[str, ...]] = {
    "middle": ("cls_token",),
    "head": ("cls_token",),
    "double": ("cls_token_head", "cls_token_tail"),
    "none": (),
}


@dataclass(frozen=True, kw_only=True)
class VimArchitecture:
    """What fixes the shapes of the weights; None means: computed from the others.

    `directions` is the reference's `bimamba_type`, `divide_out` its `if_divide_out`.
    """

    embed_dim: int  # D
    depth: int  # blocks
    patch_size: int = 16
    stride: int | None = None  # pixels between patches; None: patch_size
    position_grid: tuple[int, int] | None = None  # of the stored positions; None: image_size's
    state_dim: int = 16  # N
    conv_width: int = 4  # taps
    expand: int = 2  # inner channels / D
    step_rank: int | None = None  # R; None: D / 16, rounded up
    directions: Directions = "v2"
    divide_out: bool = True  # whether the directions of "v2" are averaged
    class_token: ClassToken = "middle"
    layer_scale: float | None = None  # first value of `gamma`; None: no such factor
    norm_eps: float = 1e-5
    mixer: Literal["mamba", "mamba2"] = "mamba"  # "mamba2": see ssd_mixer.py
    head_dim: int = 64  # channels of a head, for "mamba2"
    groups: int = 1  # of heads that share B and C, for "mamba2"

    def __post_init__(self) -> None:
        plain = self.divide_out and self.layer_scale is None and self.step_rank is None
        if self.mixer == "mamba2" and (self.directions == "v1" or not plain):
            raise UserError(
                "Vim: mixer 'mamba2' has directions 'v2' (averaged) or 'none' and no layer_scale "
                f"or step_rank, not directions {self.directions!r}, divide_out "
                f"{self.divide_out}, layer_scale {self.layer_scale}, step_rank {self.step_rank}"
            )


def patch_grid(size: tuple[int, int], patch_size: int, stride: int) -> tuple[int, int]:
    """Return (H, W) of pictures of `size` pixels (S, S'); patches overlap where stride < patch.

    >>> patch_grid((224, 224), 16, 8)
    (27, 27)
    """
    height, width = ((side - patch_size) // stride + 1 for side in size)
    return height, width


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, computed in float32."""

    def __init__(self, dim: int, eps: float) -> None:
        """Begin with ones."""
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D) in the weight's type."""
        weight = self.weight
        return F.rms_norm(x.float(), weight.shape, weight.float(), self.eps).to(weight.dtype)


class Block(GradientCheckpointingLayer):
    """x + drop_path(mixer(norm(x))), (B, L, D) -> (B, L, D) in float32."""

    def __init__(self, dim: int, mixer: nn.Module, norm_eps: float, drop_rate: float) -> None:
        """Take the mixer, a module (B, L, D) -> (B, L, D)."""
        super().__init__()
        self.mixer = mixer
        self.norm = RMSNorm(dim, norm_eps)
        self.drop_rate = drop_rate

    def forward(self, residual: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D), float32."""
        hidden = self.mixer(self.norm(residual))
        return residual + drop_path(hidden, self.drop_rate, self.training)


class PatchEmbedding(nn.Module):
    """A convolution (B, 3, S, S') -> (B, H, W, D); a module of its own for the published names."""

    def __init__(self, dim: int, patch_size: int, stride: int) -> None:
        """Draw the kernel as LeCun does, as the reference."""
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch_size, stride)
        # A normal distribution cut at two deviations has 0.88 of its deviation left.
        deviation = (3 * patch_size**2) ** -0.5 / 0.87962566103423978
        nn.init.trunc_normal_(self.proj.weight, std=deviation, a=-2 * deviation, b=2 * deviation)
        assert self.proj.bias is not None
        nn.init.zeros_(self.proj.bias)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, S, S') -> (B, H, W, D)."""
        return self.proj(images).permute(0, 2, 3, 1)


class Vim(nn.Module):
    """Vim without its classifier; `forward` gives the states of the layers asked for.

    Attributes:
        norm_f: the final norm, None where nobody asked for it.
    """

    def __init__(
        self,
        architecture: VimArchitecture,
        layers: Sequence[int],
        normed: bool,
        drop_path_rate: float = 0.0,
        position_rule: Rule = "middle",
    ) -> None:
        """Draw new weights.

        Args:
            architecture: with stride and position grid; its depth counts blocks that are not built.
            layers: blocks asked for, negative, from the end; later ones are not built.
            normed: whether the states asked for go through `norm_f`.
            drop_path_rate: of the last block, in training.
            position_rule: how positions are resized to another grid.
        """
        super().__init__()
        a = architecture
        assert a.stride is not None and a.position_grid is not None, a
        self.position_grid = a.position_grid
        self.position_rule: Rule = position_rule
        self.entries = [a.depth + layer for layer in layers]
        self.patch_embed = PatchEmbedding(a.embed_dim, a.patch_size, a.stride)
        self.class_token: ClassToken = a.class_token
        self.token_names = TOKEN_NAMES[a.class_token]
        rows = a.position_grid[0] * a.position_grid[1] + len(self.token_names)
        self.pos_embed = nn.Parameter(torch.zeros(1, rows, a.embed_dim))
        for name in self.token_names:
            self.register_parameter(name, nn.Parameter(torch.zeros(1, 1, a.embed_dim)))
        for parameter in (self.pos_embed, *self.class_tokens()):
            nn.init.trunc_normal_(parameter, std=0.02)
        rates = drop_rates(drop_path_rate, a.depth)
        self.layers = nn.ModuleList(
            Block(a.embed_dim, make_mixer(a), a.norm_eps, rates[i])
            for i in range(max(self.entries) + 1)
        )
        self.norm_f = RMSNorm(a.embed_dim, a.norm_eps) if normed else None

    def no_weight_decay(self) -> set[str]:
        """Name positions and class tokens, as the reference does."""
        return {"pos_embed", *self.token_names}

    def class_tokens(self) -> list[nn.Parameter]:
        """Return the class tokens, each (1, 1, D), in the order of the sequence."""
        return [self.get_parameter(name) for name in self.token_names]

    def embed(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Return tokens (B, L, D) of images (B, 3, S, S'), positions added, and the grid (H, W)."""
        patches = self.patch_embed(images)
        grid = (patches.shape[1], patches.shape[2])
        kind = self.class_token
        places = class_token_places(kind, grid[0] * grid[1])
        tokens = [token.expand(len(images), -1, -1) for token in self.class_tokens()]
        x = insert_tokens(patches.flatten(1, 2), tokens, places)
        old, rule = self.position_grid, self.position_rule
        return x + resize_positions(self.pos_embed, old, grid, kind, rule), grid

    def states(self, images: Tensor) -> tuple[list[Tensor], tuple[int, int]]:
        """Return the states (B, L, D), float32, before the first and after each block; the grid."""
        x, grid = self.embed(images)
        states = [x.float()]
        for block in self.layers:
            states.append(block(states[-1]))
        return states, grid

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return feature maps (B, H, W, D) of images (B, 3, S, S'), without the class tokens."""
        states, grid = self.states(images)
        maps = [states[entry + 1] for entry in self.entries]
        if self.norm_f is not None:
            maps = [self.norm_f(x) for x in maps]
        dtype = self.pos_embed.dtype
        places = class_token_places(self.class_token, grid[0] * grid[1])
        return [remove_tokens(x, places).unflatten(1, grid).to(dtype) for x in maps]


def make_mixer(a: VimArchitecture) -> MambaMixer | Mamba2Mixer:
    """Return a block's mixer with new weights; its output is scaled down for the depth, as GPT-2's.

    The reference's `_init_weights` divides `out_proj` by sqrt(depth), one residual a layer.
    """
    shape = (a.embed_dim, a.state_dim, a.conv_width, a.expand)
    gain = a.depth**-0.5
    if a.mixer == "mamba2":
        assert a.directions != "v1", a
        return Mamba2Mixer(*shape, a.head_dim, a.groups, a.directions, gain, a.norm_eps)
    options = (a.step_rank, a.directions, a.divide_out, a.layer_scale)
    return MambaMixer(*shape, *options, out_gain=gain)


def remove_tokens(x: Tensor, places: Sequence[int]) -> Tensor:
    """Return x (B, L, D) without the tokens at `places`."""
    edges = [-1, *places, x.shape[1]]
    parts = [x[:, a + 1 : b] for a, b in pairwise(edges) if b > a + 1]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
