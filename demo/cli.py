"""Talk to a model about pictures in a web page.

The page is for this machine alone: it listens on 127.0.0.1 and nothing is fetched from elsewhere.
`--host 0.0.0.0` opens it to the network; `--share` to the world, through a server of Gradio's
company that all pictures and words then pass; give both a password with `--auth user:password`.
"""

import argparse
import signal
import sys
import threading
from dataclasses import fields
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `vlm demo`; each limit is one."""
    from demo.limits import Limits

    parser.add_argument("model", metavar="MODEL", help="checkpoint folder or Hub id")
    parser.add_argument(
        "--compare", metavar="MODEL2", help="answer every question with this model too, beside it"
    )
    parser.add_argument("--port", type=int, help="default: the first free one from 7860")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    parser.add_argument("--auth", metavar="USER:PASSWORD", help="ask for these")
    parser.add_argument(
        "--share",
        action="store_true",
        help="also under a public address, through a tunnel of Gradio's company",
    )
    parser.add_argument("--device", help="such as cuda or cpu; default: a GPU if there is one")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the weights; default: the checkpoint's",
    )
    limits = parser.add_argument_group("limits")
    for field in fields(Limits):
        option = "--" + field.name.replace("_", "-")
        limits.add_argument(
            option, type=int, default=field.default, metavar="N", help="%(default)s"
        )


def run(args: argparse.Namespace) -> int:
    """Load the model and serve it until Ctrl-C.

    Raises:
        UserError: an option cannot be, the model cannot be loaded, or the port is taken.
    """
    from transformers.utils import logging

    from demo.fits import check_fits, free_bytes
    from demo.limits import Limits
    from demo.server import Address, serving
    from vlm.loading import check_checkpoint, load_model

    limits = Limits(**{field.name: vars(args)[field.name] for field in fields(Limits)})
    address = Address(
        host=args.host, port=args.port, auth=_user_and_password(args.auth), share=args.share
    )
    import gradio  # noqa: F401 - if it is missing, say so before a large model is loaded

    logging.disable_progress_bar()
    sources = [args.model, *([args.compare] if args.compare else [])]
    for source in sources:
        check_checkpoint(source)
    if args.compare:
        check_fits(sources, args.dtype, free_bytes(args.device))
    loaded = [load_model(source, dtype=args.dtype, device=args.device) for source in sources]
    first, *other = [
        (page_name(source), *parts) for source, parts in zip(sources, loaded, strict=True)
    ]
    if args.share:
        print(
            "--share: all pictures and words of the page pass a server of Gradio's company, and "
            + ("who has the password" if address.auth else "anybody who has the address")
            + " can use it",
            file=sys.stderr,
        )
    with serving(*first, limits, address, *other) as url:
        print(f"{args.model}: {url} (Ctrl-C ends it)", flush=True)
        _wait()
    return 0


def page_name(source: str) -> str:
    """Return what a model is called on the page: not where on this machine its folder lies."""
    path = Path(source)
    return "/".join(path.resolve().parts[-3:]) if path.is_dir() else source


def _user_and_password(words: str | None) -> tuple[str, str] | None:
    """Split `user:password`.

    Raises:
        UserError: one of them is missing.
    """
    from vlm.errors import UserError

    if words is None:
        return None
    user, _, password = words.partition(":")
    if not user or not password:
        raise UserError("--auth must be a user and a password with a colon between, as ann:secret")
    return user, password


def _wait() -> None:
    """Return at Ctrl-C or when the process is asked to end."""
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda number, frame: ended.set())
    try:
        ended.wait()
    except KeyboardInterrupt:
        print()
