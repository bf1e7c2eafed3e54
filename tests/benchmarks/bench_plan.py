"""Is the memory that `vlm plan` tells the memory that training takes? A table, on the CPU.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_plan.py --quickstart runs/quickstart

Each case trains a few steps in a process of its own, with the suite's own Trainer. Measured is the
peak of the resident set in those steps, less what the process held after it had trained a tiny
model: libraries, kernels and buffers that do not grow with the model. Blocks of 64 KiB and more are
given back to the system at once (MALLOC_MMAP_THRESHOLD_), as a GPU's allocator reuses them; without
that the C library keeps holes that no plan can know.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
STEPS = 2
SMALL = {"hidden_size": 384, "num_hidden_layers": 6, "vocab_size": 16000}
# Language model, vision layers, what trains, `training:`; the rest is the same.
SHAPES: dict[str, dict[str, Any]] = {
    "head of 0.8 of the parameters": {
        "language_model": {"hidden_size": 320, "num_hidden_layers": 8, "vocab_size": 152000},
        "tiling": {"type": "anyres"},
        "trainable": {"connector": 1e-4, "language_model": 1e-4},
        "training": {"per_device_train_batch_size": 4},
    },
    "everything trains, checkpointed": {
        "language_model": SMALL,
        "trainable": {"vision_tower": 1e-4, "connector": 1e-4, "language_model": 1e-4},
        "training": {"per_device_train_batch_size": 4, "gradient_checkpointing": True},
    },
    "connector alone, accumulated": {
        "language_model": SMALL,
        "trainable": {"connector": 1e-4},
        "training": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
    },
    "bfloat16 autocast": {
        "language_model": SMALL,
        "trainable": {"connector": 1e-4, "language_model": 1e-4},
        "training": {"per_device_train_batch_size": 4, "bf16": True, "use_cpu": True},
    },
}
# A language model whose layers outweigh its embedding, as those that are adapted do.
LARGE = {
    "language_model": {"hidden_size": 768, "num_hidden_layers": 8, "vocab_size": 8000},
    "trainable": {"connector": 1e-4, "language_model": 1e-4},
    "training": {"per_device_train_batch_size": 4},
}
ADAPTER = {"type": "lora", "rank": 32, "alpha": 64}
CHECKPOINTED = {"per_device_train_batch_size": 4, "gradient_checkpointing": True}
SHAPES |= {
    "LoRA": {**LARGE, "adapter": ADAPTER},
    "DoRA, checkpointed": {
        **LARGE,
        "adapter": {**ADAPTER, "dora": True},
        "training": CHECKPOINTED,
    },
    "NF4 with LoRA": {**LARGE, "adapter": ADAPTER, "quantization": "nf4"},
    "NF4 with LoRA, checkpointed": {
        **LARGE,
        "adapter": ADAPTER,
        "quantization": "nf4",
        "training": CHECKPOINTED,
    },
    "int8 with LoRA": {**LARGE, "adapter": ADAPTER, "quantization": "int8"},
}
TINY = {
    "language_model": {"hidden_size": 64, "num_hidden_layers": 1, "vocab_size": 300},
    "vision": {"hidden_size": 32, "num_hidden_layers": 1},
    "trainable": {"vision_tower": 1e-4, "connector": 1e-4, "language_model": 1e-4},
    "training": {"per_device_train_batch_size": 2},
}


def byte_tokenizer() -> Any:
    """Return a tokenizer of 256 bytes and 3 special tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def make_recipe(shape: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Write random base models and data into the folder; return a recipe as plain values."""
    import numpy as np
    from PIL import Image
    from transformers import AutoModelForCausalLM, Qwen2Config

    from vlm.encoders import build_vision_encoder

    vision = {"hidden_size": 256, "num_hidden_layers": 8, **shape.get("vision", {})}
    architecture = {
        "model_type": "siglip_vision_model",
        "intermediate_size": 4 * vision["hidden_size"],
        "num_attention_heads": 4,
        "image_size": 112,
        "patch_size": 14,
        **vision,
    }
    half = [0.5, 0.5, 0.5]
    config = {"type": "transformers", "architecture": architecture}
    encoder = build_vision_encoder({**config, "image_mean": half, "image_std": half})
    encoder.save_pretrained(folder / "encoder")
    text = {"num_attention_heads": 8, "num_key_value_heads": 2, "eos_token_id": None}
    text |= {"bos_token_id": None, "tie_word_embeddings": True, **shape["language_model"]}
    text["intermediate_size"] = 4 * text["hidden_size"]
    model = AutoModelForCausalLM.from_config(Qwen2Config(**text))
    model.save_pretrained(folder / "language_model")
    byte_tokenizer().save_pretrained(folder / "language_model")
    draw = np.random.default_rng(0)
    rows = []
    for number in range(16):
        size = tuple(int(side) for side in draw.integers(80, 500, 2))
        pixels = draw.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        said = "".join(chr(97 + int(i)) for i in draw.integers(0, 26, int(draw.integers(40, 200))))
        turns = [("human", "<image>\nWhat is it?"), ("gpt", said)]
        turns = [{"from": who, "value": value} for who, value in turns]
        rows.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
    (folder / "data.json").write_text(json.dumps(rows))
    return {
        "name": "bench",
        "output_dir": str(folder / "run"),
        "num_threads": 1,
        "model": {
            "vision_encoder": {"type": "transformers", "source": str(folder / "encoder")},
            "connector": {"type": "mlp", "depth": 2},
            "language_model": str(folder / "language_model"),
            "tiling": shape.get("tiling", {"type": "resize"}),
            "chat_template": "chatml",
            "quantization": shape.get("quantization"),
        },
        "stages": [
            {
                "name": "stage",
                "trainable": shape["trainable"],
                "adapter": shape.get("adapter"),
                "data": {"sources": [{"name": "data", "path": str(folder / "data.json")}]},
                "training": {**shape["training"], "max_steps": STEPS, "save_strategy": "no"},
            }
        ],
    }


def plan_bytes(recipe: Any, stage: str) -> dict[str, float]:
    """Return what the plan says of a stage on this machine."""
    from train.planning.gpus import GPUS
    from train.planning.plan import Options, make_plan

    options = Options(1, GPUS["H100"], 80.0, 0, 0.4, ((112, 112),), {}, {}, 64)
    planned = make_plan(recipe, options, stage).stages[0]
    memory = planned.memory
    kept = memory.weights + memory.gradients + memory.optimizer
    return {"states": kept, "activations": memory.activations, "all": memory.total}


def train(recipe: Any, stage: str, folder: Path) -> int:
    """Train a stage's first steps; return the peak of the resident set in them, in bytes."""
    from transformers import TrainerCallback

    from train.arguments import training_arguments
    from train.freeze import freeze
    from train.loop import make_trainer
    from train.manifest import StageManifest
    from train.parts import stage_parts
    from train.process import seed_everything, set_up_torch

    class Peak(TrainerCallback):
        """Takes the peak of the steps alone."""

        bytes = 0

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            Path("/proc/self/clear_refs").write_text("5")

        def on_train_end(self, *_: Any, **__: Any) -> None:
            self.bytes = resident("VmHWM")

    set_up_torch(recipe)
    seed_everything(recipe.seed)
    (chosen,) = (s for s in recipe.stages if s.name == stage)
    folder.mkdir(parents=True)
    parts = stage_parts(recipe, chosen, None, None)
    for parameter in parts.model.parameters():
        # Off the pages of the file: these stay mapped as long as one tensor lies in them.
        parameter.data = parameter.data.clone()
    groups = freeze(parts.model, chosen.trainable)
    arguments = training_arguments(recipe, chosen, folder)
    manifest = StageManifest(folder, recipe, chosen, arguments.device)
    trainer = make_trainer(chosen, folder, parts, groups, arguments, manifest, recipe.seed)
    peak = Peak()
    trainer.add_callback(peak)
    trainer.train()
    return peak.bytes


def resident(name: str) -> int:
    """Return a line of this process's memory in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(name)


def measure(case: str, quickstart: str) -> dict[str, float]:
    """Plan and train one case; meant for a process of its own."""
    import gc

    from train.recipe import load_recipe, parse_recipe

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if case in SHAPES:
            stage, recipe = "stage", parse_recipe(make_recipe(SHAPES[case], folder), "bench")
        else:
            stage = case.removeprefix("quickstart ")
            changes = ["--num_threads", "1", "--output_dir", str(folder / "run")]
            changes += [f"--stages.{stage}.training.max_steps", str(STEPS)]
            changes += [f"--stages.{stage}.training.save_strategy", "'no'"]
            text = (ROOT / "train/recipes/quickstart.yaml").read_text()
            (folder / "recipe.yaml").write_text(text.replace("runs/quickstart", quickstart))
            recipe = load_recipe(folder / "recipe.yaml", changes)
        tiny = folder / "tiny"
        tiny.mkdir()
        # With what the case needs of libraries, so that these are loaded before.
        needs = {key: SHAPES.get(case, {}).get(key) for key in ("adapter", "quantization")}
        train(parse_recipe(make_recipe(TINY | needs, tiny), "tiny"), "stage", tiny / "stage")
        planned = plan_bytes(recipe, stage)
        gc.collect()
        before = resident("VmRSS")
        return {**planned, "measured": train(recipe, stage, folder / "out") - before}


def main() -> None:
    """Measure all cases and print a Markdown table."""
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--quickstart", metavar="DIR", help="a finished one: its base models and data"
    )
    parser.add_argument("--cases", nargs="+", metavar="CASE", help="these alone")
    parser.add_argument("--one", metavar="CASE", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one, args.quickstart)))
        return
    cases = [*SHAPES, *(["quickstart align", "quickstart instruct"] if args.quickstart else [])]
    cases = args.cases or cases
    print("| MB | model and optimizer | activations | planned | measured | planned / measured |")
    print("|---|---|---|---|---|---|")
    for case in cases:
        words = [sys.executable, __file__, "--one", case]
        words += ["--quickstart", args.quickstart] if args.quickstart else []
        keep = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
        process = subprocess.run(words, capture_output=True, text=True, env={**os.environ, **keep})
        assert process.returncode == 0, process.stderr[-3000:]
        told = json.loads(process.stdout.splitlines()[-1])
        cells = [told[key] / 1e6 for key in ("states", "activations", "all", "measured")]
        ratio = told["all"] / told["measured"]
        print(
            f"| {case} | " + " | ".join(f"{c:.0f}" for c in cells) + f" | {ratio:.2f} |", flush=True
        )


if __name__ == "__main__":
    main()
