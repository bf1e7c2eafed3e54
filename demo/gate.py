"""Which requests reach gradio at all? Those that the page itself makes, from its own address.

Gradio has routes that fetch addresses for the visitor, follow proxies, record runs and tell of the
app; the page needs none of them. What is refused, is refused before gradio reads it, with one
sentence in `detail`, which the page shows.
"""

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from demo.limits import Limits
from demo.talk import Talks
from demo.told import is_disk_full
from demo.visitors import Rates, address_of, is_logged_in, new_cookie, visitor_of
from demo.wording import language_of, say

API = "/gradio_api"
FILE = f"{API}/file="
UPLOAD = f"{API}/upload"
JOIN = f"{API}/queue/join"
# What the page asks for: whole paths, and beginnings.
GET = {
    *("/", "/config", "/theme.css", "/favicon.ico", "/manifest.json", "/robots.txt", "/logout"),
    *(f"{API}/queue/data", f"{API}/upload_progress", f"{API}/startup-events"),
}
HEARTBEAT = f"{API}/heartbeat/"  # a page holds such a connection as long as it is open
GET_BELOW = ("/assets/", "/static/", "/svelte/", HEARTBEAT, FILE)
# For handlers with `queue=False`, such as "Stop"; `demo.server` lets gradio refuse the others.
DIRECT = f"{API}/run/predict"
WITH_BODY = {JOIN, DIRECT, f"{API}/cancel", f"{API}/reset"}
POST = {*WITH_BODY, UPLOAD, "/login"}
COUNTED = {JOIN, UPLOAD}  # of what a visitor may do so much in a minute
DIRECT_MORE = 4  # times as often: they are cheap, and who may ask no more can still stop a reply
# What can be had without the password: the page that asks for it, what that page is made of, and
# whether the server is up.
OPEN = {
    *("/", "/login", "/theme.css", "/favicon.ico", "/manifest.json", "/robots.txt"),
    f"{API}/startup-events",
}
OPEN_BELOW = ("/assets/", "/static/", "/svelte/")
MAX_BODY = 1_000_000  # bytes of JSON; pictures come by upload
LOOPBACK = {"localhost", "127.0.0.1", "[::1]"}
# An answer, or a conversation that is opened, may hold Markdown with pictures of other addresses:
# the browser asks this server alone, whatever the page names. Gradio's scripts need the rest.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; media-src 'self' data: blob:; "
    "font-src 'self' data:; connect-src 'self' data: blob:; worker-src 'self' blob:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'self'"
)


@dataclass(frozen=True)
class Refusal:
    """An HTTP status, and the key and values of the sentence in demo.wording."""

    status: int
    key: str
    values: Mapping[str, object]


def refuse(status: int, key: str, **values: object) -> Refusal:
    """Return a refusal."""
    return Refusal(status, key, values)


def check_route(method: str, path: str, headers: Mapping[str, str], local: bool) -> Refusal | None:
    """Refuse what is none of the page's requests, or does not come from the page.

    Args:
        method: such as "GET".
        path: unquoted.
        headers: with lower-case names.
        local: the page is for this machine alone, so no other name leads to it. (A foreign page
            whose name is made to lead here could read the answers otherwise: DNS rebinding.)
    """
    host = headers.get("host", "")
    if local and host.rpartition(":")[0] not in LOOPBACK and host not in LOOPBACK:
        return refuse(403, "foreign_page")
    if method in ("GET", "HEAD"):
        known = path in GET or path.startswith(GET_BELOW)
    else:
        known = method == "POST" and path.rstrip("/") in POST
    if not known or (path.startswith(FILE) and "://" in path) or ".." in path.split("/"):
        return refuse(404, "no_such_page")
    if method == "POST":
        origin = headers.get("origin")
        ours = {host, headers.get("x-forwarded-host", host)}
        if origin is not None and _netloc(origin) not in ours:
            return refuse(403, "foreign_page")
        if headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
            return refuse(403, "foreign_page")
    return None


def check_files(body: Any, folder: Path, host: str) -> Refusal | None:
    """Refuse a call that names a file which was not uploaded, or an address elsewhere."""
    for named in _named_files(body):
        path, url = named.get("path"), named.get("url")
        if path is not None and not _is_in(path, folder):
            return refuse(400, "foreign_file")
        if url is not None and (not isinstance(url, str) or _netloc(url) not in ("", host)):
            return refuse(400, "foreign_file")
    return None


def _netloc(url: str) -> str | None:
    """Return the name and port in an address, None if it is none."""
    try:
        return urlsplit(url).netloc
    except ValueError:
        return None


def _named_files(value: Any) -> Iterator[Mapping[str, Any]]:
    """Yield every object in a JSON value that names a file or an address."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            if "path" in value or "url" in value:
                yield value
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value


def _is_in(path: Any, folder: Path) -> bool:
    """Tell whether a path leads into a folder, links and `..` followed."""
    if not isinstance(path, str) or "\0" in path:
        return False
    return Path(path).resolve().is_relative_to(folder)


class Gate:
    """ASGI middleware in front of gradio."""

    def __init__(
        self, app: ASGIApp, limits: Limits, folder: Path, talks: Talks, local: bool
    ) -> None:
        """Guard an app.

        Args:
            app: gradio's.
            limits: of uploads and requests.
            folder: of uploads.
            talks: are told whose page is open.
            local: as in `check_route`.
        """
        self.app, self.limits, self.folder, self.local = app, limits, folder, local
        self.talks = talks
        of_each = (limits.max_requests, limits.max_requests_address)  # visitor, address
        self.asked = tuple(Rates(most) for most in of_each)
        self.direct = tuple(Rates(DIRECT_MORE * most) for most in of_each)
        self.logins = Rates(limits.max_requests)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it with a refusal."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return  # a websocket is not answered: the page opens none
        headers = Headers(scope=scope)
        send = _with_headers(send, new_cookie(scope))
        path = scope["path"].rstrip("/")  # gradio has some routes with a slash at the end too
        refusal = check_route(scope["method"], scope["path"], headers, self.local)
        refusal = refusal or _check_login(scope) or self._check_amount(scope, headers)
        if refusal is None and scope["method"] == "POST" and path in WITH_BODY:
            body = await _read(receive)
            refusal = self._check_body(body, headers.get("host", ""))
            receive = _replay(body, receive)
        if refusal is not None:
            await _answer(refusal, headers)(scope, receive, send)
            return
        if path == JOIN:
            send = _told_when_full(send, headers)
        session = path.removeprefix(HEARTBEAT)
        is_page = self.talks.page_open(session) if session != path else nullcontext()
        try:
            with is_page:
                await self.app(scope, receive, send)
        except OSError as error:
            if path != UPLOAD or not is_disk_full(error):
                raise
            await _answer(refuse(507, "disk_full"), headers)(scope, receive, send)

    def _check_amount(self, scope: Scope, headers: Headers) -> Refusal | None:
        path = scope["path"].rstrip("/")
        if scope["method"] != "POST":
            return None
        address, counted = address_of(scope), {}
        if path == "/login":  # by address alone: who guesses would come as a new visitor each time
            counted = {address: self.logins}
        elif path in COUNTED or path == DIRECT:
            both = ((address, visitor_of(scope)), address)
            counted = dict(zip(both, self.direct if path == DIRECT else self.asked, strict=True))
        for who, rates in counted.items():
            if rates.too_often(who, time.monotonic()):
                return refuse(429, "too_often", limit=rates.most)
        if path != UPLOAD:
            return None
        size = headers.get("content-length", "")
        if not size.isdecimal() or int(size) > self.limits.max_upload_bytes:
            return refuse(413, "upload_too_large", limit=self.limits.max_upload_bytes // 1_000_000)
        used = _used_bytes(self.folder)
        if used + int(size) > self.limits.max_disk_mb * 1_000_000:
            return refuse(507, "disk_full")
        return None

    def _check_body(self, body: bytes | None, host: str) -> Refusal | None:
        if body is None:
            return refuse(413, "upload_too_large", limit=MAX_BODY // 1_000_000)
        try:
            value = json.loads(body, parse_constant=_no_number)
        except (ValueError, RecursionError):
            return refuse(400, "no_such_page")
        return check_files(value, self.folder, host)


def _check_login(scope: Scope) -> Refusal | None:
    """Refuse whoever has not given the password; gradio itself forgets to ask at some routes."""
    path = scope["path"]
    if path in OPEN or path.startswith(OPEN_BELOW) or is_logged_in(scope):
        return None
    return refuse(401, "log_in")


def _used_bytes(folder: Path) -> int:
    """Return how much lies in a folder, whose files others remove meanwhile."""
    used = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                used += os.lstat(os.path.join(place, name)).st_size
    return used


def _no_number(constant: str) -> None:
    """Refuse NaN and Infinity, which JSON does not have.

    Raises:
        ValueError: always.
    """
    raise ValueError(f"{constant} is no JSON")


async def _read(receive: Receive) -> bytes | None:
    """Return a request's body, None if it is longer than MAX_BODY."""
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > MAX_BODY:
            return None
        if not message.get("more_body", False):
            return body


def _replay(body: bytes | None, receive: Receive) -> Receive:
    """Return a `receive` that gives a body that was read already, and then what else comes."""
    messages = [{"type": "http.request", "body": body or b"", "more_body": False}]

    async def again() -> Message:
        return messages.pop() if messages else await receive()

    return again


def _answer(refusal: Refusal, headers: Headers) -> JSONResponse:
    language = language_of(headers.get("accept-language"))
    sentence = say(language, refusal.key, **refusal.values)
    return JSONResponse({"detail": sentence, "error": sentence}, refusal.status)


def _with_headers(send: Send, cookie: str | None) -> Send:
    """Let every answer tell the browser what it may load for the page; give a visitor a cookie."""

    async def told(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers["content-security-policy"] = POLICY
            if cookie is not None:
                headers.append("set-cookie", cookie)
        await send(message)

    return told


def _told_when_full(send: Send, headers: Headers) -> Send:
    """Replace gradio's answer when its queue is full (503), of which the page shows no detail."""
    full = _answer(refuse(429, "queue_full"), headers)
    replaced = False

    async def told(message: Message) -> None:
        nonlocal replaced
        if message["type"] == "http.response.start" and message["status"] == 503:
            replaced = True
            await send({**message, "status": full.status_code, "headers": full.raw_headers})
        elif replaced and message["type"] == "http.response.body":
            if not message.get("more_body", False):
                await send({"type": "http.response.body", "body": full.body})
        else:
            await send(message)

    return told
