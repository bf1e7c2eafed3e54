"""Are packed documents taken apart where they begin, and put back where they were?"""

import pytest
import torch

from vlm.packed_rows import document_places, put_back, take_apart

TABLE = {
    "two documents and a whole row": (
        [[0, 1, 2, 0, 1], [0, 1, 2, 3, 4]],
        None,
        [[0, 1, 2, -1, -1], [3, 4, -1, -1, -1], [5, 6, 7, 8, 9]],
    ),
    "padding on the right": (
        [[0, 1, 0, 0, 1], [0, 0, 1, 2, 3]],
        [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]],
        [[0, 1, -1], [2, -1, -1], [5, -1, -1], [6, 7, 8]],
    ),
    "padding on the left and between": (
        [[0, 0, 0, 1, 2], [0, 1, 0, 0, 1]],
        [[0, 0, 1, 1, 1], [1, 1, 0, 1, 1]],
        [[2, 3, 4], [5, 6, -1], [8, 9, -1]],
    ),
    "positions that go on behind padding": (
        [[0, 1, 2, 3, 4]],
        [[1, 1, 0, 1, 1]],
        [[0, 1], [3, 4]],
    ),
    "positions that jump ahead": ([[0, 1, 5, 6]], None, [[0, 1], [2, 3]]),
}


@pytest.mark.parametrize("case", TABLE)
def test_places(case) -> None:
    positions, mask, places = TABLE[case]
    found = document_places(torch.tensor(positions), None if mask is None else torch.tensor(mask))
    assert found.tolist() == places


@pytest.mark.parametrize("case", TABLE)
def test_put_back_undoes_take_apart_and_leaves_padding_zero(case) -> None:
    positions, mask, places = TABLE[case]
    places = torch.tensor(places)
    real = torch.ones(len(positions), len(positions[0])) if mask is None else torch.tensor(mask)
    x = torch.randn(*real.shape, 3, requires_grad=True)
    apart = take_apart(x, places)
    assert apart.shape == (*places.shape, 3)
    assert not apart[places < 0].any()
    back = put_back(apart, places, *real.shape)
    assert torch.equal(back, x * real[..., None])
    back.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, real[..., None].expand_as(x).to(x))
