"""Are peaks those of dense bfloat16, and hours counted on them?"""

import pytest

from train.planning.gpus import GPUS, hours, this_cpu


def test_hours():
    assert hours(3600 * 8 * 0.5 * 312e12, 8, 312e12, 0.5) == pytest.approx(1)


def test_peaks_are_dense():
    # The ratios that tables in wide use have wrong: 2:4 sparsity, or the A100's peak for the H100.
    assert GPUS["H100"].peak / GPUS["A100-80"].peak == pytest.approx(3.17, rel=0.01)
    assert GPUS["A100-40"].peak == 312e12
    assert all(70e12 <= gpu.peak <= 2300e12 for gpu in GPUS.values())


def test_a_cpu_is_counted_by_its_cores():
    assert this_cpu(2, 8 * 2**30).peak == 2 * 128e9
    assert this_cpu(2, 8 * 2**30).memory == 8


def test_cards_by_number_of_cores():
    # Peak = multiprocessors x operations a clock x boost clock, from the white papers.
    assert GPUS["H100"].peak == pytest.approx(132 * 4096 * 1.83e9, rel=0.001)
    assert GPUS["A100-80"].peak == pytest.approx(108 * 2048 * 1.41e9, rel=0.001)
    assert GPUS["4090"].peak == pytest.approx(128 * 512 * 2.52e9, rel=0.001)
    assert GPUS["3090"].peak == pytest.approx(82 * 512 * 1.695e9, rel=0.01)
