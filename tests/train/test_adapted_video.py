"""Does a model of images learn videos by an adapter, with a newline that it did not have before?"""

import json
import shutil

import pytest
import torch

from vlm.cli import main
from vlm.loading import load_model
from vlm.on_base import WEIGHTS, read_base

VIDEO = {"frames": 3, "newline": "frame", "time_instruction": True}


@pytest.fixture
def watch(tree, tmp_path, make_model, make_image):
    """A recipe of one stage with an adapter, from a saved model that was told of no video."""
    model, processor = make_model(tiling={"type": "resize"})
    model.save_pretrained(tmp_path / "image_model")
    processor.save_pretrained(tmp_path / "image_model")
    (tmp_path / "clip").mkdir()
    for number in range(5):
        make_image(seed=number).save(tmp_path / f"clip/{number}.png")
    turns = [{"from": "human", "value": "<video>\nWhere to?"}, {"from": "gpt", "value": "Left."}]
    rows = [{"id": f"v{n}", "video": "clip", "conversations": turns} for n in range(4)]
    (tmp_path / "clips.json").write_text(json.dumps(rows))
    stage = tree["stages"][1]
    stage["data"] = {"sources": [{"name": "clips", "path": str(tmp_path / "clips.json")}]}
    stage["adapter"] = {"type": "lora", "rank": 4, "alpha": 8}
    stage["training"] |= {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 2}
    tree["stages"] = [stage]
    tree["model"] = {"checkpoint": str(tmp_path / "image_model"), "video": VIDEO}
    return tree


@pytest.mark.parametrize("trains_connector", [True, False])
def test_an_image_model_learns_videos_by_an_adapter(
    trains_connector, watch, write_recipe, tmp_path
):
    stage, run = watch["stages"][0], tmp_path / "run/instruct"
    if not trains_connector:
        stage["trainable"] = {"language_model": 5e-3}
    assert main(["train", str(write_recipe(watch))]) == 0
    base = read_base(run)
    before, _ = load_model(base.folder, device="cpu")
    after, processor = load_model(run, device="cpu")
    assert after.model.video == before.model.video == processor.image_processor.video_config
    assert after.model.video.newline == "frame" and after.model.video.time_instruction
    learnt = not torch.equal(after.model.image_newline, before.model.image_newline)
    assert learnt == trains_connector

    assert main(["merge", str(run), "--out", str(tmp_path / "merged")]) == 0
    whole, _ = load_model(tmp_path / "merged", device="cpu")
    video = processor.image_processor.sample(tmp_path / "clip")
    talk = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "?"}]}]
    batch = processor.collate([processor.encode(talk, videos=[video])], "right")
    with torch.no_grad():
        logits = [model(**batch).logits for model in (after, whole, before)]
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits[0], logits[2], atol=1e-3)


def test_a_stage_goes_on_from_its_checkpoint_and_another_from_its_model(
    watch, write_recipe, tmp_path
):
    recipe, run = str(write_recipe(watch)), tmp_path / "run/instruct"
    assert main(["train", recipe]) == 0
    expected = (run / WEIGHTS).read_bytes()
    for path in (run / "manifest.json", run / WEIGHTS, run / "checkpoints/checkpoint-4"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert main(["train", recipe]) == 0  # from step 2 on
    assert (run / WEIGHTS).read_bytes() == expected
    # its model looks at videos so already: nothing is written twice
    assert main(["merge", str(run), "--out", str(tmp_path / "merged")]) == 0
    again = ["--model.checkpoint", str(tmp_path / "merged"), f"--output_dir={tmp_path / 'again'}"]
    assert main(["train", recipe, *again]) == 0
    assert read_base(tmp_path / "again/instruct").folder == str(tmp_path / "merged")
