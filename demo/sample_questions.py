"""What can a visitor ask who has no picture at hand? Scenes of our own, and questions about them.

The pictures are the scenes builder's (256 pixels, no noise, seed 12345, scenes 5, 1, 8 and 11); a
model of the quickstart answers these questions.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from demo.wording import say

FOLDER = Path(__file__).parent / "examples"


@dataclass(frozen=True)
class Sample:
    """A picture's file in FOLDER, the key of its card's words, and what is asked."""

    file: str
    card: str
    question: str

    @property
    def path(self) -> Path:
        """Where the picture lies."""
        return FOLDER / self.file


SAMPLES = (
    Sample(
        "counting.png",
        "sample_count",
        "How many yellow objects are in the image? Select from the following choices.\n"
        "(A) 6\n(B) 5\n(C) 3\n(D) 4\n(E) 2",
    ),
    Sample(
        "depth.png",
        "sample_depth",
        "Which object is closer to the camera taking this photo, the cube (highlighted by a red "
        "box) or the cone (highlighted by a blue box)? Select from the following choices.\n"
        "(A) cube\n(B) cone",
    ),
    Sample(
        "relation.png",
        "sample_relation",
        "Considering the relative positions of the cylinder (annotated by the red box) and the "
        "ball (annotated by the blue box) in the image provided, where is the cylinder located "
        "with respect to the ball? Select from the following choices.\n(A) right\n(B) left",
    ),
    Sample("flat.png", "sample_describe", "Describe the image."),
)


def cards(language: str) -> list[Any]:
    """Return the cards of an empty `gr.Chatbot`."""
    return [
        {
            "text": sample.question,
            "display_text": say(language, sample.card),
            "icon": str(sample.path),
        }
        for sample in SAMPLES
    ]
