"""How is a plan told to a person? A table of plain text."""

from collections.abc import Iterator, Sequence
from functools import partial

from train.features.plan import LEAST_SAVED
from train.planning.gpus import hours
from train.planning.memory import GIB, Memory
from train.planning.plan import Options, Plan, StagePlan
from train.planning.step import StepCost

_ADAPTER = {"language_model": "an adapter of language_model"}
UNITS = {"GiB": GIB, "MiB": 2**20}


def render(plan: Plan, options: Options, gpu: str) -> str:
    """Return the whole plan as text."""
    lines = [
        f"{plan.name} on {options.gpus} x {gpu}, {options.memory:.3g} GiB each",
        "",
        *_parameters(plan),
        "",
        *_images(plan),
    ]
    for stage in plan.stages:
        lines += ["", *_stage(stage, plan, options)]
    lines += [f"stage {name}: not planned, it trains no language model" for name in plan.skipped]
    lines += ["", "Assumptions", *(f"  - {line}" for line in plan.assumptions)]
    return "\n".join(lines) + "\n"


def columns(rows: Sequence[Sequence[str]], indent: str = "  ") -> list[str]:
    """Return rows of cells as lines: the first column to the left, others to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return [
        indent
        + "  ".join(
            cell.rjust(width) if number else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def count(number: float) -> str:
    """Return 7062902784 as 7.06 B, 20979712 as 21.0 M."""
    if number >= 1e9:
        return f"{number / 1e9:.2f} B"
    return f"{number / 1e6:.1f} M" if number >= 1e5 else f"{number:,.0f}"


def amount(number: float, unit: int) -> str:
    """Return bytes in a unit of so many bytes, without its name."""
    if not number:
        return "-"
    return f"{number / unit:,.1f}" if number >= unit / 10 else f"{number / unit:.3f}"


def unit_of(number: float) -> str:
    """Return the name of the unit that suits a number of bytes."""
    return "GiB" if number >= GIB else "MiB"


def duration(hours: float) -> str:
    """Return hours as a person would say them."""
    if hours >= 1:
        return f"{hours:.3g} hours"
    return f"{60 * hours:.2g} minutes" if hours >= 1 / 60 else f"{3600 * hours:.2g} seconds"


def _parameters(plan: Plan) -> Iterator[str]:
    total, built = sum(plan.published.values()), sum(plan.parameters.values())
    rows = [
        [part, count(plan.published[part]), count(built)] for part, built in plan.parameters.items()
    ]
    yield from columns(
        [["Parameters", "published", "built"], *rows, ["all", count(total), count(built)]], ""
    )
    if total > built:
        yield f"Not built: {count(total - built)} of encoder layers that nobody reads"
    if plan.quantization is not None:
        yield f"The language model's linear layers are kept in {plan.quantization}"
    unit = unit_of(plan.load_bytes)
    loads = amount(plan.load_bytes, UNITS[unit])
    yield f"Host memory of each process while it loads: {loads} {unit}"


def _images(plan: Plan) -> list[str]:
    rows = [
        [f"{width}x{height}", str(image.views), f"{image.tokens:,}"]
        for image in plan.images
        for width, height in [image.size]
    ]
    return columns([["Images", f"views of {plan.view_size} px", "tokens"], *rows], "")


def _stage(stage: StagePlan, plan: Plan, options: Options) -> Iterator[str]:
    settings, cost = stage.settings, stage.cost
    trained = sum(stage.trained.values())
    total = sum(plan.parameters.values()) + stage.adapter
    batch = settings.micro_batch * settings.accumulation * options.gpus
    names = [_ADAPTER.get(n, n) if stage.adapter else n for n in stage.trained]
    train = f"{' and '.join(names)} train{'s' * (len(names) == 1)}"
    yield f"Stage {stage.name}: {train}, {count(trained)} of {count(total)}"
    yield (
        f"  Rows of {stage.mean_length:,} tokens on average, {stage.longest_length:,} at most; "
        f"{settings.micro_batch} in each micro-batch, {batch:,} a step"
    )
    if stage.lengths.records > 1:
        yield f"  {stage.lengths.records:.3g} records share a row"
    yield from _memory(stage, options)
    yield from _advice(stage, options)
    yield f"  TFLOP a row: {tera(cost.flops, cost)}"
    for name, flops in {"forward": cost.forward, "backward": cost.backward}.items():
        yield f"    {name}: " + ", ".join(f"{part} {tera(n, cost)}" for part, n in flops.items())
    yield (
        f"    attention's square part of these {tera(cost.attention, cost)}; recomputed beside "
        f"these {tera(cost.recomputed, cost)}"
    )
    yield from _time(stage, options)
    yield _features(stage)


def tera(flops: int, cost: StepCost) -> str:
    """Return operations of a micro-batch in 10^12 a row."""
    return f"{flops / cost.rows / 1e12:.3g}"


def _memory(stage: StagePlan, options: Options) -> Iterator[str]:
    checkpointed, unit = stage.settings.checkpointing, _unit(stage, options)
    size = partial(amount, unit=UNITS[unit])
    having = "with" if checkpointed else "without"
    first = f"{unit} of each at the longest row, {having} checkpointing"
    heads = ["weights", "gradients", "optimizer", "buffers", "activations", "total", "host"]
    rows = [[first, *heads, ""]]
    for name, memory in (stage.table | {stage.sharding: stage.memory}).items():
        fits = "fits" if memory.total <= options.memory * GIB else "does not fit"
        own = " (this recipe)" if name == stage.sharding else ""
        rows.append([f"  {name}{own}", *map(size, _cells(memory)), fits])
    yield from columns(rows)
    other, mean = stage.other_checkpointing, stage.mean_memory
    yield (
        f"    {'without' if checkpointed else 'with'} checkpointing: activations "
        f"{size(other.activations)}, total {size(other.total)}"
    )
    if stage.mean_length != stage.longest_length:
        yield f"    at the mean row: activations {size(mean.activations)}, total {size(mean.total)}"


def _unit(stage: StagePlan, options: Options) -> str:
    """Return the unit of a stage's table: small models would be all zeros in GiB."""
    totals = [memory.total for memory in (stage.memory, *stage.table.values())]
    return unit_of(max(totals) - options.reserve)


def _cells(memory: Memory) -> list[float]:
    parts = (memory.weights, memory.gradients, memory.optimizer, memory.buffers, memory.activations)
    return [*parts, memory.total, memory.host]


def _advice(stage: StagePlan, options: Options) -> Iterator[str]:
    if stage.fits:
        return
    unit = _unit(stage, options)
    yield f"  Does not fit into {options.memory:g} GiB. Each on top of those before:"
    for number, advice in enumerate(stage.advice, 1):
        fits = "fits" if advice.fits else "does not fit yet"
        yield (
            f"    {number}. {advice.change} -> {amount(advice.memory.total, UNITS[unit])} {unit}, "
            f"{fits}; costs {advice.price}"
        )
    if not stage.advice or not stage.advice[-1].fits:
        yield "    Then: more GPUs, a smaller max_length, fewer image tokens, or a smaller model"


def _time(stage: StagePlan, options: Options) -> Iterator[str]:
    if stage.hours is None:
        thousand = 1000 * stage.cost.flops / stage.cost.rows / stage.lengths.records
        time = hours(thousand, options.gpus, options.gpu.peak, options.mfu)
        yield f"  {duration(time)} for 1,000 records"
        return
    records = "" if stage.records is None else f"{stage.records:,} records, "
    yield f"  {records}{stage.steps:,} steps: {duration(stage.hours)}"


def _features(stage: StagePlan) -> str:
    """Return whether `feature_cache` is worth its room in this stage."""
    share = f"{stage.encoder_share:.1%} of a step's operations"
    if not stage.encoder_share:
        return "  Nothing is encoded"
    if "vision_tower" in stage.trained:
        return f"  The encoder trains; its forward pass is {share}"
    start = f"  The frozen encoder is {share}"
    if stage.encoder_share < LEAST_SAVED:
        return f"{start}: storing its features does not pay"
    if stage.settings.engine != "ddp":
        return f"{start}; features are not stored under DeepSpeed or FSDP"
    start += f": storing its features ({stage.feature_bytes / 1e6:.3g} MB a row) "
    if stage.saved_share >= LEAST_SAVED:
        return f"{start}saves {stage.saved_share:.1%}, so set feature_cache.folder"
    return f"{start}pays where pictures come again, in records, later stages or other runs"
