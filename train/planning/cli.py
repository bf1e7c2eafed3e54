"""Tell what a recipe's run will need, before any weight is loaded: no network, no GPU.

vlm plan train/recipes/llava-1.5-7b.yaml
vlm plan RECIPE --gpus 4 --gpu A100-80 --image-sizes 336x336 1920x1080
vlm plan train/recipes/quickstart.yaml --gpu CPU
vlm plan RECIPE --text-tokens align=40 instruct=300 --records align=558128 instruct=665298
vlm plan RECIPE --stages.instruct.training.per_device_train_batch_size 8

Parameters, trained ones by stage; tokens of an image; memory of a GPU by ZeRO level and offload;
operations and hours; what to change where it does not fit.
"""

import argparse

TAKES_OVERRIDES = True  # words such as `--a.b value` arrive in `args.overrides`
CPU = "CPU"
IMAGE_SIZES = ("336x336", "640x480", "1024x768", "1920x1080", "600x1800")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare RECIPE and what is known of machine and data."""
    parser.usage = "%(prog)s RECIPE [options] [--dotted.field value ...]"
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file, see train/recipes/")
    parser.add_argument("--stage", metavar="NAME", help="plan this stage alone")
    parser.add_argument("--gpus", type=int, help="over all machines; 8, or 1 with --gpu CPU")
    parser.add_argument(
        "--gpu", default="H100", help="H100, A100-80, 4090, ..., or CPU, this machine's; H100"
    )
    parser.add_argument("--gpu-memory", type=float, metavar="GIB", help="the GPU's own by default")
    parser.add_argument("--mfu", type=float, default=0.4, help="share of the peak reached; 0.4")
    parser.add_argument(
        "--image-sizes", nargs="+", default=IMAGE_SIZES, metavar="WxH", help="to count tokens of"
    )
    parser.add_argument(
        "--text-tokens", nargs="+", default=(), metavar="[STAGE=]N", help="of a row, beside images"
    )
    parser.add_argument("--records", nargs="+", default=(), metavar="[STAGE=]N", help="of an epoch")
    parser.add_argument(
        "--measure",
        type=int,
        default=64,
        metavar="N",
        help="look at N records if they are here; 64",
    )
    parser.add_argument("--json", action="store_true", help="all figures, in bytes and operations")


def run(args: argparse.Namespace) -> int:
    """Make the plan and print it."""
    import json
    import os
    from dataclasses import asdict

    os.environ["HF_HUB_OFFLINE"] = "1"  # before the libraries that read it are imported

    from connectors.registry import lookup
    from train.planning.gpus import GPUS, this_cpu
    from train.planning.memory import RESERVE
    from train.planning.plan import Options, make_plan
    from train.planning.report import render
    from train.recipe import load_recipe
    from vlm.errors import UserError

    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    gpu = lookup("GPU", args.gpu, {**GPUS, CPU: this_cpu(os.cpu_count() or 1, memory)})
    on_cpu = args.gpu == CPU
    gpus = args.gpus if args.gpus is not None else 1 if on_cpu else 8
    if gpus < 1 or not 0 < args.mfu <= 1:
        raise UserError("--gpus must be 1 or more, and --mfu above 0 and at most 1")
    if args.gpu_memory is not None and args.gpu_memory <= 0:
        raise UserError("--gpu-memory must be above 0 GiB")
    options = Options(
        gpus=gpus,
        gpu=gpu,
        memory=gpu.memory if args.gpu_memory is None else args.gpu_memory,
        reserve=0 if on_cpu else RESERVE,
        mfu=args.mfu,
        image_sizes=tuple(parse_size(text) for text in args.image_sizes),
        text_tokens=parse_numbers("--text-tokens", args.text_tokens),
        records=parse_numbers("--records", args.records),
        measured=args.measure,
    )
    recipe = load_recipe(args.recipe, args.overrides)
    for stage in {*options.text_tokens, *options.records} - {""}:
        recipe.stage(stage)  # says if there is none
    plan = make_plan(recipe, options, args.stage)
    print(
        json.dumps(asdict(plan), indent=2) if args.json else render(plan, options, args.gpu), end=""
    )
    return 0


def parse_size(text: str) -> tuple[int, int]:
    """Return (width, height) of "1024x768".

    Raises:
        UserError: it is not of that form.
    """
    from vlm.errors import UserError

    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise UserError(
            f"--image-sizes: {text!r} is not of the form WIDTHxHEIGHT, such as 1024x768"
        )
    return int(width), int(height)


def parse_numbers(option: str, words: tuple[str, ...] | list[str]) -> dict[str, int]:
    """Return {stage: number} of words such as "align=40"; "40" is for all stages, named "".

    Raises:
        UserError: a word is not of that form.
    """
    from vlm.errors import UserError

    numbers = {}
    for word in words:
        stage, _, number = word.rpartition("=")
        if not number.isdecimal() or not int(number):
            raise UserError(f"{option}: {word!r} is not of the form STAGE=NUMBER or NUMBER")
        numbers[stage] = int(number)
    return numbers
