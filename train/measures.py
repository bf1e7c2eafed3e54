"""How fast is a stage, and what does it wait for? What happened between two lines of its log.

Speeds are those of all processes together; the shares are this process's own.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from train.manifest import peak_memory_mb


@dataclass
class Window:
    """What happened since the last line of the log.

    Attributes:
        samples: records of all processes.
        tokens: supervised ones; a tensor, so that counting does not wait for the device.
        places: of the rows of this process, padding included.
        real: those of them that are no padding; a tensor as well.
        waited: seconds spent waiting for the loader.
        flops: operations of this process, see `train.mfu`; a tensor as well.
        peak: operations a second of its device; None: nobody knows.
        start: when it began; moved on over what is no training, such as a validation.
    """

    samples: int = 0
    tokens: Any = 0.0
    places: int = 0
    real: Any = 0
    waited: float = 0.0
    flops: Any = 0.0
    peak: float | None = None
    start: float = field(default_factory=time.perf_counter)

    def add_rows(self, inputs: dict[str, Any]) -> None:
        """Count the places of a batch; a row without an attention mask has no padding."""
        size, mask = inputs["input_ids"].numel(), inputs.get("attention_mask")
        self.places += size
        self.real = self.real + (size if mask is None else (mask != 0).sum())

    def timed(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Yield what an iterator does, and count how long it took to answer."""
        while True:
            start = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            finally:
                self.waited += time.perf_counter() - start
            yield batch

    def leave_out(self, seconds: float) -> None:
        """Let time pass that is no training."""
        self.start += seconds

    def rates(self) -> dict[str, float]:
        """Return what a line of the log tells of speed, waiting and memory."""
        seconds = max(time.perf_counter() - self.start, 1e-9)
        memory = peak_memory_mb()
        reached = {}
        if self.peak is not None:
            reached = {"mfu": round(float(self.flops) / seconds / self.peak, 4)}
        return {
            "samples_per_second": round(self.samples / seconds, 3),
            "supervised_tokens_per_second": round(float(self.tokens) / seconds, 1),
            "padding_share": round((self.places - float(self.real)) / max(self.places, 1), 4),
            "data_wait_share": round(min(self.waited / seconds, 1.0), 4),
            **reached,
            "peak_memory_gb": round(memory.get("device", memory["host"]) / 1e3, 3),
        }
