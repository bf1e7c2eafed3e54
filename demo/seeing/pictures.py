"""How does a figure get onto the page? As WebP inside its HTML, with words for who cannot see."""

import base64
import html
import io
from collections.abc import Sequence

from matplotlib.figure import Figure
from PIL import Image

INK, FADED, PAPER = "#1d2733", "#c9d0d8", "#ffffff"  # of vlm/tiles_figure.py
# Okabe and Ito's colours, which people tell apart however they see colours; black and yellow left
# out, which photographs hide.
COLORS = ("#e69f00", "#56b4e9", "#009e73", "#d55e00", "#cc79a7", "#0072b2")
LONGER_SIDE = 6.0  # inches of a picture on the page
DPI = 110


def picture_size(size: tuple[int, int], longer: float = LONGER_SIDE) -> tuple[float, float]:
    """Return the (width, height) in inches of a picture of (width, height) pixels.

    A strip is not drawn thinner than a sixth of its length.
    """
    width, height = size
    scale = longer / max(width, height)
    return max(width * scale, longer / 6), max(height * scale, longer / 6)


def as_html(figure: Figure, alt: str, captions: Sequence[str] = ()) -> str:
    """Return a figure as HTML: the picture, what it shows, and sentences below it."""
    figure.savefig(drawn := io.BytesIO(), format="png", dpi=DPI, facecolor=PAPER)
    small = io.BytesIO()
    Image.open(drawn).convert("RGB").save(small, "WEBP", quality=92)
    data = base64.b64encode(small.getvalue()).decode()
    said = "".join(f"<p>{html.escape(caption)}</p>" for caption in captions)
    image = f'<img src="data:image/webp;base64,{data}" alt="{html.escape(alt, quote=True)}">'
    return f'<figure class="seen">{image}<figcaption>{said}</figcaption></figure>'


def told_html(sentence: str) -> str:
    """Return a sentence in place of a picture that cannot be drawn."""
    return f'<p class="untold">{html.escape(sentence)}</p>'
