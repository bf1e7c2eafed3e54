"""Does what connectors need of earlier positions follow the rows of a cache?"""

import pytest
import torch

from connectors.fusion import Media
from vlm.fusion_cache import FusionLayer


@pytest.fixture
def layer():
    """Three rows, each told by its number in everything that it has."""
    number = torch.arange(3)
    of_tokens = number[:, None].expand(3, 2)
    media = Media(of_tokens[..., None].float(), of_tokens, of_tokens, {"keys": of_tokens.float()})
    return FusionLayer(number, 4, {1: media}, number)


CHANGES = [
    (lambda layer: layer.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
    (lambda layer: layer.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    (lambda layer: layer.batch_select_indices(torch.tensor([1])), [1]),
    (lambda layer: layer.crop(1), [0, 1, 2]),
]


@pytest.mark.parametrize(("change", "rows"), CHANGES)
def test_rows_keep_what_is_theirs(change, rows, layer) -> None:
    change(layer)
    media = layer.media[1]
    assert layer.latest.tolist() == layer.saved.tolist() == rows and layer.count == 4
    for tensor in (media.tokens, media.images, media.documents, media.projected["keys"]):
        assert tensor.flatten(1)[:, 0].tolist() == rows


def test_reset_forgets(layer) -> None:
    layer.reset()
    assert layer.latest.tolist() == [-1] * 3 and layer.saved.tolist() == [0] * 3
    assert layer.count == 0 and layer.media == {}
