"""Are positions divided, the context longer, and both kept in the checkpoint?"""

import pytest
import torch

from vlm.errors import UserError
from vlm.loading import assemble, load_model
from vlm.long_context import scale_positions


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt_neox"])
def test_position_p_becomes_p_over_factor(kind, make_language_model):
    plain, scaled = (make_language_model(kind).eval() for _ in range(2))
    scale_positions(scaled, 2.0)
    assert scaled.config.max_position_embeddings == 2 * plain.config.max_position_embeddings
    ids = torch.arange(6)[None]
    with torch.no_grad():
        every_other = scaled(ids, position_ids=2 * ids).logits
        assert torch.equal(every_other, plain(ids, position_ids=ids).logits)
        assert not torch.equal(scaled(ids).logits, plain(ids).logits)


def test_kept_by_the_checkpoint(make_vision_encoder, make_language_model, make_tokenizer, tmp_path):
    model, processor = assemble(
        make_vision_encoder(),
        {"type": "mlp"},
        make_language_model(),
        tokenizer=make_tokenizer(),
        chat_template="chatml",
        rope_factor=4.0,
    )
    model.save_pretrained(tmp_path), processor.save_pretrained(tmp_path)
    loaded, _ = load_model(tmp_path, device="cpu")
    assert loaded.config.text_config.max_position_embeddings == 4096
    assert loaded.config.text_config.rope_parameters["factor"] == 4.0
    ids = torch.arange(9)[None]
    assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)


def test_models_without_plain_rotary_positions_are_refused(make_language_model):
    with pytest.raises(UserError, match="'gpt2' has none"):
        scale_positions(make_language_model("gpt2"), 2.0)
    twice = make_language_model()
    scale_positions(twice, 2.0)
    with pytest.raises(UserError, match="plain rotary positions"):
        scale_positions(twice, 2.0)
    with pytest.raises(UserError, match="1 or more, not"):
        scale_positions(make_language_model(), 0.5)
