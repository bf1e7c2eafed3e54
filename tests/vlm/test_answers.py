"""Is every reply read as a careful reader would read it, and never guessed?"""

import json
from pathlib import Path

import pytest

from eval.foreign_answers import read_as_cambrian, read_as_lmms_eval
from vlm.answers import LETTERS, read_answer

GOLDEN = json.loads(
    (Path(__file__).parents[1] / "fixtures/golden/answer_replies.json").read_text("utf-8")
)
CHOICES = list(GOLDEN["options"].values())


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: case["reply"][:30] or "empty")
def test_golden_replies(case: dict[str, str]):
    reading = read_answer(case["reply"], CHOICES)
    assert (reading.letter or "-") == case["letter"], reading


TWO = ("lamp", "door")
COUNT = ("3", "2", "1", "0")
SIX = ("red", "blue", "green", "pink", "grey", "black")
PLACES = ("left", "upper left", "right", "upper right")


@pytest.mark.parametrize(
    ("reply", "choices", "letter"),
    [
        # articles and pronouns are not letters
        ("A dog", TWO, "-"),
        ("a", TWO, "A"),
        ("A dog is next to it.", TWO, "-"),
        ("A door", TWO, "B"),
        ("A lamp", TWO, "A"),
        ("The answer is a door.", TWO, "B"),
        ("The answer is A dog", TWO, "-"),
        ("The answer is A lamp.", TWO, "A"),
        ("The answer is A.", TWO, "A"),
        ("The answer is a", TWO, "A"),
        ("Answer: I cannot say", tuple("123456789"), "-"),
        ("Because of the shadow", TWO, "-"),
        ("Definitely", SIX, "-"),
        ("E", SIX, "E"),
        ("(F)", SIX, "F"),
        ("g", SIX, "-"),
        ("The answer is (G).", SIX, "-"),
        ("Answer: F", SIX, "F"),
        ("J. tenth", tuple(f"{n}th" for n in range(12)), "J"),
        # counts
        ("3", COUNT, "A"),
        ("(C) 1", COUNT, "C"),
        ("(C) 3", ("1", "2", "3"), "C"),
        ("(C) 3", COUNT, "-"),  # letter and text contradict each other
        ("three", COUNT, "A"),
        ("There are two.", COUNT, "B"),
        ("There are 13 chairs", COUNT, "-"),
        ("3 chairs and 1 table", COUNT, "-"),
        ("3.5", COUNT, "-"),
        ("Zero", COUNT, "D"),
        ("C) 1", COUNT, "C"),
        ("C. 1", COUNT, "C"),
        ("c: 1", COUNT, "C"),
        # an option inside another option
        ("upper left", PLACES, "B"),
        ("left", PLACES, "A"),
        ("It is on the upper left.", PLACES, "B"),
        ("It is on the left.", PLACES, "A"),
        ("It is on the upper left or left.", PLACES, "-"),
        ("leftmost", PLACES, "-"),
        # observations first, then the letter
        ("red y7 blue y4 so below (B)", ("above", "below"), "B"),
        ("red y7 blue y4 so below", ("above", "below"), "B"),
        ("(A) y3, (B) y7, so (B)", TWO, "B"),
        ("(A) y3, (B) y7, so (A) or (B)", TWO, "-"),
        ("(A) is far. (B) is near.", TWO, "-"),
        ("Looking at both, I say B because it is larger.", TWO, "B"),
        ("It is A because of its size.", TWO, "A"),
        ("B) because it is larger", TWO, "B"),
        ("B, the door", TWO, "B"),
        ("A. lamp\nB. door", TWO, "-"),
        ("A, B", TWO, "-"),
        ("A and B", TWO, "-"),
        ("The answer is A or B.", TWO, "-"),
        ("The answer is A. No, the answer is B.", TWO, "-"),
        # denials
        ("It is not (A).", TWO, "-"),
        ("The answer is not A.", TWO, "-"),
        ("Not the door.", TWO, "-"),
        ("It isn't the door", TWO, "-"),
        # wrappings
        ("<think>The answer is A.</think> Answer: B", TWO, "B"),
        ("<think>The answer is A.", TWO, "-"),
        ("<answer>B</answer>", TWO, "B"),
        ("(a) lamp", TWO, "A"),
        ("[B]", TWO, "B"),
        ('"B"', TWO, "B"),
        ("**Answer:** B", TWO, "B"),
        ("$\\boxed{(B)}$", TWO, "B"),
        ("\\boxed{A} \\boxed{B}", TWO, "-"),
        ("the object(s) seen", tuple(f"thing {n}" for n in range(20)), "-"),
        ("B", ("B", "A"), "-"),  # the option's text is the other option's letter
        ("door", ("door", "door"), "-"),
        ("   \n", TWO, "-"),
        ("!!!", TWO, "-"),
    ],
)
def test_more_replies(reply: str, choices: tuple[str, ...], letter: str):
    reading = read_answer(reply, choices)
    assert (reading.letter or "-") == letter, reading


def test_position_points_at_the_letter():
    for reply in ("red y7 so (B)", "<think>(A)</think>so (B).", "The answer is B.", "b"):
        reading = read_answer(reply, TWO)
        assert reading.position is not None and reply[reading.position].upper() == "B"
    assert read_answer("door", TWO).position is None


def test_the_deciding_rule_is_named():
    assert read_answer("The answer is (B)", TWO).rule == "stated"
    assert read_answer("(A) or (B)", TWO).rule == "bracketed:ambiguous"
    assert read_answer("C", TWO).rule == "exact_letter:no_such_option"
    assert read_answer("", TWO).rule == "empty"


@pytest.mark.parametrize("letter", LETTERS[:12])
def test_every_letter_in_the_asked_form(letter: str):
    choices = [f"thing {n}" for n in range(12)]
    for form in ("({})", "{}", "{}.", "Answer: {}", "The answer is ({}).", "**{}**", "Option {}"):
        assert read_answer(form.format(letter), choices).letter == letter


@pytest.mark.parametrize(("parser", "right"), [(read_as_cambrian, 12), (read_as_lmms_eval, 8)])
def test_foreign_parsers_read_as_few_as_the_originals_do(parser, right: int):
    read = [(parser(case["reply"], CHOICES) or "-") == case["letter"] for case in GOLDEN["cases"]]
    assert sum(read) == right
