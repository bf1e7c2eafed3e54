"""What is a recipe? A model and a list of stages: YAML, overridden, checked to the last key.

Precedence: defaults here < the recipe's YAML < the command line. Every field is checked by the same
code that checks `config.json` (`connectors.config`), so a misspelt field or a wrong type is one
sentence with file, dotted path and the nearest valid name.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from connectors.config import config_from_mapping
from connectors.registry import lookup
from data_recipes.loss_weight import LossWeight
from data_recipes.mixture import Source, load_mix, parse_sources
from train.adapted import check_adapters, parse_adapter
from train.beside import BenchmarkRecipe, EmaRecipe
from train.features.plan import FeatureCache
from train.freeze import PARTS
from train.objectives import Objective, check_objectives, parse_objective, resolve_objective
from train.packing import Packing
from train.rates import Change, PartRates, parse_changes, parse_trainable
from vlm.adapters import AdapterConfig
from vlm.errors import UserError
from vlm.overrides import apply_overrides, parse_overrides
from vlm.yaml_values import read_file


@dataclass(frozen=True, kw_only=True)
class ModelRecipe:
    """What the first stage starts from: three components, or a checkpoint of ours.

    Attributes:
        vision_encoder: e.g. {type: transformers, source: FOLDER_OR_HUB_ID, layer: -2}.
        connector: e.g. {type: mlp, depth: 2}, or a list of connectors that work as one.
        language_model: hub id or folder of any AutoModelForCausalLM; may be left out where no stage
            needs one.
        tiling: how an image becomes views, e.g. {type: anyres}.
        video: how videos are looked at, e.g. {frames: 8, newline: grid}; see `VideoConfig`. Of a
            checkpoint, what it says itself unless given.
        rope_factor: read further: positions are divided by it; see `vlm.long_context`.
        checkpoint: a folder or id of ours to go on from, instead of the four above.
        chat_template: name of a template of ours; the tokenizer's own if None.
        dtype: what the weights are loaded as.
        quantization: keep the frozen language model's linear layers in 4 bits (QLoRA's nf4) or 8.
    """

    vision_encoder: dict[str, Any] | None = None
    connector: dict[str, Any] | list[dict[str, Any]] | None = None
    language_model: str | None = None
    tiling: dict[str, Any] = field(default_factory=lambda: {"type": "resize"})
    video: dict[str, Any] | None = None
    rope_factor: float | None = None
    checkpoint: str | None = None
    chat_template: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    quantization: Literal["nf4", "int8"] | None = None


@dataclass(frozen=True, kw_only=True)
class DataRecipe:
    """What a stage learns from: sources written here, or a mix file with them.

    Attributes:
        sources: see `data_recipes.mixture.Source`.
        mix: a file of sources, relative to the working directory; LLaVA-NeXT's and InternVL's too.
        image_root: folder of image paths, for sources of a mix that name none.
        on_error: "skip" leaves out records that cannot be used, logged and counted.
    """

    sources: list[Source] = field(default_factory=list)
    mix: str | None = None
    image_root: str = ""
    on_error: Literal["raise", "skip"] = "raise"


@dataclass(frozen=True, kw_only=True)
class ValidationRecipe:
    """Records to measure the loss on, every so many optimizer steps and at the last one."""

    data: DataRecipe
    every: int


@dataclass(frozen=True, kw_only=True)
class StageRecipe:
    """One stage: what trains and how fast, on what, for how long.

    Attributes:
        name: folder of the stage's result, and its name in overrides.
        trainable: part -> peak learning rate, or `PartRates`; parts that are not named are frozen.
        changes: what trains from later steps on, see `train.rates`.
        ema: an average of the weights to keep, see `EmaRecipe`.
        data: see `DataRecipe`.
        adapter: low-rank weights that learn in the language model's place, at its rate; see
            `vlm.adapters.AdapterConfig`.
        objective: what it learns by, see `train.objectives`; the next token if None.
        chat_template: another template for this stage alone, such as llava_plain.
        max_length: longest row in tokens, images included; longer ones are faults, never cut.
        length_window: optimizer steps within which rows of like length are padded together. In a
            window of 1 every step sees the records it would see without; 0 sorts nothing.
        packed: true: the records of a micro-batch become one row without padding, and attention
            stays within each. {length: 8192, window: 1024}: a row takes as many as fit best, see
            `train.packing.Packing`; per_device_train_batch_size then counts such rows.
        loss_weight: what a record with n supervised tokens counts by in a step's loss: n for
            "token", 1 for "sample", sqrt(n) for "square", as in InternVL 2.5.
        validation: what to measure the loss on meanwhile, see `ValidationRecipe`.
        benchmark: what to score checkpoints on meanwhile, see `BenchmarkRecipe`.
        max_spike: a step whose loss is above so many times the median of the last hundred stops the
            run, before it reaches the weights.
        training: fields of transformers.TrainingArguments.
    """

    name: str
    trainable: dict[str, float | PartRates]
    data: DataRecipe
    changes: list[Change] = field(default_factory=list)
    ema: EmaRecipe | None = None
    adapter: AdapterConfig | None = None
    objective: dict[str, Any] | None = None
    chat_template: str | None = None
    max_length: int | None = None
    length_window: int = 0
    packed: bool | Packing = False
    loss_weight: LossWeight = "token"
    validation: ValidationRecipe | None = None
    benchmark: BenchmarkRecipe | None = None
    max_spike: float | None = None
    training: dict[str, Any] = field(default_factory=dict)

    @property
    def phases(self) -> list[dict[str, float | PartRates]]:
        """What trains at first, and after each change."""
        return [self.trainable, *(change.trainable for change in self.changes)]

    @property
    def ever_trained(self) -> list[str]:
        """Names of the parts that train at any time of the stage."""
        return list(dict.fromkeys(part for phase in self.phases for part in phase))

    @property
    def packing(self) -> Packing | None:
        """How rows are filled, where they have a length."""
        return self.packed if isinstance(self.packed, Packing) else None

    @property
    def aim(self) -> Objective:
        """Return the objective, checked."""
        return parse_objective(self.objective, f"stages.{self.name}.objective")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole run.

    Attributes:
        name: what logs and plots call the run.
        output_dir: each stage writes the folder `output_dir/<stage name>`.
        seed: decides initial weights, the data's order and dropout.
        feature_cache: where features of frozen encoders are kept; see `FeatureCache`.
        num_threads: CPU threads of torch; its own choice if None.
        float32_matmul_precision: "high" allows TF32 on recent GPUs.
    """

    name: str
    output_dir: str
    model: ModelRecipe
    stages: list[StageRecipe]
    seed: int = 0
    feature_cache: FeatureCache = field(default_factory=FeatureCache)
    num_threads: int | None = None
    float32_matmul_precision: Literal["highest", "high", "medium"] = "highest"

    def to_dict(self) -> dict[str, Any]:
        """Return the resolved recipe as plain values; reading it back gives the same recipe."""
        return asdict(self)

    def stage(self, name: str) -> StageRecipe:
        """Return the stage called `name`.

        Raises:
            UserError: there is none; the sentence lists the names.
        """
        return lookup("stage", name, {stage.name: stage for stage in self.stages})


# Of a process; tens of thousands leave it no memory to map files in, with a sentence on the file.
MOST_THREADS = 1024
# What a stage keeps or measures beside its training.
BESIDE = {"ema": EmaRecipe, "validation": ValidationRecipe, "benchmark": BenchmarkRecipe}


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file and apply command-line overrides such as `--seed 3`.

    Raises:
        UserError: anything in it is wrong; the sentence says where.
    """
    path = Path(path)
    tree = read_file(path)
    where = f"recipe {path}"
    if not isinstance(tree, dict):
        raise UserError(f"{where} must be a mapping with name, output_dir, model and stages")
    apply_overrides(tree, parse_overrides(overrides))
    return parse_recipe(tree, where)


def parse_recipe(tree: Mapping[str, Any], where: str) -> Recipe:
    """Check a recipe's tree of plain values, names of components included."""
    values = dict(tree)
    if "model" in values:
        values["model"] = _parse_model(values["model"], f"{where}: model")
    if "stages" in values:
        values["stages"] = _parse_stages(values["stages"], where)
    if "feature_cache" in values:
        given = _mapping(values["feature_cache"], f"{where}: feature_cache")
        values["feature_cache"] = config_from_mapping(
            FeatureCache, given, f"{where}: feature_cache"
        )
    recipe = config_from_mapping(Recipe, values, where)
    check_objectives(recipe.model, recipe.stages, where)
    check_adapters(recipe.model, recipe.stages, where)
    if recipe.num_threads is not None and not 1 <= recipe.num_threads <= MOST_THREADS:
        raise UserError(
            f"{where}: num_threads must be in [1, {MOST_THREADS}], not {recipe.num_threads}"
        )
    if not recipe.output_dir.strip():
        raise UserError(f"{where}: output_dir is empty; name a folder")
    if not 0 <= recipe.seed < 2**32:
        raise UserError(f"{where}: seed must be in [0, 2**32), not {recipe.seed}")
    return recipe


def _parse_model(value: Any, where: str) -> ModelRecipe:
    """Check the model, down to the names of its encoder, connector, tiling and template."""
    model = config_from_mapping(ModelRecipe, _mapping(value, where), where)
    if empty := [name for name in ("language_model", "checkpoint") if value.get(name) == ""]:
        raise UserError(f"{where}.{empty[0]} is empty; name a folder or a model of the Hub")
    needed = ("vision_encoder", "connector")  # the language model, if a stage has one
    given = [name for name in (*needed, "language_model") if value.get(name) is not None]
    if model.checkpoint is not None and given:
        raise UserError(f"{where}: give either checkpoint or {given[0]}, not both")
    missing = [name for name in needed if name not in given]
    if model.checkpoint is None and missing:
        hint = "; {type: patches} is none, as Fuyu" if missing[0] == "vision_encoder" else ""
        raise UserError(f"{where} needs {missing[0]} (or a checkpoint to go on from){hint}")
    check_components(model, where)
    return model


def check_components(model: ModelRecipe, where: str) -> None:
    """Check every component's name and fields, so that a typo is told before anything is loaded."""
    from connectors import resolve_connector_config
    from vlm.chat_templates import load as load_chat_template
    from vlm.encoders import parse_encoder_config
    from vlm.tiling import build_tiling
    from vlm.video_layout import parse_video

    with_place(f"{where}.tiling", build_tiling, model.tiling)
    with_place(where, parse_video, model.video)
    if model.rope_factor is not None and not 1 <= model.rope_factor < float("inf"):
        raise UserError(f"{where}.rope_factor must be 1 or more, not {model.rope_factor:g}")
    if model.connector is not None:
        with_place(f"{where}.connector", resolve_connector_config, model.connector)
    if model.chat_template is not None:
        with_place(f"{where}.chat_template", load_chat_template, model.chat_template)
    if model.vision_encoder is not None:
        with_place(f"{where}.vision_encoder", parse_encoder_config, model.vision_encoder)


def with_place(place: str, function: Any, *values: Any) -> Any:
    """Call a function and put `place` before its error's sentence."""
    try:
        return function(*values)
    except UserError as error:
        raise UserError(f"{place}: {error}") from error


def _parse_stages(value: Any, where: str) -> list[StageRecipe]:
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: stages must be a list with at least one stage")
    stages = []
    for number, item in enumerate(value, start=1):
        name = item.get("name", number) if isinstance(item, Mapping) else number
        stages.append(_parse_stage(item, f"{where}: stages.{name}"))
    names = [stage.name for stage in stages]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"{where}: two stages are named {twice[0]!r}")
    return stages


def _parse_stage(value: Any, where: str) -> StageRecipe:
    values = dict(_mapping(value, where))
    if "data" in values:
        values["data"] = _parse_data(values["data"], f"{where}.data")
    if "trainable" in values:
        values["trainable"] = parse_trainable(values["trainable"], f"{where}.trainable", PARTS)
    if "changes" in values:
        values["changes"] = parse_changes(values["changes"], f"{where}.changes", PARTS)
    for name, kind in BESIDE.items():
        if values.get(name) is not None:
            values[name] = _parse_beside(kind, values[name], f"{where}.{name}")
    values["adapter"] = parse_adapter(values.get("adapter"), where)
    values["objective"] = resolve_objective(values.get("objective"), f"{where}.objective")
    if isinstance(values.get("packed"), Mapping):
        values["packed"] = config_from_mapping(Packing, values["packed"], f"{where}: packed")
    stage = config_from_mapping(StageRecipe, values, where)
    _check_stage(stage, where)
    _check_engine(stage, where)
    return stage


def _check_stage(stage: StageRecipe, where: str) -> None:
    """Refuse values that no stage can have, and those of another objective."""
    if not stage.name or Path(stage.name).name != stage.name or stage.name.startswith("."):
        raise UserError(f"{where}: name {stage.name!r} cannot be a folder's name")
    _check_rows(stage, where)
    measured = [("validation", stage.validation), ("benchmark", stage.benchmark)]
    if refused := [name for name, value in measured if value and stage.objective is not None]:
        raise UserError(f"{where}: {refused[0]} is for stages that learn the next token")
    if stage.max_spike is not None and stage.max_spike <= 1:
        raise UserError(f"{where}.max_spike must be above 1, not {stage.max_spike:g}")
    if stage.chat_template is not None:
        from vlm.chat_templates import load as load_chat_template

        with_place(f"{where}.chat_template", load_chat_template, stage.chat_template)


def _check_rows(stage: StageRecipe, where: str) -> None:
    """Refuse orders, rows and weights that cannot be, or not with each other."""
    if stage.length_window < 0:
        raise UserError(f"{where}: length_window must be 0 or more, not {stage.length_window}")
    if stage.max_length is not None and stage.max_length < 1:
        raise UserError(f"{where}: max_length must be 1 or more, not {stage.max_length}")
    if stage.packing is not None and stage.length_window:
        raise UserError(f"{where}: packed rows of a length leave length_window nothing to sort")
    if stage.objective is not None and (stage.packed or stage.loss_weight != "token"):
        name = "packed" if stage.packed else "loss_weight"
        raise UserError(f"{where}: {name} is for stages that learn the next token")


def _check_engine(stage: StageRecipe, where: str) -> None:
    """Refuse what needs whole weights where they are in pieces, and schedules without a peak."""
    sharded = [name for name in ("deepspeed", "fsdp") if stage.training.get(name)]
    if len(sharded) > 1:
        raise UserError(f"{where}.training: deepspeed and fsdp are two engines; leave one out")
    for field_name, given in (("changes", stage.changes), ("ema", stage.ema)):
        if given and sharded:
            raise UserError(
                f"{where}.{field_name} needs all weights in one place, which training."
                f"{sharded[0]} cuts into pieces; leave one of them out"
                + ("" if field_name == "ema" else ", or make it two stages")
            )
    schedule = stage.training.get("lr_scheduler_type")
    if stage.changes and schedule in ("reduce_lr_on_plateau", "greedy"):
        raise UserError(
            f"{where}.changes sets the peaks that a schedule multiplies, but lr_scheduler_type "
            f"{schedule!r} has none; choose another"
        )
    if stage.ema is not None and not 0 <= stage.ema.decay < 1:
        raise UserError(f"{where}.ema.decay must be in [0, 1), not {stage.ema.decay:g}")


def _parse_beside(kind: Any, value: Any, where: str) -> Any:
    """Check one of `BESIDE`."""
    values = dict(_mapping(value, where))
    if kind is ValidationRecipe and "data" in values:
        values["data"] = _parse_data(values["data"], f"{where}.data")
    found = config_from_mapping(kind, values, where)
    if not isinstance(found, EmaRecipe) and found.every < 1:
        raise UserError(f"{where}.every must be 1 or more, not {found.every}")
    return found


def _parse_data(value: Any, where: str) -> DataRecipe:
    values = dict(_mapping(value, where))
    if bool(values.get("mix")) == bool(values.get("sources")):
        raise UserError(f"{where} needs either mix (a file) or sources (a list)")
    if values.get("sources"):
        values["sources"] = parse_sources(values["sources"], where)
        if values.get("image_root"):
            raise UserError(f"{where}: image_root is for a mix; give each source its own")
        return config_from_mapping(DataRecipe, values, where)
    data = config_from_mapping(DataRecipe, values, where)
    sources = with_place(where, load_mix, data.mix, data.image_root)
    return DataRecipe(sources=sources, on_error=data.on_error)


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise UserError(f"{where} must be a mapping, not {value!r}")
    return value
