"""The connection to Milvus: opened in words, its errors as ours, and what a collection says of itself."""

import logging
from pathlib import Path

import grpc
from pymilvus import MilvusClient, MilvusException

from service.errors import InvalidStore, StoreAway
from service.store.milvus_address import MilvusAddress

# It logs every error before it raises it.
logging.getLogger("pymilvus").setLevel(logging.CRITICAL)
# The names of our own properties of a collection begin so.
PREFIX = "lookalike."
# A call that takes longer counts as one to a server that is away.
TIMEOUT_S = 10
_CONNECT_S = 5
# A server that comes back is noticed within a second. By default gRPC waits for up to two minutes, and new connections
# to the same address wait with it.
_CHANNEL = {
    "grpc.initial_reconnect_backoff_ms": 200,
    "grpc.max_reconnect_backoff_ms": 1000,
    "grpc.use_local_subchannel_pool": 1,
}
_AWAY = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED)
_REFUSED = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)


def connect(address: MilvusAddress, token: str) -> MilvusClient:
    """Connect to Milvus.

    Raises:
        StoreAway: it does not answer.
        InvalidStore: it refuses the token, or the file of Milvus Lite is in use by another process.
    """
    if address.in_file:
        _open_file(address)
    try:
        return MilvusClient(address.uri, token=token, timeout=_CONNECT_S, grpc_options=_CHANNEL)
    except (MilvusException, grpc.RpcError) as error:
        raise translated(address, error) from error


def recorded_model(address: MilvusAddress, token: str) -> tuple[Path, str] | None:
    """Return folder and name of the encoder that built a store; None if there is no collection.

    Raises:
        As `recorded_facts`.
    """
    facts = recorded_facts(address, token)
    return None if facts is None else (Path(facts.get("model_folder", "")), facts.get("model", ""))


def recorded_facts(address: MilvusAddress, token: str) -> dict[str, str] | None:
    """Return the facts of a store, as Store.facts; None if there is no collection.

    Raises:
        As `connect`, and InvalidStore: the collection is not one of ours.
    """
    client = connect(address, token)
    try:
        if not client.has_collection(address.collection, timeout=TIMEOUT_S):
            return None
        found = client.describe_collection(address.collection, timeout=TIMEOUT_S)["properties"]
    except (MilvusException, grpc.RpcError) as error:
        raise translated(address, error) from error
    finally:
        client.close()
    if PREFIX + "fingerprint" not in found:
        raise no_collection_of_ours(address)
    return own_facts(found)


def _open_file(address: MilvusAddress) -> None:
    """Start Milvus Lite in this process, and say why where that fails: pymilvus does not."""
    try:
        from milvus_lite.adapter.grpc.server import start_server_in_thread  # noqa: F401
        from milvus_lite.exceptions import DataDirLockedError, MilvusLiteError
        from milvus_lite.server_manager import server_manager_instance
    except ImportError as error:
        raise InvalidStore(f"{address}: needs Milvus Lite: pip install milvus-lite") from error
    folder = Path(address.uri).parent
    if not folder.is_dir():
        raise InvalidStore(f"{address}: the folder {folder} is not there")
    try:
        started = server_manager_instance.start_and_get_uri(address.uri)
    except DataDirLockedError as error:
        raise _in_use(address) from error
    except (MilvusLiteError, OSError) as error:
        raise InvalidStore(f"{address}: cannot be opened: {error}") from error
    if started is None:
        raise _in_use(address)


def _in_use(address: MilvusAddress) -> InvalidStore:
    return InvalidStore(
        f"{address}: is in use by another process, or cannot be opened; Milvus Lite serves one process at a time, and "
        "a cluster any number"
    )


def translated(address: MilvusAddress, error: Exception) -> InvalidStore:
    """Return an error of Milvus or of its connection as one of ours."""
    codes = [error.code] if isinstance(error, MilvusException) else [error.code()]  # type: ignore[attr-defined]
    cause = error.__cause__ or error.__context__
    codes += [cause.code()] if isinstance(cause, grpc.RpcError) and hasattr(cause, "code") else []
    text = " ".join(str(getattr(error, "message", error)).split())
    if any(code in _REFUSED for code in codes) or "auth check failure" in text.lower() or "UNAUTHENTICATED" in text:
        return InvalidStore(f"{address}: refuses the token; LOOKALIKE_MILVUS_TOKEN has it, such as user:password")
    named = type(error).__name__ in ("ConnectError", "MilvusUnavailableException")
    unanswered = named or "Fail connecting to server" in text or "Retry timeout" in text or "Retry run out" in text
    # The next call loads it.
    unanswered = unanswered or "state 'released'" in text or "not loaded" in text
    if unanswered or any(code in _AWAY for code in codes) or getattr(error, "retriable", False):
        return StoreAway(f"{address}: Milvus does not answer now")
    return InvalidStore(f"{address}: Milvus refuses the call: {text[:500]}")


def own_facts(properties: dict[str, str]) -> dict[str, str]:
    return {name.removeprefix(PREFIX): value for name, value in properties.items() if name.startswith(PREFIX)}


def no_collection_of_ours(address: MilvusAddress) -> InvalidStore:
    return InvalidStore(f"{address}: the collection has no fingerprint of an encoder, so it is not one of ours")
