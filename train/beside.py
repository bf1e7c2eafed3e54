"""What may a stage keep or measure beside its training? An average, a benchmark."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class EmaRecipe:
    """An exponential moving average of the weights, kept in float32 beside them.

    Attributes:
        decay: what a step leaves of it; less in the first steps, see `train.averages`.
        use: which weights the stage ends with, its own or their average. Checkpoints have both.
    """

    decay: float = 0.999
    use: Literal["average", "trained"] = "average"


@dataclass(frozen=True, kw_only=True)
class BenchmarkRecipe:
    """A benchmark to score checkpoints on, every so many optimizer steps and at the last one.

    Attributes:
        data: the task's files.
        every: optimizer steps; a checkpoint is written at each of them.
        tasks: as `vlm eval` calls them.
        limit: ask so many questions only.
        options: further words for `vlm eval`, such as ["--batch-size", "16"].
    """

    data: list[str]
    every: int
    tasks: list[str] = field(default_factory=lambda: ["cv_bench"])
    limit: int | None = 200
    options: list[str] = field(default_factory=lambda: ["--no-blind", "--score", "likelihood"])

    def words(self) -> list[str]:
        """Return the words for `vlm eval` behind the model."""
        limit = [] if self.limit is None else ["--limit", str(self.limit)]
        return ["--tasks", ",".join(self.tasks), "--data", *self.data, *limit, *self.options]
