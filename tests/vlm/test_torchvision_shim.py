"""Does torchvision import beside any torch, and is a whole torchvision left alone?"""

import shutil
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.util import find_spec

import pytest

from vlm import torchvision_shim
from vlm.torchvision_shim import operators_load

LIBRARIES = """
from vlm.torchvision_shim import ensure_torchvision
first = ensure_torchvision()
assert ensure_torchvision() is first
import torchvision, timm, open_clip, peft
from transformers import CLIPImageProcessor, BloomPreTrainedModel
from torchvision.transforms.v2.functional import resize
import torch
assert resize(torch.zeros(1, 3, 8, 8), [4, 4]).shape == (1, 3, 4, 4)
whole = torchvision.extension._has_ops()
assert whole == (first is None), (whole, first)
"""

ELSEWHERE = """
import runpy, sys, torch
folder, shim = sys.argv[1:]
sys.path.insert(0, folder)
ensure_torchvision = runpy.run_path(shim)["ensure_torchvision"]  # `import vlm` wants a real one
print(ensure_torchvision() is None, hasattr(torch.ops.torchvision, "nms"))
"""


def run_python(code: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def make_torchvision(folder, operators: str):
    package = folder / "torchvision"
    package.mkdir()
    (package / "__init__.py").touch()
    target = package / f"_C{EXTENSION_SUFFIXES[-1]}"
    if operators == "whole":  # any library that the dynamic linker takes
        shutil.copyfile(find_spec("_ctypes").origin, target)
    elif operators == "broken":
        target.write_bytes(b"\x7fELF no library")
    return package


@pytest.mark.parametrize(("operators", "loads"), [("whole", True), ("broken", False), ("", False)])
def test_tries_to_load_the_operators(tmp_path, operators, loads):
    assert operators_load(make_torchvision(tmp_path, operators)) is loads


@pytest.mark.parametrize(
    ("operators", "printed"), [("whole", "True False"), ("broken", "False True")]
)
def test_declares_only_where_they_do_not_load(tmp_path, operators, printed):
    make_torchvision(tmp_path, operators)
    assert run_python(ELSEWHERE, str(tmp_path), torchvision_shim.__file__) == printed


@pytest.mark.skipif(
    find_spec("open_clip") is None or find_spec("peft") is None, reason="needs open_clip and peft"
)
def test_the_libraries_import():
    run_python(LIBRARIES)
