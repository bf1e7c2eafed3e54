"""How is a model kept as what was trained alone, on frozen weights that lie elsewhere?

FOLDER/base.json                  where the frozen weights are, what they were, how they are loaded
FOLDER/adapter_model.safetensors  what was trained: adapter, connector, whatever else; PEFT's names
FOLDER/adapter_config.json        PEFT's settings of the adapter, where there is one
beside config, processor and chat template, as every checkpoint has them

PEFT's own `PeftModel.from_pretrained` puts such a folder on its base too, connector included.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GenerationConfig

from connectors.config import config_from_mapping
from vlm.adapters import adapter_weights, inject, is_adapter, own_names
from vlm.done import write_note
from vlm.errors import UserError
from vlm.quantization import Quantization, dequantize, quantize

NOTE = "base.json"
WEIGHTS = "adapter_model.safetensors"
SETTINGS = "adapter_config.json"
FILES = "model*.safetensors"  # of the base; beside them may lie an average of the same names
PREFIX = "base_model.model."  # before every name in a file of PEFT's
SAMPLE_BYTES = 1 << 20  # of each tensor, for a fingerprint: a training step touches all of it


@dataclass(frozen=True, kw_only=True)
class Base:
    """The frozen weights that a model stands on, and what stands on them.

    Attributes:
        folder: a checkpoint of ours that holds them; in the note relative to the note's folder,
            where both belong to one run, so that the run can be moved.
        fingerprint: of the weights in it, see `fingerprint`.
        dtype: what they are loaded as.
        quantization: how the language model's are quantised after that.
        compute_dtype: what nf4 weights are multiplied in.
        trained: beginnings of the names of what was trained in full.
    """

    folder: str
    fingerprint: str
    dtype: str
    quantization: Quantization | None
    compute_dtype: str
    trained: list[str]

    def write(self, folder: Path) -> None:
        """Note in a folder what it stands on."""
        base, folder = Path(self.folder).resolve(), folder.resolve()
        near = base.parent in (folder, *folder.parents)
        place = os.path.relpath(base, folder) if near else str(base)
        write_note(folder / NOTE, {**asdict(self), "folder": place})

    def holds(self, name: str) -> bool:
        """Return whether a tensor of the model's state was trained, and so is kept."""
        return is_adapter(name) or name.startswith(tuple(self.trained))


def stands_on_base(source: str | Path) -> bool:
    """Return whether a folder holds what was trained alone."""
    return (Path(source) / NOTE).is_file()


def read_base(source: str | Path) -> Base:
    """Return what a folder stands on, its place in full.

    Raises:
        UserError: the note cannot be read, or the base is missing or has changed.
    """
    note = Path(source) / NOTE
    try:
        values = json.loads(note.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{note} cannot be read: {error}") from error
    if not isinstance(values, Mapping):
        raise UserError(f"{note} must be a mapping, not {values!r}")
    base = config_from_mapping(Base, values, str(note))
    folder = Path(os.path.normpath(Path(source).absolute() / base.folder))
    if not any(folder.glob(FILES)):
        raise UserError(
            f"{source} holds only what was trained; its frozen weights were in {folder}, which has "
            f"none now: put them back, or write their new place as 'folder' into {note}"
        )
    if fingerprint(folder) != base.fingerprint:
        raise UserError(
            f"{source} was trained on the frozen weights in {folder}, but those are others now: "
            f"put the right ones back, or write their place as 'folder' into {note}"
        )
    return config_from_mapping(Base, {**asdict(base), "folder": str(folder)}, str(note))


def fingerprint(folder: Path) -> str:
    """Return a hash of the names, types, shapes and first numbers of a checkpoint's tensors.

    Raises:
        UserError: a file of weights cannot be read.
    """
    tensors = {}
    for path in sorted(folder.glob(FILES)):
        try:
            tensors |= _hash_tensors(path)
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read: {error}") from error
    return hashlib.sha256(json.dumps(tensors, sort_keys=True).encode()).hexdigest()[:32]


def _hash_tensors(path: Path) -> dict[str, list[Any]]:
    """Return, by name, type, shape and the hash of the first numbers of a file's tensors.

    The file begins with the length of its header in 8 bytes, then the header, JSON with the place
    of each tensor behind it (github.com/huggingface/safetensors, "Format").
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        found = {}
        for name, entry in header.items():
            start, stop = entry["data_offsets"]
            file.seek(8 + length + start)
            sample = file.read(min(stop - start, SAMPLE_BYTES))
            digest = hashlib.sha256(sample).hexdigest()[:16]
            found[name] = [entry["dtype"], entry["shape"], digest]
    return found


def save_trained(
    model: Any, base: Base, folder: Path, state: Mapping[str, Tensor] | None = None
) -> None:
    """Write what was trained, and what it stands on.

    Args:
        model: its configuration is its base's.
        base: what it stands on.
        folder: where to.
        state: the model's state, where it is gathered from several processes; None: asked here.
    """
    whole: Mapping[str, Tensor] = model.state_dict() if state is None else state
    kept = {name: tensor for name, tensor in whole.items() if base.holds(name)}
    adapter = {name: tensor for name, tensor in kept.items() if is_adapter(name)}
    tensors = {name: tensor for name, tensor in kept.items() if name not in adapter}
    folder.mkdir(parents=True, exist_ok=True)
    if adapter:
        tensors |= adapter_weights(model, adapter)
        model.peft_config["default"].base_model_name_or_path = base.folder
        model.peft_config["default"].save_pretrained(folder)
    # Copies: what is shared or lies in strides cannot be written.
    copies = {
        f"{PREFIX}{n}": t.detach().to("cpu", copy=True).contiguous() for n, t in tensors.items()
    }
    save_file(copies, folder / WEIGHTS, metadata={"format": "pt"})
    shutil.copy(Path(base.folder) / "config.json", folder)
    model.generation_config.save_pretrained(folder)
    base.write(folder)


def load_trained(
    model: Any, base: Base, source: Path, dtype: torch.dtype | None, merged: bool
) -> None:
    """Put what was trained on a model that holds the frozen weights.

    Args:
        model: on the CPU, with the base's weights.
        base: what `read_base` gives.
        source: the folder that holds what was trained.
        dtype: of what was trained; None: as it was trained.
        merged: add the adapter to the weights that it stands beside, dequantised before.

    Raises:
        UserError: something is missing, left over or of another shape.
    """
    if (source / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(source)
    if base.quantization is not None:
        quantize(model, base.quantization, getattr(torch, base.compute_dtype))
        if merged:
            dequantize(model, model.dtype)
    if (source / SETTINGS).is_file():
        from peft import LoraConfig

        inject(model, LoraConfig.from_pretrained(str(source)))
    try:
        published = load_file(source / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{source / WEIGHTS} cannot be read: {error}") from error
    found = own_names(model, {n.removeprefix(PREFIX): tensor for n, tensor in published.items()})
    _check_names(source, {name for name in model.state_dict() if base.holds(name)}, set(found))
    for name, parameter in model.named_parameters():
        if name in found:
            wanted = found[name].dtype if dtype is None else dtype
            parameter.data = parameter.data.to(wanted)
    try:
        model.load_state_dict(found, strict=False)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{source / WEIGHTS} does not fit its base: {reason}") from error


def _check_names(source: Path, wanted: set[str], found: set[str]) -> None:
    """Refuse a file that lacks a tensor or has one more.

    Raises:
        UserError: the sentence names one.
    """
    for what, names in (("are missing", wanted - found), ("are not of this model", found - wanted)):
        if names:
            raise UserError(
                f"{source / WEIGHTS} cannot be loaded: {len(names)} weights {what}, such as "
                f"{min(names)}"
            )
