"""Are published training states read, and nothing else run or taken for weights?"""

import sys
import types

import pytest
import torch
from safetensors.torch import save_file

from vlm.encoders.vision_checkpoint import find_checkpoint, read_checkpoint
from vlm.errors import UserError

STATE = {"a.weight": torch.arange(3.0)}


def write(folder, content, name="model.pth"):
    torch.save(content, folder / name)
    return folder / name


@pytest.mark.parametrize("content", [STATE, {"model": STATE}, {"state_dict": STATE, "epoch": 3}])
def test_weights_alone_or_inside_a_training_state(content, tmp_path):
    assert torch.equal(read_checkpoint(write(tmp_path, content))["a.weight"], STATE["a.weight"])


def test_safetensors(tmp_path):
    save_file(STATE, tmp_path / "model.safetensors")
    assert set(read_checkpoint(tmp_path / "model.safetensors")) == {"a.weight"}


def test_settings_of_yacs_need_no_yacs(tmp_path, monkeypatch):
    module = types.ModuleType("yacs.config")

    class CfgNode(dict):
        def __init__(self, values):
            super().__init__(values)
            self.__dict__["__immutable__"] = True

    CfgNode.__module__, CfgNode.__qualname__ = "yacs.config", "CfgNode"
    module.CfgNode = CfgNode  # pyright: ignore[reportAttributeAccessIssue]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
        patch.setitem(sys.modules, "yacs.config", module)
        settings = CfgNode({"MODEL": CfgNode({"NAME": "vssm1_tiny_0230s"})})
        file = write(tmp_path, {"model": STATE, "config": settings})
    assert set(read_checkpoint(file)) == {"a.weight"}


class Trap:
    """Unpickling it would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_code_is_not_run(tmp_path):
    file = write(tmp_path, {"model": STATE, "extra": Trap(tmp_path / "ran")})
    with pytest.raises(UserError, match="cannot read the weights"):
        read_checkpoint(file)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [{}, {"model": {"a": 3}}, [1, 2], torch.zeros(2), {"model": 1}])
def test_no_weights(content, tmp_path):
    with pytest.raises(UserError, match="holds no weights: expected a dict of tensors"):
        read_checkpoint(write(tmp_path, content))


@pytest.mark.parametrize("name", ["broken.pth", "broken.safetensors", "empty.bin"])
def test_broken_files(name, tmp_path):
    (tmp_path / name).write_bytes(b"" if name.startswith("empty") else b"not a checkpoint")
    with pytest.raises(UserError, match=r"cannot read the weights .*: \w"):  # and says why
        read_checkpoint(tmp_path / name)


def test_find_checkpoint(tmp_path):
    with pytest.raises(UserError, match=r"must be a checkpoint file .*; found none"):
        find_checkpoint(str(tmp_path / "missing"))
    first = write(tmp_path, STATE, "vim_s.pth")
    (tmp_path / "README.md").write_text("words")
    assert find_checkpoint(str(tmp_path)) == find_checkpoint(str(first)) == first
    write(tmp_path, STATE, "vim_t.pth")
    with pytest.raises(UserError, match=r"found vim_s\.pth, vim_t\.pth"):
        find_checkpoint(str(tmp_path))
