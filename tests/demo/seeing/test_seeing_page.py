"""Does the page show what the model sees, to mouse and keyboard?"""

from pathlib import Path

import pytest


def test_the_panel_follows_the_answers_and_the_chosen_word(
    demo, open_page, make_image, tmp_path: Path
):
    path = tmp_path / "cat.png"
    make_image(64, 48).save(path)
    demo.voice.say("It is (B)", end=True)
    page = open_page()
    page.focus("#see")
    page.keyboard.press("Enter")
    page.get_by_text("Ask about a picture; then").first.wait_for()
    page.set_input_files("#box [data-testid=file-upload]", str(path))
    page.locator("#box .thumbnail-item").wait_for()
    page.wait_for_function("() => !document.querySelector('#box .loader')")
    page.fill("#box textarea", "Where?\n(A) left\n(B) right")
    page.press("#box textarea", "Enter")
    page.wait_for_selector("#heat img[alt*='for the whole answer']")
    assert page.locator("#words label").all_inner_texts() == ["It", "is", "(B)"]
    page.locator("#words input").nth(2).focus()
    page.keyboard.press("Space")
    page.wait_for_selector("#heat img[alt*='for “(B)”']")
    assert not page.locator("#views").is_visible(), "one view, so nothing to choose"
    tab = page.get_by_role("tab", name="Attention")
    tab.focus()
    for name, wanted in (
        ("Options", "Probability of each option"),
        ("Tiles", "Picture 1 cut into 1 × 1 tiles"),
    ):
        page.get_by_role("tab", name=name).press("Enter")
        page.wait_for_selector(f"#{name.lower()} img[alt*='{wanted}']")
    page.get_by_role("tab", name="Boxes").press("Enter")
    page.get_by_text("The answer names no boxes.").wait_for()
    page.click("#see")
    page.wait_for_selector("#seeing", state="hidden")


@pytest.mark.parametrize(("width", "height"), [(1100, 760), (1600, 900)])
def test_the_heat_map_of_two_pictures_lies_on_the_page(
    demo, open_page, make_image, tmp_path: Path, width: int, height: int
):
    paths = [tmp_path / "cat.png", tmp_path / "dog.png"]
    for path in paths:
        make_image(64, 48).save(path)
    demo.voice.say("yes", end=True)
    page = open_page(viewport={"width": width, "height": height})
    page.click("#see")
    page.set_input_files("#box [data-testid=file-upload]", [str(path) for path in paths])
    page.locator("#box .thumbnail-item").nth(1).wait_for()
    page.wait_for_function("() => !document.querySelector('#box .loader')")
    page.fill("#box textarea", "Where?")
    page.press("#box textarea", "Enter")
    page.wait_for_selector("#heat img[alt*='for the whole answer']")
    for selector in ("#heat img", "#seeing [role=tab]"):
        box = page.locator(selector).first.bounding_box()
        assert box["x"] + box["width"] <= width, f"{selector} is beside the window"
        assert box["y"] < height
