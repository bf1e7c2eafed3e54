"""Are shares and speeds of a window of steps what was counted, and what does the line tell?"""

import time

import pytest
import torch

from train.callbacks import TOLD, ProgressLine
from train.measures import Window


def rows(*lengths):
    mask = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    for row, length in zip(mask, lengths, strict=True):
        row[:length] = 1
    return {"input_ids": torch.zeros_like(mask), "attention_mask": mask}


def test_padding_is_counted_over_batches_and_none_is_where_there_is_no_mask():
    window = Window()
    window.add_rows(rows(4, 2))
    window.add_rows(rows(2))
    assert window.rates()["padding_share"] == pytest.approx(2 / 10)
    packed = Window()
    packed.add_rows({"input_ids": torch.zeros(1, 7)})
    assert packed.rates()["padding_share"] == 0 == Window().rates()["padding_share"]


def slow(count):
    for number in range(count):
        time.sleep(0.01)
        yield number


def test_waiting_is_the_loaders_time_alone():
    window = Window()
    for _ in window.timed(slow(3)):
        time.sleep(0.01)
    assert 0.03 <= window.waited < time.perf_counter() - window.start
    assert 0 < window.rates()["data_wait_share"] < 1
    with pytest.raises(StopIteration):
        next(window.timed(iter([])))


def test_speeds_leave_out_what_is_no_training():
    window = Window(samples=8, tokens=torch.tensor(80.0))
    window.start -= 100
    window.leave_out(60)
    rates = window.rates()
    assert rates["samples_per_second"] == pytest.approx(8 / 40, rel=0.05)
    assert rates["supervised_tokens_per_second"] == pytest.approx(2, rel=0.05)
    assert rates["peak_memory_gb"] > 0.01


class Bar:
    def set_postfix_str(self, text):
        self.text = text


def test_the_line_tells_what_the_log_has():
    line = ProgressLine("align")
    line.bar = Bar()
    logs = {"loss": 2.0, "validation_loss": 2.5, **Window(peak=1e9).rates(), "epoch": 1.0}
    line.on_log(None, None, None, logs)
    assert line.bar.text.startswith("loss 2.0000, validation 2.5000, 0 tokens/s")
    for part in ("samples/s", "padding 0%", "waiting for data 0%", "MFU 0.0%", " GB"):
        assert part in line.bar.text
    assert set(TOLD) < set(logs)
