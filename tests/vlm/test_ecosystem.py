"""Do transformers' Trainer and PEFT take the model as one of their own?"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from vlm.modeling import VlmForConditionalGeneration

IMAGE = {"type": "image"}


def conversation(question: str, answer: str, num_images: int) -> list[dict]:
    content = [IMAGE] * num_images + [{"type": "text", "text": question}]
    return [
        {"role": "user", "content": content},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]


@pytest.fixture
def dataset(make_image):
    def encode(processor) -> list[dict[str, torch.Tensor]]:
        return [
            processor.encode(
                conversation(f"Number {i}?", str(i), i % 3),
                [make_image(40 + i, 30, seed) for seed in range(i % 3)],
                supervise=True,
            )
            for i in range(12)
        ]

    return encode


def trainer(model, processor, dataset, folder: Path, **options) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        learning_rate=1e-2,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        remove_unused_columns=False,
        **{
            "per_device_train_batch_size": 4,
            "max_steps": 3,
            "save_strategy": "no",
            "logging_steps": 1,
            **options,
        },
    )
    return Trainer(
        model,
        arguments,
        train_dataset=dataset(processor),
        data_collator=lambda rows: processor.collate(rows, "right"),
        processing_class=processor,
    )


def losses(finished: Trainer) -> list[float]:
    return [entry["loss"] for entry in finished.state.log_history if "loss" in entry]


def test_stock_trainer_trains_all_parts(make_model, dataset, tmp_path: Path) -> None:
    model, processor = make_model(tiling={"type": "anyres"})
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.train()
    finished = trainer(model, processor, dataset, tmp_path, max_grad_norm=1.0)
    finished.train()
    assert len(losses(finished)) == 3
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    for part in ("vision_tower", "connector", "image_newline", "language_model"):
        assert any(f"model.{part}" in name for name in moved), part


def test_accumulation_weighs_tokens_not_batches(make_model, dataset, tmp_path: Path) -> None:
    results = []
    for batch, steps in ((4, 1), (2, 2)):
        model, processor = make_model()
        options = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": steps}
        finished = trainer(model, processor, dataset, tmp_path, **options)
        finished.train()
        results.append(losses(finished))
    assert results[0] == pytest.approx(results[1], rel=1e-3)


def test_stock_trainer_resumes_exactly(make_model, dataset, tmp_path: Path) -> None:
    """transformers' Trainer loads the raw file: renamed keys would silently restore nothing."""
    model, processor = make_model(kind="qwen2", tied=True)
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "seed": 3}
    whole = trainer(model, processor, dataset, tmp_path, **options)
    whole.train()
    model, processor = make_model(kind="qwen2", tied=True)
    resumed = trainer(model, processor, dataset, tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses(resumed)[-2:] == losses(whole)[-2:]
    for name, parameter in whole.model.state_dict().items():
        assert torch.equal(parameter, resumed.model.state_dict()[name]), name


def test_lora_with_a_trained_connector(make_model, dataset, tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    model, processor = make_model()
    config = LoraConfig(
        r=4,
        target_modules=r".*language_model.*\.(q_proj|v_proj)",
        modules_to_save=["connector"],
        task_type="CAUSAL_LM",
    )
    wrapped = get_peft_model(model, config)
    trained = {name for name, p in wrapped.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in n or "connector.modules_to_save" in n for n in trained)
    wrapped.train()
    trainer(wrapped, processor, dataset, tmp_path).train()
    wrapped.save_pretrained(tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert any("connector" in key for key in saved) and any("lora_A" in key for key in saved)

    fresh, _ = make_model()
    again = PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    batch = processor.collate(dataset(processor)[:3], "right")
    wrapped.eval()
    torch.testing.assert_close(again(**batch).loss, wrapped(**batch).loss)
    untrained, _ = make_model()
    assert not torch.allclose(untrained(**batch).loss, wrapped(**batch).loss)
    options = {"max_new_tokens": 4, "do_sample": False}
    del batch["labels"]
    assert torch.equal(again.generate(**batch, **options), wrapped.generate(**batch, **options))
    merged = again.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    loaded = VlmForConditionalGeneration.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(
        loaded(**batch).logits, wrapped(**batch).logits, rtol=1e-4, atol=1e-5
    )
