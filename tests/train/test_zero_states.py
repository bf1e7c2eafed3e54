"""Do the pieces that some processes wrote under ZeRO become those of other processes?"""

from types import SimpleNamespace

import pytest
import torch

from train.zero_states import _own_piece, load_states, state_files
from train.zero_states import _zero3_pieces as zero3_pieces
from train.zero_states import _zero12_pieces as zero12_pieces
from vlm.errors import UserError


def states_of(flat):
    return {0: {"step": torch.tensor(3.0), "exp_avg": flat + 100}}


def write(folder, states, model):
    (folder / "global_step3").mkdir()
    for rank, state in enumerate(states):
        name = f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        torch.save({"optimizer_state_dict": state}, folder / "global_step3" / name)
    torch.save(model, folder / "global_step3" / "zero_pp_rank_0_mp_rank_00_model_states.pt")


def test_zero3_cuts_each_parameter_and_the_last_piece_ends_with_padding():
    shapes = [{"a": (5,), "b": (2, 2)}]  # three ranks: 2 and 2 numbers of each
    flats = [torch.tensor(row) for row in ([0, 1, 10, 11], [2, 3, 12, 13], [4, -1, -1, -1])]
    states = [
        {"fp32_flat_groups": [flat], "optimizer_state_dict": {"state": states_of(flat)}}
        for flat in flats
    ]
    pieces = zero3_pieces(states, shapes)
    assert torch.cat(pieces["a"]["fp32"])[:5].tolist() == [0, 1, 2, 3, 4]
    assert torch.cat(pieces["b"]["exp_avg"])[:4].tolist() == [110, 111, 112, 113]


def test_zero12_cuts_a_group_wherever_a_rank_ends():
    def place(start, numel):
        return SimpleNamespace(start=start, numel=numel)

    flats = [torch.tensor([0, 1, 2]), torch.tensor([3, 10, 11])]  # a has four numbers, b two
    places = [{"a": place(0, 3)}, {"a": place(0, 1), "b": place(1, 2)}]
    states = [
        {
            "single_partition_of_fp32_groups": [flat],
            "base_optimizer_state": {"state": states_of(flat)},
            "param_slice_mappings": [where],
        }
        for flat, where in zip(flats, places, strict=True)
    ]
    pieces = zero12_pieces(states)
    assert torch.cat(pieces["a"]["fp32"]).tolist() == [0, 1, 2, 3]
    assert torch.cat(pieces["a"]["exp_avg"]).tolist() == [100, 101, 102, 103]
    assert torch.cat(pieces["b"]["fp32"]).tolist() == [10, 11]


@pytest.mark.parametrize(
    ("length", "rank", "piece"),
    [(3, 0, [0, 1, 2]), (3, 1, [3, 4, 0]), (2, 3, [0, 0]), (5, 0, None)],
)
def test_a_rank_takes_its_own_piece(length, rank, piece):
    whole = torch.arange(5)
    assert _own_piece(whole, length, rank).tolist() == (whole.tolist() if piece is None else piece)


def test_files_come_in_the_order_of_their_ranks(tmp_path):
    write(tmp_path, [{}] * 11, {})
    ranks = [path.name.split("_")[4] for path in state_files(tmp_path)]
    assert ranks == [str(rank) for rank in range(11)]


def test_states_that_do_not_belong_to_numbers_are_refused(tmp_path):
    own = {0: {"state1": torch.zeros(512), "absmax1": torch.zeros(2)}}
    state = {
        "single_partition_of_fp32_groups": [torch.zeros(512)],
        "base_optimizer_state": {"state": own},
        "param_slice_mappings": [{}],
    }
    write(tmp_path, [state] * 2, {"param_shapes": []})
    with pytest.raises(UserError, match=r"keeps more than numbers .* which the 2 processes"):
        load_states(None, tmp_path)
    (tmp_path / "global_step3" / "offloaded_tensors").mkdir()
    with pytest.raises(UserError, match="states on an NVMe disk"):
        load_states(None, tmp_path)
