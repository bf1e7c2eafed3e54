"""Which option does a reply choose? Named rules in a fixed order; what is ambiguous stays unread.

A rule either reads a letter, or stops the search because the reply is ambiguous, or passes the
reply to the next rule. No rule guesses: no random letter, no first letter of a word, no first of
two letters. The name of the rule that decided is kept with every answer, so that a score can be
traced back to what was read and why.

Surprises:
  - "A dog" is an article and a noun unless an option reads so; "A." and "(A)" are letters.
  - Everything before the last `</think>` is thought, not answer.
  - Number words equal digits ("three" is the option "3").
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

PARSER_VERSION = "1"  # raise it when a rule changes: stored scores are tied to it
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

NUMBER_WORDS: dict[str, str] = {
    word: str(number)
    for number, word in enumerate(
        "zero one two three four five six seven eight nine ten eleven twelve".split()
    )
}
NEGATIONS = frozenset(
    "not no nor neither cannot can't isn't aren't doesn't don't unclear unsure unknown".split()
)
MAX_WORDS_FOR_TEXT_MENTION = 20  # in a longer text the one option named need not be the answer

WORD = re.compile(r"\d+(?:[.,]\d+)*|[^\W\d_]+(?:['’-][^\W\d_]+)*")
OPENERS, CLOSERS = r"[*_`\"'\[({\\$]*", r"[*_`\"'\])}$]*"
EXACT_LETTER = re.compile(rf"\s*{OPENERS}\s*([A-Za-z])\s*{CLOSERS}[\s.,:;!]*{CLOSERS}\s*")
LETTER_THEN_TEXT = re.compile(
    rf"\s*{OPENERS}([A-Za-z])({CLOSERS}[.:,]?{CLOSERS})[\s-]+(\S.*)", re.S
)
BOXED = re.compile(r"\\boxed\s*\{\s*(?:\\text\s*\{)?\s*\(?\s*([A-Za-z])\s*\)?\s*\}")
LEAD = r"(?:\s+(?:is|was|would\s+be|should\s+be|must\s+be))?\s*[*_]*\s*[:=]?[*_]*\s*(?:the\s+)?"
STATED = re.compile(
    rf"\banswer\b{LEAD}(?:(?:option|choice|letter)\s+)?{OPENERS}([A-Za-z])(?![\w'’])", re.I
)
OPTION = re.compile(rf"\b(?:option|choice)\b{LEAD}{OPENERS}([A-Za-z])(?![\w'’])", re.I)
OWN_SENTENCE = re.compile(rf"(?:^|[.!?:;\n])\s*{OPENERS}([A-Z]){CLOSERS}[.!\s]*$")
CONCLUDED = re.compile(
    r"\b(?:so|thus|therefore|hence)\b(?!.*\b(?:so|thus|therefore|hence)\b)", re.S
)
BRACKETED = re.compile(r"(?<!\w)(?:[(\[{]\s*\**([A-Za-z])\**\s*[)\]}]|\*\*([A-Z])\*\*)")
LEADING = re.compile(rf"\s*{OPENERS}([A-Z]){CLOSERS}(?:[).:,]|\s[-–—])[*_]*(?=\s)")
MARKER = re.compile(r"(?:^|(?<=[\s(]))([A-Z])[).:](?=\s|$)")
SAID = re.compile(
    r"(?:\b(?:is|it's|choose|select|pick|say)\s+)([A-Z])(?=\s*[.,;!]|\s+because\b|\s*$)"
)
ANOTHER_LETTER = re.compile(rf"{CLOSERS}\s*(?:,|/|&|\bor\b|\band\b)\s*{OPENERS}([A-Z])(?![\w'’])")
ANSWER_TAG = re.compile(r"<answer>(.*?)</answer>", re.S)


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What was read in a reply: the letter (None = unread), the rule that decided, and where.

    `position` is the letter's index in the reply, None where no letter stands in it (an option
    named by its text).
    """

    letter: str | None
    rule: str
    position: int | None = None


@dataclass(frozen=True, kw_only=True)
class _Reply:
    """The part of a reply that answers, and the options it may choose."""

    text: str
    offset: int  # index of `text` in the whole reply
    options: tuple[tuple[str, ...], ...]  # each option as comparable words

    def letter(self, match: re.Match[str], rule: str, group: int = 1) -> Reading:
        """Return the matched letter, or unread where no option carries it."""
        letter = match[group].upper()
        if LETTERS.index(letter) >= len(self.options):
            return Reading(letter=None, rule=f"{rule}:no_such_option")
        return Reading(letter=letter, rule=rule, position=self.offset + match.start(group))

    def agreed(self, matches: Sequence[tuple[re.Match[str], int]], rule: str) -> Reading | None:
        """Return the one letter that all matches show; two different letters are ambiguous."""
        if not matches:
            return None
        if len({match[group].upper() for match, group in matches}) > 1:
            return Reading(letter=None, rule=f"{rule}:ambiguous")
        last, group = matches[-1]
        other = ANOTHER_LETTER.match(self.text, last.end(group))
        if other is not None and other[1] != last[group].upper():
            return Reading(letter=None, rule=f"{rule}:ambiguous")
        if _negated(self.text[: last.start(group)]):
            return Reading(letter=None, rule=f"{rule}:negated")
        return self.letter(last, rule, group)


def read_answer(reply: str, choices: Sequence[str]) -> Reading:
    """Return which of the options (A), (B), ... with these texts the reply chooses."""
    text, offset = reply, 0
    if "<think>" in reply and "</think>" not in reply:
        return Reading(letter=None, rule="unfinished_thought")
    if "</think>" in reply:
        offset = reply.rindex("</think>") + len("</think>")
        text = reply[offset:]
    tags = list(ANSWER_TAG.finditer(text))
    if tags:
        text, offset = tags[-1][1], offset + tags[-1].start(1)
    if not text.strip():
        return Reading(letter=None, rule="empty")
    part = _Reply(text=text, offset=offset, options=tuple(tuple(words(c)) for c in choices))
    for rule in RULES:
        reading = rule(part)
        if reading is not None:
            return reading
    return Reading(letter=None, rule="nothing_read")


def words(text: str) -> list[str]:
    """Return the words of a text in comparable form: folded case, digits for number words."""
    found: list[str] = [word.casefold().replace("’", "'") for word in WORD.findall(text)]
    return [NUMBER_WORDS.get(word, word) for word in found]


def _negated(before: str) -> bool:
    """Say whether the two words before a letter deny it ("not (A)", "not option A")."""
    return bool(NEGATIONS & set(words(before)[-2:]))


def _options_equal_to(part: _Reply, text: str) -> list[str]:
    """Return the letters of the options that the text spells out, article or not."""
    spoken = words(text)
    bare = words(re.sub(r"^\s*(?:a|an|the)\s+", "", text, flags=re.I))
    return [
        LETTERS[i]
        for i, option in enumerate(part.options)
        if option and list(option) in (spoken, bare)
    ]


def _plausible(part: _Reply, match: re.Match[str]) -> bool:
    """Say whether the matched character is an option's letter and not a word ("a", "A", "I")."""
    letter, after = match[1], part.text[match.end(1) :]
    before = part.text[match.start(1) - 1] if match.start(1) else ""
    if before in tuple("([{*\"'`") or not after.strip(" .!*_)]}\"'`\n"):
        return True
    if letter.islower():
        return False
    if re.match(r"\s*[.,;:!?)\]}*\n-]", after) or letter not in "AI":
        return True
    option = part.options[LETTERS.index(letter)] if letter == "A" else ()
    following = words(after)
    reasons = ("because", "since", "as", "or", "and")
    return tuple(following[: len(option)]) == option != () or following[0] in reasons


def exact_letter(part: _Reply) -> Reading | None:
    """Read "B", "(b)", "**B.**": the reply is one letter."""
    match = EXACT_LETTER.fullmatch(part.text)
    if match is None:
        return None
    spelled = _options_equal_to(part, match[1])
    if spelled and spelled != [match[1].upper()]:  # an option whose text is another's letter
        return Reading(letter=None, rule="exact_letter:ambiguous")
    return part.letter(match, "exact_letter")


def exact_text(part: _Reply) -> Reading | None:
    """Read "door", "The door", "three": the reply is one option's text."""
    found = _options_equal_to(part, part.text)
    if len(found) > 1:
        return Reading(letter=None, rule="exact_text:ambiguous")
    return Reading(letter=found[0], rule="exact_text") if found else None


def letter_then_text(part: _Reply) -> Reading | None:
    """Read "(B) door", "B: door"; a letter with another option's text is ambiguous."""
    match = LETTER_THEN_TEXT.fullmatch(part.text)
    if match is None:
        return None
    found = _options_equal_to(part, match[3])
    if match[1].upper() in found:
        return part.letter(match, "letter_then_text")
    return Reading(letter=None, rule="letter_then_text:contradiction") if found else None


def boxed(part: _Reply) -> Reading | None:
    r"""Read "\boxed{B}"."""
    return part.agreed([(m, 1) for m in BOXED.finditer(part.text)], "boxed")


def stated(part: _Reply) -> Reading | None:
    """Read "the answer is (B)", "Answer: B"."""
    found = [(m, 1) for m in STATED.finditer(part.text) if _plausible(part, m)]
    return part.agreed(found, "stated")


def option(part: _Reply) -> Reading | None:
    """Read "Option B", "the correct option is (B) door."."""
    found = [(m, 1) for m in OPTION.finditer(part.text) if _plausible(part, m)]
    return part.agreed(found, "option")


def own_sentence(part: _Reply) -> Reading | None:
    """Read a letter that closes the reply as a sentence of its own: "... than the lamp. B"."""
    match = OWN_SENTENCE.search(part.text)
    return None if match is None else part.letter(match, "own_sentence")


def concluded(part: _Reply) -> Reading | None:
    """Read the only bracketed letter after the last "so", "thus", "therefore", "hence"."""
    conclusion = CONCLUDED.search(part.text)
    if conclusion is None:
        return None
    found = list(BRACKETED.finditer(part.text, conclusion.end()))
    return part.agreed([(m, 1 if m[1] else 2) for m in found], "concluded")


def bracketed(part: _Reply) -> Reading | None:
    """Read "I think it is (B).": one bracketed or bold letter, however often it stands there."""
    found = [(m, 1 if m[1] else 2) for m in BRACKETED.finditer(part.text)]
    return part.agreed(found, "bracketed")


def leading(part: _Reply) -> Reading | None:
    """Read "B. The door is nearer", unless the reply lists other letters in the same way."""
    match = LEADING.match(part.text)
    if match is None:
        return None
    others = [(m, 1) for m in MARKER.finditer(part.text, match.end())]
    return part.agreed([*others, (match, 1)], "leading")


def said(part: _Reply) -> Reading | None:
    """Read "It is B because ...", "I choose C."."""
    return part.agreed([(m, 1) for m in SAID.finditer(part.text)], "said")


def text_mention(part: _Reply) -> Reading | None:
    """Read a short reply that names exactly one option by its text: "The door is closer."

    Longer options are looked for first and claim their words, so that "upper left" does not name
    the option "left".
    """
    spoken = words(part.text)
    if len(spoken) > MAX_WORDS_FOR_TEXT_MENTION or NEGATIONS & set(spoken):
        return None
    claimed = [False] * len(spoken)
    named: list[str] = []
    for i in sorted(range(len(part.options)), key=lambda i: -len(part.options[i])):
        size = len(part.options[i])
        for start in range(len(spoken) - size + 1 if size else 0):
            window = slice(start, start + size)
            if tuple(spoken[window]) == part.options[i] and not any(claimed[window]):
                claimed[window] = [True] * size
                named.append(LETTERS[i])
    if len(set(named)) > 1:
        return Reading(letter=None, rule="text_mention:ambiguous")
    if named and part.options.count(part.options[LETTERS.index(named[0])]) == 1:
        return Reading(letter=named[0], rule="text_mention")
    return None


# The order is the meaning: whole replies first, then statements, then letters, then option texts.
RULES: tuple[Callable[[_Reply], Reading | None], ...] = (
    exact_letter,
    exact_text,
    letter_then_text,
    boxed,
    stated,
    option,
    own_sentence,
    concluded,
    bracketed,
    leading,
    said,
    text_mention,
)
