"""Draw what the encoder sees of an image: its views in order, and the tokens they become.

Example: vlm data tiles photo.jpg --tiling anyres --out tiles.png
"""

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image

    from vlm.image_processing import VlmImageProcessor
    from vlm.tiling import Tiling, ViewPlan

MEAN_COLOR = (122, 116, 104)  # CLIP's


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `vlm data tiles`."""
    parser.add_argument("image", metavar="IMAGE", help="picture file")
    parser.add_argument(
        "--tiling",
        default="anyres",
        metavar="NAME",
        help="resize, pad, anyres (default), dynamic, hd",
    )
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="a field of the tiling, such as max_tiles=6 or grids='(1x1),...,(6x6)'",
    )
    parser.add_argument(
        "--view-size", type=int, default=336, metavar="S", help="side of a view (%(default)s)"
    )
    parser.add_argument(
        "--encoder-grid", type=int, default=24, metavar="N", help="features per side (%(default)s)"
    )
    parser.add_argument(
        "--connector",
        default="mlp",
        metavar="NAME",
        help="type, or a config as JSON (%(default)s)",
    )
    parser.add_argument("--model", metavar="FOLDER", help="take all of these from a checkpoint")
    parser.add_argument("--out", default="tiles.png", metavar="PNG", help="file (%(default)s)")


def run(args: argparse.Namespace) -> int:
    """Write the drawing and print the count."""
    from vlm.errors import UserError
    from vlm.images import load_image
    from vlm.tiles_figure import draw

    for option, value in (("--view-size", args.view_size), ("--encoder-grid", args.encoder_grid)):
        if value < 1:
            raise UserError(f"{option} must be at least 1, not {value}")
    image = load_image(args.image)
    view = view_of_model(args.model, image) if args.model else view_of_options(args, image)
    figure = draw(view, Path(args.image).name)
    try:
        figure.savefig(args.out)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write {args.out}: {error}") from error
    print(f"{view.summary()}\n{args.out}")
    return 0


@dataclass(frozen=True, kw_only=True)
class TilesView:
    """What is drawn: the image and everything that decides how it becomes tokens."""

    image: "Image.Image"
    tiling: "Tiling"
    tiling_name: str
    view_size: int
    token_grid: tuple[int, int]
    mean_color: tuple[int, int, int] = MEAN_COLOR
    num_images: int = 1  # of the conversation

    @property
    def plan(self) -> "ViewPlan":
        """The views of the image."""
        return self.tiling.plan(*self.image.size, self.view_size, self.num_images)

    def num_tokens(self) -> int:
        """Return how many tokens the image takes."""
        from vlm.token_layout import num_image_tokens

        known = (self.image.size, self.tiling, self.view_size, self.token_grid)
        return num_image_tokens(*known, self.plan.grid)

    def summary(self) -> str:
        """Return the numbers in one line."""
        plan, count = self.plan, self.num_tokens()
        views = "1 view" if plan.num_views == 1 else f"{plan.num_views} views"
        return (
            f"{self.image.width} x {self.image.height} pixels, {self.tiling_name} "
            f"{plan.rows} x {plan.cols}: {views} of {self.view_size} pixels, {count} tokens"
        )


def view_of_options(args: argparse.Namespace, image: "Image.Image") -> TilesView:
    """Return what the options describe.

    Raises:
        UserError: an unknown tiling or connector, or a wrong value.
    """
    from connectors import connector_token_grid
    from vlm.tiling import build_tiling

    tiling = {"type": args.tiling, **dict(map(_parse_option, args.option))}
    connector = {"type": args.connector}
    if args.connector.startswith("{"):
        connector = _parse_json("--connector", args.connector)
    return TilesView(
        image=image,
        tiling=build_tiling(tiling),
        tiling_name=args.tiling,
        view_size=args.view_size,
        token_grid=connector_token_grid(connector, args.encoder_grid, args.encoder_grid),
    )


def view_of_model(folder: str, image: "Image.Image") -> TilesView:
    """Return what a checkpoint does with the image.

    Raises:
        UserError: the folder is no checkpoint.
    """
    from vlm.loading import check_checkpoint
    from vlm.processing import VlmProcessor

    check_checkpoint(folder)
    return view_of_processor(VlmProcessor.from_pretrained(folder).image_processor, image)


def view_of_processor(
    processor: "VlmImageProcessor", image: "Image.Image", num_images: int = 1
) -> TilesView:
    """Return what a model's processor does with an image of a conversation with `num_images`."""
    from vlm.tiling import build_tiling

    return TilesView(
        image=image,
        tiling=build_tiling(processor.tiling),
        tiling_name=processor.tiling["type"],
        view_size=processor.view_size,
        token_grid=processor.view_token_grid,
        mean_color=processor.mean_color,
        num_images=num_images,
    )


def _parse_option(text: str) -> tuple[str, Any]:
    """Return the field and the value of FIELD=VALUE; what is no JSON is a string."""
    from vlm.errors import UserError

    field, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"--option {text!r} must be FIELD=VALUE, such as max_tiles=6")
    try:
        return field, json.loads(value)
    except json.JSONDecodeError:
        return field, value


def _parse_json(option: str, text: str) -> Mapping[str, Any]:
    """Return the JSON object of an option."""
    from vlm.errors import UserError

    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{option} {text!r} is not JSON: {error}") from error
