"""Where a store on Milvus lies: milvus://HOST:PORT/COLLECTION, milvuss:// with TLS, milvus:FILE.db/COLLECTION."""

import re
from pathlib import Path
from typing import NamedTuple

from service.errors import InvalidRequest

# A path of these letters has lost a slash.
_ADDRESS = re.compile(r"milvus(?P<tls>s?):(?P<rest>.*)")
_FILE = re.compile(r"(?P<file>.+\.db)/(?P<collection>[A-Za-z_]\w*)", re.ASCII)
_SERVER = re.compile(r"/+(?P<host>[^/@:]+|\[[0-9a-fA-F:]+\])(:(?P<port>\d+))?/(?P<collection>[A-Za-z_]\w*)", re.ASCII)
_PORT = 19530


class MilvusAddress(NamedTuple):
    """A collection of a Milvus server, or in a file of Milvus Lite.

    Attributes:
        uri: what pymilvus connects to.
        collection: its name.
        in_file: whether it is a file, which one process opens at a time.
    """

    uri: str
    collection: str
    in_file: bool

    def __str__(self) -> str:
        if self.in_file:
            return f"milvus:{self.uri}/{self.collection}"
        scheme, _, host = self.uri.partition("://")
        return f"{'milvuss' if scheme == 'https' else 'milvus'}://{host}/{self.collection}"


def parse_address(store: Path | str) -> MilvusAddress | None:
    """Return the address that a --store names, or None if it names a folder.

    Args:
        store: what follows --store; as a path it has lost one of two slashes, and means the same.

    Raises:
        InvalidRequest: it begins like an address of Milvus and is none.
    """
    match = _ADDRESS.fullmatch(str(store))
    if match is None:
        return None
    if not match["tls"] and (file := _FILE.fullmatch(match["rest"])):
        # milvus:///data/x.db/c has an empty host.
        path = re.sub("^/+", "/", file["file"])
        return MilvusAddress(str(Path(path).absolute()), file["collection"], True)
    server = _SERVER.fullmatch(match["rest"])
    if server is None:
        # The text may hold a password.
        raise InvalidRequest(
            "--store: expected milvus://HOST:PORT/COLLECTION, milvuss://… for TLS, or milvus:FILE.db/COLLECTION for "
            "Milvus Lite; a collection's name has letters, digits and _; a token comes as LOOKALIKE_MILVUS_TOKEN"
        )
    scheme = "https" if match["tls"] else "http"
    return MilvusAddress(f"{scheme}://{server['host']}:{server['port'] or _PORT}", server["collection"], False)
