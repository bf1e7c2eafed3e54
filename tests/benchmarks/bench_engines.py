"""Does every engine learn what one process learns, whatever trains? A table, two ranks on the CPU.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_engines.py [--rows 'tied;DoRA'] [--engines DDP]

Each row is a way to train a small random model: one process takes batches of 4, two processes of 2
each. Told is the largest difference of a step's loss. In bfloat16 engines round at other places:
there an engine on two processes is compared with itself on one, which stands beside what that one
differs by if it takes its 4 records in two halves, and by from none of these engines.
"""

import argparse
import json
import os
import socket
import sys
import tempfile
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

STEPS = 8
ENGINES: dict[str, dict[str, Any]] = {
    "DDP": {},
    "ZeRO-1": {"deepspeed": "zero1"},
    "ZeRO-2": {"deepspeed": "zero2"},
    "ZeRO-2, optimizer on the host": {"deepspeed": "zero2_offload"},
    "ZeRO-3": {"deepspeed": "zero3"},
    "ZeRO-3, optimizer and weights on the host": {"deepspeed": "zero3_offload"},
    "FSDP2": {"fsdp": True},
}
LORA = {"type": "lora", "rank": 4, "alpha": 8, "dropout": 0.0}
CASES: dict[str, dict[str, Any]] = {
    "in full": {},
    "tied": {"language_model": {"tie_word_embeddings": True}},
    "LoRA": {"adapter": LORA},
    "LoRA, tied": {"adapter": LORA, "language_model": {"tie_word_embeddings": True}},
    "DoRA": {"adapter": {**LORA, "dora": True}},
    "NF4, LoRA": {"adapter": LORA, "model": {"quantization": "nf4"}},
    "int8, LoRA": {"adapter": LORA, "model": {"quantization": "int8"}},
    "bf16": {"training": {"bf16": True}},
    "bf16, tied": {"training": {"bf16": True}, "language_model": {"tie_word_embeddings": True}},
    "bf16, LoRA": {"training": {"bf16": True}, "adapter": LORA},
    "bf16, LoRA, weights in bfloat16": {
        "training": {"bf16": True},
        "adapter": LORA,
        "model": {"dtype": "bfloat16"},
    },
    "bf16, DoRA": {"training": {"bf16": True}, "adapter": {**LORA, "dora": True}},
}


def make_case(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Write models and data into the folder, 4 of 24 records without a picture; return a recipe."""
    from bench_plan import TINY, make_recipe

    tied = {"tie_word_embeddings": False, **case.get("language_model", {})}
    shape = {**TINY, "language_model": {**TINY["language_model"], "num_hidden_layers": 2, **tied}}
    shape["trainable"] = {"connector": 1e-3, "language_model": 5e-4}
    recipe = make_recipe({**shape, "training": {}}, folder)
    rows = json.loads((folder / "data.json").read_text())
    for number in range(16, 20):
        turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "nothing " * number}]
        rows.append({"id": str(number), "conversations": turns})
    (folder / "data.json").write_text(json.dumps(rows))
    recipe["model"] |= case.get("model", {})
    stage = recipe["stages"][0]
    stage["adapter"] = case.get("adapter")
    stage["training"] = {
        "logging_steps": 1,
        "max_steps": STEPS,
        "save_steps": STEPS,
        "use_cpu": True,
    }
    stage["training"] |= case.get("training", {})
    return recipe


def train(recipe: dict[str, Any], folder: Path, size: int, training: dict[str, Any]) -> None:
    """Train a recipe in a folder, as this process's rank."""
    import yaml

    from vlm.cli import main

    name = f"recipe.{os.environ.get('RANK', '0')}.yaml"
    stage = {**recipe["stages"][0]}
    stage["training"] = {**stage["training"], "per_device_train_batch_size": size} | training
    path = folder.with_name(f"{folder.name}.{name}")
    path.write_text(yaml.safe_dump({**recipe, "output_dir": str(folder), "stages": [stage]}))
    if main(["train", str(path)]):
        raise SystemExit(1)


def losses(folder: Path) -> list[float]:
    """Return those of all steps."""
    from train.callbacks import read_log

    return [line["loss"] for line in read_log(folder / "stage" / "training_log.jsonl")]


def be_a_rank(rank: int, ranks: int, port: int, told: Path, given: tuple[Any, ...]) -> None:
    """Be one process of several; what the libraries print goes into a file, too."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    os.environ["MASTER_PORT"] = str(port)
    with told.open("a", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        with redirect_stdout(file), redirect_stderr(file):
            train(*given)


def on_ranks(ranks: int, *given: Any, timeout: float = 300) -> list[float]:
    """Train on several processes, forks of this one; return the losses.

    Raises:
        RuntimeError: it failed; with the last lines that were told.
    """
    import torch
    from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder: Path = given[1]
    told = folder.with_suffix(".log")
    started: Any = torch.multiprocessing.start_processes(  # pyright: ignore[reportPrivateImportUsage]
        be_a_rank, (ranks, port, told, given), ranks, join=False, start_method="fork"
    )
    end = time.monotonic() + timeout
    try:
        while not started.join(1):
            if time.monotonic() > end:
                raise TimeoutError(f"still runs after {timeout} s")
    except (ProcessExitedException, ProcessRaisedException, TimeoutError) as error:
        words = told.read_text().splitlines()[-1:] if told.exists() else []
        words = words or [str(error)]
        raise RuntimeError(words[0]) from error
    finally:
        for process in started.processes:
            process.kill()
    return losses(folder)


def alone(*given: Any) -> list[float]:
    """Train in this process, which then has imported what its forks need; return the losses."""
    folder: Path = given[1]
    with folder.with_suffix(".log").open("a") as file, redirect_stdout(file), redirect_stderr(file):
        train(*given)
    return losses(folder)


def distance(one: list[float], other: list[float]) -> str:
    """Return the largest difference of two lists."""
    assert len(one) == len(other) == STEPS
    return f"{max(abs(a - b) for a, b in zip(one, other, strict=True)):.1e}"


def measure(case: dict[str, Any], engines: list[str], folder: Path) -> dict[str, str]:
    """Return what each engine on two processes differs by from one process.

    In bfloat16 engines round at other places: each is compared with its own on one process, and so
    is that one with itself in halves, and with none of these engines: three numbers.
    """
    recipe = make_case(case, folder)
    plain = alone(recipe, folder / "one", 4, {})
    found = {}
    for engine in engines:

        def run(ranks: int, size: int, part: int = 1, engine: str = engine) -> list[float]:
            place = folder / f"{engine}.{ranks}.{size}".replace(" ", "_")
            training = {**ENGINES[engine], "gradient_accumulation_steps": part}
            return on_ranks(ranks, recipe, place, size, training)

        try:
            told = run(2, 2)
            found[engine] = distance(told, plain)
            if "training" in case and engine != "DDP":
                one, halves = run(1, 4), run(1, 2, part=2)
                pairs = (told, one), (halves, one), (one, plain)
                found[engine] = " / ".join(distance(*pair) for pair in pairs)
        except RuntimeError as error:
            refused = "would cut quantised weights" in str(error)
            found[engine] = "refused" if refused else str(error)
    return found


def table(found: dict[str, dict[str, str]], engines: list[str]) -> str:
    """Return a row for each engine and a column for each way to train, in Markdown."""
    rows = [["engine", *found], ["---"] * (len(found) + 1)]
    rows += [[engine, *(told[engine] for told in found.values())] for engine in engines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", default=";".join(CASES), help="ways to train, with ; between")
    parser.add_argument("--engines", default=";".join(ENGINES), help="likewise")
    parser.add_argument("--keep", type=Path, help="folder for models and logs")
    options = parser.parse_args()
    import deepspeed  # noqa: F401 # pyright: ignore[reportMissingImports]

    import vlm  # noqa: F401

    engines = options.engines.split(";")
    found = {}
    for row in options.rows.split(";"):
        with tempfile.TemporaryDirectory() as name:
            folder = (options.keep or Path(name)) / row.replace(" ", "_").replace(",", "")
            folder.mkdir(parents=True)
            found[row] = measure(CASES[row], engines, folder)
        print(row, found[row], file=sys.stderr)
    print(table(found, engines))


if __name__ == "__main__":
    main()
