"""What does one micro-batch of a stage cost, in bytes at the peak and in operations?

Shapes: B rows, L tokens of a row, T views, S view size.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from train.planning.kernels import Autocast, fused_attention, gpu_kernels
from train.planning.rehearsal import META, Rehearsal
from vlm.instructions import IDS, MASK
from vlm.modeling import VlmForConditionalGeneration
from vlm.processing import IGNORE
from vlm.tiling import Size
from vlm.token_layout import num_image_tokens

INSTRUCTION_TOKENS = 32  # of a question, where the connector reads it
LOSS = "loss"  # the head's and the loss's share, beside the parts


@dataclass(frozen=True)
class Sample:
    """One record as far as cost goes; sizes are (width, height) in pixels."""

    image_sizes: tuple[Size, ...]
    text_tokens: int  # all but the images' and the videos'
    supervised_tokens: int  # of the text
    frames: tuple[int, ...] = ()  # of each video


@dataclass(frozen=True)
class Pack:
    """The records that share one filled row, each a document of its own."""

    documents: tuple[Sample, ...]


@dataclass(frozen=True)
class StepCost:
    """One micro-batch, forward and backward, on one device.

    Attributes:
        rows: B.
        length: L.
        views: T.
        activations: most bytes alive beside the model, gradients of parameters left out.
        with_gradients: the same with gradients, where the step begins without any.
        forward, backward: part -> floating point operations.
        recomputed: operations that checkpoints run a second time.
        attention: of forward and backward, those that grow with the square of L.
    """

    rows: int
    length: int
    views: int
    activations: int
    with_gradients: int
    forward: dict[str, int]
    backward: dict[str, int]
    recomputed: int
    attention: int

    @property
    def flops(self) -> int:
        """Operations of the forward and the backward pass, recomputation left out."""
        return sum(self.forward.values()) + sum(self.backward.values())


def plan_views(model: Any, sample: Sample) -> tuple[list[Size], int, int]:
    """Return (grid of each image, then of each video; their tokens; their views) of a sample."""
    parts = model.model
    size, grid = parts.vision_tower.image_size, parts.view_token_grid()
    plans = [
        parts.tiling.plan(width, height, size, len(sample.image_sizes))
        for width, height in sample.image_sizes
    ]
    grids = [*(plan.grid for plan in plans), *((0, frames) for frames in sample.frames)]
    tokens = [
        num_image_tokens(shown, parts.tiling, size, grid, cut, parts.video)
        for shown, cut in zip(sizes_shown(sample), grids, strict=True)
    ]
    return grids, sum(tokens), sum(plan.num_views for plan in plans) + sum(sample.frames)


def sizes_shown(sample: Sample) -> list[Size]:
    """Return (width, height) of a sample's images, then of its videos: any, as nothing rests on it.

    A frame is a view, whatever its size.
    """
    return [*sample.image_sizes, *((1, 1) for _ in sample.frames)]


def make_batch(
    model: Any, sample: Sample | Pack, rows: int, packed: bool = False
) -> dict[str, Any]:
    """Return a micro-batch of equal rows; pictures have no values.

    Args:
        model: on the meta device.
        sample: what every row is.
        rows: B; the last of several is a token shorter: there is padding, as in a real batch.
        packed: one row with all samples as documents, without padding, as packs always are.
    """
    documents = [*(sample.documents if isinstance(sample, Pack) else (sample,))] * rows
    laid = {document: _lay_out(model, document) for document in dict.fromkeys(documents)}
    ids, labels = ([laid[document][key] for document in documents] for key in ("ids", "labels"))
    batch: dict[str, Any] = {}
    if packed or isinstance(sample, Pack):
        for of in labels:
            of[0] = IGNORE
        positions = [torch.arange(len(of)) for of in ids]
        columns = {"input_ids": ids, "labels": labels, "position_ids": positions}
        batch = {name: torch.cat(parts)[None] for name, parts in columns.items()}
    else:
        batch = {"input_ids": torch.stack(ids), "labels": torch.stack(labels)}
        mask = batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        if rows > 1:
            mask[-1, -1], batch["labels"][-1, -1] = 0, IGNORE
    grids = [grid for document in documents for grid in laid[document]["grids"]]
    if grids:
        size = model.model.vision_tower.image_size
        views = sum(laid[document]["views"] for document in documents)
        pixels = [pair for document in documents for pair in sizes_shown(document)]
        batch["pixel_values"] = torch.empty(views, 3, size, size, device=META)
        batch["tile_grids"] = torch.tensor(grids)
        batch["image_sizes"] = torch.tensor([(height, width) for width, height in pixels])
        if "text" in model.model.connector.itself().reads:
            asked = torch.ones(len(grids), INSTRUCTION_TOKENS, dtype=torch.long)
            batch[IDS] = batch[MASK] = asked
    return batch


def _lay_out(model: Any, sample: Sample) -> dict[str, Any]:
    """Return a record's ids (L,) and labels (L,), the grids of what it shows and its views."""
    grids, image_tokens, views = plan_views(model, sample)
    length = image_tokens + sample.text_tokens
    ids = torch.zeros(length, dtype=torch.long)
    ids[:image_tokens] = model.config.image_token_id
    labels = torch.full_like(ids, IGNORE)
    labels[length - sample.supervised_tokens :] = 0
    return {"ids": ids, "labels": labels, "grids": grids, "views": views}


def rehearse(
    model: VlmForConditionalGeneration,
    sample: Sample | Pack,
    rows: int,
    packed: bool = False,
    autocast: torch.dtype | None = None,
    gpu: bool = False,
) -> StepCost:
    """Run one micro-batch of a model on the meta device, as it is frozen, cast and checkpointed.

    Args:
        model: its parts that train require gradients.
        sample: what every row is.
        rows: B.
        packed: the rows become documents of one.
        autocast: the lower type of mixed precision; None: everything runs in the weights' type.
        gpu: whether it takes a GPU's kernels where these hold something else.
    """
    model.train()
    rehearsal = Rehearsal([*model.parameters(), *model.buffers()])
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with ExitStack() as stack:
        stack.enter_context(fused_attention())
        if gpu:
            stack.enter_context(gpu_kernels(autocast))
        stack.enter_context(_told_by_modules(model, rehearsal))
        hooks = [p.register_post_accumulate_grad_hook(rehearsal.take_gradient) for p in trained]
        stack.callback(lambda: [hook.remove() for hook in hooks])
        stack.enter_context(rehearsal)
        batch = make_batch(model, sample, rows, packed)
        casts = stack.enter_context(Autocast(autocast)) if autocast else None
        loss = model(**batch, num_items_in_batch=1).loss
        if casts is not None:
            casts.forget()
        rehearsal.phase, rehearsal.part = "backward", LOSS
        _run_backward(loss)
    model.zero_grad(set_to_none=True)
    flops = rehearsal.flops
    return StepCost(
        rows=rows,
        length=batch["input_ids"].numel() // rows,
        views=len(batch.get("pixel_values", ())),
        activations=rehearsal.peak_without_gradients,
        with_gradients=rehearsal.peak,
        forward={part: n for (phase, part), n in flops.items() if phase == "forward"},
        backward={part: n for (phase, part), n in flops.items() if phase == "backward"},
        recomputed=sum(n for (phase, _), n in flops.items() if phase == "recompute"),
        attention=rehearsal.attention_flops,
    )


def _run_backward(loss: Tensor) -> None:
    """Call the engine itself: `loss.backward()` would switch the modes off while it runs."""
    engine: Any = cast(Any, torch.autograd).Variable._execution_engine
    gradient = torch.ones_like(loss)
    engine.run_backward(
        (loss,), (gradient,), False, False, (), allow_unreachable=True, accumulate_grad=True
    )


@contextmanager
def _told_by_modules(model: Any, rehearsal: Rehearsal) -> Iterator[None]:
    """Let the model's parts say when they begin, in both passes, whose operations follow.

    In the backward pass the gradient of a part's input comes when the part is done.
    """
    order = ["vision_tower", "connector", "language_model", LOSS]
    handles = []
    rehearsal.part = "language_model"  # which embeds the ids

    def listen(part: str, before: str, after: str) -> None:
        def begin(_: nn.Module, args: Any, kwargs: Any) -> None:
            rehearsal.part = part
            _when_gradient_comes([*args, *kwargs.values()], rehearsal, before)

        def end(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            rehearsal.part = after
            if after == LOSS:
                _when_gradient_comes([output.last_hidden_state], rehearsal, part)

        module = getattr(model.model, part)
        handles.append(module.register_forward_pre_hook(begin, prepend=True, with_kwargs=True))
        handles.append(module.register_forward_hook(end, with_kwargs=True))

    for number, part in enumerate(order[:-1]):
        # What follows the connector is laid out and embedded for the language model.
        after = LOSS if part == "language_model" else "language_model"
        listen(part, order[max(0, number - 1)], after)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _when_gradient_comes(values: Sequence[Any], rehearsal: Rehearsal, part: str) -> None:
    """Let operations be `part`'s as soon as the gradient of one of the tensors is known."""
    for value in values:
        if isinstance(value, (list, tuple)):
            _when_gradient_comes(value, rehearsal, part)
        elif isinstance(value, Tensor) and value.requires_grad:
            value.register_hook(lambda _: setattr(rehearsal, "part", part))
