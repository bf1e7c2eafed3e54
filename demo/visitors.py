"""Who asks, have they given the password, and how often did they ask within a minute?

Many visitors have one address where they come through a proxy or a tunnel; so each browser gets a
cookie and is counted by it. A cookie is easily thrown away: addresses are counted as well.
"""

import re
import secrets
from collections import defaultdict, deque
from collections.abc import Hashable

from starlette.requests import HTTPConnection
from starlette.types import Scope

COOKIE = "vlm-visitor"
VALUE = re.compile(r"[\w-]{22}")


def address_of(scope: Scope) -> str:
    """Return where a request comes from."""
    return scope["client"][0] if scope["client"] else ""


def visitor_of(scope: Scope) -> str | None:
    """Return the cookie that a visitor was given; None: they show none."""
    value = HTTPConnection(scope).cookies.get(COOKIE, "")
    return value if VALUE.fullmatch(value) else None


def new_cookie(scope: Scope) -> str | None:
    """Return the header that gives whoever opens the page a cookie; None: they have one."""
    if scope["path"] != "/" or visitor_of(scope) is not None:
        return None
    return f"{COOKIE}={secrets.token_urlsafe(16)}; Path=/; HttpOnly; SameSite=Strict"


def is_logged_in(scope: Scope) -> bool:
    """Tell whether a request to gradio's app comes with one of its logins, if it asks for any."""
    app, cookies = scope["app"], HTTPConnection(scope).cookies
    names = (f"access-token-{app.cookie_id}", f"access-token-unsecure-{app.cookie_id}")
    return app.auth is None or any(cookies.get(name) in app.tokens for name in names)


class Rates:
    """How often did each of those who ask do so within the last minute?"""

    def __init__(self, most: int) -> None:
        self.most = most
        self._asked: dict[Hashable, deque[float]] = defaultdict(deque)

    def too_often(self, who: Hashable, now: float) -> bool:
        """Count a request, and tell whether it is one too many; those refused do not count."""
        for known in [key for key, times in self._asked.items() if times[-1] < now - 60]:
            del self._asked[known]
        times = self._asked[who]
        while times and times[0] < now - 60:
            times.popleft()
        if len(times) >= self.most:
            return True
        times.append(now)
        return False
