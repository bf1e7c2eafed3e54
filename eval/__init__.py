"""How good is a model? Benchmark tasks, answers, scores with their intervals, reports."""

import vlm  # noqa: F401 - its torchvision fix must come before transformers is imported
