"""Do two processes with half the batch each learn what one with the whole batch learns?"""

import os
import socket
import subprocess
import sys

import pytest

from train.callbacks import read_log
from vlm.cli import main


@pytest.mark.slow
def test_two_ranks_equal_one(tree, write_recipe, tmp_path):
    del tree["stages"][0]
    tree["stages"][0]["training"]["use_cpu"] = True
    recipe = str(write_recipe(tree))
    size = "--stages.instruct.training.per_device_train_batch_size"
    assert main(["train", recipe, size, "4", "--output_dir", str(tmp_path / "one")]) == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    torchrun += ["--master-port", str(port), "-m", "train", recipe]
    result = subprocess.run(
        [*torchrun, size, "2", "--output_dir", str(tmp_path / "two")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    logs = [
        read_log(tmp_path / name / "instruct" / "training_log.jsonl") for name in ("one", "two")
    ]
    losses = [[line["loss"] for line in log] for log in logs]
    assert len(losses[0]) == 8
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)
