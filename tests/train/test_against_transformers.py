"""Does a recipe learn what transformers' own class and Trainer learn, on the same records?"""

import pytest

BENCHMARKS = __file__.replace("train/test_against_transformers.py", "benchmarks")


def test_losses_are_those_of_llava_next(tmp_path, monkeypatch) -> None:
    """The benchmark of the training speed, in miniature."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    from training_sides import Shape, prepare, train_ours
    from training_theirs import train_theirs

    shape = Shape(
        hidden_size=64,
        intermediate_size=128,
        num_layers=2,
        vocab_size=300,
        batch_size=2,
        vision_layers=2,
        vision_dim=64,
    )
    prepare(shape, tmp_path, steps=3)
    theirs, ours = train_theirs(shape, tmp_path, 3), train_ours(shape, tmp_path, 3)
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-5)
    assert len(ours.losses) == 3 and len(set(ours.losses)) == 3
    assert max(theirs.padding) > 0
