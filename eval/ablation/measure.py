"""What does each trained model cost for one picture or video: tokens, arithmetic, time, memory?

All models are measured in one process on one question, in turns: whatever slows the machine for a
while hits all of them alike. Arithmetic is what torch's FlopCounterMode
counts: matrix products, convolutions and attention (not causal attention's half), one
multiplication and addition being two.

Shapes: B batch, L sequence, T views, S view size.
"""

import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from PIL import Image
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from vlm.loading import load_model
from vlm.video import VideoSource
from vlm.video_sampling import choose_frames

Json = dict[str, Any]
WARM_UP = 2  # calls before the first that is timed
SHARE_OF_MEMORY = 0.5  # of what is free, for the weights of models that are measured in turns


@dataclass(frozen=True)
class Probe:
    """The question that everything is measured on."""

    media: list[Image.Image | VideoSource]
    messages: list[dict[str, Any]]
    blind_messages: list[dict[str, Any]]


@dataclass(frozen=True)
class Picture:
    """Pictures of the benchmark that cost the same.

    Attributes:
        size: (width, height) in pixels.
        siblings: pictures of the same question, itself included.
    """

    size: tuple[int, int]
    siblings: int


@dataclass(frozen=True)
class Clip:
    """Videos of the benchmark that cost the same; `times` are those of all frames, in seconds."""

    times: tuple[float, ...]


Medium = Picture | Clip


class Subject:
    """A loaded model with the inputs of one question."""

    def __init__(self, folder: Path, probe: Probe) -> None:
        self.model, self.processor = load_model(folder)
        self.model.requires_grad_(False)  # FlopCounterMode hooks the gradients of weights passed on
        self.batch = self._batch(probe.messages, probe.media)
        self.blind = self._batch(probe.blind_messages, [])

    def _batch(
        self, messages: list[dict[str, Any]], media: list[Image.Image | VideoSource]
    ) -> dict[str, Any]:
        sample = self.processor.image_processor.sample
        images = [each for each in media if isinstance(each, Image.Image)]
        videos = [sample(each) for each in media if not isinstance(each, Image.Image)]
        encoded = self.processor.encode(messages, images, videos=videos, add_generation_prompt=True)
        batch = self.processor.collate([encoded], padding_side="left")
        return {name: value.to(self.model.device) for name, value in batch.items()}

    @torch.inference_mode()
    def look(self) -> None:
        """Run encoder and connector on the picture."""
        self.model.model.get_view_tokens(self.batch["pixel_values"])
        self._wait()

    @torch.inference_mode()
    def prefill(self, blind: bool = False) -> None:
        """Run the whole model up to the first token of the reply."""
        batch = self.blind if blind else self.batch
        self.model(**batch, use_cache=True, logits_to_keep=1)
        self._wait()

    def _wait(self) -> None:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()


def measure(
    models: Mapping[str, Path], probe: Probe, pictures: Mapping[Medium, int], rounds: int
) -> dict[str, Json]:
    """Return the costs of each model.

    Args:
        models: name -> checkpoint folder.
        probe: one question.
        pictures: how many of each kind, and of each video, the scored questions have.
        rounds: how often each is timed.
    """
    costs: dict[str, Json] = {}
    for names in _groups(models):
        subjects = {name: Subject(models[name], probe) for name in names}
        for name, subject in subjects.items():
            costs[name] = _fixed_costs(subject, pictures)
        for name, both in _times(subjects, rounds).items():
            for part, values in both.items():
                low, _, high = statistics.quantiles(values, n=4)
                costs[name] |= {
                    f"{part}_ms": statistics.median(values),
                    f"{part}_ms_low": low,
                    f"{part}_ms_high": high,
                }
            costs[name]["in_turns"] = len(names) == len(models)
    return costs


def _groups(models: Mapping[str, Path]) -> list[list[str]]:
    """Return all names as one group, or each alone where memory holds no two models at once."""
    weights = sum(file.stat().st_size for f in models.values() for file in f.glob("*.safetensors"))
    if torch.cuda.is_available():
        free = torch.cuda.mem_get_info()[0]
    else:
        free = psutil.virtual_memory().available
    return [list(models)] if weights < SHARE_OF_MEMORY * free else [[name] for name in models]


def _times(subjects: Mapping[str, Subject], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Return the milliseconds of each round, the subjects in turns."""
    times = {name: {"look": [], "prefill": []} for name in subjects}
    for number in range(WARM_UP + rounds):
        for name, subject in subjects.items():
            look, prefill = _milliseconds(subject.look), _milliseconds(subject.prefill)
            if number >= WARM_UP:
                times[name]["look"].append(look)
                times[name]["prefill"].append(prefill)
    return times


def _milliseconds(function: Callable[[], None]) -> float:
    start = time.perf_counter()
    function()
    return 1000 * (time.perf_counter() - start)


def _fixed_costs(subject: Subject, pictures: Mapping[Medium, int]) -> Json:
    """Return tokens, parameters, arithmetic and memory, which do not vary from call to call."""
    model = subject.model
    tokens = sum(_num_tokens(subject, medium) * n for medium, n in pictures.items())
    parts = model.model
    seen = _flops(subject, blind=False)
    total, blind = seen[""], _flops(subject, blind=True)[""]
    encoder = seen.get("model.vision_tower", 0)
    connector = seen.get("model.connector", 0)
    return {
        "visual_tokens": tokens / sum(pictures.values()),
        "parameters_connector": _count(parts.connector),
        "parameters_encoder": _count(parts.vision_tower),
        "parameters": _count(model),
        "flops_encoder": encoder,
        "flops_connector": connector,
        "flops_language_model": total - encoder - connector - blind,
        "prompt_tokens": int(subject.blind["input_ids"].shape[1]),
        "prefill_peak_mb": _peak_bytes(subject) / 1e6,
    }


def _num_tokens(subject: Subject, medium: Medium) -> int:
    """Return the image tokens of a picture or a video; no frame of it is decoded."""
    processor = subject.processor.image_processor
    if isinstance(medium, Picture):
        return processor.num_tokens(medium.size, medium.siblings)
    frames = choose_frames(medium.times, **processor.video_config.sampling())
    return processor.num_tokens_of_grid((1, 1), (0, len(frames)))


def _count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _cpu_attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _flops(subject: Subject, blind: bool) -> dict[str, int]:
    """Return operations of a prefill, in all ("") and in each module by its name."""
    on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    counter = FlopCounterMode(display=False, custom_mapping={on_cpu: _cpu_attention})
    with counter:
        subject.prefill(blind)
    root = type(subject.model).__name__
    found = {"": counter.get_total_flops()}
    for name, counts in counter.get_flop_counts().items():
        if name.startswith(f"{root}."):
            found[name.removeprefix(f"{root}.")] = sum(counts.values())
    return found


def _peak_bytes(subject: Subject) -> int:
    """Return the most bytes that weights and a prefill's tensors take at once."""
    if subject.model.device.type == "cuda":
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        subject.prefill()
        own = torch.cuda.max_memory_allocated() - held
    else:
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or it reports its start and stop
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            subject.prefill()
        results: Any = profiler.profiler
        events = [e for e in results.kineto_results.events() if e.name() == "[memory]"]
        own = total = 0
        for event in sorted(events, key=lambda e: e.start_ns()):
            total += event.nbytes()
            own = max(own, total)
    weights = sum(p.numel() * p.element_size() for p in subject.model.parameters())
    return weights + own
