"""The web server of `mlxft studio`: who may ask, the pages, and live updates.

Pages are HTML that the server writes; static/studio.js only saves reloads, so that all of it works without JavaScript.
"""

from __future__ import annotations

import asyncio
import errno
import hmac
import importlib
import json
import os
import secrets
import signal
import socket
import sys
import webbrowser
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, quote, urlencode

from jinja2 import Environment, PackageLoader, StrictUndefined

from mlxft import __version__
from mlxft.errors import ConfigError, DataError, MlxftError, missing_extra
from mlxft.studio.work import (
    BASE_NAME,
    HEIGHT,
    WIDTH,
    Desk,
    Playground,
    Workplace,
    charts,
    histogram,
    inspect_file,
    inspect_recipe,
)
from mlxft.study.plots import overlaid, panels
from mlxft.study.report import compare_runs, details, page_parts, render, show_value
from mlxft.text import echo, printable, read_small

if TYPE_CHECKING:
    from mlxft.study.label import LabelSource

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.exceptions import HTTPException
    from starlette.requests import Request
    from starlette.responses import HTMLResponse, RedirectResponse, Response, StreamingResponse
    from starlette.routing import Mount, Route
    from starlette.staticfiles import StaticFiles
    from starlette.types import ASGIApp, Message, Receive, Scope, Send
except ModuleNotFoundError as e:
    raise ConfigError(missing_extra(str(e.name).partition(".")[0], "studio")) from e

# --- who may ask ------------------------------------------------------------------------------------------------------

PORT = 8765
_PORTS = 20  # that are tried when the default one is in use
_HOSTS = {"127.0.0.1", "localhost", "[::1]"}
_MOST_BODY, _MOST_QUERY = 1 << 20, 1 << 13  # bytes of a request
_TOO_LARGE = f"A request may have {_MOST_BODY:,} bytes."
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'"
)
# The report is a page of its own, whose style stands in it. Nothing in it runs.
_REPORT_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; frame-ancestors 'none'"
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Gate:
    """Let only the browser through that has opened the address with the token; refuse everything else.

    A web page elsewhere may lead the user's browser here. Its requests have another Origin (or Sec-Fetch-Site), lack
    the cookie, which is SameSite=Strict, or, where its name was made to point to this machine, have another Host.
    """

    def __init__(self, app: ASGIApp, token: str, cookie: str) -> None:
        self.app, self.token, self.cookie = app, token, cookie
        self.pass_value = secrets.token_urlsafe(32)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            refused = self._refusal(Request(scope))
            app = self.app if refused is None else refused
            await app(scope, _limited(receive), _with_headers(send))

    def _refusal(self, request: Request) -> Response | None:
        """Return the reply to a request that may not pass, None for one that may."""
        host, origin = request.headers.get("host", ""), request.headers.get("origin")
        site = request.headers.get("sec-fetch-site")
        length = request.headers.get("content-length", "0")
        if host.rpartition(":")[0] not in _HOSTS and host not in _HOSTS:
            return _plain(403, "This address is not the studio's: open the one that mlxft studio has printed.")
        if request.method not in ("GET", "HEAD", "POST"):
            return _plain(405, "Only GET and POST are allowed.")
        if len(request.scope["query_string"]) > _MOST_QUERY:
            return _plain(414, "The address is too long.")
        if not length.isdecimal() or int(length) > _MOST_BODY:
            return _plain(413, _TOO_LARGE)
        given = request.query_params.get("token") if request.url.path == "/" else None
        foreign = origin is not None and origin != f"http://{host}"
        foreign |= given is None and site not in (None, "same-origin", "none")
        if foreign or (request.method == "POST" and origin is None and site != "same-origin"):
            return _plain(403, "Another web page has sent this request; it is refused.")
        if given is not None:
            if not hmac.compare_digest(given.encode(), self.token.encode()):
                return _plain(403, "The token is not this studio's: open the address that mlxft studio has printed.")
            reply = RedirectResponse("/", 303)
            reply.set_cookie(self.cookie, self.pass_value, httponly=True, samesite="strict", path="/")
            return reply
        shown = request.cookies.get(self.cookie, "")
        if not hmac.compare_digest(shown.encode("utf-8", "replace"), self.pass_value.encode()):
            return _plain(401, "Open the address that mlxft studio has printed, with its token.")
        return None


def _limited(receive: Receive) -> Receive:
    """Count a body that does not state its length."""
    size = 0

    async def counted() -> Message:
        nonlocal size
        message = await receive()
        size += len(message.get("body", b""))
        if size > _MOST_BODY:
            raise HTTPException(413, _TOO_LARGE)
        return message

    return counted


def _with_headers(send: Send) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            there = {name.lower() for name, _ in message["headers"]}
            more = [(k.lower().encode(), v.encode()) for k, v in _HEADERS.items() if k.lower().encode() not in there]
            message["headers"] = [*message["headers"], *more]
        await send(message)

    return sending


def _plain(status: int, text: str) -> Response:
    return Response(text + "\n", status, media_type="text/plain")


# --- pages ------------------------------------------------------------------------------------------------------------

Form = Mapping[str, str]
_BEAT = 15.0  # seconds between signs of life of a stream
_LOOK, _LOOK_AT_ALL = 0.4, 2.0  # seconds between two looks at a run's files, and at those of all runs


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def _number(fields: Form, name: str, default: float, kind: type[int] | type[float] = int) -> Any:
    """Return a number of a form."""
    try:
        return kind(fields.get(name) or default)
    except ValueError as e:
        raise ConfigError(f"{name}: {printable(fields[name])[:40]!r} is not a number") from e


class Studio:
    """The pages of a studio; each handler has the name of its page.

    Attributes:
        closing: set when the server ends, so that streams end, too.
    """

    def __init__(self, work: Workplace) -> None:
        self.work, self.play, self.desk = work, Playground(), Desk()
        self.closing = asyncio.Event()
        self.pages = Environment(
            loader=PackageLoader("mlxft.studio"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            finalize=lambda v: printable(v) if type(v) is str else v,  # Markup is the template's own
        )
        self.pages.globals |= {
            "version": __version__,
            "link": _link,
            "folder": str(work.root),
            "width": WIDTH,
            "height": HEIGHT,
        }
        self.pages.filters["value"] = show_value

    def page(self, template: str, code: int = 200, /, **values: Any) -> Response:
        """Return a page from its template."""
        return HTMLResponse(self.pages.get_template(f"{template}.html").render(**values), code)

    def app(self, token: str, cookie: str) -> Gate:
        """Return the application, behind its gate."""
        gets = {
            "/": self.runs,
            "/runs/live": self.runs_live,
            "/run": self.run,
            "/run/live": self.run_live,
            "/run/report": self.report,
            "/compare": self.compare,
            "/data": self.data,
            "/playground": self.playground,
            "/label": self.label,
        }
        posts = {
            "/start": self.start,
            "/stop": self.stop,
            "/resume": self.resume,
            "/playground/stop": self.playground_stop,
            "/label/open": self.label_open,
            "/label/close": self.label_close,
            "/label": self.label_press,
        }
        routes = [
            *(Route(path, self._get(handler), methods=["GET"]) for path, handler in gets.items()),
            *(Route(path, self._post(handler), methods=["POST"]) for path, handler in posts.items()),
            Route("/runs/events", self.runs_events, methods=["GET"]),
            Route("/run/events", self.run_events, methods=["GET"]),
            Route("/playground", self.playground_ask, methods=["POST"]),
            Mount("/static", StaticFiles(directory=Path(__file__).parent / "static")),
        ]
        handlers: Any = {MlxftError: self.refused, OSError: self.refused, HTTPException: self.missing}
        return Gate(Starlette(routes=routes, exception_handlers=handlers), token, cookie)

    def _get(self, handler: Callable[[Request], Response]) -> Callable[[Request], Awaitable[Response]]:
        async def reply(request: Request) -> Response:
            return await run_in_threadpool(handler, request)

        return reply

    def _post(self, handler: Callable[[Form], Response]) -> Callable[[Request], Awaitable[Response]]:
        async def reply(request: Request) -> Response:
            return await run_in_threadpool(handler, await _form(request))

        return reply

    def refused(self, request: Request, error: Exception) -> Response:
        """Say what is wrong with a request."""
        return self.page("error", 400, title="This did not work", text=str(error))

    def missing(self, request: Request, error: Exception) -> Response:
        """Say that there is no such page, or that a request is too large."""
        assert isinstance(error, HTTPException)
        return self.page("error", error.status_code, title=error.detail, text=request.url.path)

    # Runs

    def runs(self, request: Request) -> Response:
        """List the runs, and offer recipes to start."""
        return self.page("runs", runs=self.work.runs(), recipes=self.work.recipes())

    def runs_live(self, request: Request) -> Response:
        """Return the list of the runs."""
        return self.page("runs_live", runs=self.work.runs())

    async def runs_events(self, request: Request) -> Response:
        """Send an event whenever the list of the runs changes."""
        return self._events(lambda: self.runs_live(request).body, _LOOK_AT_ALL)

    def _run_values(self, name: str) -> dict[str, Any]:
        folder = self.work.run(name)
        job = self.work.job(folder)
        values: dict[str, Any] = {"name": name, "exists": folder.is_dir(), "output": job.output if job else ""}
        values |= {"starting": job is not None and job.runs, "failed": job is not None and job.failed}
        if not values["exists"]:
            return values
        found = details(folder, name)
        try:
            values["charts"], values["no_curves"] = charts(panels(found.events), found.info.objective), ""
        except DataError as e:
            values["charts"], values["no_curves"] = [], str(e)
        with suppress(OSError, ValueError):
            values["recipe"] = read_small(folder / "config.yaml")
        return {"recipe": ""} | values | page_parts(found)

    def run(self, request: Request) -> Response:
        """Show one run."""
        return self.page("run", **self._run_values(request.query_params.get("run", "")))

    def run_live(self, request: Request) -> Response:
        """Return the part of a run's page that changes while it runs."""
        return self.page("live", **self._run_values(request.query_params.get("run", "")))

    async def run_events(self, request: Request) -> Response:
        """Send an event whenever a run's numbers, status or output change."""
        folder = await run_in_threadpool(self.work.run, request.query_params.get("run", ""))

        def look() -> tuple[Any, ...]:
            job = self.work.job(folder)
            files = [os.stat(p) for n in ("metrics.jsonl", "status.json") if (p := folder / n).exists()]
            return [(f.st_ino, f.st_size, f.st_mtime_ns) for f in files], job and job.runs, job and job.printed

        return self._events(look, _LOOK)

    def _events(self, look: Callable[[], Any], every: float) -> Response:
        """Send an event at first, and whenever what `look` returns has changed."""

        async def events() -> AsyncIterator[str]:
            before, quiet = None, 0.0
            while not self.closing.is_set():
                now = await run_in_threadpool(look)
                if now != before:
                    before, quiet = now, 0.0
                    yield "data: changed\n\n"
                elif quiet >= _BEAT:
                    quiet = 0.0
                    yield ": still here\n\n"
                with suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self.closing.wait(), every)
                quiet += every

        return StreamingResponse(events(), media_type="text/event-stream")

    def start(self, fields: Form) -> Response:
        """Start a run from a recipe."""
        return _see("/run", run=self.work.start(fields.get("recipe", ""), _lines(fields.get("set", ""))))

    def stop(self, fields: Form) -> Response:
        """Stop a run after its step."""
        self.work.stop(fields.get("run", ""))
        return _see("/run", run=fields["run"])

    def resume(self, fields: Form) -> Response:
        """Resume a run."""
        self.work.resume(fields.get("run", ""))
        return _see("/run", run=fields["run"])

    def compare(self, request: Request) -> Response:
        """Show runs side by side."""
        names = list(dict.fromkeys(request.query_params.getlist("run")))
        if len(names) < 2:
            raise ConfigError("choose at least two runs to compare")
        found = [details(self.work.run(name), name) for name in names]
        drawn = {}
        for run in found:
            with suppress(DataError):  # nothing to draw yet
                panels(run.events)
                drawn[run.info.name] = run.events
        return self.page("compare", names=names, found=compare_runs(found), charts=charts(overlaid(drawn)))

    def report(self, request: Request) -> Response:
        """Return the report of a run, as `mlxft runs report` writes it."""
        text = render(details(self.work.run(request.query_params.get("run", ""))))
        return HTMLResponse(text, headers={"Content-Security-Policy": _REPORT_POLICY})

    # Data

    def data(self, request: Request) -> Response:
        """Show rows as they are trained, their lengths, and what is wrong with them."""
        asked = request.query_params
        recipe, file, text = asked.get("recipe", ""), asked.get("file", ""), asked.get("set", "")
        found, more = None, _lines(text)
        if recipe:
            given = [f"data.train={self.work.name(self.work.inside(file))}"] if file else []
            found = inspect_recipe(self.work, recipe, [*given, *more])
        elif file:
            found = inspect_file(self.work, file)
        return self.page(
            "data",
            recipes=self.work.recipes(),
            files=self.work.data_files(),
            recipe=recipe,
            file=file,
            set=text,
            found=found,
            chart=histogram(found.lengths, found.unit) if found else None,
        )

    # Playground

    def _playground(self, **values: Any) -> Response:
        runs = [run for run in self.work.runs() if self.play.offers(run)]
        return self.page("playground", **{"runs": runs, "asked": {}, "found": {}, "error": ""} | values)

    def playground(self, request: Request) -> Response:
        """Show the form of the playground."""
        return self._playground(asked={"run": request.query_params.getlist("run")})

    async def playground_ask(self, request: Request) -> Response:
        """Complete a prompt by the chosen models: as a stream of events, or as a page for a browser without scripts."""
        from mlxft.model.sampling import Sampling

        fields, names = await _form(request), await _form_list(request, "run")
        events: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        streams = "text/event-stream" in request.headers.get("accept", "")

        def say(event: dict[str, Any]) -> None:
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(events.put_nowait, event)

        def begin() -> None:
            prompt = [{"role": "user", "content": fields.get("prompt", "")}]
            if fields.get("system", "").strip():
                prompt.insert(0, {"role": "system", "content": fields["system"]})
            if not fields.get("prompt", "").strip():
                raise ConfigError("write a prompt")
            how = Sampling(_number(fields, "max_tokens", 200), _number(fields, "temperature", 0.0, float))
            runs = [(name, self.work.run(name)) for name in names]
            self.play.begin(runs, BASE_NAME in fields, prompt, how, _number(fields, "seed", 0), say)

        async def pieces() -> AsyncIterator[dict[str, Any]]:
            try:
                while "end" not in (event := await events.get()):
                    yield event
            finally:
                self.play.stop()

        async def stream() -> AsyncIterator[str]:
            async for event in pieces():
                yield f"data: {json.dumps(event)}\n\n"

        try:
            await run_in_threadpool(begin)
        except MlxftError as e:
            if streams:
                return _plain(400, printable(str(e)))
            raise
        if streams:
            return StreamingResponse(stream(), media_type="text/event-stream")
        found: dict[str, str] = {}
        error = ""
        async for event in pieces():
            found[event.get("model", "")] = found.get(event.get("model", ""), "") + event.get("text", "")
            error = event.get("error", error)
        found.pop("", None)
        return await run_in_threadpool(
            lambda: self._playground(asked={**fields, "run": names}, found=found, error=error)
        )

    def playground_stop(self, fields: Form) -> Response:
        """End the completion that is being written."""
        self.play.stop()
        return _see("/playground")

    # Labelling

    def label(self, request: Request) -> Response:
        """Show the next prompt to judge, or the form that opens a file."""
        out = request.query_params.get("out", "")
        path = self.work.inside(out) if out else None
        session = self.desk.session(path) if path else None
        if session is None or path is None:
            files = self.work.data_files()
            given = {k: request.query_params.get(k, "") for k in ("prompts", "out", "model", "against")}
            open_now = [self.work.name(p) for p in self.desk.names()]
            return self.page("label_open", files=files, runs=self.work.runs(), given=given, open_now=open_now)
        found = self.play.worker.submit(session.next).result()
        texts = [found[1].completions[i] for i in session.order(found[1])] if found else []
        return self.page("label", out=out, found=found, texts=texts, summary=session.summary())

    def label_open(self, fields: Form) -> Response:
        """Open prompts and the file of their judgements."""
        prompts, out = self.work.inside(fields.get("prompts", "")), fields.get("out", "").strip()
        path = self.work.inside(out) if out else prompts.with_name(f"{prompts.stem}.labels.jsonl")
        source = self._source(fields)
        self.play.worker.submit(self.desk.open, prompts, path, source).result()
        return _see("/label", out=self.work.name(path))

    def _source(self, fields: Form) -> LabelSource:
        from mlxft.model.sampling import Sampling
        from mlxft.study.label import LabelSource

        model, against = (str(self.work.run(fields[k])) if fields.get(k) else None for k in ("model", "against"))
        return LabelSource(Sampling(_number(fields, "max_tokens", 256), 1.0), model=model, against=against)

    def label_close(self, fields: Form) -> Response:
        """Close a file of judgements, so that others may write it."""
        self.play.worker.submit(self.desk.close, self.work.inside(fields.get("out", ""))).result()
        return _see("/label")

    def label_press(self, fields: Form) -> Response:
        """Judge, skip or undo; the judgement is on the disk before the next prompt is shown."""
        out = fields.get("out", "")
        key, task = fields.get("key", ""), fields.get("task", "")
        self.play.worker.submit(self.desk.press, self.work.inside(out), task, key).result()
        return _see("/label", out=out)


def _link(path: str, **values: Any) -> str:
    """Return an address with a query."""
    return f"{path}?{urlencode(values, doseq=True, quote_via=quote, errors='surrogateescape')}" if values else path


def _see(path: str, **values: Any) -> Response:
    return RedirectResponse(_link(path, **values), 303)


async def _form(request: Request) -> dict[str, str]:
    """Return the fields of a form, the last one of each name."""
    return {k: v[-1] for k, v in (await _parsed(request)).items()}


async def _form_list(request: Request, name: str) -> list[str]:
    return (await _parsed(request)).get(name, [])


async def _parsed(request: Request) -> dict[str, list[str]]:
    return parse_qs((await request.body()).decode("utf-8", "replace"), keep_blank_values=True, max_num_fields=200)


# --- the server -------------------------------------------------------------------------------------------------------


def open_port(port: int | None) -> socket.socket:
    """Return a socket that listens on the loopback device.

    Args:
        port: None: the default one, or the next that is free.
    Raises:
        ConfigError: the port is in use.
    """
    for tried in [port] if port is not None else range(PORT, PORT + _PORTS):
        listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind(("127.0.0.1", tried))
            listening.listen(64)
            return listening
        except OSError as e:
            listening.close()
            if e.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
    wanted = f"port {port} is" if port is not None else f"ports {PORT} to {PORT + _PORTS - 1} are"
    raise ConfigError(f"--port: {wanted} in use or not allowed; give another one, or --port 0 for any that is free")


def run_studio(work: Workplace, port: int | None, browse: bool) -> None:
    """Serve a working folder until Ctrl-C; runs that were started continue.

    Args:
        port: None: the default one, or the next that is free.
        browse: open the address in a browser.
    Raises:
        ConfigError: another studio works in this folder, or the port is in use.
    """
    with open_port(port) as listening:
        number, token = listening.getsockname()[1], secrets.token_urlsafe(24)
        address = f"http://127.0.0.1:{number}/?token={token}"
        with work.held(address):
            studio = Studio(work)
            app: Any = studio.app(token, f"mlxft-studio-{number}")
            config = uvicorn.Config(
                app,
                log_level="error",
                access_log=False,
                lifespan="off",
                timeout_graceful_shutdown=5,
                server_header=False,
            )
            echo(f"studio: {address}\nCtrl-C ends it; runs that it has started continue.")
            if browse and (sys.platform == "darwin" or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
                webbrowser.open(address)
            # Imported here: two threads that import one package can lock each other out.
            for name in ("mlxft.objectives.sft", "mlxft.study.label", "mlxft.study.compare"):
                importlib.import_module(name)
            asyncio.run(_serve(_Server(config), studio, listening))
    running = [run.name for run in work.runs() if run.status == "running"]
    echo("studio closed" + (f"; still running: {', '.join(running)}" if running else ""))


class _Server(uvicorn.Server):
    """A server whose signals `_serve` handles."""

    def capture_signals(self) -> Any:
        return nullcontext()


async def _serve(server: _Server, studio: Studio, listening: socket.socket) -> None:
    """Serve until SIGINT or SIGTERM."""

    def end() -> None:
        if server.should_exit:  # a second time: at once, whatever is being loaded or sampled
            os._exit(130)
        studio.closing.set()
        for check in studio.work.checks:
            check.kill()
        studio.play.stop()
        server.should_exit = True

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, end)
    await server.serve([listening])
    studio.desk.close()
    studio.play.close()
