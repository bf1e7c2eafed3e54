"""Are the records that a stage sees counted as the Trainer counts them?"""

import pytest

from train.steps import StepSizes, check_batches
from vlm.errors import UserError


@pytest.mark.parametrize(
    "epoch, micro_batch, accumulation, drop_last, steps, ahead, expected",
    [
        (100, 4, 1, False, 3, 0, [12]),
        (100, 4, 2, False, 3, 0, [24]),
        (10, 4, 1, False, 3, 0, [10]),
        (10, 4, 1, True, 2, 0, [8]),  # the last two are left out
        (10, 4, 1, True, 2, 1, [8]),
        (10, 4, 2, False, 2, 0, [10]),  # the second step has one micro-batch
        (10, 4, 2, False, 3, 0, [10, 8]),
        (10, 4, 1, False, 7, 0, [10, 10, 4]),
        (100, 4, 1, False, 3, 1, [16]),
        (10, 4, 1, False, 4, 3, [10, 10]),  # not into an epoch that never starts
        (10, 4, 1, False, 3, 3, [10]),
        (100, 200, 1, True, 1, 0, [0]),
    ],
)
def test_seen(epoch, micro_batch, accumulation, drop_last, steps, ahead, expected):
    sizes = StepSizes(epoch, micro_batch, accumulation, drop_last)
    assert sizes.seen(steps, ahead) == expected


def test_an_epoch_without_a_batch_is_refused():
    check_batches(StepSizes(24, 50, 1, drop_last=False), "one")
    check_batches(StepSizes(24, 24, 1, drop_last=True), "one")
    with pytest.raises(UserError, match="leaves no batch of 50 where an epoch has 24"):
        check_batches(StepSizes(24, 50, 1, drop_last=True), "one")
