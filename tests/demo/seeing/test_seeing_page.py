"""Does the page show what the model sees, to mouse and keyboard?"""

from pathlib import Path


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
