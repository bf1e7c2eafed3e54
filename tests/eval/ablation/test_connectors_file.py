"""Does every row of connectors.yaml fit the quickstart's model, and does it learn?"""

from pathlib import Path

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from eval.ablation.fit import count
from eval.ablation.rows import rows_of
from vlm.encoders import build_vision_encoder
from vlm.loading import assemble
from vlm.overrides import apply_overrides

ROOT = Path(__file__).parents[3]
FILE = ROOT / "eval/ablation/connectors.yaml"
ROWS = {row.name: row for row in rows_of([f"@{FILE}"])}


@pytest.fixture(scope="module")
def base_models():
    """The quickstart's encoder config, and a config of its language model."""
    recipes = ROOT / "train/recipes"
    encoder = yaml.safe_load((recipes / "base-encoder.yaml").read_text())["encoder"]
    llama = yaml.safe_load((recipes / "base-language-model.yaml").read_text())["llama"]
    return encoder, LlamaConfig(vocab_size=259, bos_token_id=None, eos_token_id=None, **llama)


@pytest.mark.parametrize("name", ROWS)
def test_row_fits_and_its_connector_learns(name, base_models, make_tokenizer, make_image):
    encoder, llama = base_models
    tree = {"model": {"vision_encoder": dict(encoder), "connector": None}}
    apply_overrides(tree, dict(ROWS[name].changes))
    torch.manual_seed(0)
    language_model = LlamaForCausalLM(llama)
    model, processor = assemble(
        build_vision_encoder(tree["model"]["vision_encoder"]),
        tree["model"]["connector"],
        language_model,
        tokenizer=make_tokenizer(),
        chat_template="chatml",
    )
    text = [{"type": "image"}, {"type": "text", "text": "What?"}]
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": "A thing."}]
    encoded = processor.encode(messages, [make_image(64, 64)], supervise=True)
    model(**processor.collate([encoded], padding_side="right")).loss.backward()
    connector = model.model.connector
    gradients = [p.grad for p in connector.parameters() if p.grad is not None]
    assert gradients and all(bool(torch.isfinite(g).all()) for g in gradients)
    assert any(bool(g.any()) for g in gradients)
    assert count(connector) < 1.5 * count(language_model)  # sized for this language model


def test_there_are_connectors_of_every_kind():
    choices = [row.changes["model.connector"] for row in ROWS.values()]
    parts = [part for c in choices for part in (c if isinstance(c, list) else [c])]
    types = {part["type"] for part in parts}
    assert next(iter(ROWS)) == "mlp" and len(ROWS) >= 12
    assert {"perceiver", "qformer", "sva", "kan", "partial_lora", "deepstack"} <= types
