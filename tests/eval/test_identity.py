"""Do fingerprints change with the model and with nothing else?"""

import copy

import pytest
import torch

from eval import identity
from eval.identity import fingerprint_processor, fingerprint_weights


@pytest.mark.parametrize("whole", [1 << 30, 0])
def test_weights_are_told_apart(tiny_vlm, monkeypatch, whole: int):
    monkeypatch.setattr(identity, "WHOLE_TENSOR_BYTES", whole)
    monkeypatch.setattr(identity, "SAMPLED_ELEMENTS", 16)
    model, _ = tiny_vlm
    other = copy.deepcopy(model)
    assert fingerprint_weights(other) == fingerprint_weights(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 1e-3
    assert fingerprint_weights(other) != fingerprint_weights(model)


def test_a_changed_template_or_picture_size_is_another_processor(tiny_vlm, tmp_path):
    _, processor = tiny_vlm
    processor.save_pretrained(tmp_path)
    loaded = type(processor).from_pretrained(tmp_path)
    assert fingerprint_processor(loaded) == fingerprint_processor(processor)
    loaded.tokenizer(["a", "b c"], padding=True)
    assert fingerprint_processor(loaded) == fingerprint_processor(processor)
    loaded.chat_template += " "
    assert fingerprint_processor(loaded) != fingerprint_processor(processor)
    again = type(processor).from_pretrained(tmp_path)
    again.image_processor.image_mean = [0.1, 0.1, 0.1]
    assert fingerprint_processor(again) != fingerprint_processor(processor)
