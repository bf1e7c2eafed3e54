"""Did the loss jump? A step's loss against the median of those before it.

Only steps that did not jump are remembered, and only the last of them; with fewer than half of
`WINDOW` nothing is judged, as a loss that begins high and falls is no spike.
"""

import json
from collections import deque
from pathlib import Path
from statistics import median

from train.checkpoints import LOSSES
from vlm.done import write_flushed

WINDOW = 100  # optimizer steps


class SpikeGuard:
    """Remembers the losses of the last steps.

    Args:
        times: a loss above so many times the median is a spike.
    """

    def __init__(self, times: float) -> None:
        self.times = times
        self.losses: deque[float] = deque(maxlen=WINDOW)

    def save(self, checkpoint: Path) -> None:
        """Write the losses into a checkpoint's folder."""
        write_flushed(checkpoint / LOSSES, json.dumps(list(self.losses)))

    def load(self, checkpoint: Path) -> None:
        """Go on with the losses that a checkpoint holds."""
        losses = json.loads((checkpoint / LOSSES).read_text(encoding="utf-8"))
        self.losses = deque(losses, maxlen=WINDOW)

    def median(self) -> float | None:
        """Return the median of the losses remembered; None: too few to judge by."""
        return median(self.losses) if len(self.losses) >= WINDOW // 2 else None

    def is_spike(self, loss: float) -> bool:
        """Return whether a step's loss is a spike; remember it if not."""
        usual = self.median()
        if usual is not None and loss > self.times * usual:
            return True
        self.losses.append(loss)
        return False
