"""Talk to a model about images and videos in the terminal.

Type a question; Ctrl-C stops a reply, Ctrl-D or /quit ends the chat. Lines starting with / are
commands: /image PATH and /video PATH add a picture or a video to the next question, /clear begins
anew, /save FILE writes the conversation as LLaVA JSON, /help lists the commands. Questions can come
from a pipe, one per line.
"""

import argparse
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vlm.chat_session import ChatSession

VIDEO_SUFFIXES = {
    *(".3gp", ".asf", ".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ogv"),
    *(".ts", ".webm", ".wmv"),
}
HELP = """\
/image PATH   add a picture to the next question
/video PATH   add a video to the next question
/clear        forget the conversation and its pictures
/save FILE    write the conversation as LLaVA-format JSON
/help         this list
/quit         leave (also Ctrl-D); Ctrl-C stops a reply"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `vlm chat`."""
    parser.add_argument("model", metavar="MODEL", help="checkpoint folder or Hub id")
    parser.add_argument(
        "images",
        metavar="FILE",
        nargs="*",
        help="pictures, videos and folders of a video's frames to talk about",
    )
    parser.add_argument("--prompt", metavar="TEXT", help="ask this, print the reply and exit")
    parser.add_argument("--system", metavar="TEXT", help="system message")
    parser.add_argument(
        "--max-new-tokens", type=int, default=512, help="longest reply, in tokens (%(default)s)"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0: the likeliest reply (default)"
    )
    parser.add_argument(
        "--top-p", type=float, default=1.0, help="sample among this probability mass (%(default)s)"
    )
    parser.add_argument("--device", help="such as cuda or cpu; default: a GPU if there is one")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the weights; default: the checkpoint's",
    )


def run(args: argparse.Namespace) -> int:
    """Load the model and answer one prompt, or chat until the end of the input."""
    from transformers.utils import logging

    from vlm.chat_session import ChatSession, Sampling
    from vlm.errors import UserError
    from vlm.images import load_image
    from vlm.loading import check_checkpoint, load_model
    from vlm.video import video_facts

    if args.prompt is not None and not args.prompt.strip():
        raise UserError("--prompt is empty; write a question")
    sampling = Sampling(
        max_new_tokens=args.max_new_tokens, temperature=args.temperature, top_p=args.top_p
    )
    logging.disable_progress_bar()
    # Loading a large model takes minutes: look at everything else first.
    check_checkpoint(args.model)
    videos = [path for path in args.images if is_video_name(path)]
    images = {path: load_image(path) for path in args.images if path not in videos}
    for path in videos:
        video_facts(path)
    model, processor = load_model(args.model, dtype=args.dtype, device=args.device)
    session = ChatSession(model, processor, sampling, args.system)
    for path in args.images:
        if path in videos:
            session.add_video(path)
        else:
            session.add_image(images[path], name=path)
    if args.prompt is not None:
        say(session, args.prompt)
        return 0
    return converse(session, interactive=sys.stdin.isatty(), name=args.model)


def is_video_name(path: str) -> bool:
    """Return whether a path is a video: by its name, or a folder of frames; a GIF is a picture."""
    return Path(path).suffix.lower() in VIDEO_SUFFIXES or Path(path).is_dir()


def converse(session: "ChatSession", interactive: bool, name: str) -> int:
    """Answer line after line.

    At a terminal a mistake is told and the chat goes on; from a pipe it ends the command, because
    what follows may rest on it.
    """
    from vlm.errors import UserError

    if interactive:
        print(f"{name}: {len(session.waiting)} pictures and videos; /help lists the commands")
    for line in read_lines(interactive):
        try:
            if not obey(session, line):
                break
        except UserError as error:
            if not interactive:
                raise
            print(f"! {error}")
    return 0


def read_lines(interactive: bool) -> Iterator[str]:
    """Yield what is typed or piped, without empty lines; Ctrl-C on a line drops the line."""
    if interactive:
        # Importing it is what gives input() line editing and a history.
        import readline  # noqa: F401
    while True:
        try:
            line = input("> ") if interactive else next(sys.stdin)
        except (EOFError, StopIteration):
            if interactive:
                print()
            return
        except KeyboardInterrupt:
            if not interactive:
                raise
            print("\n(/quit or Ctrl-D leaves)")
            continue
        if line.strip():
            yield line.rstrip()


def obey(session: "ChatSession", line: str) -> bool:
    """Do one command or answer one question; return whether the chat goes on.

    Raises:
        UserError: the command or the question cannot be done.
    """
    from vlm.errors import UserError

    if not line.startswith("/"):
        say(session, line.strip())
        return True
    command, _, rest = line.partition(" ")
    rest = rest.strip()
    needed = {"/image": "picture", "/video": "video", "/save": "file"}
    if command in needed and not rest:
        raise UserError(f"{command} needs a {needed[command]}'s path")
    match command:
        case "/quit":
            return False
        case "/help":
            print(HELP)
        case "/clear":
            session.clear()
        case "/image":
            session.add_image(rest)
        case "/video":
            video = session.add_video(rest)
            times = ", ".join(f"{time:.2f}" for time in video.times)
            print(f"{len(video.frames)} of {video.num_file_frames} frames, at {times} s")
        case "/save":
            session.save(rest)
            print(f"saved {rest}")
        case _:
            raise UserError(
                f"unknown command {command}; /help lists them (a question that begins with / needs "
                "a space before it)"
            )
    return True


def say(session: "ChatSession", text: str) -> None:
    """Print the reply as it comes; Ctrl-C stops the reply and keeps what was said."""
    if left_out := session.fit_videos(text):
        print(f"({left_out})")
    with closing(session.ask(text)) as pieces:
        try:
            for piece in pieces:
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            print(" ...", end="")
    print(flush=True)
