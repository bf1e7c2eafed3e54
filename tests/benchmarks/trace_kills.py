"""Does a stage that is killed again and again end as one left alone? A table of kills, on the CPU.

    OMP_NUM_THREADS=1 python tests/benchmarks/trace_kills.py --seed 0 --out kills.md

Every kind of stage is trained once undisturbed, and once more while kill -9 ends its process at
random moments: between two steps, while a checkpoint is half written, while the stage is loaded or
its model is written. Then losses, gradient norms and learning rates of all steps are compared, the
final weights byte for byte, and the counts of records. Processes are forked from one that has
imported everything and computed nothing; `--kinds` runs some kinds alone and adds to the table.
"""

import argparse
import importlib
import json
import multiprocessing
import random
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STEPS, SAVE = 20, 4
TRAINING = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": STEPS,
    "save_steps": SAVE,
    "logging_steps": 1,
    "weight_decay": 0.1,
}
BOTH = {"connector": 1e-3, "language_model": 5e-4}
QFORMER = {"type": "qformer", "num_queries": 4, "hidden_dim": 16, "num_layers": 2, "num_heads": 2}
QFORMER |= {"feed_forward_dim": 32, "max_num_positions": 40, "vocab_size": 60, "dropout": 0.1}
LORA = {"type": "lora", "rank": 4, "alpha": 8, "dropout": 0.1}
RATES = {"learning_rate": 5e-4, "layers": "1-", "layer_decay": 0.8}
CHANGE = {"at_step": 9, "trainable": {"connector": 1e-3, "vision_tower": 1e-3}}
# What each kind of stage changes in a plain one; the language model has dropout in all.
KINDS: dict[str, dict[str, Any]] = {
    "align, one worker": {
        "trainable": {"connector": 1e-3},
        "chat_template": "llava_plain",
        "training": {"dataloader_num_workers": 1},
    },
    "instruct, packed": {"packed": True, "loss_weight": "square"},
    "rows filled best-fit, two workers": {
        "packed": {"length": 160, "window": 10},
        "training": {"dataloader_num_workers": 2},
    },
    "sorted by length, validation, a guard against spikes": {
        "length_window": 2,
        "validation": {"every": 5},
        "max_spike": 50.0,
    },
    "records skipped, one worker": {
        "data": {"on_error": "skip"},
        "training": {"dataloader_num_workers": 1},
    },
    "LoRA": {"adapter": LORA},
    "QLoRA (nf4)": {"adapter": LORA, "quantization": "nf4"},
    "EMA and a change at step 9": {"ema": {"decay": 0.9}, "changes": [CHANGE]},
    "layers 1 and above, layer decay": {"trainable": {"connector": 1e-3, "language_model": RATES}},
    "feature cache": {"feature_cache": True},
    "Q-Former's first stage": {"qformer": True},
}
MEASURED = ("per_second", "data_wait_share", "mfu", "peak_memory_gb")  # of the machine


@dataclass(frozen=True)
class Kill:
    """One kill.

    Attributes:
        moment: when it was meant to come; "" if the process ended before.
        step: the last one in the log.
        torn: checkpoints that it left unfinished.
        began: what the process that was killed had gone on from; "" if it did not come so far.
    """

    moment: str
    step: int
    torn: str
    began: str


def write_parts(folder: Path) -> dict[str, Any]:
    """Write base models and records; return the recipe of a plain stage."""
    import numpy as np
    import torch
    from bench_plan import byte_tokenizer
    from PIL import Image
    from transformers import AutoModelForCausalLM, LlamaConfig

    from vlm.encoders import build_vision_encoder

    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2}
    view = {"image_size": 32, "patch_size": 8}
    architecture = {"model_type": "siglip_vision_model", "hidden_size": 24, **sizes, **view}
    half = [0.5, 0.5, 0.5]
    encoder = {"type": "transformers", "architecture": {**architecture, "intermediate_size": 48}}
    encoder |= {"image_mean": half, "image_std": half}
    build_vision_encoder(encoder).save_pretrained(folder / "encoder")
    text = {"vocab_size": 259, "hidden_size": 64, "intermediate_size": 128, **sizes}
    text |= {"bos_token_id": None, "eos_token_id": None, "attention_dropout": 0.1}
    text |= {"max_position_embeddings": 1024}
    language_model = AutoModelForCausalLM.from_config(LlamaConfig(**text))
    language_model.save_pretrained(folder / "language_model")
    byte_tokenizer().save_pretrained(folder / "language_model")
    draw, rows = np.random.default_rng(0), []
    for number in range(30):
        pixels = draw.integers(0, 256, (40, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        said = f"a thing of kind {number % 7}" + " and so on" * (number % 4)
        turns = [("human", "<image>\nWhat?"), ("gpt", said)]
        turns = [{"from": who, "value": value} for who, value in turns]
        rows.append({"id": f"r{number}", "image": f"{number}.png", "conversations": turns})
    (folder / "data.json").write_text(json.dumps(rows))
    for number in (3, 11, 17):
        rows[number]["image"] = "nowhere.png"
    (folder / "faults.json").write_text(json.dumps(rows))
    return {
        "name": "trace",
        "output_dir": str(folder / "run"),
        "num_threads": 1,
        "model": {
            "vision_encoder": {"type": "transformers", "source": str(folder / "encoder")},
            "connector": {"type": "mlp", "depth": 2},
            "language_model": str(folder / "language_model"),
            "chat_template": "chatml",
        },
        "stages": [{"name": "stage", "trainable": BOTH, "training": TRAINING}],
    }


def make_recipe(plain: dict[str, Any], kind: str, parts: Path) -> dict[str, Any]:
    """Return the recipe of a kind of stage."""
    changes = dict(KINDS[kind])
    tree = json.loads(json.dumps(plain))
    (stage,) = tree["stages"]
    stage["training"] |= changes.pop("training", {})
    extra = changes.pop("data", {})
    name = "faults.json" if extra else "data.json"
    sources = [{"name": "records", "path": str(parts / name)}]
    stage["data"] = {"sources": sources, **extra}
    if "validation" in changes:
        changes["validation"] = {**changes["validation"], "data": {"sources": sources}}
    tree["model"]["quantization"] = changes.pop("quantization", None)
    if changes.pop("feature_cache", False):
        tree["feature_cache"] = {"mode": "always"}
    if changes.pop("qformer", False):
        tree["model"] = {"vision_encoder": tree["model"]["vision_encoder"], "connector": QFORMER}
        stage["objective"] = {"type": "qformer_stage1", "shared_dim": 8}
        stage["trainable"] = {"connector": 1e-3}
    stage.update(changes)
    return tree


def start(words: list[str], told: Path) -> Any:
    """Begin `vlm train` in a process of its own; what it prints goes to a file."""
    process = multiprocessing.get_context("fork").Process(target=_train, args=(words, told))
    process.start()
    return process


def _train(words: list[str], told: Path) -> None:
    from vlm.cli import main

    with told.open("w", buffering=1) as file, redirect_stdout(file), redirect_stderr(file):
        code = main(["train", *words])
    sys.exit(code)


def last_step(folder: Path) -> int:
    """Return the last step that a stage has logged."""
    from train.callbacks import read_log

    return max([line["step"] for line in read_log(folder / "training_log.jsonl")], default=0)


def torn_checkpoints(folder: Path) -> list[str]:
    """Return the names of a stage's checkpoints that are not whole."""
    from train.checkpoints import all_checkpoints, is_whole

    return [each.name for each in all_checkpoints(folder / "checkpoints") if not is_whole(each)]


def inode(path: Path) -> int:
    """Return a number that changes when a file is replaced; 0 where there is none."""
    return path.stat().st_ino if path.exists() else 0


def choose_moment(
    draw: random.Random, folder: Path, trains: Callable[[], bool]
) -> tuple[str, Callable[[], bool], float]:
    """Return what a moment is called, when it has come, and seconds to wait after that.

    Args:
        draw: chooses.
        folder: of the stage.
        trains: whether the process has begun to train: the log is its own.
    """
    from train.checkpoints import newest, step_of

    checkpoint = newest(folder / "checkpoints")
    done = step_of(checkpoint) if checkpoint else 0
    kind = draw.choice(["step", "step", "save", "save", "start", "end"])
    if kind == "start" or done >= STEPS:
        return "while it loads or ends", lambda: True, draw.uniform(0.05, 1)
    target = STEPS if kind == "end" else draw.randint(done + 1, min(done + 2 * SAVE, STEPS))
    name = f"in step {target + 1}" if target < STEPS else "after the last step"
    if kind != "save":
        return name, lambda: trains() and last_step(folder) >= target, draw.uniform(0, 0.1)
    target, files = -(-target // SAVE) * SAVE, draw.randint(1, 7)
    saved = folder / "checkpoints" / f"checkpoint-{target}"

    def half_written() -> bool:
        return trains() and last_step(folder) >= target and len(list(saved.glob("*"))) >= files

    return f"saving step {target}", half_written, draw.uniform(0, 0.003)


def kill_once(words: list[str], folder: Path, told: Path, draw: random.Random) -> Kill:
    """Run a stage and kill it at a random moment; the moment is "" if it ended before."""
    log = folder / "training_log.jsonl"
    before = inode(log)

    def trains() -> bool:
        return inode(log) != before

    moment, has_come, wait = choose_moment(draw, folder, trains)
    process = start(words, told)
    while process.is_alive() and not has_come():
        time.sleep(0.0003)
    time.sleep(wait)
    alive = process.is_alive()
    process.kill()
    process.join()
    assert alive or process.exitcode == 0, told.read_text()
    torn = ", ".join(torn_checkpoints(folder))
    began = resumed_from(told) or ("the start" if trains() else "")
    return Kill(moment if alive else "", last_step(folder), torn, began)


def resumed_from(told: Path) -> str:
    """Return which checkpoint a process said it went on from; "" if it said nothing."""
    found = [line for line in told.read_text().splitlines() if line.startswith("going on from")]
    return Path(found[-1].split()[-1]).name if found else ""


def log_of(folder: Path) -> list[dict[str, Any]]:
    """Return a stage's log without what was measured of the machine."""
    from train.callbacks import read_log

    lines = read_log(folder / "training_log.jsonl")
    return [{k: v for k, v in line.items() if not k.endswith(MEASURED)} for line in lines]


def weights_of(folder: Path) -> dict[str, bytes]:
    """Return the bytes of a stage's final weights, its average among them."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def differences(cut: Path, whole: Path) -> str:
    """Return, as cells, whether losses, weights and counts of records of two stages are equal."""
    assert weights_of(cut), "there are none"
    counts = [json.loads((run / "manifest.json").read_text())["records"] for run in (cut, whole)]
    logs, weights = log_of(cut) == log_of(whole), weights_of(cut) == weights_of(whole)
    same = [logs, weights, counts[0] == counts[1]]
    return " | ".join("yes" if each else "**no**" for each in same)


def trace(kind: str, parts: Path, plain: dict[str, Any], kills: int, seed: int) -> list[str]:
    """Return the rows of the table for one kind of stage."""
    import yaml

    folder = Path(tempfile.mkdtemp(dir=parts))
    recipe, draw = folder / "recipe.yaml", random.Random(f"{seed} {kind}")
    recipe.write_text(yaml.safe_dump(make_recipe(plain, kind, parts)))
    told = folder / "told.log"

    def words(run: str) -> list[str]:
        cache = ["--feature_cache.folder", str(folder / f"{run} features")]
        store = cache if "feature_cache" in KINDS[kind] else []
        return [str(recipe), "--output_dir", str(folder / run), *store]

    def finish(run: str) -> str:
        process = start(words(run), told)
        process.join()
        assert process.exitcode == 0, told.read_text()
        return resumed_from(told) or "the start"

    finish("whole")
    rows: list[str] = []
    for run in map(str, range(5)):  # a run may end before its moment comes; then there is another
        found: list[Kill] = []
        while len(rows) + len(found) < kills and (not found or found[-1].moment):
            found.append(kill_once(words(run), folder / run / "stage", told, draw))
        began = [*[each.began for each in found[1:]], finish(run)]
        verdict = differences(folder / run / "stage", folder / "whole" / "stage")
        for number, kill in enumerate(found):
            if kill.moment:  # the next process that came as far as to train tells
                after = next(each for each in began[number:] if each)
                cells = [kind, kill.moment, str(kill.step), kill.torn or "-", after, verdict]
                rows.append(f"| {' | '.join(cells)} |")
    return rows[:kills]


def main() -> None:
    """Trace all kinds, and add their rows to the table as they come."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND")
    parser.add_argument("--kills", type=int, default=3, help="of each kind")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--out", type=Path, default=Path("kills.md"), help="gets the rows")
    args = parser.parse_args()
    import torch

    # imported here, so that no forked process need do it
    for name in ("vlm", "train.run", "torch.utils.tensorboard", "matplotlib.pyplot", "peft"):
        importlib.import_module(name)
    torch.set_num_threads(1)
    head = ["stage", "killed", "last step logged", "torn checkpoints", "resumed from"]
    head += ["losses equal", "weights equal", "records equal"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    with tempfile.TemporaryDirectory() as name:
        plain = write_parts(Path(name))
        for kind in args.kinds:
            rows = trace(kind, Path(name), plain, args.kills, args.seed)
            lines = [] if args.out.exists() else lines
            with args.out.open("a") as file:
                file.write("\n".join([*lines, *rows]) + "\n")
            print("\n".join(rows), flush=True)


if __name__ == "__main__":
    main()
