"""Is a page of answers drawn, whatever the texts hold?"""

from PIL import Image

from eval.gallery import PER_TASK, draw_gallery
from eval.runner import BLIND, IMAGE


class Pictures:
    def __init__(self):
        self.asked = []

    def images(self, index):
        self.asked.append(index)
        return [Image.new("RGB", (8, 8), "red")]


def row(index, view=IMAGE, group="Count", reply="so 3 (A)"):
    return {
        "index": index,
        "view": view,
        "groups": {"task": group},
        "prompt": "How many? Select from the following choices.\n(A) 3\n(B) 4",
        "choices": ["3", "4"],
        "answer": "A",
        "generation": "A",
        "reply": reply,
    }


def test_the_first_answers_of_each_group_are_drawn_and_blind_ones_are_not(tmp_path):
    rows = [row(i) for i in reversed(range(9))] + [row(20, group="Depth"), row(3, view=BLIND)]
    task = Pictures()
    draw_gallery(task, rows, "task", tmp_path / "page.png")
    assert sorted(task.asked) == [*range(PER_TASK), 20]
    assert Image.open(tmp_path / "page.png").size[1] > 200


def test_any_reply_can_be_drawn(tmp_path):
    for reply in ("$x_$ {", "a\x15b\n\n", "", "word " * 900, "猫"):
        draw_gallery(Pictures(), [row(0, reply=reply)], "task", tmp_path / "page.png")
