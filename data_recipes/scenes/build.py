"""How do scenes become files? Conversations as LLaVA JSONL, benchmarks as CV-Bench parquet.

    OUT/train/images/*.png, captions.jsonl, questions.jsonl   what the two stages train on
    OUT/test.parquet                                          CV-Bench's four tasks, held out
    OUT/control.parquet                                       Depth with all objects off the ground
    OUT/manifest.json                                         settings and counts; written last

Work is cut into shards with their own seeds, so the files do not depend on the number of processes.
"""

import hashlib
import io
import json
import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from tqdm import tqdm

from data_recipes.scenes import questions as ask
from data_recipes.scenes.layout import Difficulty
from data_recipes.scenes.sets import Example, benchmark_examples, training_examples
from data_recipes.scenes.vocabulary import BOX_NAMES
from vlm.done import make_folder, read_done, write_note
from vlm.errors import UserError

SHARD = 500  # training scenes per shard
# Streams of one seed that must never meet.
TRAIN_STREAM, TEST_STREAM, CONTROL_STREAM = 1, 2, 3

SCHEMA = pa.schema(
    [
        ("idx", pa.int64()),
        ("type", pa.string()),
        ("task", pa.string()),
        ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        ("question", pa.string()),
        ("choices", pa.list_(pa.string())),
        ("answer", pa.string()),
        ("prompt", pa.string()),
        ("filename", pa.string()),
        ("source", pa.string()),
        ("source_dataset", pa.string()),
        ("source_filename", pa.string()),
        ("target_class", pa.string()),
        ("target_size", pa.int64()),
        ("bbox", pa.list_(pa.list_(pa.float64()))),
    ]
)


@dataclass(frozen=True, kw_only=True)
class BuildSettings:
    """What to build; everything that the files depend on.

    Attributes:
        train: scenes to train on.
        test_per_task: least number of questions per benchmark task.
        control: least number of questions of the control benchmark.
        size: side of the pictures in pixels.
        seed: another seed gives other scenes.
        direct_share: share of training questions that ask for the letter alone.
        difficulty: the scenes' knobs.
    """

    train: int = 10_000
    test_per_task: int = 1000
    control: int = 1000
    size: int = 64
    seed: int = 0
    direct_share: float = 0.0
    difficulty: Difficulty = field(default_factory=Difficulty)

    def __post_init__(self) -> None:
        least = {"train": 1, "test_per_task": 1, "control": 1, "size": 8, "seed": 0}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise UserError(f"scenes: {name} must be {low} or more, not {getattr(self, name)}")
        if not 0 <= self.direct_share <= 1:
            raise UserError(f"scenes: direct_share must be from 0 to 1, not {self.direct_share}")


def build(out: Path, settings: BuildSettings, workers: int = 1) -> dict:
    """Write all files below `out` and return the manifest; a finished folder is kept as it is.

    Raises:
        UserError: `out` holds scenes of other settings.
    """
    note = out / "manifest.json"
    manifest = read_done(note, asdict(settings), "scenes")
    if manifest is not None:
        return manifest
    make_folder(out)
    (out / "train" / "images").mkdir(parents=True, exist_ok=True)
    counts: dict[str, Any] = {**_write_training(out / "train", settings, workers)}
    tests = {task: (settings.test_per_task, TEST_STREAM) for task in ask.TASKS}
    counts["test"] = _write_benchmark(out / "test.parquet", tests, settings)
    hovering = replace(
        settings, difficulty=replace(settings.difficulty, solid_share=1.0, floating_share=1.0)
    )
    control = {"Depth": (settings.control, CONTROL_STREAM)}
    counts["control"] = _write_benchmark(out / "control.parquet", control, hovering)
    manifest = {"settings": asdict(settings), "counts": counts}
    write_note(note, manifest)
    return manifest


def _write_training(folder: Path, settings: BuildSettings, workers: int) -> dict[str, int]:
    shards = [
        (folder, settings, start, min(SHARD, settings.train - start))
        for start in range(0, settings.train, SHARD)
    ]
    with (
        (folder / "captions.jsonl").open("w") as captions,
        (folder / "questions.jsonl").open("w") as dialogues,
        _mapping(workers) as each,
        tqdm(total=settings.train, desc="training scenes", unit="scene") as progress,
    ):
        num_questions = 0
        for caption_lines, dialogue_lines, asked in each(_train_shard, shards):
            captions.writelines(caption_lines)
            dialogues.writelines(dialogue_lines)
            num_questions += asked
            progress.update(len(dialogue_lines))
    return {"train": settings.train, "train_questions": num_questions}


@contextmanager
def _mapping(workers: int) -> Iterator[Callable[..., Iterable[Any]]]:
    """Yield a `map` that keeps the order: over processes, or here where one is enough."""
    if workers == 1:
        yield map
        return
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        yield pool.imap


def _train_shard(job: tuple[Path, BuildSettings, int, int]) -> tuple[list[str], list[str], int]:
    folder, settings, start, num = job
    rng = np.random.default_rng([settings.seed, TRAIN_STREAM, start, 1])
    seed = stream_seed(settings.seed, TRAIN_STREAM, start)
    captions, dialogues, asked = [], [], 0
    examples = training_examples(num, settings.size, seed, closer_calls(settings.difficulty))
    for number, example in enumerate(examples, start):
        name = f"images/{number:06d}.png"
        (folder / name).write_bytes(_png(example))
        captions += _captions(number, name, example, rng)
        turns = [_turn(q, rng.random() < settings.direct_share) for q in example.questions]
        dialogues.append(conversation(f"scene-{number:06d}", turns, image=name))
        asked += len(turns)
    return captions, dialogues, asked


def closer_calls(difficulty: Difficulty) -> Difficulty:
    """Return the difficulty of training: half the benchmark's margins, so more can be asked."""
    return replace(
        difficulty,
        depth_ratio=(1 + difficulty.depth_ratio) / 2,
        distance_ratio=(1 + difficulty.distance_ratio) / 2,
    )


def _captions(number: int, image: str, example: Example, rng: np.random.Generator) -> list[str]:
    """Return one record that describes the whole picture, and one that describes named objects."""
    identity, scenes, row = f"scene-{number:06d}", example.scenes, example.row
    lines = [
        conversation(
            f"{identity}-all",
            [(ask.CAPTION_PROMPT, ask.caption(scenes, row))],
            image=image,
        )
    ]
    referring = ask.referring(scenes, row, rng)
    if referring is not None:
        lines.append(conversation(f"{identity}-named", [referring], image=image))
    return lines


def _turn(question: ask.Question, direct: bool) -> tuple[str, str]:
    if direct:
        return question.prompt + ask.LETTER_SUFFIX, question.letter
    return question.prompt, question.reply


def conversation(identity: str, turns: list[tuple[str, str]], **shown: str) -> str:
    """Return one LLaVA record as a line of JSON; the image or video stands before the first turn.

    Args:
        identity: the record's id.
        turns: questions and answers.
        **shown: `image` or `video`: a path.
    """
    (kind,) = shown
    messages = []
    for i, (human, gpt) in enumerate(turns):
        messages.append({"from": "human", "value": (f"<{kind}>\n" if i == 0 else "") + human})
        messages.append({"from": "gpt", "value": gpt})
    return json.dumps({"id": identity, **shown, "conversations": messages}) + "\n"


def _write_benchmark(
    path: Path, tasks: dict[str, tuple[int, int]], settings: BuildSettings
) -> dict[str, int]:
    rows, counts = [], {}
    for task, (num, stream) in tasks.items():
        seed = stream_seed(settings.seed, stream, 0)
        examples = benchmark_examples(task, num, settings.size, seed, settings.difficulty)
        before = len(rows)
        rows += [
            benchmark_row(len(rows) + i, example, settings.size)
            for i, example in enumerate(tqdm(examples, desc=f"{path.stem} {task}", unit="scene"))
        ]
        counts[task] = len(rows) - before
    temporary = path.with_suffix(".tmp")
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), temporary, row_group_size=256)
    temporary.replace(path)
    return counts


def benchmark_row(index: int, example: Example, size: int) -> dict:
    """Return one row in CV-Bench's schema (evaluated exactly like the published files)."""
    question, scenes, row = example.questions[0], example.scenes, example.row
    kind = "3D" if question.task in ("Depth", "Distance") else "2D"
    filename = f"img/{kind}/{question.task.lower()}/scenes_{index}.png"
    counted = question.task == "Count"
    source = "ScenesSolid" if scenes.solid[row] else "ScenesFlat"
    return {
        "idx": index,
        "type": kind,
        "task": question.task,
        "image": {"bytes": _png(example), "path": filename},
        "question": question.text,
        "choices": list(question.choices),
        "answer": question.letter,
        "prompt": question.prompt,
        "filename": filename,
        "source": source,
        "source_dataset": source,
        "source_filename": f"{index}.png",
        "target_class": ask.category_plural(int(scenes.target[row])) if counted else None,
        "target_size": None,
        "bbox": None if counted else list(_boxes(example, size)),
    }


def _boxes(example: Example, size: int) -> Iterator[list[float]]:
    """Yield [left, top, right, bottom] in pixels of the boxed objects, red, blue, green."""
    scenes, row = example.scenes, example.row
    for box in range(1, len(BOX_NAMES)):
        for slot in np.flatnonzero(scenes.box[row] == box):
            x, y, r = scenes.x[row, slot], scenes.y[row, slot], scenes.radius[row, slot]
            yield [round(float(v) * size, 2) for v in (x - r, y - r, x + r, y + r)]


def _png(example: Example) -> bytes:
    assert example.picture is not None
    buffer = io.BytesIO()
    Image.fromarray(example.picture).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def stream_seed(seed: int, stream: int, start: int) -> int:
    """Return a seed of its own for every (seed, stream, start)."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{stream}/{start}".encode()).digest()[:8], "big")
