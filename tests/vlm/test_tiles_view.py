"""Does the drawing show the tiling it was asked for, and does it name mistakes?"""

import argparse
import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlm import tiles_view
from vlm.errors import UserError
from vlm.tiles_figure import NEWLINE, split, token_arithmetic, token_blocks


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "wide.png"
    ramp = np.tile(np.linspace(0, 255, 640).astype(np.uint8), (480, 1))
    Image.fromarray(ramp).convert("RGB").save(path)
    return path


def options(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    tiles_view.add_arguments(parser)
    return parser.parse_args(words)


@pytest.mark.parametrize(
    "words, count",
    [
        (["--tiling", "resize"], "1 view of 336 pixels, 576 tokens"),
        (["--tiling", "pad", "--connector", "pixel_shuffle"], "1 view of 336 pixels, 144 tokens"),
        (["--tiling", "pad", "--option", "unpad=true"], "1 view of 336 pixels, 450 tokens"),
        (["--tiling", "anyres"], "5 views of 336 pixels, 2340 tokens"),
        (["--option", "grids=(1x1),...,(6x6)", "--option", "max_tiles=9"], "2340 tokens"),
        (["--tiling", "dynamic", "--option", "max_tiles=6"], "dynamic 2 x 3: 7 views"),
        (
            ["--tiling", "hd", "--option", "max_tiles=9", "--connector", "pixel_shuffle"],
            "hd 3 x 3: 10 views of 336 pixels, 1489 tokens",
        ),
        (["--option", "unpad=false"], "2880 tokens"),
        (["--connector", '{"type": "mlp", "depth": 3}'], "2340 tokens"),
    ],
)
def test_the_drawing_and_the_count(words, count, picture: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "tiles.png"
    assert tiles_view.run(options(str(picture), *words, "--out", str(out))) == 0
    assert count in capsys.readouterr().out
    drawn = Image.open(out)
    assert drawn.width > 1000 and drawn.height > 700
    assert len(np.unique(np.asarray(drawn.convert("L")))) > 100


def test_token_cells_have_the_colours_of_the_image(picture: Path) -> None:
    view = tiles_view.view_of_options(options(str(picture)), Image.open(picture).convert("RGB"))
    views = view.tiling.split(view.image, view.view_size, view.mean_color)
    whole, mosaic = token_blocks(view, views)
    assert whole.shape == (24, 24, 3) and mosaic.shape == (36, 49, 3)
    assert np.allclose(mosaic[:, -1], NEWLINE)
    assert np.all(np.diff(mosaic[18, :-1, 0]) > 0)


def test_token_cells_of_hd_have_a_separator_between_two_pictures(picture: Path) -> None:
    words = ("--tiling", "hd", "--option", "max_tiles=9", "--connector", "pixel_shuffle")
    chosen = options(str(picture), *words)
    view = tiles_view.view_of_options(chosen, Image.open(picture).convert("RGB"))
    views = view.tiling.split(view.image, view.view_size, view.mean_color)
    whole, separator, mosaic = token_blocks(view, views)
    assert whole.shape == (12, 13, 3) and mosaic.shape == (36, 37, 3)
    assert separator.shape == (1, 1, 3) and np.allclose(separator, NEWLINE)
    for block in (whole, mosaic):
        assert np.allclose(block[:, -1], NEWLINE)
        assert np.all(np.diff(block[len(block) // 2, :-1, 0]) > 0)


def test_a_checkpoints_own_tiling(
    model_folder: Path, picture: Path, tmp_path: Path, capsys
) -> None:
    words = ["--model", str(model_folder), "--out", str(tmp_path / "tiles.png")]
    assert tiles_view.run(options(str(picture), *words)) == 0
    assert "resize 1 x 1: 1 view of 32 pixels, 16 tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, message",
    [
        (["--tiling", "anyrez"], "did you mean 'anyres'"),
        (["--option", "max_tiles"], "FIELD=VALUE"),
        (["--option", "max_tilez=3"], "max_tiles"),
        (["--connector", "mpl"], "did you mean 'mlp'"),
        (["--connector", "{mlp}"], "is not JSON"),
        (["--out", "/nowhere/tiles.png"], "/nowhere/tiles.png"),
        (["--out", "tiles.docx"], "tiles.docx"),
        (["--model", "/nowhere"], "/nowhere"),
        (["--view-size", "0"], "--view-size"),
    ],
)
def test_mistakes_are_named(words, message, picture: Path) -> None:
    with pytest.raises(UserError) as error:
        tiles_view.run(options(str(picture), *words))
    assert message in str(error.value)


@pytest.mark.parametrize(
    "words",
    [
        ["--tiling", "resize"],
        ["--tiling", "pad", "--option", "unpad=true"],
        ["--tiling", "anyres"],
        ["--option", "unpad=false"],
        ["--option", "multi_image=single_view"],
        ["--tiling", "dynamic", "--option", "max_tiles=6"],
        ["--tiling", "hd", "--option", "max_tiles=9"],
    ],
)
def test_the_arithmetic_adds_up_alone_and_among_others(words, picture: Path) -> None:
    image = Image.open(picture).convert("RGB")
    alone = tiles_view.view_of_options(options(str(picture), *words), image)
    for view in (alone, dataclasses.replace(alone, num_images=2)):
        sum_, _, total = token_arithmetic(view).partition(" = ")
        assert eval(sum_.replace("x", "*")) == int(total) == view.num_tokens()
        cells = token_blocks(view, split(view))
        assert sum(block.shape[0] * block.shape[1] for block in cells) == view.num_tokens()
