"""`lookalike serve`: check the settings, report an error in one sentence, then exec BentoML's server."""

import os
import socket
import sys
import tempfile
from pathlib import Path
from typing import NoReturn

from service.encoder_choice import choose_model
from service.encoding.card import read_card
from service.errors import InvalidOutput, InvalidRequest
from service.gallery import follow_reindex, open_store
from service.http.keys import read_keys
from service.jobs.open_page import open_page_later
from service.kept_choice import keep_choice, open_encoder
from service.settings import Settings
from service.store.milvus_address import parse_address

# service/lifetime.py ends the worker a little later.
_GRACEFUL_SHUTDOWN_S = 18


def serve(settings: Settings, open_page: bool = False) -> NoReturn:
    """Replace this process by BentoML's server with these settings; print the address first.

    Args:
        settings: of the service.
        open_page: open the page in the user's browser, once the service is ready.

    Raises:
        LookalikeError: the server could not start; see `check`.
    """
    settings, address = check(settings)
    bentoml = Path(sys.executable).with_name("bentoml")
    # The API keys and the token are in the environment already; nothing else holds them. BentoML runs in another
    # folder.
    told = settings.model_dump(exclude_none=True, exclude={"api_keys", "milvus_token"})
    told = {name: value.absolute() if isinstance(value, Path) else value for name, value in told.items()}
    if (milvus := parse_address(settings.store)) is not None:
        told["store"] = milvus
    if settings.pictures and "://" not in settings.pictures:
        told["pictures"] = Path(settings.pictures).absolute()
    environment = _bentoml_home() | {f"LOOKALIKE_{name.upper()}": str(value) for name, value in told.items()}
    if os.environ.get("BENTOML_CONFIG"):
        environment["BENTOML_CONFIG"] = str(Path(os.environ["BENTOML_CONFIG"]).absolute())
    shown = f"[{settings.host}]" if ":" in settings.host else settings.host
    url = f"http://{shown}:{settings.port}{settings.root_path}"
    print(f"Lookalike on {url}  (Ctrl-C stops it)", flush=True)
    if open_page:
        open_page_later(url)
    command = [str(bentoml), "serve", "service.app:Lookalike", "--host", address, "--port", str(settings.port)]
    # BentoML imports from its working folder first, where a user may have a service.py of their own.
    command += ["--working-dir", str(Path(__file__).parents[1])]
    command += ["--timeout-graceful-shutdown", str(_GRACEFUL_SHUTDOWN_S)]
    os.execve(bentoml, command, {"BENTOML_DO_NOT_TRACK": "True", **os.environ, **environment})


def check(settings: Settings) -> tuple[Settings, str]:
    """Open all that a server opens, and close it again.

    Returns:
        The settings with the encoder that was chosen, and the IP address of their host.

    Raises:
        InvalidRequest: bad API keys, several workers with a store, or an address that is unknown or taken.
        InvalidModel, InvalidStore, StoreMismatch: the encoder or the store cannot be opened.
    """
    read_keys(settings)
    if settings.workers > 1 and not settings.no_store:
        milvus = parse_address(settings.store)
        if milvus is None:
            raise InvalidRequest(
                f"--workers {settings.workers} needs --no-store or a Milvus server: a store in a folder has one writer"
            )
        if milvus.in_file:
            raise InvalidRequest(
                f"--workers {settings.workers}: Milvus Lite opens its file in one process; several workers need a "
                "Milvus server, as in --store milvus://HOST:19530/COLLECTION"
            )
    settings, warning = follow_reindex(settings)
    if warning:
        print(f"warning: {warning}", file=sys.stderr)
    model, notice = choose_model(settings)
    if notice:
        print(notice, file=sys.stderr)
    settings = settings.model_copy(update={"model": model})
    encoder = open_encoder(settings, read_card(model))
    if not settings.no_store:
        open_store(settings, encoder.card, encoder.dimension).close()
        keep_choice(settings, encoder)
    # The workers need not measure again, and all take the same.
    settings = settings.model_copy(update={"measured": encoder.choice})
    return settings, _free_address(settings.host, settings.port)


def _free_address(host: str, port: int) -> str:
    """Return the IP address of a host, on which this port is free. Raises InvalidRequest."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    # The second is of a name that no name can be.
    except (OSError, UnicodeError) as error:
        raise InvalidRequest("--host: expected an address of this machine, such as 127.0.0.1 or ::1") from error
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            shown = f"[{host}]" if ":" in host else host
            raise InvalidRequest(
                f"cannot listen on {shown}:{port}: {error.strerror}; choose another with --port"
            ) from error
    return str(address[0])


def _bentoml_home() -> dict[str, str]:
    """Return where BentoML may write: its own folder in HOME, or a temporary one if that cannot be written."""
    if os.environ.get("BENTOML_HOME"):
        return {}
    try:
        home = Path.home() / "bentoml"
        home.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=home):
            return {"BENTOML_HOME": str(home)}
    # A user without a home has none in the list of users either.
    except (OSError, RuntimeError):
        pass
    try:
        return {"BENTOML_HOME": tempfile.mkdtemp(prefix="lookalike-bentoml-")}
    except OSError as error:
        raise InvalidOutput(
            "neither HOME nor a temporary folder can be written; BENTOML_HOME may name another"
        ) from error
