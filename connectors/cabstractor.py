"""How can convolutions merge features and keep their places? Honeybee's C-Abstractor.

Shapes: T views, H W feature grid, D encoder width, C width of the convolutions, N tokens per view,
E language-model width.

Position embedding, RegNet blocks, adaptive average pooling to the token grid, RegNet blocks, MLP.
Surprises:
- Blocks are timm's `RegStage` with group size 1, so the 3 x 3 convolutions are depthwise, and with
  LayerNorm over channels (eps 1e-5) where RegNet has BatchNorm.
- The MLP has SiLU, not GELU.
- Positions are one learned square table; grids of other sides read it bicubically resized, which
  the reference does not offer.

Follows `honeybee/projectors/projectors.py` of khanrc/honeybee; section 3.2 of arXiv:2312.06742.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from connectors.base import Connector, ConnectorConfig, join_channels
from connectors.errors import UserError
from connectors.key_table import Layout, Unsqueezed
from connectors.position_tables import resize_table


@dataclass(frozen=True, kw_only=True)
class CAbstractorConfig(ConnectorConfig):
    """Published: CLIP-L/336's 24 x 24 features become 12 x 12 (C144) or 16 x 16 (C256) tokens."""

    side: int | None = None  # rows and columns of tokens; None: half of the features', rounded up
    hidden_dim: int | None = None  # C; None: as wide as the features, which all published ones are
    depth: int = 3  # blocks before the pooling, and again after it
    mlp_depth: int = 2
    position_side: int | None = 24  # of the position table; None: no positions

    def __post_init__(self) -> None:
        optional = (self.side, self.position_side, self.hidden_dim)
        numbers = [self.depth, self.mlp_depth, *(n for n in optional if n is not None)]
        if min(numbers) < 1:
            raise UserError(
                "connector 'cabstractor': side, hidden_dim, depth, mlp_depth and position_side "
                f"must be at least 1, not {self.side}, {self.hidden_dim}, {self.depth}, "
                f"{self.mlp_depth} and {self.position_side}"
            )

    def token_grid(self, height: int, width: int) -> tuple[int, int]:
        """Return `side` twice, or half the grid, rounded up."""
        if self.side is None:
            return (height + 1) // 2, (width + 1) // 2
        return self.side, self.side


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of pictures (T, C, H, W)."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name of the base class
        """Return the normed picture."""
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class RegNetBlock(nn.Module):
    """RegNet's bottleneck: 1 x 1, depthwise 3 x 3, squeeze and excitation, 1 x 1; residual."""

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_dim, dim, 1, bias=False)
        self.norm1 = ChannelNorm(dim)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False)
        self.norm2 = ChannelNorm(dim)
        squeezed = round(in_dim * 0.25)
        self.squeeze = nn.Conv2d(dim, squeezed, 1)
        self.excite = nn.Conv2d(squeezed, dim, 1)
        self.conv3 = nn.Conv2d(dim, dim, 1, bias=False)
        self.norm3 = ChannelNorm(dim)
        self.shortcut = nn.Identity()
        if in_dim != dim:
            self.shortcut = nn.Sequential(nn.Conv2d(in_dim, dim, 1, bias=False), ChannelNorm(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Map (T, in_dim, H, W) to (T, dim, H, W)."""
        inner = F.silu(self.norm1(self.conv1(x)))
        inner = F.silu(self.norm2(self.conv2(inner)))
        gate = self.excite(F.silu(self.squeeze(inner.mean((2, 3), keepdim=True))))
        inner = self.norm3(self.conv3(inner * gate.sigmoid()))
        return F.silu(inner + self.shortcut(x))


class CAbstractorConnector(Connector[CAbstractorConfig]):
    """Convolutions around an average pooling; fewer tokens, each of its own neighbourhood."""

    config_class = CAbstractorConfig

    def __init__(
        self, config: CAbstractorConfig, vision_dims: Sequence[int], text_dim: int
    ) -> None:
        super().__init__(config, vision_dims, text_dim)
        in_dim = sum(vision_dims)
        dim = in_dim if config.hidden_dim is None else config.hidden_dim
        self.positions = None
        if config.position_side is not None:
            self.positions = nn.Parameter(torch.zeros(config.position_side**2, in_dim))
            nn.init.trunc_normal_(self.positions, std=0.02)
        self.before = _stage(in_dim, dim, config.depth)
        self.after = _stage(dim, dim, config.depth)
        layers: list[nn.Module] = [nn.Linear(dim, text_dim)]
        for _ in range(config.mlp_depth - 1):
            layers += [nn.SiLU(), nn.Linear(text_dim, text_dim)]
        self.readout = nn.Sequential(*layers)
        self.apply(_initialise)

    def project(self, features: Sequence[Tensor]) -> Tensor:
        """Map feature maps, each (T, H, W, D_i), to tokens (T, N, E)."""
        joined = join_channels(features, self.vision_dims)
        height, width = joined.shape[1:3]
        if self.positions is not None:
            positions = resize_table(self.positions, height, width)
            joined = joined + positions.reshape(height, width, -1)
        maps = self.before(joined.permute(0, 3, 1, 2))
        maps = self.after(F.adaptive_avg_pool2d(maps, self.token_grid(height, width)))
        return self.readout(maps.permute(0, 2, 3, 1)).flatten(1, 2)

    @classmethod
    def key_tables(cls, config: CAbstractorConfig) -> Mapping[str, Mapping[str, "str | Layout"]]:
        """Return the keys of Honeybee, whose convolutions are as wide as the features."""
        if config.hidden_dim is not None:
            return {}
        names = ("weight", "bias")
        keys: dict[str, str | Layout] = {
            f"abstractor.readout.{i}.{n}": f"readout.{i}.{n}"
            for i in range(0, 2 * config.mlp_depth, 2)
            for n in names
        }
        if config.position_side is not None:
            keys["abstractor.pos_emb"] = Unsqueezed("positions")
        for theirs, ours in ((0, "before"), (2, "after")):
            for i in range(config.depth):
                for their_key, our_key in block_keys(widens=False).items():
                    keys[f"abstractor.net.{theirs}.b{i + 1}.{their_key}"] = f"{ours}.{i}.{our_key}"
        return {"honeybee": keys}


def block_keys(widens: bool) -> dict[str, str]:
    """Return {key of timm's RegNet `Bottleneck`: ours}; `widens`: its width out is another."""
    names = ("weight", "bias")
    keys = {}
    for i in (1, 2, 3):
        keys[f"conv{i}.conv.weight"] = f"conv{i}.weight"
        keys |= {f"conv{i}.bn.{n}": f"norm{i}.{n}" for n in names}
    for theirs, ours in (("se.fc1", "squeeze"), ("se.fc2", "excite")):
        keys |= {f"{theirs}.{n}": f"{ours}.{n}" for n in names}
    if widens:
        keys["downsample.conv.weight"] = "shortcut.0.weight"
        keys |= {f"downsample.bn.{n}": f"shortcut.1.{n}" for n in names}
    return keys


def _stage(in_dim: int, dim: int, depth: int) -> nn.Sequential:
    """Return `depth` blocks, the first from in_dim to dim."""
    return nn.Sequential(*(RegNetBlock(dim if i else in_dim, dim) for i in range(depth)))


def _initialise(module: nn.Module) -> None:
    """Draw as `HoneybeePreTrainedModel._init_weights`, common_layers.py."""
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        nn.init.normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
