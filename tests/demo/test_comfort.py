"""Is the page pleasant: by keyboard, on a phone, in the dark, in Chinese?"""

import json
import re
import string
import zipfile
from pathlib import Path
from typing import Any

import yaml

from demo.sample_questions import SAMPLES
from demo.wording import CHINESE, ENGLISH, language_of
from vlm.cli import main


def fields(text: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(text) if name}


def test_both_languages_say_the_same():
    assert list(ENGLISH) == list(CHINESE)
    assert all(fields(ENGLISH[key]) == fields(CHINESE[key]) for key in ENGLISH)
    assert all(CHINESE.values()) and {sample.card for sample in SAMPLES} <= set(ENGLISH)


def test_the_language_is_the_browsers():
    wanted = {"zh-CN,zh;q=0.9,en": "zh", "en-GB": "en", "fr,zh": "en", "": "en", None: "en"}
    assert {header: language_of(header) for header in wanted} == wanted


def test_a_chinese_browser_gets_a_chinese_page(demo, open_page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # gradio shows no sample's picture from above the working folder
    demo.voice.say("Hao", end=True)
    page = open_page(locale="zh-CN")
    page.get_by_text("给一张图片或一段视频，提一个问题").wait_for()
    page.get_by_text("有几个黄色物体？").wait_for()
    page.get_by_role("button", name="新对话").wait_for()
    assert page.get_attribute("html", "lang") == "zh"
    page.get_by_text("图中有什么？").click()
    page.get_by_text("Hao").wait_for()
    page.wait_for_selector("#box .submit-button")
    page.get_by_role("button", name="重试").wait_for()
    assert page.get_by_role("button", name="分享").count() == 0, "it would send the picture away"
    # What no longer fits the model is told, and goes back into the box; the conversation stays.
    page.fill("#box textarea", "A" * 5000)
    page.press("#box textarea", "Enter")
    page.get_by_text("超过此模型可读的 4,095 个").wait_for()
    page.wait_for_selector("#box .submit-button")
    assert page.input_value("#box textarea") == "A" * 5000
    assert page.locator("#chat [data-testid=bot]").all_inner_texts() == ["Hao"]
    demo.voice.fail = True
    page.fill("#box textarea", "你好")
    page.press("#box textarea", "Enter")
    page.get_by_text("服务器出错").wait_for()


def test_all_of_it_goes_by_keyboard(demo, open_page):
    demo.voice.say("Gladly.", end=True)
    page = open_page()
    assert page.evaluate("document.activeElement.tagName") == "TEXTAREA", "typing can begin at once"
    page.keyboard.type("Hello")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("there")
    page.keyboard.press("Enter")
    page.get_by_text("Gladly.").wait_for()
    assert "Hello\nthere" in page.inner_text("#chat [data-testid=user]")
    page.wait_for_selector("#box .submit-button")
    reached = set()
    for _ in range(30):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.closest('[id]')?.id"))
        reached.add(page.evaluate("document.activeElement.getAttribute('aria-label')"))
    assert {"new-chat", "save", "open", "camera-button", "Settings", "Retry", "Edit"} <= reached
    nameless = page.evaluate(
        "[...document.querySelectorAll('button, textarea, input:not([type=file])')]"
        ".filter(x => x.checkVisibility() && !x.innerText && !x.ariaLabel && !x.title"
        " && !x.placeholder && !x.labels?.length).map(x => x.outerHTML.slice(0, 120))"
    )
    assert nameless == []
    assert page.locator("img:not([alt])").count() == 0


def test_a_phone_shows_all_of_it_without_sideways_scrolling(demo, open_page):
    demo.voice.say("word " * 30, end=True)
    page = open_page(viewport={"width": 390, "height": 780}, is_mobile=True, has_touch=True)
    page.locator("#chat .example").first.tap()
    page.wait_for_selector("#chat [aria-label=Retry]")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    for part in ("#new-chat", "#camera-button", "#box textarea", "#chat [data-testid=bot]"):
        shape = page.locator(part).bounding_box()
        assert shape["x"] >= 0 and shape["x"] + shape["width"] <= 390
        assert shape["y"] + shape["height"] <= 780


def test_dark_browsers_get_a_dark_page(demo, open_page):
    def lightness(page, selector: str, what: str) -> float:
        colour = page.evaluate(f"getComputedStyle(document.querySelector('{selector}')).{what}")
        return sum(float(part) for part in re.findall(r"[\d.]+", colour)[:3]) / 3

    page = open_page(color_scheme="dark")
    page.wait_for_selector("#chat h2")
    assert lightness(page, "body", "backgroundColor") < 60
    assert lightness(page, "#chat h2", "color") > 190


def learn_from(data: Path, model: Path, folder: Path) -> dict[str, Any]:
    """Run one step of `vlm train` on a file; return what the run's manifest tells of its data."""
    stage = {
        "name": "one",
        "trainable": {"connector": 1e-3},
        "data": {"sources": [{"name": "saved", "path": str(data)}]},
        "training": {"max_steps": 1, "per_device_train_batch_size": 1},
    }
    recipe = {"name": "tiny", "output_dir": str(folder / "run"), "num_threads": 1}
    recipe |= {"model": {"checkpoint": str(model)}, "stages": [stage]}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["train", str(folder / "recipe.yaml")]) == 0
    return json.loads((folder / "run" / "one" / "manifest.json").read_text())["records"]


def test_a_conversation_is_saved_opened_again_and_learnt_from(
    demo, open_page, make_clip, model_folder, tmp_path
):
    demo.voice.say("see 3 (C)", end=True)
    page = open_page()
    page.locator("#chat .example").first.click()
    page.get_by_text("see 3 (C)").wait_for()
    page.wait_for_selector("#box .submit-button")
    demo.voice.say("It <moves>.", end=True)
    page.set_input_files("#box [data-testid=file-upload]", make_clip(tmp_path / "clip.mp4"))
    page.locator("#box .thumbnail-item").wait_for()
    page.wait_for_function("() => !document.querySelector('#box .loader')")
    page.fill("#box textarea", "What happens?")
    page.press("#box textarea", "Enter")
    page.get_by_text("moves>.").wait_for()
    page.wait_for_selector("#box .submit-button")
    with page.expect_download() as download:
        page.click("#save")
    download.value.save_as(tmp_path / "talk.zip")
    other = open_page()
    with other.expect_file_chooser() as chooser:
        other.click("#open")
    chooser.value.set_files(tmp_path / "talk.zip")
    other.get_by_text("see 3 (C)").wait_for()
    assert other.locator("#chat .message img").count() == 2, "the picture, the video's frames"
    assert other.locator("#chat video").count() == 1
    demo.voice.say("Still three.", end=True)
    other.fill("#box textarea", "Sure?")
    other.press("#box textarea", "Enter")
    other.get_by_text("Still three.").wait_for()
    with zipfile.ZipFile(tmp_path / "talk.zip") as archive:
        archive.extractall(tmp_path / "talk")
    record = tmp_path / "talk" / "conversation.json"
    assert "It <moves>." in record.read_text()
    assert learn_from(record, model_folder, tmp_path) == {"saved": {"seen": 1, "skipped": 0}}
