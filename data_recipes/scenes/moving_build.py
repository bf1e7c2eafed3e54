"""How do moving scenes become files? Clips as MP4, LLaVA JSONL, and a benchmark with its controls.

    OUT/train/videos/*.mp4, questions.jsonl      what a stage trains on
    OUT/test.parquet, test/*.mp4                 four tasks, held out; `video` is a path beside it
    OUT/first_frame.parquet, first_frame/*.mp4   the same questions; every frame is the clip's first
    OUT/last_frame.parquet, last_frame/*.mp4     every frame is its last
    OUT/manifest.json                            settings and counts; written last

A training record asks about what moves and about what appears, once each: two questions about the
same thing would answer each other. In the benchmark every option of a task is right equally often,
and so is every letter. The controls say what one frame tells. The first tells nothing: whoever
answers it better than by chance has found a leak. The last tells something (more objects, more that
may have come); a model that answers it as well as the clip does not look at what came before.
"""

import multiprocessing
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from data_recipes.scenes import moving_questions as ask
from data_recipes.scenes.build import conversation, stream_seed
from data_recipes.scenes.layout import Difficulty
from data_recipes.scenes.moving import (
    DIRECTIONS,
    FRAMES_PER_SECOND,
    MOST_APPEARING,
    MovingBatch,
    render_clips,
    sample_moving,
)
from data_recipes.scenes.questions import Question
from vlm.done import make_folder, read_done, write_note
from vlm.errors import UserError

SHARD = 100  # clips drawn together
TRAIN_STREAM, TEST_STREAM = 11, 12  # streams of one seed that must never meet
SETS = {  # of the benchmark -> the frames (S, F, P, P, 3) that are shown
    "test": lambda clips: clips,
    "first_frame": lambda clips: np.repeat(clips[:, :1], clips.shape[1], axis=1),
    "last_frame": lambda clips: np.repeat(clips[:, -1:], clips.shape[1], axis=1),
}
SCHEMA = pa.schema(
    [
        ("idx", pa.int64()),
        ("type", pa.string()),
        ("task", pa.string()),
        ("video", pa.string()),
        ("question", pa.string()),
        ("choices", pa.list_(pa.string())),
        ("answer", pa.string()),
        ("prompt", pa.string()),
        ("source", pa.string()),
    ]
)


@dataclass(frozen=True, kw_only=True)
class MovingSettings:
    """What to build; everything that the files depend on."""

    train: int = 6000
    test_per_task: int = 576  # truths and letters of 2, 3 and 4 options come out even
    size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low in {"train": 1, "test_per_task": 1, "size": 8, "seed": 0}.items():
            if getattr(self, name) < low:
                raise UserError(
                    f"moving scenes: {name} must be {low} or more, not {getattr(self, name)}"
                )


def build_moving(out: Path, settings: MovingSettings, workers: int = 1) -> dict:
    """Write all files below `out` and return the manifest; a finished folder is kept as it is.

    Raises:
        UserError: `out` holds scenes of other settings, or PyAV is missing.
    """
    note = out / "manifest.json"
    manifest = read_done(note, asdict(settings), "moving scenes")
    if manifest is not None:
        return manifest
    make_folder(out)
    for folder in ("train/videos", *SETS):
        (out / folder).mkdir(parents=True, exist_ok=True)
    jobs = [(out, settings, start) for start in range(0, settings.train, SHARD)]
    lines: list[str] = []
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        for written in tqdm(pool.imap(_train_shard, jobs), total=len(jobs), desc="training clips"):
            lines += written
        tests = [(out, settings, task) for task in ask.TASKS]
        rows = [row for part in pool.imap(_test_shard, tests) for row in part]
    (out / "train/questions.jsonl").write_text("".join(lines))
    for name in SETS:
        numbered = [
            {**row, "idx": i, "video": f"{name}/{row['video']}"} for i, row in enumerate(rows)
        ]
        pq.write_table(pa.Table.from_pylist(numbered, SCHEMA), out / f"{name}.parquet")
    counts = {"train": settings.train, "test": {task: settings.test_per_task for task in ask.TASKS}}
    manifest = {"settings": asdict(settings), "counts": counts}
    write_note(note, manifest)
    return manifest


def _train_shard(job: tuple[Path, MovingSettings, int]) -> list[str]:
    """Write some training clips, and return their records: every question, in random order."""
    out, settings, start = job
    num = min(SHARD, settings.train - start)
    seed = stream_seed(settings.seed, TRAIN_STREAM, start)
    rng = np.random.default_rng(seed)
    batch = sample_moving(
        rng, rng.integers(0, len(DIRECTIONS), num), rng.integers(0, MOST_APPEARING + 1, num)
    )
    clips = render_clips(batch, settings.size, seed, Difficulty().noise)
    lines = []
    for row in range(num):
        name = f"videos/{start + row:06d}.mp4"
        write_clip(out / "train" / name, clips[row])
        for number, tasks in enumerate(_pairs(batch, row, rng)):
            places = [int(rng.integers(ask.NUM_CHOICES[task])) for task in tasks]
            questions = [
                ask.ask(task, batch, row, place, rng)
                for task, place in zip(tasks, places, strict=True)
            ]
            turns = [(question.prompt, question.reply) for question in questions]
            lines.append(conversation(f"clip-{start + row:06d}-{number}", turns, video=name))
    return lines


def _pairs(batch: MovingBatch, row: int, rng: np.random.Generator) -> list[list[str]]:
    """Return the tasks of a clip's two records, each in random order."""
    moving, appearing = ["Direction", "Mover"], ["Appear"]
    if len(batch.slots(row, appearing=True)) > 1:
        appearing.append("First")
    moving = [moving[i] for i in rng.permutation(2)]
    appearing = [appearing[i] for i in rng.permutation(len(appearing))]
    pairs = [moving[:1] + appearing[:1], moving[1:] + appearing[1:]]
    return [[pair[i] for i in rng.permutation(len(pair))] for pair in pairs]


def _test_shard(job: tuple[Path, MovingSettings, str]) -> list[dict[str, Any]]:
    """Write a task's clips and their controls, which stand still; return its rows."""
    out, settings, task = job
    rows = []
    for start, batch, questions in benchmark(task, settings.test_per_task, settings.seed):
        seed = stream_seed(settings.seed, TEST_STREAM, start)
        clips = render_clips(batch, settings.size, seed, Difficulty().noise)
        names = [f"{task.lower()}_{start + row:05d}.mp4" for row in range(len(questions))]
        for folder, shown in SETS.items():
            for name, frames in zip(names, shown(clips), strict=True):
                write_clip(out / folder / name, frames)
        rows += [benchmark_row(*each) for each in zip(names, questions, strict=True)]
    return rows


def benchmark(task: str, num: int, seed: int) -> Iterator[tuple[int, MovingBatch, list[Question]]]:
    """Yield (number of the first, clips, their questions): truths and letters take turns."""
    choices = ask.NUM_CHOICES[task]
    for start in range(0, num, SHARD):
        numbers = np.arange(start, min(start + SHARD, num))
        rng = np.random.default_rng(stream_seed(seed, TEST_STREAM, start) + ask.TASKS.index(task))
        direction = rng.integers(0, len(DIRECTIONS), len(numbers))
        low = 2 if task == "First" else 0
        appearing = rng.integers(low, MOST_APPEARING + 1, len(numbers))
        turn = (numbers // choices) % choices  # so that every truth meets every letter
        if task == "Direction":
            direction = turn
        if task == "Appear":
            appearing = turn
        batch = sample_moving(rng, direction, appearing)
        places = (numbers % choices).tolist()
        yield start, batch, [ask.ask(task, batch, i, p, rng) for i, p in enumerate(places)]


def benchmark_row(name: str, question: Question) -> dict[str, Any]:
    """Return one row in CV-Bench's columns, with a `video` in place of the image."""
    return {
        "type": "Video",
        "task": question.task,
        "video": name,
        "question": question.text,
        "choices": list(question.choices),
        "answer": question.letter,
        "prompt": question.prompt,
        "source": "MovingScenes",
    }


def write_clip(path: Path, frames: np.ndarray) -> None:
    """Write pictures (F, P, P, 3) as an MP4 that is near to lossless.

    Raises:
        UserError: PyAV is not installed.
    """
    from vlm.video_file import pyav

    options = {"preset": "ultrafast", "crf": "8", "threads": "1"}
    with pyav().open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FRAMES_PER_SECOND, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv444p"
        for picture in frames:
            frame = pyav().VideoFrame.from_ndarray(np.ascontiguousarray(picture), "rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
