"""Can a model that is no folder here be asked of the Hub?

Without a network the Hub's library tries for half a minute, and says so line by line, before it
gives up: also for a folder's name with one wrong letter.
"""

import socket
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

SECONDS = 5.0


def check_reach(source: str | Path) -> None:
    """Refuse a model that is neither here nor in the Hub's cache, where no Hub is reached.

    Otherwise asking is worth it: also behind a proxy, which is not tried.

    Raises:
        OSError: as transformers raises it, half a minute later.
    """
    if Path(source).exists() or constants.HF_HUB_OFFLINE or getproxies():
        return
    try:
        if isinstance(try_to_load_from_cache(str(source), "config.json"), str):
            return
    except HFValidationError:
        return  # no name that the Hub has; its library says so at once
    hub = urlsplit(constants.ENDPOINT)
    with socket.create_connection((hub.hostname, hub.port or 443), timeout=SECONDS):
        pass
