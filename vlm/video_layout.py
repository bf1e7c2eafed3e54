"""How do the tokens of a video's frames become one sequence, and how many are they?

Shapes: T frames, (p, q) tokens of a view, N = p * q, (h, w) tokens of a frame after pooling, E
language-model width, R side of a window, V its width.

As LLaVA-NeXT-Video (`get_2dPool`, `add_token_per_grid` and `add_token_per_frame` of its
llava_arch.py): each frame is one view, encoded and projected alone, then pooled over its grid of
tokens; the learned newline of images ends rows, frames, the video, or nothing. Tokens in one row
are no picture but queries, each of which reads the whole view: they are not pooled.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from connectors.config import check_positive, config_from_mapping
from vlm.errors import UserError
from vlm.tile_grids import Size


@dataclass(frozen=True, kw_only=True)
class VideoConfig:
    """How a model looks at videos.

    Attributes:
        frames: most frames of a video; so many, evenly spread, where there is no `fps`.
        fps: frames a second instead, `frames` at most.
        pool: how `stride` x `stride` tokens of a frame become one. "bilinear" rounds the grid up,
            the others down: of 27 x 27 tokens 14 x 14 and 13 x 13 are left. Queries (resamplers')
            are all kept.
        stride: 1 keeps every token.
        newline: what a learned newline ends: each row of tokens ("grid"), each frame, the whole
            video once ("one_token", as LLaVA-OneVision), or nothing.
        time_instruction: whether a sentence after the video says how long it lasts and when its
            frames were taken (vlm/video_times.py).
    """

    frames: int = 8
    fps: float | None = None
    pool: Literal["bilinear", "average", "max"] = "bilinear"
    stride: int = 2
    newline: Literal["grid", "frame", "one_token", "no_token"] = "no_token"
    time_instruction: bool = False

    def __post_init__(self) -> None:
        check_positive("video", frames=self.frames, stride=self.stride)
        if self.fps is not None and not 0 < self.fps < float("inf"):
            raise UserError(f"video: fps must be above 0, not {self.fps}")

    @property
    def has_newline(self) -> bool:
        """Whether the model needs a learned newline for videos."""
        return self.newline != "no_token"

    def sampling(self) -> dict[str, Any]:
        """Return the arguments of `vlm.video.sample_video`."""
        if self.fps is None:
            return {"num_frames": self.frames}
        return {"fps": self.fps, "max_frames": self.frames}


def parse_video(values: Mapping[str, Any] | None) -> VideoConfig:
    """Return the config of a dict; None is a model that was not told, with the defaults.

    Raises:
        UserError: an unknown field, or a value of the wrong type or range.
    """
    return config_from_mapping(VideoConfig, values or {}, "video")


def pooled_grid(token_grid: Size, config: VideoConfig) -> Size:
    """Return (h, w) of a frame's tokens after pooling.

    Raises:
        UserError: nothing would be left.
    """
    rows, cols = token_grid
    stride = config.stride
    if rows == 1:
        return token_grid
    if config.pool == "bilinear":
        return -(-rows // stride), -(-cols // stride)
    if min(rows, cols) < stride:
        raise UserError(
            f"video: stride {stride} with pool {config.pool!r} leaves nothing of a view's {rows} x "
            f"{cols} tokens; choose a smaller stride"
        )
    return rows // stride, cols // stride


def num_video_tokens(num_frames: int, token_grid: Size, config: VideoConfig) -> int:
    """Return how many tokens T frames of (p, q) tokens each take."""
    height, width = pooled_grid(token_grid, config)
    newlines = {"grid": num_frames * height, "frame": num_frames, "one_token": 1, "no_token": 0}
    return num_frames * height * width + newlines[config.newline]


def pool_frames(tokens: Tensor, token_grid: Size, config: VideoConfig, window: int = 1) -> Tensor:
    """Return frames' tokens (T, N, E) pooled, (T, h, w, E); `window` as in `lay_out_video`."""
    picture = tokens.unflatten(1, token_grid)
    target = pooled_grid(token_grid, config)
    if target == token_grid:
        return picture
    picture = spread_windows(picture, window).permute(0, 3, 1, 2)
    height, width = target[0] * window, target[1] * window
    if config.pool == "bilinear":
        pooled = F.interpolate(picture, (height, width), mode="bilinear")
    elif config.pool == "average":
        pooled = F.avg_pool2d(picture, config.stride)
    else:
        pooled = F.max_pool2d(picture, config.stride)
    return gather_windows(pooled[..., :height, :width].permute(0, 2, 3, 1), window)


def spread_windows(picture: Tensor, window: int) -> Tensor:
    """Return the map (T, p R, q R, V) whose R x R windows are (T, p, q, R * R * V), row-major."""
    cells = picture.unflatten(-1, (window, window, -1))  # (T, p, q, R, R, V)
    return cells.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def gather_windows(picture: Tensor, window: int) -> Tensor:
    """Return the R x R windows (T, p, q, R * R * V) of a map (T, p R, q R, V)."""
    cells = picture.unflatten(2, (-1, window)).unflatten(1, (-1, window))  # (T, p, R, q, R, V)
    return cells.transpose(2, 3).flatten(3)


def lay_out_video(
    tokens: Tensor,
    token_grid: Size,
    config: VideoConfig,
    newline: Tensor | None,
    window: int = 1,
) -> Tensor:
    """Join the tokens of a video's frames (T, N, E) into its sequence (num_video_tokens, E).

    Args:
        tokens: row-major over `token_grid`, frames in order.
        token_grid: (p, q) tokens of a frame.
        config: how they are pooled and joined.
        newline: (E,) where the config has one.
        window: R, where a token's numbers are the features of an R x R window of a map, so that
            the map is pooled and cut into as many windows as tokens are left.
    """
    pooled = pool_frames(tokens, token_grid, config, window)
    if not config.has_newline:
        return pooled.flatten(0, 2)
    assert newline is not None, "these videos need the newline embedding"
    end = newline.to(pooled)
    if config.newline == "grid":
        ends = end.expand(*pooled.shape[:2], 1, -1)
        return torch.cat([pooled, ends], dim=2).flatten(0, 2)
    frames = pooled.flatten(1, 2)
    if config.newline == "frame":
        return torch.cat([frames, end.expand(len(frames), 1, -1)], dim=1).flatten(0, 1)
    return torch.cat([frames.flatten(0, 1), end[None]])
