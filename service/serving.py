"""`lookalike serve`: check the settings, report an error in one sentence, then exec BentoML's server."""

import os
import socket
import sys
from pathlib import Path
from typing import NoReturn

from service.encoder_choice import choose_model
from service.encoding.card import read_card
from service.encoding.encoder import Encoder
from service.errors import InvalidRequest
from service.gallery import follow_reindex, open_store
from service.http.keys import read_keys
from service.settings import Settings

# service/lifetime.py ends the worker a little later.
_GRACEFUL_SHUTDOWN_S = 18


def serve(settings: Settings) -> NoReturn:
    """Replace this process by BentoML's server with these settings; print the address first.

    Raises:
        LookalikeError: the server could not start; see `check`.
    """
    settings = check(settings)
    bentoml = Path(sys.executable).with_name("bentoml")
    # The API keys are in the environment already; nothing else holds them.
    told = settings.model_dump(exclude_none=True, exclude={"api_keys"})
    environment = {f"LOOKALIKE_{name.upper()}": str(value) for name, value in told.items()}
    print(f"Lookalike on http://{settings.host}:{settings.port}  (Ctrl-C stops it)", flush=True)
    command = [str(bentoml), "serve", "service.app:Lookalike", "--host", settings.host, "--port", str(settings.port)]
    command += ["--timeout-graceful-shutdown", str(_GRACEFUL_SHUTDOWN_S)]
    os.execve(bentoml, command, {"BENTOML_DO_NOT_TRACK": "True", **os.environ, **environment})


def check(settings: Settings) -> Settings:
    """Open all that a server opens, and close it again; return the settings with the encoder that was chosen.

    Raises:
        InvalidRequest: bad API keys, several workers with a store, or an address that is taken.
        InvalidModel, InvalidStore, StoreMismatch: the encoder or the store cannot be opened.
    """
    read_keys(settings)
    if settings.workers > 1 and not settings.no_store:
        raise InvalidRequest(f"--workers {settings.workers} needs --no-store: a store has one writer")
    settings, warning = follow_reindex(settings)
    if warning:
        print(f"warning: {warning}", file=sys.stderr)
    model, notice = choose_model(settings)
    if notice:
        print(notice, file=sys.stderr)
    settings = settings.model_copy(update={"model": model})
    encoder = Encoder(read_card(model), settings.device, settings.variant)
    if not settings.no_store:
        open_store(settings, encoder).close()
    _check_address(settings.host, settings.port)
    return settings


def _check_address(host: str, port: int) -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise InvalidRequest(
                f"cannot listen on {host}:{port}: {error.strerror}; choose another with --port"
            ) from error
