"""How do blocks that are left out at random, whole samples at a time, regularise an encoder?

Source: Huang et al. 2016 (arXiv 1603.09382), which calls it stochastic depth.
"""

from dataclasses import dataclass

from torch import Tensor

from vlm.encoders.base import EncoderConfig
from vlm.errors import UserError


@dataclass(frozen=True, kw_only=True)
class DropPathConfig(EncoderConfig):
    """What encoders of our own code understand beside the rest."""

    drop_path: float = 0.0  # how often a block is left out while training; each says which block

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.drop_path < 1:
            raise UserError(f"vision encoder: drop_path must be in [0, 1), not {self.drop_path}")


def drop_path(x: Tensor, rate: float, training: bool) -> Tensor:
    """Return x (B, ...) with whole samples set to zero at `rate`, the others scaled up for it."""
    if rate == 0.0 or not training:
        return x
    shape = (x.shape[0],) + (1,) * (x.ndim - 1)
    return x * (x.new_empty(shape).bernoulli_(1 - rate) / (1 - rate))


def drop_rates(last: float, depth: int) -> list[float]:
    """Return each block's rate, growing from 0 to `last`.

    Vim drops a block's output at the start of the next one, which has its rate one place later in
    the list; counted by the block that made the output, the rates are these.
    """
    return [last * i / max(depth - 1, 1) for i in range(depth)]
