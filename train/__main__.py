"""What does `python -m train RECIPE` run? The same as `vlm train`, for torchrun and deepspeed."""

import sys

from vlm.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
