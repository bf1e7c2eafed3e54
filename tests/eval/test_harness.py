"""Do whole runs come out right: known answerers, resumed runs, any batch size?"""

import json
import random
from itertools import chain
from pathlib import Path

import pytest

from eval.harness import Messages, evaluate
from eval.protocols import LMMS, OFFICIAL
from eval.report import console_table
from eval.runner import BLIND, IMAGE, RunPlan, choose_indices
from eval.settings import AnswerSettings
from eval.tasks.cv_bench import CvBench
from vlm.errors import UserError


@pytest.fixture(autouse=True)
def no_gallery(monkeypatch):
    """Drawing it takes longer than all else; test_gallery.py and test_cli.py look at it."""
    monkeypatch.setattr("eval.harness.draw_gallery", lambda *_: None)


@pytest.fixture
def task(tmp_path, write_benchmark) -> CvBench:
    return CvBench.open([write_benchmark(tmp_path / "data.parquet", 150)])


def run(
    task, answerer, folder, *, protocol=OFFICIAL, views=(IMAGE, BLIND), limit=None, batch=64, **kw
):
    plan = RunPlan(
        protocol=protocol, indices=choose_indices(task, limit), views=views, batch_size=batch
    )
    messages = kw.pop("messages", Messages(say=print, progress=lambda *_: None))
    return evaluate(task, answerer, AnswerSettings(**kw), plan, folder, {"model": "fake"}, messages)


def oracle(task: CvBench):
    return lambda number, choices: f"({task.get_example(number).answer})"


def test_an_oracle_scores_everything(task, tmp_path, fake_answerer):
    results = run(task, fake_answerer(oracle(task)), tmp_path / "out")
    assert results["headline"]["accuracy"] == 1.0 and results["headline"]["high"] == 1.0
    assert list(results["tasks"]) == ["Count", "Depth", "Distance", "Relation"]
    for cell in results["tasks"].values():
        assert cell["n"] == 150 and cell["accuracy"] == 1.0 == cell["generation"]["accuracy"]
        assert cell["vision_gain"] == 0.0, "the oracle needs no picture"
        assert cell["agreement"] == {"n": 150, "rate": 1.0}
        assert cell["generation"]["unread"] == 0
        assert cell["letters"]["gold"] == cell["letters"]["likelihood"]


def test_a_random_answerer_stands_at_chance(task, tmp_path, fake_answerer):
    dice = random.Random(0)
    guess = fake_answerer(lambda _, choices: f"({'ABCDEF'[dice.randrange(len(choices))]})")
    results = run(task, guess, tmp_path)
    for cell in (*results["tasks"].values(), results["all"]):
        spread = (cell["chance"] * (1 - cell["chance"]) / cell["n"]) ** 0.5
        assert abs(cell["accuracy"] - cell["chance"]) < 3 * spread
        assert abs(cell["blind"] - cell["chance"]) < 3 * spread
        width = cell["vision_gain_high"] - cell["vision_gain_low"]
        assert abs(cell["vision_gain"]) < 3 / 1.96 * width / 2
    count = [
        task.get_example(i) for i in range(600) if task.get_example(i).groups["task"] == "Count"
    ]
    chance = sum(1 / len(example.choices) for example in count) / len(count)
    assert results["tasks"]["Count"]["chance"] == pytest.approx(chance, abs=1e-6)
    assert results["tasks"]["Depth"]["chance"] == 0.5


def test_always_a_scores_the_share_of_a(task, tmp_path, fake_answerer):
    results = run(task, fake_answerer(lambda *_: "A"), tmp_path)
    for cell in results["tasks"].values():
        assert (
            cell["accuracy"]
            == cell["always_a"]
            == pytest.approx(cell["letters"]["gold"]["A"] / cell["n"], abs=1e-6)
        )
        assert cell["letters"]["likelihood"] == {"A": 150}
        assert cell["majority"] >= cell["always_a"]


def test_official_score_is_the_mean_of_means(task, tmp_path, fake_answerer):
    right_sources = ("ADE20K", "Omni3D")

    def choose(number, choices):
        example = task.get_example(number)
        right = example.groups["source"] in right_sources
        return f"({example.answer})" if right else "(A)" if example.answer != "A" else "(B)"

    results = run(task, fake_answerer(choose), tmp_path)
    official, *_ = results["composites"]
    assert (official["name"], official["formula"]) == ("official", "((ADE20K + COCO)/2 + Omni3D)/2")
    assert official["accuracy"] == 0.75 and official["scoring"] == "likelihood"
    pooled = next(c for c in results["composites"] if c["name"] == "pooled")
    assert pooled["accuracy"] == pytest.approx(1 - results["sources"]["COCO"]["n"] / 600, abs=1e-6)
    assert results["headline"]["name"] == "official"
    assert results["label"] == "CV-Bench schema, n=600; not the published files"


def test_unread_replies_are_wrong_and_counted(task, tmp_path, fake_answerer):
    def choose(number, _):
        return "I cannot tell" if number % 2 else f"({task.get_example(number).answer})"

    results = run(task, fake_answerer(choose), tmp_path)
    cell = results["all"]
    assert cell["generation"]["unread"] == 300 and cell["generation"]["unread_rate"] == 0.5
    assert cell["generation"]["accuracy"] == 0.5
    assert cell["accuracy"] > 0.5, "the forced choice gets some of the unread ones right"
    assert cell["agreement"] == {"n": 300, "rate": 1.0}
    assert results["reading_rules"][IMAGE] == {"exact_letter": 300, "nothing_read": 300}
    assert cell["letters"]["generation"]["unread"] == 300


def test_vision_gain_is_what_the_picture_adds(task, tmp_path, fake_answerer):
    class Seeing(fake_answerer):
        def answer(self, questions):
            seen = len(questions[0].encoded["input_ids"]) > 100 + 64
            self.choose = oracle(task) if seen else (lambda *_: "(A)")
            return super().answer(questions)

        def encode(self, messages, images, choices):
            question = super().encode(messages, images, choices)
            question.encoded["input_ids"] = question.encoded["input_ids"].new_zeros(
                300 * len(images) + 1
            )
            return question

    cell = run(task, Seeing(oracle(task)), tmp_path)["all"]
    assert cell["accuracy"] == 1.0 and cell["blind"] == cell["always_a"]
    assert cell["vision_gain"] == pytest.approx(1 - cell["blind"])
    assert cell["vision_gain_low"] < cell["vision_gain"] < cell["vision_gain_high"]


def test_without_blind_and_with_one_scoring(task, tmp_path, fake_answerer):
    results = run(
        task, fake_answerer(oracle(task)), tmp_path, views=(IMAGE,), scorings=("generation",)
    )
    cell = results["tasks"]["Depth"]
    assert cell["blind"] is None and "vision_gain" not in cell and "likelihood" not in cell
    assert results["headline"]["scoring"] == "generation"
    assert "read in the generated reply" in (tmp_path / "report.md").read_text()
    assert "Depth" in console_table(results)


def test_a_protocols_own_parser_is_reported_under_its_name(task, tmp_path, fake_answerer):
    replies = fake_answerer(lambda number, _: f"The answer is ({task.get_example(number).answer})")
    results = run(task, replies, tmp_path, protocol=LMMS)
    cell = results["all"]
    assert cell["generation"]["accuracy"] == 1.0
    assert cell["generation, lmms parser"]["accuracy"] == 0.0, "it reads the T of The"
    assert any(c["scoring"] == "generation, lmms parser" for c in results["composites"])


def stripped(folder: Path) -> tuple[dict, str]:
    results = json.loads((folder / "results.json").read_text("utf-8"))
    results.pop("run")
    report = (folder / "report.md").read_text("utf-8").splitlines()
    return results, "\n".join(line for line in report if not line.startswith("Time:"))


class Stop(Exception):
    """Stands for a kill."""


def test_a_stopped_run_goes_on_and_ends_the_same(task, tmp_path, fake_answerer):
    whole = fake_answerer(oracle(task))
    run(task, whole, tmp_path / "whole")
    for stop_at in (1, 4, 11, 19):
        folder = tmp_path / str(stop_at)

        class Killed(fake_answerer):
            def answer(self, questions, stop_at=stop_at):
                if len(self.batches) == stop_at:
                    raise Stop
                return super().answer(questions)

        with pytest.raises(Stop):
            run(task, Killed(oracle(task)), folder)
        path = folder / "samples.jsonl"
        path.write_bytes(path.read_bytes()[:-20])  # a torn line
        rest = fake_answerer(oracle(task))
        results = run(task, rest, folder)
        assert stripped(folder) == stripped(tmp_path / "whole")
        # the torn batch is formed again as it was, nothing before it
        assert rest.batches == whole.batches[stop_at - 1 :]
        assert results["run"]["answers_found"] + results["run"]["answers_new"] == 1200
    again = fake_answerer(oracle(task))
    run(task, again, tmp_path / "whole")
    assert again.asked == 0


def test_another_model_in_the_same_folder_is_asked_anew(task, tmp_path, fake_answerer):
    said: list[str] = []
    messages = Messages(say=said.append, progress=lambda *_: None)
    run(task, fake_answerer(oracle(task)), tmp_path, limit=20)
    other = fake_answerer(lambda *_: "(A)", identity="other")
    results = run(task, other, tmp_path, limit=20, messages=messages)
    assert other.asked == 40 and results["all"]["accuracy"] == results["all"]["always_a"]
    assert len(said) == 1 and "(weights changed)" in said[0]
    back = fake_answerer(oracle(task))
    assert run(task, back, tmp_path, limit=20)["all"]["accuracy"] == 1.0 and back.asked == 0


def test_other_data_prompts_or_settings_are_other_answers(
    task, tmp_path, fake_answerer, write_benchmark
):
    def asked(task=task, **changes) -> int:
        answerer = fake_answerer(lambda *_: "(A)")
        run(task, answerer, tmp_path / "out", limit=20, **changes)
        return answerer.asked

    assert asked() == 40
    assert asked(batch=7) == 0, "the batch size changes no answer"
    assert asked(protocol=LMMS) == 40
    assert asked(max_new_tokens=9) == 40
    assert asked(strategy="direct") == 40
    other = CvBench.open([write_benchmark(tmp_path / "other.parquet", 10, seed=5)])
    assert asked(other) == 40
    assert asked() == 0, "and the first ones are still there"


def test_a_larger_limit_keeps_the_answers_of_a_smaller(task, tmp_path, fake_answerer):
    run(task, fake_answerer(oracle(task)), tmp_path, limit=200)
    results = run(task, fake_answerer(lambda *_: "I cannot tell"), tmp_path)
    assert results["all"]["n"] == 600 and results["run"]["answers_found"] == 400
    assert results["all"]["generation"]["unread"] == 400
    assert len((tmp_path / "samples.jsonl").read_text("utf-8").splitlines()) == 1 + 1200


def test_limit_takes_evenly_from_every_group(task):
    indices = choose_indices(task, 40)
    tasks = [task.get_example(i).groups["task"] for i in indices]
    assert len(set(indices)) == 40 == len(tasks) and list(indices) == sorted(indices)
    assert {name: tasks.count(name) for name in set(tasks)} == dict.fromkeys(set(tasks), 10)
    assert choose_indices(task, 600) == choose_indices(task, None) == tuple(range(600))


def test_batches_are_sorted_by_length_inside_windows(task, tmp_path, fake_answerer):
    answerer = fake_answerer(oracle(task))
    run(task, answerer, tmp_path, batch=10, views=(IMAGE,))
    assert [len(batch) for batch in answerer.batches] == [10] * 60
    assert sorted(list(chain(*answerer.batches))) == list(range(600))
    for start in range(0, 60, 8):
        window = list(chain(*answerer.batches[start : start + 8]))
        assert sorted(window) == list(range(start * 10, start * 10 + len(window)))
        lengths = [len(task.get_example(i).prompt) for i in window]
        assert lengths == sorted(lengths)


def test_interrupted_says_what_is_saved(task, tmp_path, fake_answerer):
    class Interrupted(fake_answerer):
        def answer(self, questions):
            if len(self.batches) == 3:
                raise KeyboardInterrupt
            return super().answer(questions)

    said: list[str] = []
    messages = Messages(say=said.append, progress=lambda *_: None)
    with pytest.raises(KeyboardInterrupt):
        run(task, Interrupted(oracle(task)), tmp_path, messages=messages)
    assert said == [f"192 of 1200 answers are saved in {tmp_path / 'samples.jsonl'}"]


def test_an_unwritable_report_keeps_the_answers(task, tmp_path, fake_answerer):
    (tmp_path / "results.json.part").mkdir()
    with pytest.raises(UserError, match="the answers are saved"):
        run(task, fake_answerer(oracle(task)), tmp_path, limit=8)
    assert len((tmp_path / "samples.jsonl").read_text().splitlines()) == 17


def test_the_report_says_how_it_was_made(task, tmp_path, fake_answerer):
    run(task, fake_answerer(oracle(task)), tmp_path, limit=40)
    report = (tmp_path / "report.md").read_text("utf-8")
    for piece in (
        "CV-Bench schema, 40 of 600 questions; a subset, not the benchmark",
        "likeliest option letter after the model's own reasoning (forced choice)",
        "((ADE20K + COCO)/2 + Omni3D)/2",
        task.files[0].sha256,
        "parser_version",
        "| Relation |",
        "chance",
    ):
        assert piece in report
    manifest = json.loads((tmp_path / "results.json").read_text())["manifest"]
    assert manifest["first_prompt"].endswith(task.get_example(choose_indices(task, 40)[0]).prompt)
    assert manifest["versions"]["torch"] and manifest["weights"] == "fake"


def test_settings_say_no_early():
    for bad in (
        {"strategy": "guess"},
        {"scorings": ("luck",)},
        {"scorings": ()},
        {"max_new_tokens": 0},
    ):
        with pytest.raises(UserError):
            AnswerSettings(**bad)
