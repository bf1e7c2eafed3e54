"""Do the walks visit every place, in the orders of the reference, and come back with gradients?"""

import pytest
import torch

from vlm.encoders.cross_scan import REVERSE, inverse, join_walks, take_own, take_walks, walks

# Grid 2 x 3: places 0 1 2 / 3 4 5. The first two walks; the last two are the same.
FIRST_TWO = {
    "cross": [[0, 1, 2, 3, 4, 5], [0, 3, 1, 4, 2, 5]],
    "unidirectional": [[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]],
    "bidirectional": [[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]],
    "rotations": [[0, 1, 2, 3, 4, 5], [2, 5, 1, 4, 0, 3]],
}


@pytest.mark.parametrize("mode", REVERSE)
def test_walks(mode):
    assert walks(mode, 2, 3).tolist() == FIRST_TWO[mode] * 2


@pytest.mark.parametrize("grid", [(1, 1), (1, 5), (4, 1), (3, 5), (4, 4)])
@pytest.mark.parametrize("mode", REVERSE)
def test_walks_visit_every_place_once(mode, grid):
    order = walks(mode, *grid)
    places = torch.arange(grid[0] * grid[1])
    assert torch.equal(order.sort(dim=1).values, places.expand(4, -1))
    assert torch.equal(order.gather(1, inverse(order)), places.expand(4, -1))


def test_values():
    order = walks("cross", 2, 2)
    back = inverse(order)
    x = torch.tensor([[[1.0], [2.0], [3.0], [4.0]]])
    taken = take_walks(x, order, back)
    assert taken[0, :, :, 0].t().tolist() == [[1, 2, 3, 4], [1, 3, 2, 4]] * 2
    assert join_walks(taken, order, back).flatten().tolist() == [4, 8, 12, 16]
    own = torch.arange(16.0).view(1, 4, 4, 1)  # place p, walk k: 4 p + k
    assert take_own(own, order, back)[0, :, 1, 0].tolist() == [1, 9, 5, 13]


@pytest.mark.parametrize("function", [take_walks, join_walks, take_own])
def test_gradients(function):
    order = walks("rotations", 3, 2)
    back = inverse(order)
    shape = (2, 6, 3) if function is take_walks else (2, 6, 4, 3)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: function(t, order, back), x)
