"""Does `vlm data check` count faults by kind and exit with 2, and reach its neighbours?"""

import json

import pytest

from vlm.cli import main


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def row(number, image=None):
    question = "<image>?" if image else "Hi?"
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "Yes."}]
    return {"id": f"r{number}", "conversations": turns, **({"image": image} if image else {})}


def test_good_file(tmp_path, capsys):
    write(tmp_path / "a.jsonl", [row(i) for i in range(3)])
    assert main(["data", "check", str(tmp_path / "a.jsonl")]) == 0
    assert "3 records, 0 images, 0 record(s) with faults" in capsys.readouterr().out


def test_faults_are_counted_by_kind(tmp_path, capsys, make_image):
    make_image().save(tmp_path / "good.png")
    (tmp_path / "zero.png").touch()
    empty = [{"id": f"e{i}", "conversations": []} for i in range(5)]
    write(
        tmp_path / "a.jsonl", [row(0, "good.png"), row(1, "zero.png"), row(2, "gone.png"), *empty]
    )
    assert main(["data", "check", str(tmp_path / "a.jsonl")]) == 2
    out = capsys.readouterr().out
    assert "8 records, 3 images, 6 record(s) with faults" in out
    assert "  5 x" in out
    assert out.count("at least one question") == 3  # examples
    assert "a.jsonl:3 (id 'r2')" in out
    assert "zero.png" not in out  # is there, and only --decode looks inside
    assert main(["data", "check", str(tmp_path / "a.jsonl"), "--decode"]) == 2
    assert "zero.png" in capsys.readouterr().out


def test_a_placeholder_without_its_file_is_counted(tmp_path, capsys):
    lost = [row(number) for number in range(4)]
    lost[1]["conversations"][0]["value"] = "<video>\nWhat happens?"
    lost[3]["conversations"][0]["value"] = "<image>\nWhat is it?"
    write(tmp_path / "a.jsonl", lost)
    assert main(["data", "check", str(tmp_path / "a.jsonl")]) == 2
    out = capsys.readouterr().out
    assert "2 record(s) with faults" in out
    assert "a.jsonl:2 (id 'r1'): 0 video(s) but 1 <video> placeholder(s)" in out
    assert "a.jsonl:4 (id 'r3'): 0 image(s) but 1 <image> placeholder(s)" in out


@pytest.fixture
def web(tmp_path):
    """Five records: two name </s>, one of them <|box|> too, and one <|im_end|>."""
    rows = [row(number) for number in range(5)]
    for number, text in ((1, "<s>Old</s> </s>"), (2, "See <|box|></s>"), (4, "a<|im_end|>\n")):
        rows[number]["conversations"][number % 2]["value"] = text
    write(tmp_path / "web.jsonl", rows)
    return str(tmp_path / "web.jsonl")


def test_special_tokens_in_texts_are_counted_and_no_faults(web, capsys):
    assert main(["data", "check", web, "--examples", "1"]) == 0
    out = capsys.readouterr().out
    assert "0 record(s) with faults\n  special tokens named in texts" in out
    assert f"2 x </s>: {web}:2 (id 'r1')\n" in out
    for token, line in (("<s>", 2), ("<|box|>", 3), ("<|im_end|>", 5)):
        assert f"1 x {token}: {web}:{line} (id" in out


def test_special_tokens_of_a_tokenizer(web, language_model_folder, capsys):
    assert main(["data", "check", web, "--tokenizer", str(language_model_folder)]) == 0
    out = capsys.readouterr().out
    assert f"2 x </s>: {web}:2 (id 'r1'), {web}:3 (id 'r2')\n" in out
    assert "<|im_end|>" not in out and "<|box|>" not in out  # it has no such tokens
    assert main(["data", "check", web, "--tokenizer", "nowhere/to/be"]) == 2
    assert "--tokenizer nowhere/to/be: no tokenizer" in capsys.readouterr().err


def test_captions(tmp_path, capsys, make_image):
    make_image().save(tmp_path / "a.png")
    path = tmp_path / "data.json"
    asked = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "A cat."}]
    records = [
        {"image": "a.png", "caption": "A cat."},
        {"image": "a.png", "conversations": asked},
        {"image": "a.png", "conversations": [*asked, *asked[:1], asked[1]]},
        {"image": "gone.png", "caption": "A cat.</s>"},
    ]
    path.write_text(json.dumps(records[:2]))
    assert main(["data", "check", str(path), "--captions"]) == 0
    assert main(["data", "check", str(path)]) == 2
    path.write_text(json.dumps(records))
    capsys.readouterr()
    assert main(["data", "check", str(path), "--captions"]) == 2
    out = capsys.readouterr().out
    assert "4 records, 3 images, 2 record(s) with faults" in out and "1 x </s>: " in out


def test_mix(tmp_path, capsys):
    write(tmp_path / "a.jsonl", [row(0)])
    mix = tmp_path / "mix.yaml"
    mix.write_text(f"sources: [{{name: first, path: {tmp_path / 'a.jsonl'}}}]")
    assert main(["data", "check", str(mix)]) == 0
    assert "first: 1 records" in capsys.readouterr().out


def test_unknown_option_is_one_sentence(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["data", "check", "a.json", "--decod"])
    assert stop.value.code == 2
    error = "vlm data check: unrecognized arguments: --decod; see `vlm data check --help`\n"
    assert capsys.readouterr().err == error


def test_unknown_action_and_missing_file(tmp_path, capsys):
    assert main(["data", "chekc", "x"]) == 2
    assert "did you mean 'check'?" in capsys.readouterr().err
    assert main(["data", "check", str(tmp_path / "gone.json")]) == 2
    assert "gone.json: cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["build", "scenes"], ["tiles"], ["check"], ["regroup"], ["stats"]]
)
def test_help_of_every_action(words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["data", *words, "--help"])
    assert stop.value.code == 0
    assert f"vlm data {' '.join(words)}" in capsys.readouterr().out
