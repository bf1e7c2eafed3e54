"""Do the words of --vary become the rows that a reader expects?"""

import pytest

from eval.ablation.rows import distinct_ends, rows_of
from vlm.errors import UserError

CONNECTOR = "model.connector"


@pytest.mark.parametrize(
    ("words", "rows"),
    [
        (["connector=mlp,kan"], {"mlp": {CONNECTOR: {"type": "mlp"}},
                                 "kan": {CONNECTOR: {"type": "kan"}}}),
        (["connector={type: perceiver, num_queries: 16}"],
         {"perceiver(num_queries=16)": {CONNECTOR: {"type": "perceiver", "num_queries": 16}}}),
        (["connector=[mlp, {type: partial_lora, rank: 8}]"],
         {"mlp+partial_lora(rank=8)":
          {CONNECTOR: [{"type": "mlp"}, {"type": "partial_lora", "rank": 8}]}}),
        (["encoder=vim-small"], {"vim-small": {"model.vision_encoder": {"preset": "vim-small"}}}),
        (["encoder.layer=-2,[-3, -4]"], {"layer=-2": {"model.vision_encoder.layer": -2},
                                        "layer=[-3,-4]": {"model.vision_encoder.layer": [-3, -4]}}),
        (["stages.align.trainable.connector=1e-3"],
         {"connector=0.001": {"stages.align.trainable.connector": 1e-3}}),
        (["connector=mlp", "a.b=1,2"], {"mlp, b=1": {CONNECTOR: {"type": "mlp"}, "a.b": 1},
                                        "mlp, b=2": {CONNECTOR: {"type": "mlp"}, "a.b": 2}}),
    ],
)  # fmt: skip
def test_words_become_rows(words, rows):
    assert {row.name: dict(row.changes) for row in rows_of(words)} == rows


def test_a_folder_of_an_encoder_is_its_source(encoder_folder):
    (row,) = rows_of([f"encoder={encoder_folder}"])
    assert row.changes == {"model.vision_encoder": {"source": str(encoder_folder)}}
    assert row.name == encoder_folder.name


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["runs/a/encoder", "runs/b/encoder"], ["a", "b"]),
        (["x/encoder", "x/other", "clip-l-336"], ["encoder", "other", "clip-l-336"]),
        (["a/1/encoder", "b/1/encoder/", "b/2/encoder"], ["a/1", "b/1", "b/2"]),
        (["encoder", "runs/encoder"], ["encoder", "runs/encoder"]),
        (["runs/a/encoder"], ["encoder"]),
        ([], []),
    ],
)
def test_folders_are_called_by_what_tells_them_apart(paths, names):
    assert list(distinct_ends(paths).values()) == names


def test_folders_and_settings_of_encoders_may_be_mixed():
    rows = rows_of(["encoder=runs/a/encoder,{type: patches, patch_size: 8},runs/b/encoder"])
    assert [row.name for row in rows] == ["a", "patches(patch_size=8)", "b"]


def test_a_file_names_its_rows_and_may_change_several_fields(tmp_path):
    path = tmp_path / "rows.yaml"
    path.write_text(
        "one: {connector: [mlp, kan]}\n"
        "two / b: {connector: {type: minigemini}, encoder.layer: [-3, -4]}\n"
    )
    one, two = rows_of([f"@{path}"])
    assert one.changes == {CONNECTOR: [{"type": "mlp"}, {"type": "kan"}]}
    assert two.changes == {
        CONNECTOR: {"type": "minigemini"},
        "model.vision_encoder.layer": [-3, -4],
    }
    assert (two.name, two.folder) == ("two / b", "two-b")
    assert rows_of([f"@{path}:two / b"]) == [two]
    with pytest.raises(UserError, match="did you mean 'one'"):
        rows_of([f"@{path}:onee"])


def test_several_vary_give_all_combinations():
    rows = rows_of(["connector=mlp,kan", "num_threads=1,2,3"])
    assert len({row.folder for row in rows}) == 6
    assert [row.name for row in rows][:2] == ["mlp, num_threads=1", "mlp, num_threads=2"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["connector"], "looks like connector=mlp"),
        (["connector="], "looks like connector=mlp"),
        (["connector=[mlp"], "--vary connector: is no YAML"),
        (["connector=mlp,mlp"], "are the same variant"),
        (["connector=mlp", "connector=kan"], "two --vary change model.connector"),
        (["a.depth=1,2", "b.depth=1"], None),
        (["seed=1,2"], "see --seeds"),
        (["@gone.yaml"], "gone.yaml: cannot be read"),
    ],
)
def test_mistakes_are_one_sentence(words, sentence):
    if sentence is None:
        assert len(rows_of(words)) == 2
        return
    with pytest.raises(UserError, match=sentence):
        rows_of(words)


@pytest.mark.parametrize("text", ["[1]", "", "one: mlp", "one: {}"])
def test_a_file_of_another_form_is_told(tmp_path, text):
    path = tmp_path / "rows.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"rows\.yaml"):
        rows_of([f"@{path}"])
