"""Which pictures do tests put into files of records?"""

from collections.abc import Callable
from io import BytesIO

import pytest


@pytest.fixture
def picture(make_image: Callable) -> Callable[[int], bytes]:
    """(number) -> the bytes of a PNG."""

    def make(number: int) -> bytes:
        buffer = BytesIO()
        make_image(seed=number).save(buffer, "PNG")
        return buffer.getvalue()

    return make
