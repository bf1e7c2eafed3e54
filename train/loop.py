"""How does a stage get to its end? The Trainer with its callbacks, the stop, the final model."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Literal, cast

import torch
from torch import nn
from transformers import PrinterCallback, TrainingArguments
from transformers.integrations.integration_utils import TensorBoardCallback

from data_recipes.dataset import Collator
from train.benchmark import Benchmark, failed_steps
from train.callbacks import JsonLog, LogWithCheckpoint, ProgressLine, StopCleanly, read_log
from train.checkpoints import copy_model, full_disk_told, newest, step_of
from train.data import SkipNotes, dataset_of
from train.engine import whole_models
from train.folders import flush_files
from train.freeze import Group
from train.manifest import StageManifest
from train.mfu import make_meter
from train.order import seen_spans
from train.pack_sampler import PackSampler
from train.parts import StageParts
from train.plot import draw_loss
from train.process import is_main_process, keep_freed_memory, say
from train.recipe import StageRecipe
from train.trainer import VlmTrainer
from train.validation import Validation
from vlm.lean_layers import learn_lean
from vlm.long_context import context_length
from vlm.modeling import VlmForConditionalGeneration

LOG_NAME = "training_log.jsonl"


def make_trainer(
    stage: StageRecipe,
    folder: Path,
    parts: StageParts,
    groups: list[Group],
    arguments: TrainingArguments,
    manifest: StageManifest,
    seed: int,
) -> VlmTrainer:
    """Return the stage's Trainer with everything that watches it."""
    callbacks = [
        LogWithCheckpoint(),
        JsonLog(folder / LOG_NAME),
        manifest,
    ]
    if is_main_process():
        from torch.utils.tensorboard import SummaryWriter

        callbacks.append(TensorBoardCallback(SummaryWriter(str(folder / "tensorboard"))))
    if arguments.device.type == "cpu":
        keep_freed_memory()
        if isinstance(parts.model, VlmForConditionalGeneration):
            learn_lean(parts.model.model.language_model)
    starts = (0, *(change.at_step for change in stage.changes))
    dtype = torch.bfloat16 if arguments.bf16 else torch.float32
    with whole_models(arguments):
        meter = make_meter(parts.model, groups, starts, stage.adapter, arguments.device, dtype)
    if meter.why:
        say(f"MFU is not told: {meter.why}")
    trainer = parts.trainer(
        model=parts.model,
        args=arguments,
        groups=groups,
        on_skip=SkipNotes(folder, arguments.process_index),
        on_engine=manifest.tell_engine,
        dataset=parts.dataset,
        length_window=stage.length_window,
        packing=stage.packing,
        starts=starts,
        ema_decay=None if stage.ema is None else stage.ema.decay,
        max_spike=stage.max_spike,
        meter=meter,
        data_collator=parts.collate,
        processing_class=parts.dataset.processor,
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)  # the progress line shows the same
    if isinstance(trainer.sampler, PackSampler):
        told = f"{trainer.sampler.packs} rows an epoch, {trainer.sampler.fill:.1%} full"
        say(f"packed: {told}")
    _add_measurements(trainer, stage, folder, parts, seed)
    return trainer


def _add_measurements(
    trainer: VlmTrainer, stage: StageRecipe, folder: Path, parts: StageParts, seed: int
) -> None:
    """Add what the recipe wants measured every n steps."""
    if stage.validation is not None:
        data, positions = stage.validation.data, context_length(parts.model.config.text_config)
        lenient = replace(data, on_error="skip")
        held_out = dataset_of(stage, lenient, parts.dataset.processor, seed, positions)
        collate = Collator(parts.dataset.processor, bool(stage.packed))
        every, strict = stage.validation.every, data.on_error == "raise"
        trainer.add_callback(Validation(trainer, held_out, collate, every, strict))
    if stage.benchmark is not None:
        words = stage.benchmark.words()
        trainer.add_callback(Benchmark(trainer, folder, words, stage.benchmark.every))


def train_to_end(
    trainer: VlmTrainer,
    checkpoint: Path | None,
    folder: Path,
    manifest: StageManifest,
    weights: Literal["trained", "average"] = "trained",
) -> None:
    """Train from `checkpoint` (or the start) to the last step and write the stage's model.

    Args:
        trainer: from `make_trainer`.
        checkpoint: the stage's newest.
        folder: the stage's.
        manifest: the stage's.
        weights: which ones the stage ends with.

    Raises:
        KeyboardInterrupt: the user stopped it; the newest checkpoint is whole.
    """
    if checkpoint is not None:
        say(f"going on from {checkpoint}")
        trainer.load_more(checkpoint)
    step = 0 if checkpoint is None else step_of(checkpoint)
    ended = checkpoint if checkpoint is not None and _is_last(checkpoint) else None
    if ended is None:
        with StopCleanly() as stop, ProgressLine(folder.name) as line:
            trainer.add_callback(stop)
            trainer.add_callback(line)
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        step = trainer.state.global_step
        if stop.stopped:
            _draw(folder)
            manifest.write("interrupted")
            say(f"stopped; {newest(folder / 'checkpoints')} is saved, the same command goes on")
            raise KeyboardInterrupt
    with full_disk_told("the stage's model", folder / "checkpoints"):
        _write_final(trainer, ended, folder, weights)
    trainer.accelerator.wait_for_everyone()
    if is_main_process():
        _draw(folder)
        flush_files(folder)
        figures = {"weights": weights, **trainer.final_figures()}
        if failed := failed_steps(folder):
            figures["benchmark_failed_at"] = failed
        manifest.finish(step, records_seen(trainer, step), figures)
        say(f"stage {folder.name}: done, {folder}")
    trainer.accelerator.wait_for_everyone()


def _write_final(trainer: VlmTrainer, ended: Path | None, folder: Path, weights: str) -> None:
    """Write the stage's model.

    Args:
        trainer: holds the weights of the last step.
        ended: the checkpoint of the last step, where the stage was killed after it.
        folder: the stage's.
        weights: "average" puts the average in place of the weights first.
    """
    average = trainer.average
    if weights == "average" and average is not None:
        average.copy_to(cast(nn.Module, trainer.model))
    elif ended is not None:
        if is_main_process():
            copy_model(ended, folder)
        return
    trainer.save_model(str(folder))
    if weights == "trained" and average is not None:
        average.save(folder)


def records_seen(trainer: VlmTrainer, step: int) -> dict[str, int]:
    """Return how many records of each source the steps so far asked for, skipped ones included."""
    mixture, seen = trainer.dataset.mixture, Counter()
    for span in seen_spans(trainer.sampler, trainer.args, step):
        seen.update(mixture.seen(*span))
    return {source.name: seen[source.name] for source in mixture.sources}


def _is_last(checkpoint: Path) -> bool:
    """Return whether a checkpoint is that of the stage's last step."""
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    return state["global_step"] >= state["max_steps"]


def _draw(folder: Path) -> None:
    if is_main_process():
        title = f"{folder.parent.name}: {folder.name}"
        draw_loss(read_log(folder / LOG_NAME), title, folder / "loss.png")
