"""How does Vim's position embedding fit a grid of another size than it was trained on?

Shapes: P trained positions on a grid (rows, columns), D width, H W the new grid. The embedding has
a row for every token in the order of the sequence: the class token's row lies where that token is.

Two rules, and for a class token in the middle they differ:
- "middle" takes the class token's row out, resizes the true grid and puts the row back.
- "official" is Vim's own `interpolate_pos_embed` (vim/utils.py): the first rows count as the class
  token's wherever that is. With the token in the middle, the first half of the grid is then shifted
  by one place and the class token's row becomes a patch's. The published stride-8 models were made
  through it and trained further, so both are here. It is for square grids.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Rule = Literal["middle", "official"]


def class_token_places(kind: str, patches: int) -> list[int]:
    """Return the places in the sequence of the class token(s), ascending.

    Args:
        kind: "middle", "head", "double" (one at each end) or "none".
        patches: number of patch tokens.
    """
    places = {"middle": [patches // 2], "head": [0], "double": [0, patches + 1], "none": []}
    return places[kind]


def resize_positions(
    embedding: Tensor, old: tuple[int, int], new: tuple[int, int], kind: str, rule: Rule
) -> Tensor:
    """Return the embedding (1, H * W + c, D) of (1, P + c, D), c class tokens; bicubic.

    Args:
        embedding: trained rows, in the order of the sequence.
        old: trained grid, P = rows * columns.
        new: (H, W).
        kind: where the class tokens are, see `class_token_places`.
        rule: see above.
    """
    if old == new:
        return embedding
    places = class_token_places(kind, old[0] * old[1])
    if rule == "official":
        count = len(places)
        grid = _resize(embedding[:, count:], old, new)
        return torch.cat([embedding[:, :count], grid], dim=1)
    keep = [i for i in range(embedding.shape[1]) if i not in places]
    grid = _resize(embedding[:, keep], old, new)
    rows = [embedding[:, place, None] for place in places]
    return insert_tokens(grid, rows, class_token_places(kind, new[0] * new[1]))


def insert_tokens(tokens: Tensor, extra: Sequence[Tensor], places: Sequence[int]) -> Tensor:
    """Return tokens (B, P, D) with each of `extra` (B, 1, D) at its place in the result."""
    for token, place in zip(extra, places, strict=True):
        tokens = torch.cat([tokens[:, :place], token, tokens[:, place:]], dim=1)
    return tokens


def _resize(rows: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """(1, P, D) on the old grid -> (1, H * W, D)."""
    grid = rows.unflatten(1, old).permute(0, 3, 1, 2)
    # No antialiasing and corners not aligned, as the reference; bicubic has no bf16 on the CPU.
    grid = F.interpolate(grid.float(), size=new, mode="bicubic", align_corners=False)
    return grid.to(rows.dtype).permute(0, 2, 3, 1).flatten(1, 2)
