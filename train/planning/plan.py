"""What will a recipe's run need? Everything that `vlm plan` tells, as data."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from train.build import check_context
from train.features.plan import Demand, saved_share
from train.objectives import NextToken
from train.planning.advice import Advice, advise
from train.planning.gpus import Gpu, hours
from train.planning.lengths import (
    Lengths,
    assumed_lengths,
    count_records,
    measured_lengths,
    pack_assumed,
)
from train.planning.memory import GIB, Memory
from train.planning.settings import (
    DTYPE_BYTES,
    OPTIMIZERS,
    StageSettings,
    all_shardings,
    read_settings,
)
from train.planning.skeleton import Skeleton, build_skeleton
from train.planning.stage import StageCosts
from train.planning.step import Sample, StepCost, plan_views
from train.recipe import Recipe, StageRecipe
from vlm.errors import UserError
from vlm.lm_head import usual_chunk_elements
from vlm.long_context import context_length
from vlm.quantization import Quantization
from vlm.tiling import Size


@dataclass(frozen=True)
class Options:
    """What the user says of machine and data.

    Attributes:
        gpus: how many, over all machines.
        gpu: which.
        memory: GiB of one.
        reserve: bytes of one that are taken before anything is stored; 0: it is a CPU.
        mfu: share of the peak that the model's own operations reach.
        image_sizes: (width, height) to count tokens of.
        text_tokens: stage -> text tokens of a row; the name "" is for all.
        records: stage -> records of an epoch, likewise.
        measured: how many records to measure where the data is here.
    """

    gpus: int
    gpu: Gpu
    memory: float
    reserve: int
    mfu: float
    image_sizes: tuple[Size, ...]
    text_tokens: Mapping[str, int]
    records: Mapping[str, int]
    measured: int


@dataclass(frozen=True)
class ImageTokens:
    """What one image costs."""

    size: Size
    views: int
    tokens: int


@dataclass(frozen=True)
class StagePlan:
    """One stage.

    Attributes:
        name: of the stage.
        changes: how often another set of parts trains.
        settings: its arguments.
        trained: part -> parameters that train.
        adapter: parameters of an adapter beside the model's own.
        lengths: its rows.
        mean_length, longest_length: tokens of these rows, images included.
        cost: of a micro-batch of mean rows.
        sharding: what its memory is called in a table.
        memory: of a GPU at the longest row, as the recipe has it.
        mean_memory: the same at the mean row.
        table: the same at the longest row by ZeRO level and offload.
        other_checkpointing: the same with checkpointing switched.
        advice: what to change if it does not fit.
        fits: whether it does.
        records, steps, hours: None where nobody knows how many records there are.
        encoder_share: the encoder's forward pass as a share of all operations.
        saved_share: what stored features save of all operations, if no two records share a picture.
        feature_bytes: what a row's features take on disk.
    """

    name: str
    changes: int
    settings: StageSettings
    trained: dict[str, int]
    adapter: int
    lengths: Lengths
    mean_length: int
    longest_length: int
    cost: StepCost
    sharding: str
    memory: Memory
    mean_memory: Memory
    table: dict[str, Memory]
    other_checkpointing: Memory
    advice: list[Advice]
    fits: bool
    records: int | None
    steps: int | None
    hours: float | None
    encoder_share: float
    saved_share: float
    feature_bytes: int


@dataclass(frozen=True)
class Plan:
    """A recipe.

    Attributes:
        name: of the recipe.
        parameters: part -> built.
        published: part -> in its checkpoint.
        quantization: of the language model's linear layers.
        view_size: pixels of a view's side.
        images: what images of some sizes cost.
        stages: those that can be planned.
        skipped: names of others.
        load_bytes: what each process holds on the host while it loads.
        assumptions: what was not known.
    """

    name: str
    parameters: dict[str, int]
    published: dict[str, int]
    quantization: Quantization | None
    view_size: int
    images: list[ImageTokens]
    stages: list[StagePlan]
    skipped: list[str]
    load_bytes: int
    assumptions: list[str]


def make_plan(recipe: Recipe, options: Options, only: str | None = None) -> Plan:
    """Return the plan of a recipe, or of its stage `only`; loads no weights and asks no network.

    Raises:
        UserError: an architecture that is not known here, or settings that cannot be.
    """
    chosen = recipe.stages if only is None else [recipe.stage(only)]
    planned = [stage for stage in chosen if isinstance(stage.aim, NextToken)]
    if not planned:
        raise UserError("no stage trains a language model, and only such stages can be planned")
    skeleton = build_skeleton(recipe.model)
    stages = [plan_stage(recipe, stage, skeleton, options) for stage in planned]
    return Plan(
        name=recipe.name,
        parameters=skeleton.parameters,
        published=skeleton.published,
        quantization=recipe.model.quantization,
        view_size=skeleton.model.model.vision_tower.image_size,
        images=[_image_tokens(skeleton, size) for size in options.image_sizes],
        stages=stages,
        skipped=[stage.name for stage in chosen if stage not in planned],
        load_bytes=sum(skeleton.parameters.values()) * DTYPE_BYTES[recipe.model.dtype],
        assumptions=list(_assumptions(options, stages, skeleton.processor is not None)),
    )


def _image_tokens(skeleton: Skeleton, size: Size) -> ImageTokens:
    _, tokens, views = plan_views(skeleton.model, Sample((size,), 0, 0))
    return ImageTokens(size, views, tokens)


def plan_stage(
    recipe: Recipe, stage: StageRecipe, skeleton: Skeleton, options: Options
) -> StagePlan:
    """Return the plan of one stage."""
    settings = read_settings(stage)
    check_context(stage, skeleton.model)
    found = count_records(stage, recipe.seed)
    lengths = _lengths(recipe, stage, skeleton, settings, options, bool(found))
    costs = StageCosts(
        *(skeleton, stage, settings, lengths, recipe.model.dtype, recipe.model.quantization),
        *(options.gpus, options.reserve),
    )
    setup, budget = costs.setup(), options.memory * GIB
    cost, memory = costs.cost(lengths.mean, setup), costs.memory(setup)
    records = option_of(options.records, stage.name) or found
    rows = None if records is None else math.ceil(records / lengths.records)
    steps = settings.steps(rows, options.gpus)
    epochs = settings.epochs
    if steps is not None and rows is not None:
        epochs = steps * settings.micro_batch * settings.accumulation * options.gpus / rows
    others = all_shardings(settings.engine, options.gpus, costs.hidden_size)
    # A CPU has no host to lean on, and engines cannot cut quantised weights.
    tables = others if options.reserve and recipe.model.quantization is None else []
    return StagePlan(
        name=stage.name,
        changes=len(stage.changes),
        settings=settings,
        trained=costs.trained,
        adapter=costs.adapter_size,
        lengths=lengths,
        mean_length=cost.length,
        longest_length=costs.cost(lengths.longest, setup).length,
        cost=cost,
        sharding=setup.sharding.name,
        memory=memory,
        mean_memory=costs.memory(setup, lengths.mean),
        table={s.name: costs.memory(replace(setup, sharding=s)) for s in tables},
        other_checkpointing=costs.memory(replace(setup, checkpointing=not setup.checkpointing)),
        advice=advise(costs, budget),
        fits=memory.total <= budget,
        records=records,
        steps=steps,
        hours=None if steps is None else stage_hours(cost, settings, steps, options),
        encoder_share=cost.forward.get("vision_tower", 0) / (cost.flops + cost.recomputed),
        saved_share=saved_by_storing(cost, epochs, recipe.feature_cache.runs),
        feature_bytes=feature_bytes(skeleton.model, cost, settings.lower or recipe.model.dtype),
    )


def _lengths(
    recipe: Recipe,
    stage: StageRecipe,
    skeleton: Skeleton,
    settings: StageSettings,
    options: Options,
    data_is_here: bool,
) -> Lengths:
    """Return a stage's rows, measured if that can be and the user did not say."""
    text, processor, note = option_of(options.text_tokens, stage.name), skeleton.processor, ""
    if data_is_here and processor is not None and text is None:
        number = max(options.measured, 4 * settings.micro_batch)
        positions = context_length(skeleton.model.config.text_config)
        measured = measured_lengths(
            stage, processor, recipe.seed, number, settings.micro_batch, positions
        )
        if measured is not None:
            return measured
        note = f"; none of the first {number} records can be used, `vlm data check` says why"
    longest = None if stage.packed else stage.max_length
    assumed = assumed_lengths(skeleton.model, options.image_sizes, text, longest)
    if stage.packing is not None:
        packs = pack_assumed(skeleton.model, assumed, stage.packing)
        assumed = replace(packs, origin=assumed.origin + packs.origin)
    return replace(assumed, origin=assumed.origin + note)


def option_of(values: Mapping[str, int], stage: str) -> int | None:
    """Return what the user gave for a stage, or for all."""
    return values.get(stage, values.get(""))


def stage_hours(cost: StepCost, settings: StageSettings, steps: int, options: Options) -> float:
    """Return the hours of a stage."""
    flops = cost.flops * settings.accumulation * options.gpus * steps
    return hours(flops, options.gpus, options.gpu.peak, options.mfu)


def saved_by_storing(cost: StepCost, epochs: float, runs: int) -> float:
    """Return the share of all operations that stored features of a frozen encoder save.

    Every row has a picture of its own, looked at once in each epoch.
    """
    encoder = cost.forward.get("vision_tower", 0)
    readings = max(1, round(1000 * epochs))  # of 1000 pictures
    demand = Demand(
        readings=readings,
        pictures=min(1000, readings),
        missing=min(1000, readings),
        later=0,
        encoder_flops=encoder,
        other_flops=cost.flops + cost.recomputed - encoder,
        picture_bytes=0,
    )
    return saved_share(demand, runs)


def feature_bytes(model: Any, cost: StepCost, dtype: str) -> int:
    """Return what the encoder's features of one row take."""
    tower = model.model.vision_tower
    maps = zip(tower.grids, tower.dims, strict=True)
    numbers = sum(height * width * dim for (height, width), dim in maps)
    return cost.views // cost.rows * numbers * DTYPE_BYTES[dtype]


def _assumptions(
    options: Options, stages: Sequence[StagePlan], tokenizer_here: bool
) -> Iterator[str]:
    """Yield what the figures rest on."""
    for stage in stages:
        yield f"rows of {stage.name}: {stage.lengths.origin}"
        if stage.changes:
            yield f"{stage.name}: what trains at any time counts as training from the first step on"
        if stage.settings.optimizer not in OPTIMIZERS:
            yield f"optimizer {stage.settings.optimizer} of {stage.name} counts as AdamW"
        if stage.settings.lower is None and options.reserve:
            yield f"{stage.name} has no bf16 or fp16: the GPU's peak is out of its reach"
        if stage.records is None and stage.settings.max_steps <= 0:
            yield f"records of {stage.name} are not here: --records {stage.name}=NUMBER gives hours"
    if not tokenizer_here:
        yield "the tokenizer is not here: the vocabulary is the language model's, without <image>"
    yield (
        "attention by fused kernels, rows of a batch equally long; loss on supervised rows in "
        f"chunks of {usual_chunk_elements(options.reserve > 0):,} logits"
    )
    if options.reserve:
        yield f"{options.reserve / GIB:g} GiB of each GPU for CUDA, NCCL and the allocator's holes"
    else:
        yield "memory beside that of Python and its libraries"
    yield (
        f"hours: forward and backward pass at {options.mfu:.0%} of {options.gpu.peak / 1e12:g} "
        f"TFLOP/s ({options.gpu.source}); recomputation is not counted, so it lowers the MFU that "
        "is reached"
    )
