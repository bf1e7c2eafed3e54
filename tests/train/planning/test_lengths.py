"""Are rows measured where the data is, and assumed in plain words where it is not?"""

import json

import pytest

from train.data import stage_dataset
from train.packing import Packing
from train.planning.lengths import (
    assumed_lengths,
    count_records,
    filled_lengths,
    measured_lengths,
    pack_assumed,
)
from train.planning.skeleton import build_skeleton
from train.planning.step import Pack, Sample, plan_views
from train.recipe import parse_recipe
from vlm.errors import UserError

SIZES = ((64, 32), (32, 32), (96, 96))  # (width, height)


def test_assumed_rows_have_the_middle_and_the_largest_image(both):
    _, model = both(tiling={"type": "anyres"})
    lengths = assumed_lengths(model, SIZES, 10, None)
    assert lengths.mean == Sample(((64, 32),), 10, 5)  # 52 tokens, between 36 and 88
    assert lengths.longest == Sample(((96, 96),), 10, 5)
    assert lengths.origin == (
        "10 text tokens, half of them supervised, and one image a row (as given)"
    )


def test_the_longest_row_is_filled_up_to_max_length(both):
    _, model = both()  # 16 tokens an image
    lengths = assumed_lengths(model, SIZES, None, 100)
    assert lengths.longest.text_tokens == 84
    assert lengths.origin.endswith("(assumed); the longest is filled up to max_length 100")


def test_images_that_do_not_fit_are_told(both):
    _, model = both(tiling={"type": "anyres"})
    lengths = assumed_lengths(model, SIZES, None, 50)
    assert lengths.longest == Sample(((32, 32),), 50 - 36, 7)
    assert lengths.origin.endswith("max_length 50, which images of 64x32, 96x96 exceed")
    with pytest.raises(UserError, match="takes 36 tokens, which leaves no text in max_length 36"):
        assumed_lengths(model, SIZES, None, 36)


def processor_of(recipe):
    processor = build_skeleton(recipe.model).processor
    assert processor is not None
    return processor


@pytest.fixture
def measure(tree):
    """(**stage) -> the lengths of stage instruct, measured, and its dataset's own."""

    def run(num_records=24, **changes):
        align, instruct = tree["stages"]
        recipe = parse_recipe({**tree, "stages": [align, {**instruct, **changes}]}, "recipe")
        return measured_lengths(recipe.stages[1], processor_of(recipe), 0, num_records, 4)

    return run


def test_measured_on_the_records(measure):
    lengths = measure()
    assert lengths.origin.startswith("mean and longest of 24 records")
    # 20 of 24 have one image, and answers have three lengths
    assert len(lengths.mean.image_sizes) == 1
    assert lengths.mean.text_tokens < lengths.longest.text_tokens
    assert 0 < lengths.mean.supervised_tokens < lengths.mean.text_tokens


def test_packed_rows_share_a_micro_batch(measure):
    longest, heaviest = measure().longest, measure(packed=True).longest
    assert heaviest.text_tokens < longest.text_tokens


def test_filled_rows_of_measured_records(measure):
    lengths = measure(packed={"length": 200, "window": 40})
    assert isinstance(lengths.mean, Pack) and isinstance(lengths.longest, Pack)
    assert lengths.records > 2 and lengths.records == pytest.approx(
        len(lengths.mean.documents), abs=1.5
    )
    assert "24 records (--measure N looks at more); best fit fills rows of 200" in lengths.origin
    shorter = measure(packed={"length": 100, "window": 40})
    assert shorter.records < lengths.records


def test_filled_rows_of_assumed_records():
    samples = [Sample((), 60, 1), Sample((), 40, 1)]
    lengths = filled_lengths(samples, lambda sample: sample.text_tokens, Packing(length=100))
    assert lengths.longest == Pack(tuple(samples)) == lengths.mean
    assert (lengths.records, lengths.origin[-9:]) == (2, "to 100.0%")


def test_an_assumed_record_longer_than_a_row_is_told(both):
    _, model = both()
    assumed = assumed_lengths(model, SIZES, 10, None)
    with pytest.raises(UserError, match=r"takes 26 tokens, more than packed\.length 25"):
        pack_assumed(model, assumed, Packing(length=25))


def test_records_that_cannot_be_used_are_left_out(measure, tmp_path):
    longest = measure().longest.text_tokens + 16
    kept = measure(max_length=longest - 1)
    assert kept.longest.text_tokens + 16 < longest
    (tmp_path / "0.png").unlink()
    assert measure().origin.startswith("mean and longest of 19 records")
    assert measure(max_length=20) is None


def test_each_stage_is_measured_with_its_own_template(tree):
    recipe = parse_recipe(tree, "recipe")
    processor = processor_of(recipe)
    align, instruct = recipe.stages
    alone = measured_lengths(instruct, processor, 0, 24, 4)
    assert measured_lengths(align, processor, 0, 24, 4) != alone  # llava_plain drops the question
    assert measured_lengths(instruct, processor, 0, 24, 4) == alone


def test_no_usable_record_is_none(measure, tmp_path):
    (tmp_path / "data.json").write_text('[{"id": "a", "conversations": []}]')
    assert measure() is None


def test_records_of_an_epoch(tree):
    tree["stages"][0]["data"]["sources"][0]["repeat"] = 2.0
    stages = parse_recipe(tree, "recipe").stages
    assert count_records(stages[0], 0) == 48
    tree["stages"][0]["data"]["sources"][0]["path"] = "nowhere.json"
    assert count_records(parse_recipe(tree, "recipe").stages[0], 0) is None


def test_rows_of_videos_have_the_processors_length(tree, data_file, make_clip):
    tree["model"]["video"] = {"frames": 6, "pool": "average", "newline": "frame"}
    rows = json.loads(data_file.read_text())[:12]
    make_clip(data_file.parent / "a.mp4", num_frames=9)
    make_clip(data_file.parent / "b.mp4", num_frames=3)
    for row in rows[:6]:
        row["conversations"][0]["value"] = "<image><video>\nWhat?"
        row["video"] = "a.mp4" if row["id"] in ("r2", "r4") else "b.mp4"
    data_file.write_text(json.dumps(rows))
    recipe = parse_recipe(tree, "recipe")
    skeleton = build_skeleton(recipe.model)
    dataset = stage_dataset(recipe.stages[1], skeleton.processor, 0)
    lengths = measured_lengths(recipe.stages[1], skeleton.processor, 0, 12, 4)
    longest = max(dataset.num_tokens(position) for position in range(12))
    _, tokens, views = plan_views(skeleton.model, lengths.longest)
    assert tokens + lengths.longest.text_tokens == longest
    assert (views, lengths.longest.frames) == (1 + 6, (6,))
    assert lengths.mean.frames == (round((2 * 6 + 4 * 3) / 12),)


def test_records_longer_than_the_context_are_left_out(tree):
    recipe = parse_recipe(tree, "recipe")
    processor = processor_of(recipe)
    longest = measured_lengths(recipe.stages[1], processor, 0, 24, 4).longest.text_tokens + 16
    kept = measured_lengths(recipe.stages[1], processor, 0, 24, 4, positions=longest - 1)
    assert kept.longest.text_tokens + 16 < longest
