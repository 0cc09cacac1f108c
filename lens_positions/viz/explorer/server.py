"""The explorer in a browser: a server for one person, on this machine.

What it lets in, in the order in which it looks:

    Host        the address that it was started on, so that no other name leads here (DNS rebinding)
    Origin      none, or its own: a page of another site may send requests, and gets nothing
    token       a secret in the address of the page, drawn anew at each start, sent along with every question
    size        256 KB of JSON
    state       what `state.py` reads; a model by one of the names that the server was started with

It runs no commands, reads no files but those of the page, and keeps nothing of what it is asked.
"""

import json
import secrets
import socket
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

from ...errors import PositionsError
from ...model import HookedPositionTransformer
from . import page as pages
from .engine import Explorer

SMALL = 20_000_000
"""A model of fewer parameters runs in one thread: a second one brings nothing in passes of a few milliseconds, and
waits for the first on a core that the browser needs (29 against 165 ms an edit of a shipped one on two busy cores)."""

MOST_BYTES = 256 * 1024
TABS_KNOWN = 256

NEEDED = "pip install starlette uvicorn"

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""What the page may load and reach: itself. circuitsvis writes styles into the page."""

HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class Models:
    """The models of a server by name, each loaded when it is first asked for; and which questions are outdated."""

    def __init__(self, names: Sequence[str], loaded: Sequence[HookedPositionTransformer] = ()) -> None:
        self.names = [*dict.fromkeys([*(model.name for model in loaded), *names])]
        self._explorers = {model.name: _explorer_of(model) for model in loaded}
        self._loading = threading.Lock()
        self._newest: OrderedDict[str, int] = OrderedDict()

    def of(self, state: Any) -> Explorer:
        """The explorer of the model that a state names.

        Raises:
            PositionsError: it names another than those that the server was started with.
        """
        name = state.get("model") if isinstance(state, dict) else None
        if not isinstance(name, str) or name not in self.names:
            raise PositionsError(f"the model {name!r:.60} was asked for; expected one of {', '.join(self.names)}.")
        if name in self._explorers:
            return self._explorers[name]
        with self._loading:
            if name not in self._explorers:
                self._explorers[name] = _explorer_of(HookedPositionTransformer.from_pretrained(name))
            return self._explorers[name]

    def note(self, tab: str, serial: int) -> None:
        """Note that a tab has asked a question, by its number."""
        self._newest[tab] = max(serial, self._newest.get(tab, 0))
        self._newest.move_to_end(tab)
        while len(self._newest) > TABS_KNOWN:
            self._newest.popitem(last=False)

    def outdated(self, tab: str, serial: int) -> bool:
        """Whether the tab has asked another question since."""
        return bool(tab) and self._newest.get(tab, 0) > serial


def _explorer_of(model: HookedPositionTransformer) -> Explorer:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Explorer(model, threads=1 if parameters < SMALL else None)


def application(models: Models, token: str, hosts: Sequence[str]) -> Any:
    """The server as an ASGI application.

    Args:
        models: what it may run.
        token: the secret of its page.
        hosts: what may stand in Host, with the port.
    """
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route

    def refused(status: int, sentence: str) -> Response:
        return JSONResponse({"error": sentence}, status, headers=HEADERS)

    def check(request: Request, given: str | None) -> Response | None:
        host, origin = request.headers.get("host", ""), request.headers.get("origin")
        if host not in hosts:
            return refused(421, "This address is not the one that the explorer was started on.")
        if origin is not None and origin not in {f"http://{known}" for known in hosts}:
            return refused(403, "Another site may not ask the explorer.")
        if given is None or not secrets.compare_digest(given.encode(), token.encode()):
            return refused(403, "The token is missing or wrong; expected the address that the explorer printed.")
        return None

    async def show(request: Request) -> Response:
        wrong = check(request, request.query_params.get("token"))
        return wrong or Response(pages.page(models.names), media_type="text/html", headers=HEADERS)

    async def file(request: Request) -> Response:
        name = request.path_params["name"]
        wrong = check(request, token)  # the files are those of the package, and no secret
        if wrong is not None or name not in pages.FILES:
            return wrong or refused(404, "There is no such file.")
        return Response(pages.file(name), media_type=pages.FILES[name], headers=HEADERS)

    def answered(answer: Callable[..., Any], state: Any, outdated: Callable[[], bool]) -> Any:
        explorer = models.of(state)
        try:
            return answer(explorer, state, outdated)
        except PositionsError as error:
            return {"error": str(error)}  # an answer: the model cannot do what was asked

    def asking(answer: Callable[[Explorer, Any, Callable[[], bool]], Any]) -> Callable[[Request], Any]:
        async def ask(request: Request) -> Response:
            wrong = check(request, request.headers.get("x-explorer-token"))
            if wrong is not None:
                return wrong
            if request.headers.get("content-type", "").partition(";")[0] != "application/json":
                return refused(415, "The question is no JSON; expected application/json.")
            body = b""
            async for piece in request.stream():
                body += piece
                if len(body) > MOST_BYTES:
                    return refused(413, f"The question is longer than {MOST_BYTES:,} bytes; expected a shorter text.")
            tab, serial = request.headers.get("x-explorer-tab", "")[:64], request.headers.get("x-explorer-serial", "")
            number = int(serial) if serial.isascii() and serial.isdigit() and len(serial) < 16 else 0
            models.note(tab, number)
            try:
                state = json.loads(body)
            except (ValueError, RecursionError):
                return refused(400, "The question is no JSON; expected an object.")
            try:
                found = await run_in_threadpool(answered, answer, state, lambda: models.outdated(tab, number))
            except PositionsError as error:
                return refused(400, str(error))
            if isinstance(found, str):
                return Response(found, media_type="text/html", headers=HEADERS)
            return JSONResponse(found, headers=HEADERS)

        return ask

    ask: dict[str, Callable[[Explorer, Any, Callable[[], bool]], Any]] = {
        "run": Explorer.run,
        "slopes": Explorer.slopes,
        "page": lambda explorer, state, _outdated: explorer.page(state),
    }
    routes = [Route("/", show), Route("/{name}", file)]
    routes += [Route(f"/api/{name}", asking(answer), methods=["POST"]) for name, answer in ask.items()]
    return Starlette(routes=routes)


class Server:
    """The explorer on a port of this machine.

    Attributes:
        address: of its page, with the token.
    """

    def __init__(self, models: Models, host: str = "127.0.0.1", port: int = 0) -> None:
        """Take the port, without answering yet.

        Raises:
            PositionsError: the address cannot be taken, or starlette or uvicorn is missing.
        """
        try:
            import uvicorn
        except ModuleNotFoundError as error:
            raise PositionsError(
                f"the explorer needs starlette and uvicorn, which are not installed; expected {NEEDED} "
                "(or lens-positions[explore])."
            ) from error
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        # asyncio sends small packets at once only where a socket says that it is of TCP; otherwise the end of an answer
        # waits for the receiver's acknowledgement of its beginning, which Linux holds back for 40 ms.
        self._socket = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._socket.bind((host, port))
            self._socket.listen()
        except OSError as error:
            self._socket.close()
            raise PositionsError(
                f"the explorer cannot listen on {host} port {port} ({error.strerror or error}); expected an address of "
                "this machine and a free port (0 takes any)."
            ) from error
        self.host, self.port = host, self._socket.getsockname()[1]
        token = secrets.token_urlsafe(24)
        names = ["127.0.0.1", "localhost"] if is_local(host) else [host if ":" not in host else f"[{host}]"]
        if host in EVERY_ADDRESS:
            names = ["127.0.0.1", "localhost", *addresses()]
        hosts = [f"{name}:{self.port}" for name in [*names, *(["[::1]"] if host == "::1" else [])]]
        self.address = f"http://{hosts[0]}/?token={token}"
        config = uvicorn.Config(
            application(models, token, hosts), log_level="error", access_log=False, server_header=False, lifespan="off"
        )
        self._server = uvicorn.Server(config)

    def run(self) -> None:
        """Answer until interrupted."""
        self._server.run(sockets=[self._socket])

    def stop(self) -> None:
        """Stop answering, from another thread."""
        self._server.should_exit = True


EVERY_ADDRESS = ("0.0.0.0", "::")


def is_local(host: str) -> bool:
    """Whether only this machine reaches an address."""
    return host in ("127.0.0.1", "localhost", "::1")


def addresses() -> list[str]:
    """Names and addresses under which others reach this machine."""
    name = socket.gethostname()
    try:
        found = {str(info[4][0]) for info in socket.getaddrinfo(name, None, socket.AF_INET)}
    except OSError:
        found = set()
    return sorted({name, *found})
