"""Are LLaVA-NeXT's and InternVL's lists of data read as the sources they mean?"""

import json

import pytest

from data_recipes.mixture import Source, is_mix, load_mix
from vlm.cli import main
from vlm.errors import UserError

NEXT = """
datasets:
  - json_path: /data/llava/a.json
    sampling_strategy: all
  - json_path: /data/ai2d/a.json
    sampling_strategy: "first:10%"
  - {json_path: "/data/{b,c}.json", sampling_strategy: "end:3000"}
  - {json_path: d.jsonl, sampling_strategy: "random:5%"}
  - {json_path: e.json}
"""
INTERNVL = {
    "sharegpt4v": {
        "root": "playground/data/",
        "annotation": "playground/sharegpt4v.jsonl",
        "data_augment": False,
        "repeat_time": 1,
        "length": 102025,
    },
    "dvqa": {"root": "dvqa", "annotation": "dvqa.jsonl", "repeat_time": 0.07},
    "docvqa": {"root": "docvqa", "annotation": "docvqa.jsonl", "repeat_time": 3},
}


def test_llava_next(tmp_path):
    path = tmp_path / "exp.yaml"
    path.write_text(NEXT)
    front = {"image_position": "first", "image_root": "images"}
    assert load_mix(path, "images") == [
        Source(name="a", path="/data/llava/a.json", **front),
        Source(name="a-2", path="/data/ai2d/a.json", cap="10%", **front),
        Source(name="{b,c}", path="/data/{b,c}.json", cap=3000, take="end", **front),
        Source(name="d", path="d.jsonl", cap="5%", take="random", **front),
        Source(name="e", path="e.json", **front),
    ]


def test_internvl(tmp_path):
    path = tmp_path / "meta.json"
    path.write_text(json.dumps(INTERNVL, indent="\t"))
    added = {"image_position": "front_if_missing"}
    assert load_mix(path, "elsewhere") == [
        Source(
            name="sharegpt4v",
            path="playground/sharegpt4v.jsonl",
            image_root="playground/data/",
            **added,
        ),
        Source(name="dvqa", path="dvqa.jsonl", image_root="dvqa", cap="7%", **added),
        Source(name="docvqa", path="docvqa.jsonl", image_root="docvqa", repeat=3.0, **added),
    ]


def entry(**fields):
    return {"x": {"root": "r", "annotation": "a.jsonl", **fields}}


@pytest.mark.parametrize(
    ("tree", "sentence"),
    [
        ({"datasets": {"json_path": "a"}}, "datasets must be a list"),
        ({"datasets": [{"path": "a"}]}, "datasets 1 must be a mapping with the key json_path"),
        ({"datasets": [{"json_path": "a", "weight": 2}]}, "datasets 1: 'weight' is not read here"),
        *(
            ({"datasets": [{"json_path": "a", "sampling_strategy": text}]}, f"not {text!r}")
            for text in ("first", "last:3", "first:x", "random:0.5", "first:-1", "end:")
        ),
        (entry(repeat_time=1.5), "x: a repeat_time above 1 must be a whole number"),
        (entry(repeat_time=0), "x: repeat_time must be a number above 0"),
        (entry(data_augment=True), "x: data_augment is not done here"),
        (entry(max_dynamic_patch=24), "x: 'max_dynamic_patch' is not read here"),
        (entry() | {"y": 3}, "y must be a mapping with the key annotation"),
        ({"datasets": [], "sources": []}, "must have the one key 'sources'"),
    ],
)
def test_what_cannot_be_read_is_told(tmp_path, tree, sentence):
    path = tmp_path / "mix.json"
    path.write_text(json.dumps(tree))
    with pytest.raises(UserError, match=r"mix\.json") as error:
        load_mix(path)
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    ("name", "text", "answer"),
    [
        ("a.yaml", "", True),
        ("a.json", json.dumps(INTERNVL), True),
        ("a.json", json.dumps(INTERNVL, indent=1), True),
        ("a.json", '[{"id": 1}]', False),
        ("a.json", '{"id": 1}\n{"id": 2}', False),
        ("a.json", '{"id": 1, "conversations": []}', False),
        ("a.jsonl", json.dumps(INTERNVL), False),
    ],
)
def test_mix_or_records(tmp_path, name, text, answer):
    (tmp_path / name).write_text(text)
    assert is_mix(tmp_path / name) == answer
    assert not is_mix(tmp_path / "gone.json")


def test_check_reads_internvl_as_internvl_does(tmp_path, capsys, make_image):
    make_image().save(tmp_path / "0.png")
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A cat."}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"image": "0.png", "conversations": turns}))
    meta = {"one": {"root": str(tmp_path), "annotation": str(tmp_path / "a.jsonl")}}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    assert main(["data", "check", str(tmp_path / "meta.json")]) == 0
    assert "one: 1 records, 1 images, 0 record(s) with faults" in capsys.readouterr().out
    assert main(["data", "check", str(tmp_path / "a.jsonl")]) == 2
