"""Are sequences cut evenly, and are sums between steps exact after a step that forgets all?"""

import pytest
import torch

from vlm.encoders.scan_chunks import chunk_length, cut, segment_sums

LENGTHS = [
    (197, 64, 50),
    (64, 64, 64),
    (65, 64, 33),
    (1, 64, 1),
    (9, 3, 3),
    (9, 4, 3),
    (10, 4, 4),
    (4096, 1, 1),
]


@pytest.mark.parametrize(("length", "longest", "expected"), LENGTHS)
def test_chunk_length(length, longest, expected):
    assert chunk_length(length, longest) == expected


def test_no_chunk_is_all_filling():
    for length in range(1, 70):
        for longest in range(1, 20):
            steps = chunk_length(length, longest)
            assert steps <= longest and cut(torch.zeros(1, length), steps).shape[1] * steps < (
                length + steps
            )


def test_cut_fills_the_end_of_the_right_dimension():
    x = torch.arange(1.0, 11.0).reshape(1, 5, 2)
    parts = cut(x, 3, value=-1.0)
    assert parts.tolist() == [[[[1, 2], [3, 4], [5, 6]], [[7, 8], [9, 10], [-1, -1]]]]


def test_segment_sums_are_sums_of_what_lies_between():
    logs = torch.tensor([-1.0, -2.0, -4.0])
    running, sums = segment_sums(logs)
    inf = torch.inf
    assert running.tolist() == [-1, -3, -7]
    assert sums.tolist() == [[0, -inf, -inf], [-2, 0, -inf], [-6, -4, 0]]


def test_small_sums_survive_a_large_one():
    logs = torch.tensor([-12345.0, -0.1, -0.01, -0.001])
    sums = segment_sums(logs)[1]
    torch.testing.assert_close(sums[3, 0], torch.tensor(-0.111), rtol=1e-6, atol=0)
    assert (logs.cumsum(0)[3] - logs.cumsum(0)[0] + 0.111).abs() > 1e-4  # float32 would lose it


def test_gradient_of_segment_sums():
    logs = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    earlier = torch.ones(5, 5).tril().bool()
    assert torch.autograd.gradcheck(lambda x: segment_sums(x)[1][:, earlier], logs)
    single = logs.detach().float().requires_grad_()
    grads = [
        torch.autograd.grad(segment_sums(x)[1][:, earlier].pow(2).sum(), x)[0]
        for x in (logs, single)
    ]
    torch.testing.assert_close(grads[1], grads[0].float(), rtol=1e-5, atol=1e-5)
