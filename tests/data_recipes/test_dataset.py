"""Do records become model inputs, and are bad ones named, or skipped but not replaced?"""

import json
import tarfile
from io import BytesIO

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from data_recipes.dataset import IGNORED, Collator, ConversationDataset, Skipped
from data_recipes.feature_store import FeatureStore, Layout, LostFeaturesError
from data_recipes.feature_writer import FeatureWriter
from data_recipes.mixture import Source
from data_recipes.pictures import PictureViews, Shown, is_stored
from vlm.errors import UserError


def row(number, image="0.png", answer="A cat."):
    turns = [
        {"from": "human", "value": "<image>\nWhat?" if image else "What?"},
        {"from": "gpt", "value": answer},
    ]
    return {"id": f"r{number}", "conversations": turns, **({"image": image} if image else {})}


@pytest.fixture
def make_dataset(tmp_path, make_model, make_image):
    _, processor = make_model()
    make_image().save(tmp_path / "0.png")

    def make(rows, **kwargs):
        path = tmp_path / "data.jsonl"
        path.write_text("".join(json.dumps(item) + "\n" for item in rows))
        return ConversationDataset([Source(name="s", path=str(path))], processor, **kwargs)

    return make


def test_item_has_inputs_labels_and_its_name(make_dataset):
    dataset = make_dataset([row(0)])
    item = dataset[0]
    assert item["record_id"] == "r0"
    assert item["pixel_values"].shape == (1, 3, 32, 32)
    assert item["labels"].shape == item["input_ids"].shape
    supervised = item["labels"][item["labels"] != IGNORED]
    assert "A cat." in dataset.processor.tokenizer.decode(supervised)
    assert "What" not in dataset.processor.tokenizer.decode(supervised)


def test_epochs_follow_each_other(make_dataset):
    dataset = make_dataset([row(i) for i in range(5)])
    epochs = [{dataset[position]["record_id"] for position in range(e, e + 5)} for e in (0, 5)]
    assert epochs[0] == epochs[1] == {f"r{i}" for i in range(5)}


def test_batch_mixes_images_and_text(make_dataset):
    dataset = make_dataset([row(0), row(1, image=None), row(2)])
    batch = Collator(dataset.processor)([dataset[position] for position in range(3)])
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape
    assert len(batch["input_ids"]) == 3
    assert len(batch["pixel_values"]) == 2
    assert sorted(batch["record_ids"]) == ["r0", "r1", "r2"]
    assert batch["skipped"] == []


def test_missing_image_names_file_line_id_and_image(make_dataset):
    dataset = make_dataset([row(0, image="gone.png")])
    with pytest.raises(UserError) as error:
        dataset[0]
    for part in ("data.jsonl:1", "'r0'", "gone.png"):
        assert part in str(error.value)


def spoil(kind, path):
    """Make the picture at a path one of the files that other suites stumble over."""
    data = path.read_bytes()
    path.unlink()
    if kind == "a folder":
        path.mkdir()
    elif kind != "missing":
        whole = {"empty": b"", "cut short": data[: len(data) // 2], "text": b"<html>404</html>"}
        path.write_bytes(whole[kind])


@pytest.mark.parametrize("kind", ["missing", "empty", "cut short", "text", "a folder"])
def test_a_bad_picture_is_told_or_left_out_but_never_replaced(make_dataset, tmp_path, kind):
    dataset = make_dataset([row(0), row(1, image=None)])
    spoil(kind, tmp_path / "0.png")
    places = {dataset.mixture.locate(position)[1]: position for position in range(2)}
    with pytest.raises(UserError, match=r"data\.jsonl:1 \(id 'r0'\): image .*0\.png"):
        dataset[places[0]]
    dataset.on_error = "skip"
    batch = Collator(dataset.processor)([dataset[position] for position in range(2)])
    assert batch["record_ids"] == ["r1"]
    assert [note.row for note in batch["skipped"]] == [0]
    assert "pixel_values" not in batch


def test_an_answer_in_the_words_of_the_image_token_is_a_fault_not_a_picture(make_dataset):
    dataset = make_dataset([row(0, answer="I wrote <image> here.")])
    with pytest.raises(UserError, match=r"data\.jsonl:1 \(id 'r0'\): turn 2 is the assistant's"):
        dataset[0]


def test_a_template_that_marks_nothing_of_a_record_is_told(make_dataset):
    dataset = make_dataset([row(0)])
    dataset.processor.chat_template = (
        "{%- generation -%}{%- endgeneration -%}{%- for message in messages -%}"
        "{%- for entry in message.content -%}"
        "{{- '<image>' if entry.type == 'image' else entry.text -}}"
        "{%- endfor -%}{%- endfor -%}"
    )
    with pytest.raises(UserError, match=r"data\.jsonl:1 \(id 'r0'\): no token of it is superv"):
        dataset[0]


def test_long_record_is_a_fault_not_cut(make_dataset):
    dataset = make_dataset([row(0, answer="long " * 50)], max_length=64)
    with pytest.raises(UserError, match=r"data\.jsonl:1 \(id 'r0'\).*more than 64, the least"):
        dataset[0]


def test_record_without_id_is_named_by_its_row(make_dataset):
    unnamed = row(0)
    del unnamed["id"]
    assert make_dataset([unnamed])[0]["record_id"] == "s[0]"


def test_skip_leaves_a_note_and_replaces_nothing(make_dataset):
    rows = [row(0), row(1, image="gone.png"), row(2)]
    dataset = make_dataset(rows, on_error="skip")
    items = [dataset[position] for position in range(3)]
    notes = [item for item in items if isinstance(item, Skipped)]
    assert len(notes) == 1
    assert (notes[0].source, notes[0].row) == ("s", 1)
    assert "data.jsonl:2 (id 'r1')" in notes[0].reason
    batch = Collator(dataset.processor)(items)
    assert len(batch["input_ids"]) == 2
    assert sorted(batch["record_ids"]) == ["r0", "r2"]
    assert batch["skipped"] == notes


def test_batch_of_skipped_records_adds_nothing_to_the_loss(make_dataset, make_model):
    dataset = make_dataset([row(0, image="gone.png")], on_error="skip")
    batch = Collator(dataset.processor)([dataset[0]])
    assert batch.pop("record_ids") == []
    assert len(batch.pop("skipped")) == 1
    model, _ = make_model()
    loss = model(**batch, num_items_in_batch=torch.tensor(1)).loss
    loss.backward()
    assert loss.item() == 0.0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_programming_errors_are_not_skipped(make_dataset, monkeypatch):
    dataset = make_dataset([row(0)], on_error="skip")
    monkeypatch.setattr(dataset.processor, "encode", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        dataset[0]


def embed(form, rows, folder):
    """Write the rows, and 0.png with each that shows it, as one file of a form; return its path."""
    picture = (folder / "0.png").read_bytes()
    if form == "parquet":
        images = [
            {"image": {"bytes": picture, "path": "0.png"} if "image" in r else None} for r in rows
        ]
        table = pa.Table.from_pylist([r | image for r, image in zip(rows, images, strict=True)])
        pq.write_table(table, folder / "in.parquet", row_group_size=2)
        return folder / "in.parquet"
    with tarfile.open(folder / "in.tar", "w") as tar:
        for number, item in enumerate(rows):
            parts = {
                "json": json.dumps(item | ({"image": "png"} if "image" in item else {})).encode()
            }
            for suffix, data in (parts | ({"png": picture} if "image" in item else {})).items():
                info = tarfile.TarInfo(f"{number:03d}.{suffix}")
                info.size = len(data)
                tar.addfile(info, BytesIO(data))
    return folder / "in.tar"


@pytest.mark.parametrize("form", ["parquet", "tar"])
def test_pictures_inside_the_file_are_those_outside(make_dataset, tmp_path, form):
    rows = [row(0), row(1, image=None), row(2)]
    outside = make_dataset(rows)
    sources = [Source(name="s", path=str(embed(form, rows, tmp_path)))]
    inside = ConversationDataset(sources, outside.processor)
    loader = torch.utils.data.DataLoader(inside, batch_size=None, num_workers=1)
    for position, item in enumerate(loader):
        expected = outside[position]
        assert item.pop("record_id") == expected.pop("record_id")
        assert item.keys() == expected.keys()
        assert all(torch.equal(item[key], expected[key]) for key in item)
        assert inside.num_tokens(position) == outside.num_tokens(position) == len(item["labels"])
    assert sorted(inside.pictures([(0, 3)]).values()) == [1, 1]


@pytest.mark.parametrize("form", ["parquet", "tar"])
def test_features_of_pictures_inside_the_file(make_dataset, tmp_path, form):
    rows = [row(0)]
    dataset = make_dataset(rows)
    dataset = ConversationDataset(
        [Source(name="s", path=str(embed(form, rows, tmp_path)))], dataset.processor
    )
    layout = Layout(((4, 4, 24),), (torch.float32,))
    folder, image_processor = tmp_path / "store", dataset.processor.image_processor
    folder.mkdir()
    (shown,) = dataset.pictures([(0, 1)])
    nothing = FeatureStore(folder, layout)
    assert not is_stored(shown, image_processor, nothing)
    view = PictureViews([shown], image_processor, nothing)[0]
    with FeatureWriter(folder, layout, 10**9) as writer:
        writer.note(view.state, view.picture)
        writer.add(view.picture, view.grid, [torch.ones(1, 4, 4, 24)])
    dataset.features = FeatureStore(folder, layout)
    assert is_stored(shown, image_processor, dataset.features)
    assert dataset[0]["vision_features"][0].shape == (1, 4, 4, 24)


def test_features_stand_in_place_of_pictures_also_where_there_are_none(make_dataset, tmp_path):
    dataset = make_dataset([row(0), row(1, image=None), row(2)])
    pixels = Collator(dataset.processor)([dataset[position] for position in range(3)])
    layout = Layout(((4, 4, 24), (2, 2, 7)), (torch.float32, torch.bfloat16))
    folder, image_processor = tmp_path / "store", dataset.processor.image_processor
    folder.mkdir()
    shown, nothing = [Shown(str(tmp_path / "0.png"), 1)], FeatureStore(folder, layout)
    view = PictureViews(shown, image_processor, nothing)[0]
    maps = [torch.ones(1, *each.shape[1:], dtype=each.dtype) for each in layout.empty()]
    with FeatureWriter(folder, layout, 10**9) as writer:
        writer.add(view.picture, view.grid, maps)
    dataset.features = FeatureStore(folder, layout)
    collate = Collator(dataset.processor, features=dataset.features)
    items = {item["record_id"]: item for item in (dataset[position] for position in range(3))}
    batch = collate([dataset[position] for position in range(3)])
    assert [tuple(each.shape) for each in batch["vision_features"]] == [(2, 4, 4, 24), (2, 2, 2, 7)]
    assert all(each.all() for each in batch["vision_features"])
    same = [
        key for key in pixels if isinstance(pixels[key], torch.Tensor) and key != "pixel_values"
    ]
    assert "pixel_values" not in batch
    assert all(torch.equal(batch[key], pixels[key]) for key in same)
    assert len(same) == 5
    batch = collate([items["r1"]])
    assert [tuple(each.shape) for each in batch["vision_features"]] == [(0, 4, 4, 24), (0, 2, 2, 7)]
    assert batch["vision_features"][1].dtype == torch.bfloat16
    # What is lost is stored again by the same command, so no record is skipped for it.
    dataset.on_error = "skip"
    (stored,) = folder.glob("*.features")
    stored.unlink()
    with pytest.raises(LostFeaturesError, match="^" + str(stored)):
        [dataset[position] for position in range(3)]


@pytest.mark.parametrize("kind, power", [("sample", 1.0), ("square", 0.5)])
@pytest.mark.parametrize("packed", [False, True])
def test_weights_of_a_records_tokens(kind, power, packed, make_dataset):
    dataset = make_dataset([row(0), row(1, answer="A cat and a dog.")])
    items = [dataset[0], dataset[1]]
    batch = Collator(dataset.processor, packed, loss_weight=kind)(items)
    learnt = [int((item["labels"] != IGNORED).sum()) for item in items]
    assert len(set(learnt)) == 2
    weights = batch["loss_weights"]
    assert torch.equal(weights != 0, batch["labels"] != IGNORED)
    for n in learnt:
        assert int(torch.isclose(weights, torch.tensor(n**-power)).sum()) == n
    assert float(weights.sum()) == pytest.approx(sum(n ** (1 - power) for n in learnt))


def test_a_batch_of_skipped_records_has_no_weight(make_dataset):
    dataset = make_dataset([row(0)])
    assert not Collator(dataset.processor, loss_weight="square")([])["loss_weights"].any()
    assert "loss_weights" not in Collator(dataset.processor)([])


def test_works_in_worker_processes(make_dataset):
    dataset = make_dataset([row(i) for i in range(6)])
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=2, num_workers=2, collate_fn=Collator(dataset.processor)
    )
    ids = [name for batch in loader for name in batch["record_ids"]]
    assert ids == [dataset[position]["record_id"] for position in range(6)]
