"""Which tiny model do the tests of planning share, with values and without?"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from vlm.modeling import VlmForConditionalGeneration


@pytest.fixture
def both(make_model, make_two_encoders) -> Callable[..., tuple[Any, Any]]:
    """(two_encoders, **of make_model) -> the same model with values and on the meta device."""

    def build(two_encoders: bool = False, **choices: Any) -> tuple[Any, Any]:
        if two_encoders:
            choices["vision_encoder"] = make_two_encoders()
        real, _ = make_model(**choices)
        with torch.device("meta"):
            hollow = VlmForConditionalGeneration(real.config)
        hollow.tie_weights()
        return real, hollow

    return build
