"""How does a stage under ZeRO go on with another number of processes than wrote its checkpoint?

DeepSpeed writes a file of each process, with its piece of the optimizer's states, flat, and refuses
to read it with another number. Here the pieces of all files are put together parameter by parameter
(as `deepspeed/checkpoint/ds_to_universal.py` does), and each process takes what is its own now.

Why not DeepSpeed's universal checkpoints: they are a copy of all states on the disk, and loading
them under ZeRO-3 gives every group of parameters the first one's weight decay, and one counter of
steps to share, which then counts each step once per group (0.19.8, `stage3.py`).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlm.errors import UserError

WEIGHT = "fp32"  # the parameter itself, beside the optimizer's own names
FILES = "*zero_pp_rank_*_mp_rank_00_optim_states.pt"
Pieces = dict[str, dict[str, list[Tensor]]]  # parameter -> state -> flat pieces, rank after rank


def state_files(checkpoint: Path) -> list[Path]:
    """Return DeepSpeed's file of each process, in their order; none of another engine."""
    found = list(checkpoint.glob(f"global_step*/{FILES}"))
    return sorted(
        found, key=lambda path: int(path.name.partition("zero_pp_rank_")[2].split("_")[0])
    )


def load_states(engine: Any, checkpoint: Path) -> None:
    """Go on with the states that another number of processes wrote.

    Args:
        engine: DeepSpeed's, just begun; the weights of its model are the checkpoint's.
        checkpoint: that they wrote, under the same ZeRO level and with the same groups.

    Raises:
        UserError: the optimizer keeps what does not belong to single parameters, or keeps it in
            files of its own.
    """
    files = state_files(checkpoint)
    if any(checkpoint.glob("global_step*/offloaded_tensors")):
        raise _refusal(checkpoint, files, "states on an NVMe disk")
    states = [_read(path)["optimizer_state_dict"] for path in files]
    model_file = min(files[0].parent.glob("*mp_rank_00_model_states.pt"))
    noted = _read(model_file)
    if "fp32_flat_groups" in states[0]:
        parts, inner = _zero3_pieces(states, noted["param_shapes"]), "optimizer_state_dict"
    else:
        parts, inner = _zero12_pieces(states), "base_optimizer_state"
    if parts is None:
        raise _refusal(checkpoint, files, "an optimizer that keeps more than numbers of parameters")
    _put(engine, parts)
    _set_groups(engine.optimizer.optimizer, states[0][inner])
    if "loss_scaler" in states[0]:
        engine.optimizer.loss_scaler = states[0]["loss_scaler"]
    for name in ("global_steps", "global_samples", "skipped_steps"):
        setattr(engine, name, noted[name])


def _read(path: Path) -> dict[str, Any]:
    """Return a file of DeepSpeed's, whose tensors stay on the disk until they are used."""
    return torch.load(path, map_location="cpu", mmap=True, weights_only=False)


def _refusal(checkpoint: Path, files: Sequence[Path], what: str) -> UserError:
    return UserError(
        f"{checkpoint} holds {what}, which the {len(files)} processes that wrote it alone can go "
        "on with; start as many, or train the stage anew from the weights there (model.checkpoint)"
    )


def _flat_states(weight: Tensor, states: Mapping[str, Any]) -> dict[str, Tensor] | None:
    """Return the flat tensors of a group's piece by name; None where their lengths differ."""
    flat = {name: value for name, value in states.items() if not _is_count(value)}
    if len({value.shape for value in flat.values()}) > 1:
        return None  # as an 8-bit optimizer's, whose scales belong to blocks
    return {WEIGHT: weight, **flat}


def _is_count(value: Any) -> bool:
    return not torch.is_tensor(value) or not value.ndim


def _zero12_pieces(states: Sequence[Mapping[str, Any]]) -> Pieces | None:
    """Return the pieces of each parameter: of ZeRO-1 and 2, whose groups are cut as a whole."""
    pieces: Pieces = {}
    for state in states:
        for group, places in enumerate(state["param_slice_mappings"]):
            weight = state["single_partition_of_fp32_groups"][group]
            flat = _flat_states(weight, state["base_optimizer_state"]["state"].get(group, {}))
            if flat is None:
                return None
            for name, place in places.items():
                _add(pieces, name, flat, place.start, place.numel)
    return pieces


def _zero3_pieces(
    states: Sequence[Mapping[str, Any]], shapes: Sequence[Mapping[str, Sequence[int]]]
) -> Pieces | None:
    """Return the pieces of each parameter: of ZeRO-3, where each is cut in as many equal ones."""
    pieces: Pieces = {}
    for state in states:
        for group, names in enumerate(shapes):
            weight = state["fp32_flat_groups"][group]
            flat = _flat_states(weight, state["optimizer_state_dict"]["state"].get(group, {}))
            if flat is None:
                return None
            start = 0
            for name, shape in names.items():
                length = math.ceil(math.prod(shape) / len(states))
                _add(pieces, name, flat, start, length)
                start += length
    return pieces


def _add(pieces: Pieces, name: str, flat: Mapping[str, Tensor], start: int, length: int) -> None:
    known = pieces.setdefault(name, {key: [] for key in flat})
    for key, value in flat.items():
        known[key].append(value[start : start + length])


def _put(engine: Any, pieces: Pieces) -> None:
    """Give this process its own of each parameter's numbers."""
    from deepspeed import utils  # pyright: ignore[reportMissingImports]

    names = next(iter(pieces.values())).keys() - {WEIGHT}
    _begin_states(engine.optimizer, names)
    for name, parameter in engine.module.named_parameters():
        for key, values in pieces[name].items() if parameter.requires_grad else ():
            whole = torch.cat(values)
            if hasattr(parameter, "ds_tensor"):
                own = _own_piece(whole, parameter.ds_tensor.numel(), torch.distributed.get_rank())
                if key == WEIGHT:
                    utils.safe_set_local_fp32_param(parameter, own)
                else:
                    utils.safe_set_local_optimizer_state(parameter, own, key)
            elif key == WEIGHT:
                utils.safe_set_full_fp32_param(parameter, whole)
            else:
                utils.safe_set_full_optimizer_state(parameter, whole, key)


def _begin_states(zero: Any, names: Iterable[str]) -> None:
    """Make the states that an optimizer makes in its first step."""
    of_zero3 = hasattr(zero, "fp32_partitioned_groups_flat")
    groups = zero.optimizer.param_groups
    flats = zero.fp32_partitioned_groups_flat if of_zero3 else [g["params"][0] for g in groups]
    for flat in flats:
        zero.optimizer.state[flat].update({name: torch.zeros_like(flat) for name in names})
    if not of_zero3:
        zero._lazy_init_hp_params_optimizer_state()  # parameters learn where theirs are


def _own_piece(whole: Tensor, length: int, rank: int) -> Tensor:
    """Return the piece of a rank, all of a length: the last ones end with zeros."""
    own = whole[rank * length : (rank + 1) * length]
    return torch.cat([own, own.new_zeros(length - len(own))])


def _set_groups(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """Take over rates and decays of the groups, and the count of steps, one for all of them."""
    groups = saved["state"].values()
    counts = {name: value for own in groups for name, value in own.items() if _is_count(value)}
    for state in optimizer.state.values():
        for name, value in counts.items():
            state[name] = value.clone() if torch.is_tensor(value) else value
    for group, values in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        group.update({name: value for name, value in values.items() if name != "params"})
