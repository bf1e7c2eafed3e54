"""Which tiny run do the training tests share? Two stages, 24 records, 20 steps of a second."""

import gc
import json
import multiprocessing
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tqdm import tqdm

from train.mfu import Meter
from vlm.cli import main

QFORMER = {"type": "qformer", "num_queries": 4, "hidden_dim": 16, "num_layers": 2, "num_heads": 2}
QFORMER |= {"feed_forward_dim": 32, "max_num_positions": 20, "vocab_size": 60, "dropout": 0.0}
COLORS, THINGS = ("red", "blue", "green", "grey"), ("ball", "cube", "cone", "box", "pen", "cup")


@pytest.fixture(scope="module", autouse=True)
def frozen() -> None:
    """Leave what was imported for the tests before out of a stage's collections of garbage."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def shown() -> None:
    """Ask for it to have stages draw their plots and count their operations."""


@pytest.fixture(autouse=True)
def bare(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let stages draw and count nothing, which takes a third of ones so short, unless asked to."""
    if "shown" not in request.fixturenames:
        monkeypatch.setattr("train.loop.draw_loss", lambda *_: None)
        monkeypatch.setattr("train.loop.make_meter", lambda *_: Meter(None))


@pytest.fixture
def data_file(tmp_path: Path, make_image: Callable) -> Path:
    """20 records with one of 4 images, 4 of text alone."""
    for number in range(4):
        make_image(seed=number).save(tmp_path / f"{number}.png")
    rows = []
    for number in range(24):
        question = "What?" if number >= 20 else "<image>\nWhat?"
        turns = [
            {"from": "human", "value": question},
            {"from": "gpt", "value": f"thing {number % 4}" + " and so on" * (number % 3)},
        ]
        image = {} if number >= 20 else {"image": f"{number % 4}.png"}
        rows.append({"id": f"r{number}", **image, "conversations": turns})
    path = tmp_path / "data.json"
    path.write_text(json.dumps(rows))
    return path


@pytest.fixture
def tree(
    tmp_path: Path, data_file: Path, encoder_folder: Path, language_model_folder: Path
) -> dict[str, Any]:
    """A recipe as plain values: align trains the connector, instruct the language model too."""
    training = {
        "per_device_train_batch_size": 4,
        "max_steps": 6,
        "save_steps": 2,
        "logging_steps": 1,
    }
    data = {"sources": [{"name": "main", "path": str(data_file)}]}
    return {
        "name": "tiny",
        "output_dir": str(tmp_path / "run"),
        "num_threads": 1,
        "model": {
            "vision_encoder": {"type": "transformers", "source": str(encoder_folder)},
            "connector": {"type": "mlp", "depth": 2},
            "language_model": str(language_model_folder),
            "chat_template": "chatml",
        },
        "stages": [
            {
                "name": "align",
                "trainable": {"connector": 1e-3},
                "chat_template": "llava_plain",
                "data": data,
                "training": dict(training),
            },
            {
                "name": "instruct",
                "trainable": {"connector": 1e-3, "language_model": 5e-4},
                "data": data,
                "training": {**training, "max_steps": 8},
            },
        ],
    }


@pytest.fixture
def write_recipe(tmp_path: Path) -> Callable[[dict[str, Any]], Path]:
    """(tree) -> its YAML file."""

    def write(values: dict[str, Any]) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(values, sort_keys=False))
        return path

    return write


@pytest.fixture
def kill_when(tmp_path: Path) -> Callable[[Sequence[Any], Callable[[], bool]], None]:
    """(words of `vlm train`, condition): run it, and kill -9 it as soon as the condition holds.

    The process is forked from this one, so that it need not import what is imported here.
    """

    def kill(words: Sequence[Any], condition: Callable[[], bool]) -> None:
        told = tmp_path / "killed.log"
        fork = multiprocessing.get_context("fork")
        process = fork.Process(target=_train, args=(list(map(str, words)), told))
        process.start()
        deadline = time.monotonic() + 600  # of a process that hangs, not of a machine that is busy
        try:
            while not condition():
                assert process.is_alive(), told.read_text()
                assert time.monotonic() < deadline
                time.sleep(0.002)
        finally:
            process.kill()
            process.join()

    return kill


def _train(words: list[str], told: Path) -> None:
    # tqdm's lock is shared with forks: one that is killed as it writes would leave it locked here.
    tqdm.set_lock(threading.RLock())
    with told.open("w", buffering=1) as file, redirect_stdout(file), redirect_stderr(file):
        main(["train", *words])


@pytest.fixture
def captions(tmp_path: Path, make_image: Callable) -> Path:
    """24 records, each with a picture and a caption of its own."""
    rows = []
    for number in range(24):
        make_image(seed=number).save(tmp_path / f"{number}.png")
        text = f"A {COLORS[number % 4]} {THINGS[number // 4]}" + " here" * (number % 3)
        turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": text}]
        rows.append({"id": f"r{number}", "image": f"{number}.png", "conversations": turns})
    path = tmp_path / "captions.json"
    path.write_text(json.dumps(rows))
    return path


@pytest.fixture
def two_stages(tree: dict[str, Any], captions: Path) -> dict[str, Any]:
    """The shared recipe with a Q-Former, whose first stage stands where `align` stood."""
    source = {"name": "main", "path": str(captions)}
    tree["model"]["connector"] = dict(QFORMER)
    first, second = tree["stages"]
    first |= {"name": "represent", "data": {"sources": [source]}}
    first["objective"] = {"type": "qformer_stage1", "shared_dim": 8}
    del first["chat_template"]
    second |= {"name": "align", "trainable": {"connector": 1e-3}}
    second["data"] = {"sources": [source]}
    return tree


@pytest.fixture
def first_stage(two_stages: dict[str, Any]) -> dict[str, Any]:
    """The same without its second stage, and without a language model."""
    del two_stages["stages"][1], two_stages["model"]["language_model"]
    del two_stages["model"]["chat_template"]
    return two_stages


def _rank(rank: int, ranks: int, port: int, jobs: Sequence[Sequence[str]]) -> None:
    """Run `vlm` with each of the jobs' words, as one process of several."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    os.environ["MASTER_PORT"] = str(port)
    tqdm.set_lock(threading.RLock())  # as in `_train`
    for words in jobs:
        assert main(["train", *words]) == 0, words


@pytest.fixture
def on_ranks() -> Callable[..., None]:
    """(*jobs, ranks=2, timeout=300) -> run `vlm train` with each job's words in turn, on all ranks.

    Ranks are forks of this process, which spares them the imports. A rank that hangs is killed.
    """

    def run(*jobs: Sequence[str], ranks: int = 2, timeout: float = 300) -> None:
        if any("deepspeed" in word for words in jobs for word in words):
            import deepspeed  # noqa: F401 # pyright: ignore[reportMissingImports]
        gc.collect()
        gc.freeze()  # DeepSpeed collects often
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        started = torch.multiprocessing.start_processes(
            _rank, (ranks, port, jobs), ranks, join=False, start_method="fork"
        )
        assert started is not None
        end = time.monotonic() + timeout
        try:
            while not started.join(max(0, end - time.monotonic())):
                if time.monotonic() > end:
                    raise TimeoutError(f"ranks still run after {timeout} s: {jobs}")
        finally:
            for process in started.processes:
                process.kill()

    return run
