"""Are the positions that a stage sees counted as the Trainer counts them?"""

import pytest

from train.steps import StepSizes


@pytest.mark.parametrize(
    "epoch, micro_batch, accumulation, drop_last, steps, window, ahead, expected",
    [
        (100, 4, 1, False, 3, 0, 0, [(0, 12)]),
        (100, 4, 2, False, 3, 0, 0, [(0, 24)]),
        (10, 4, 1, False, 3, 0, 0, [(0, 10)]),
        (10, 4, 1, True, 2, 0, 0, [(0, 8)]),  # the last two are left out
        (10, 4, 1, True, 2, 1, 0, [(0, 8)]),
        (10, 4, 1, True, 2, 2, 1, [(0, 10)]),  # and sorted by length it may be any two
        (10, 4, 2, False, 2, 0, 0, [(0, 10)]),  # the second step has one micro-batch
        (10, 4, 2, False, 3, 0, 0, [(0, 10), (10, 18)]),
        (10, 4, 1, False, 7, 0, 0, [(0, 10), (10, 20), (20, 24)]),
        (100, 4, 1, False, 3, 0, 1, [(0, 16)]),
        (10, 4, 1, False, 4, 0, 3, [(0, 10), (10, 20)]),  # not into an epoch that never starts
        (10, 4, 1, False, 3, 0, 3, [(0, 10)]),
        (100, 4, 2, False, 3, 5, 0, [(0, 40)]),
        (100, 4, 2, False, 5, 5, 1, [(0, 80)]),
        (100, 200, 1, True, 1, 0, 0, [(0, 0)]),
    ],
)
def test_spans(epoch, micro_batch, accumulation, drop_last, steps, window, ahead, expected):
    sizes = StepSizes(epoch, micro_batch, accumulation, drop_last)
    assert sizes.spans(steps, window, ahead) == expected
