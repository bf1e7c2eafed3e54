"""Make a plain checkpoint of one that holds an adapter, or quantised weights.

vlm merge runs/mine/instruct --out runs/mine/merged
vlm merge runs/mine/instruct/checkpoints/checkpoint-500 --out runs/mine/merged-500

Weights that were quantised in training keep the numbers that they had there.
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `vlm merge`."""
    parser.add_argument("model", metavar="FOLDER", help="a stage's folder, or a checkpoint in it")
    parser.add_argument("--out", metavar="DIR", required=True, help="a new folder for the result")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the weights; default: that of the frozen ones in training",
    )


def run(args: argparse.Namespace) -> int:
    """Load, merge, write."""
    from pathlib import Path

    from vlm.done import make_folder
    from vlm.errors import UserError
    from vlm.loading import check_checkpoint, load_model
    from vlm.on_base import stands_on_base

    folder = Path(args.out)
    check_checkpoint(args.model)
    if not stands_on_base(args.model):
        raise UserError(f"{args.model} is a plain checkpoint already: there is nothing to merge")
    make_folder(folder)
    if any(folder.iterdir()):
        raise UserError(f"{folder} is not empty; choose another --out")
    model, processor = load_model(args.model, dtype=args.dtype, device="cpu", merged=True)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    print(f"merged: {folder}")
    return 0
