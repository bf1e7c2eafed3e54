"""Does `vlm data stats` count with a recipe's processor, or a model's, and say what it needs?"""

from vlm.cli import main


def test_of_a_recipe(tree, write_recipe, tmp_path, capsys):
    out = tmp_path / "a.png"
    recipe = str(write_recipe(tree))
    assert main(["data", "stats", recipe, "--stage", "align", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "every record of an epoch was read" in printed
    assert out.exists()
    assert main(["data", "stats", recipe, "--stage", "algin"]) == 2
    assert "did you mean 'align'?" in capsys.readouterr().err


def test_of_a_file_with_a_model(tree, tmp_path, make_model, capsys):
    data = tree["stages"][0]["data"]["sources"][0]
    assert main(["data", "stats", data["path"]]) == 2
    assert "--model FOLDER is needed" in capsys.readouterr().err
    model, processor = make_model()
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    words = [data["path"], "--model", str(tmp_path / "model"), "--limit", "3"]
    words += ["--image-root", data.get("image_root", ""), "--out", str(tmp_path / "a.png")]
    assert main(["data", "stats", *words]) == 0
    assert "3 of an epoch's" in capsys.readouterr().out
    assert main(["data", "stats", data["path"], "--limit", "0", "--model", "x"]) == 2
    assert "--limit must be 1 or more" in capsys.readouterr().err
