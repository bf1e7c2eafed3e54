"""By how much does a record count in a step's loss?

With n supervised tokens: by n ("token"), by 1 ("sample"), or by sqrt(n) ("square", InternVL 2.5:
`len2weight` in internvl_chat_finetune.py, normalised as in modeling_internvl_chat.py). Each of its
tokens weighs 1, 1 / n or 1 / sqrt(n). A step's loss is the weighted sum over the sum of weights, of
all micro-batches and ranks; InternVL takes each micro-batch apart, or averages over ranks.
"""

from typing import Literal

LossWeight = Literal["token", "sample", "square"]
POWERS: dict[LossWeight, float] = {"token": 0.0, "sample": 1.0, "square": 0.5}


def token_weight(num_supervised: int, kind: LossWeight) -> float:
    """Return the weight of each supervised token of a record that has so many; 0 if it has none."""
    return num_supervised ** -POWERS[kind] if num_supervised else 0.0
