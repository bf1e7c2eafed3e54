"""How is the page served, so that no request leaves the machine and no other file is given out?"""

import io
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from demo.limits import Limits
from vlm.errors import UserError
from vlm.modeling import VlmForConditionalGeneration
from vlm.processing import VlmProcessor

if TYPE_CHECKING:
    from gradio.themes import Base

# Read by gradio when it is imported, or when blocks are built.
OFFLINE = {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_RUN_HISTORY": "False"}
NO_TUNNEL = (
    "--share: no tunnel could be opened through the server of Gradio's company, so there is no "
    "public address; see that this machine reaches the internet, or leave --share out"
)


@dataclass(frozen=True, kw_only=True)
class Address:
    """Where the page is found, and who may see it."""

    host: str = "127.0.0.1"
    port: int | None = None  # None: the first free one from 7860
    auth: tuple[str, str] | None = None  # user, password
    share: bool = False


@contextmanager
def serving(
    name: str,
    model: VlmForConditionalGeneration,
    processor: VlmProcessor,
    limits: Limits,
    address: Address,
    other: tuple[str, VlmForConditionalGeneration, VlmProcessor] | None = None,
) -> Iterator[str]:
    """Serve a model, or two side by side, while the block runs; yield the page's URL.

    Uploads and pictures lie in a folder of the server's own, which goes when it ends.

    Raises:
        UserError: the port is taken, or there is no public address for who wants one.
    """
    folder = Path(tempfile.mkdtemp(prefix="vlm-demo-")).resolve()
    before = os.environ.copy()
    os.environ |= OFFLINE | {"GRADIO_TEMP_DIR": str(folder)}
    from starlette.middleware import Middleware

    from demo.gate import Gate
    from demo.page import CSS, SCRIPT, build_page
    from demo.sample_questions import FOLDER
    from demo.talk import Served, Talks

    talks = Talks(limits.max_visitors)
    second = None if other is None else Served(*other, limits, folder, talks)
    served = Served(name, model, processor, limits, folder, talks, second)
    local = address.host in ("127.0.0.1", "localhost", "::1") and not address.share
    blocks = build_page(served)
    # Not open: what goes through the queue can be called in no other way.
    blocks.queue(max_size=limits.max_waiting, default_concurrency_limit=8, api_open=False)
    try:
        if address.port is not None:
            _check_free(address.host, address.port)
        with redirect_stdout(io.StringIO()):  # what gradio tells of a tunnel, over several lines
            _, url, _ = blocks.launch(
                server_name=address.host,
                server_port=address.port,
                auth=address.auth,
                share=address.share,
                prevent_thread_lock=True,
                quiet=True,
                show_error=False,
                inbrowser=False,
                max_file_size=limits.max_upload_bytes,  # a saved conversation holds several files
                allowed_paths=[str(FOLDER)],  # wherever the command is given
                footer_links=[],
                run_history=False,
                ssr_mode=False,
                pwa=False,
                mcp_server=False,
                enable_monitoring=False,
                app_kwargs={"middleware": [Middleware(Gate, limits, folder, talks, local)]},
                css=CSS,
                js=SCRIPT,
                theme=_theme(),
            )
        if address.share and blocks.share_url is None:
            raise UserError(NO_TUNNEL)
        yield blocks.share_url or url
    finally:
        served.talks.stop_all()
        blocks.close(verbose=False)
        shutil.rmtree(folder, ignore_errors=True)
        os.environ.clear()
        os.environ |= before


def _check_free(host: str, port: int) -> None:
    """Say early that a port is taken.

    Raises:
        UserError: nothing can listen there.
    """
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except (OSError, OverflowError) as error:
            raise UserError(f"--host {host} --port {port} cannot be used: {error}") from error


def _theme() -> "Base":
    """Return colours and fonts; the fonts are the machine's own."""
    from gradio.themes import Soft

    sans = ("system-ui", "-apple-system", "Segoe UI", "Noto Sans", "Noto Sans SC", "sans-serif")
    return Soft(
        primary_hue="teal",
        secondary_hue="teal",
        neutral_hue="slate",
        radius_size="lg",
        font=sans,
        font_mono=("ui-monospace", "monospace"),
    ).set(
        block_title_background_fill="none",
        block_title_background_fill_dark="none",
        block_title_text_color="*body_text_color",
        block_title_text_color_dark="*body_text_color",
        block_title_padding="0",
    )
