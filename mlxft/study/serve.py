"""Serve models by OpenAI's API, by mlx_lm.server: `mlxft serve`.

mlx_lm.server does the work: batches, streaming, tools, thoughts, cached prompts. This module decides what it may load,
which is only what the command names, and who may ask.
"""

from __future__ import annotations

import errno
import socket
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from http import HTTPStatus
from http.server import ThreadingHTTPServer
from threading import Event, Thread
from typing import Any
from urllib.parse import unquote

from mlx_lm.generate import DEFAULT_QUANTIZED_KV_START
from mlx_lm.models.cache import LRUPromptCache, make_prompt_cache
from mlx_lm.server import APIHandler, GenerationContext, ModelProvider, ResponseGenerator, get_system_fingerprint

from mlxft.data.dataset import encode_prompt
from mlxft.data.formats import message_at
from mlxft.errors import ConfigError, DataError, nearest, shorten
from mlxft.study.compare import OpenModel
from mlxft.text import echo, json_text

LOOPBACK = ("127.0.0.1", "localhost", "::1")
_EVERYWHERE = ("0.0.0.0", "::")
_LARGEST = 64 * 2**20  # bytes of a request
_FOREIGN = ("adapters", "draft_model")  # fields by which mlx_lm.server loads what a request names
# Settings of mlx_lm.server that have no option here, as its own command has them.
_SETTINGS: dict[str, Any] = {
    "model": None,
    "chat_template_args": {},
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "num_draft_tokens": 0,
    "decode_concurrency": 32,
    "prompt_concurrency": 8,
    "prefill_step_size": 2048,
    "prompt_cache_size": 10,
    "prompt_cache_bytes": None,
    "kv_bits": None,
    "kv_group_size": 64,
    "quantized_kv_start": DEFAULT_QUANTIZED_KV_START,
}


class _Provider(ModelProvider):
    """Puts one of the open models in place; it loads nothing."""

    def __init__(self, models: dict[str, OpenModel], settings: Namespace) -> None:
        self.models, self.cli_args = models, settings
        self.pipeline_group = self.tensor_group = None
        self.is_distributed = False
        self.reset()
        self.is_batchable = all(hasattr(c, "merge") for m in models.values() for c in make_prompt_cache(m.loaded.model))

    def load_default(self) -> None:
        """Load nothing: the models are open."""

    def load(self, model_path: str, adapter_path: Any = None, draft_model_path: Any = None) -> tuple[Any, Any]:
        """Put the model with this name in place."""
        chosen = self.models[model_path]
        chosen.roles.use(chosen.role)
        self.model, self.tokenizer = chosen.loaded.model, chosen.loaded.tokenizer
        self.model_key = (model_path, None, None)
        return self.model, self.tokenizer


class _Generator(ResponseGenerator):
    def __init__(self, provider: _Provider, prompt_cache: LRUPromptCache) -> None:
        self._running: list[GenerationContext] = []
        super().__init__(provider, prompt_cache)

    def _run_generate(self) -> None:
        # A thread that has computed may not end: MLX frees the functions that it compiled there after Python has let go
        # of the thread, and if the interpreter ends meanwhile, the process is aborted. So a daemon computes, and waits.
        ended = Event()

        def compute() -> None:
            super(_Generator, self)._run_generate()
            ended.set()
            Event().wait()

        Thread(target=compute, daemon=True).start()
        ended.wait()

    def generate(self, *args: Any, **options: Any) -> Any:
        """Begin a completion, and note it until its request ends it."""
        context, pieces = super().generate(*args, **options)
        self._running = [each for each in self._running if not each._should_stop] + [context]
        return context, pieces

    def stop_and_join(self) -> None:
        """End all completions, however long they would be, and then the thread."""
        for context in self._running:
            context.stop()
        super().stop_and_join()

    def _tokenize(self, tokenizer: Any, request: Any, args: Any) -> Any:
        """Render a conversation as training and `mlxft generate` do."""
        prompt, segments, kinds, state, vision = super()._tokenize(tokenizer, request, args)
        if request.request_type == "chat" and tokenizer.has_chat_template and not args.chat_template_kwargs:
            # Where the template does not write the tools, mlx_lm.server's rendering stands, which leaves them out.
            with suppress(DataError) if request.tools else nullcontext():
                messages = [message_at(m, f"messages[{i}]") for i, m in enumerate(request.messages)]
                ids = encode_prompt(messages, tokenizer, tools=request.tools)
                if ids != list(prompt):
                    return ids, [ids], ["assistant"], state, None
        return prompt, segments, kinds, state, vision


class _Refused(Exception):
    """A request is refused, or has failed; with its HTTP status."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class _Handler(APIHandler):
    """mlx_lm.server's handler, for requests that only name open models."""

    requested_model: str

    def log_message(self, format: str, *args: Any) -> None:
        """Print one line for a request."""
        echo(f"{time.strftime('%H:%M:%S')} {self.client_address[0]} {format % args}", err=True)

    def do_GET(self) -> None:
        """List the models, or say that the server is well."""
        self._guarded(super().do_GET)

    def do_POST(self) -> None:
        """Complete a conversation or a text."""
        self._guarded(super().do_POST)

    def do_OPTIONS(self) -> None:
        """Say to a browser whether a web page may send a request."""
        self._guarded(super().do_OPTIONS)

    def _guarded(self, work: Callable[[], None]) -> None:
        """Do what a request asks for, and send errors as OpenAI's API does."""
        try:
            self._check_welcome()
            work()
        except _Refused as refused:
            error = {"message": str(refused), "type": "invalid_request_error", "code": refused.status}
            self._send(refused.status, {"error": error})

    def _check_welcome(self) -> None:
        """Refuse endless requests, other hosts, and web pages, which a browser on this machine may be led to."""
        settings = self.response_generator.cli_args
        host, origin = self.headers.get("Host"), self.headers.get("Origin")
        name = (host or "").rpartition("]")[0].lstrip("[") or (host or "").partition(":")[0]
        length = self.headers.get("Content-Length") or "0"
        if not length.isdecimal() or int(length) > _LARGEST:
            raise _Refused(413, f"a request may have {_LARGEST:,} bytes")
        foreign = host is not None and settings.hosts is not None and name not in settings.hosts
        web = origin is not None and not {origin, "*"} & set(settings.allowed_origins)
        if foreign or web:
            self.rfile.read(int(length))  # a client may read nothing before it has sent everything
            if foreign:
                raise _Refused(403, f"the host {host} is not served; start mlxft serve with --host")
            raise _Refused(403, f"the page {origin} is not allowed; start mlxft serve with --allow-origin {origin}")

    def _set_completion_headers(self, status_code: int = 200) -> None:
        if status_code >= 400:  # mlx_lm.server would send a bare text, and 404 for whatever a model refuses
            error = sys.exc_info()[1]
            raise _Refused(
                status_code if error is None else 400,
                str(error or f"{HTTPStatus(status_code).phrase}: {shorten(self.path)}"),
            )
        super()._set_completion_headers(status_code)

    def _send(self, status: int, found: dict[str, Any]) -> None:
        body = json_text(found).encode()
        super()._set_completion_headers(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _known(self, name: str) -> str:
        """Return the name of a model; refuse the request if there is none."""
        models = self.response_generator.model_provider.models
        if name not in models:
            text = f"model {shorten(name)!r} is not served{nearest(name, models)}; there are {', '.join(models)}"
            raise _Refused(404, text)
        return name

    def handle_completion(self, request: Any, stop_words: list[str]) -> None:
        """Complete, unless the request asks for what the command has not named."""
        if self.requested_model == "default_model":
            self.requested_model = next(iter(self.response_generator.model_provider.models))
        self._known(self.requested_model)
        if given := [name for name in _FOREIGN if self.body.get(name) is not None]:
            raise _Refused(400, f"{given[0]}: a request only names one of the models in /v1/models")
        super().handle_completion(request, stop_words)

    def handle_chat_completions(self) -> Any:
        """Read a conversation; images are refused before mlx_lm.server fetches their addresses."""
        for message in self.body.get("messages") or ():
            if not isinstance(message, dict):
                continue
            if message.get("role") == "developer":  # OpenAI's newer name of the role system
                message["role"] = "system"
            parts = content if isinstance(content := message.get("content"), list) else []
            if any(not isinstance(part, dict) or part.get("type") != "text" for part in parts):
                raise ValueError("only texts are served, not images or audio")
        return super().handle_chat_completions()

    def handle_models_request(self) -> None:
        """List the models by name, or describe one."""
        _, _, wanted = self.path.partition("/v1/models/")
        names = [self._known(unquote(wanted))] if wanted else self.response_generator.model_provider.models
        found = [{"id": name, "object": "model", "created": self.created, "owned_by": "mlxft"} for name in names]
        self._send(200, found[0] if wanted else {"object": "list", "data": found})


class _Server(ThreadingHTTPServer):
    daemon_threads = False  # a thread that prints while the interpreter ends would abort it

    def __init__(self, *args: Any) -> None:
        self._sockets: set[Any] = set()
        super().__init__(*args)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Begin a request, and note its socket."""
        self._sockets.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """End a request."""
        self._sockets.discard(request)
        super().shutdown_request(request)

    def server_close(self) -> None:
        """Close the server and all connections, and wait for their threads."""
        for connection in [*self._sockets]:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        super().server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print in a line what went wrong; that a client has gone is no fault."""
        if not isinstance(error := sys.exc_info()[1], ConnectionError):
            echo(f"{client_address[0]}: {error!r}", err=True)


def _bound(host: str, port: int) -> ThreadingHTTPServer:
    """Return a server on a free port.

    Raises:
        ConfigError: the port is in use, or the host is not one of this machine.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        kind = type("_Bound", (_Server,), {"address_family": family})
        return kind(address, _Handler)
    except OSError as e:
        if e.errno == errno.EADDRINUSE:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                other = free.getsockname()[1]
            raise ConfigError(
                f"--port {port} is in use by another program; give another, such as --port {other}"
            ) from e
        raise ConfigError(f"--host {host} --port {port}: {e.strerror or e}") from e


def serve_models(
    models: dict[str, OpenModel],
    host: str,
    port: int,
    *,
    origins: Sequence[str] = (),
    temperature: float = 0.0,
    max_tokens: int = 512,
) -> None:
    """Serve open models until Ctrl-C.

    Args:
        port: 0 takes a free one.
        origins: web pages, such as http://localhost:3000, whose scripts may ask; "*": all.
        temperature, max_tokens: of requests that do not say.
    Raises:
        ConfigError: the port is in use.
        KeyboardInterrupt: the user has stopped it; the server is closed.
    """
    server = _bound(host, port)
    hosts = None if host in _EVERYWHERE else {*LOOPBACK, host}
    own = {"allowed_origins": list(origins), "hosts": hosts, "temp": temperature, "max_tokens": max_tokens}
    provider = _Provider(models, Namespace(**_SETTINGS, **own))
    generator = _Generator(provider, LRUPromptCache(_SETTINGS["prompt_cache_size"]))
    identity = get_system_fingerprint()
    server.RequestHandlerClass = lambda *a, **k: _Handler(generator, *a, system_fingerprint=identity, **k)
    where = f"[{host}]" if ":" in host else host
    echo(f"serving {', '.join(models)} at http://{where}:{server.server_address[1]}/v1  (Ctrl-C stops it)")
    if host not in LOOPBACK:
        echo(f"note: --host {host}: everyone who reaches this machine can use the models", err=True)
    try:
        server.serve_forever(poll_interval=0.1)
    finally:
        generator.stop_and_join()
        server.server_close()
