"""Which batch do the tests of the model share? One image, none, two images, in one batch."""

import pytest

IMAGE = {"type": "image"}


def talk(num_images: int, question: str, answer: str | None = None) -> list[dict]:
    content = [IMAGE] * num_images + [{"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}]
    if answer is not None:
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return messages


@pytest.fixture
def rows(make_image):
    """Encode a mixed batch: one image, none, two images."""

    def encode(processor, supervise: bool = True):
        images = [make_image(48, 40, 1), make_image(90, 30, 2), make_image(30, 90, 3)]
        answers = ("A cat.", "Because.", "No, not at all.") if supervise else (None,) * 3
        return [
            processor.encode(
                talk(n, q, a), ims, supervise=supervise, add_generation_prompt=a is None
            )
            for n, q, a, ims in zip(
                (1, 0, 2),
                ("What?", "Why is it so?", "Same?"),
                answers,
                (images[:1], [], images[1:]),
                strict=True,
            )
        ]

    return encode
