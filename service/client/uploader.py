"""Many pictures or items → requests to a running service, several at a time, and what became of each."""

import json
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from service.client.connection import RETRYABLE, Connections, ServiceError
from service.client.wire import Added, EmbeddedUpload, Upload, composed, form, read, size
from service.errors import InvalidRequest

T = TypeVar("T")
R = TypeVar("R")

# Pictures and bytes of one request: enough for the encoder's batches, and little to send again.
TOGETHER, _BYTES_TOGETHER = 32, 8_000_000
# Items with embeddings of one request, and what the JSON of one has besides embedding and pictures, in bytes.
_ITEMS_TOGETHER, _OF_METADATA = 1000, 1000
# The limit of a request is for the whole body: pictures, their names and what stands between them.
_SHARE_OF_BODY = 0.8
# Statuses of a request that may be due to one of its pictures.
_OF_ONE = (400, 413, 415, 422)
# Codes of lines that mean: send this one again.
_AGAIN = (*RETRYABLE, "timed_out", "unreachable")
_LONGEST_WAIT_S = 10


class Uploader:
    """Sends pictures and items in groups, and those again that the service could not take for now."""

    def __init__(self, connections: Connections, max_request_bytes: int, patience_s: float) -> None:
        """Send nothing yet.

        Args:
            connections: to the service.
            max_request_bytes: limit of a request's body.
            patience_s: how long a group is sent again.
        """
        self._connections, self._patience_s = connections, patience_s
        self._most_bytes = min(_BYTES_TOGETHER, int(_SHARE_OF_BODY * max_request_bytes))

    def add(self, uploads: Iterable[Upload], parallel: int) -> Iterator[Added]:
        """Yield what became of pictures, in their order."""
        groups = self.groups(uploads, lambda one: size(one.picture), TOGETHER, lambda one: composed(one.id))
        yield from (added for group in ahead(groups, self._add_pictures, parallel, _ids) for added in group)

    def add_embedded(self, uploads: Iterable[EmbeddedUpload], fingerprint: str, parallel: int) -> Iterator[Added]:
        """Yield what became of items with embeddings, in their order."""

        def bytes_of(one: EmbeddedUpload) -> int:
            pictures = len(one.thumbnail or b"") + len(one.original or b"")
            return (pictures + one.embedding.size * 4) * 4 // 3 + _OF_METADATA

        def send(group: Sequence[EmbeddedUpload]) -> list[Added]:
            body = json.dumps({"items": [one.json() for one in group], "fingerprint": fingerprint}).encode()
            return self._post(group, [one.id for one in group], body, "application/json", send)

        def add_items(group: Sequence[EmbeddedUpload]) -> list[Added]:
            return self._until_done({}, [*range(len(group))], lambda numbers: send([group[at] for at in numbers]))

        groups = self.groups(uploads, bytes_of, _ITEMS_TOGETHER, lambda one: composed(one.id))
        yield from (added for group in ahead(groups, add_items, parallel, _ids) for added in group)

    def groups(
        self,
        members: Iterable[T],
        bytes_of: Callable[[T], int],
        most: int,
        name: Callable[[T], str] | None = None,
    ) -> Iterator[list[T]]:
        """Yield members in groups that one request may hold; no group has two members of one name."""
        group: list[T] = []
        names: set[str] = set()
        total = 0
        for member in members:
            more, named = bytes_of(member), {name(member)} if name is not None else set[str]()
            if group and (len(group) == most or total + more > self._most_bytes or names & named):
                yield group
                group, names, total = [], set(), 0
            group.append(member)
            names |= named
            total += more
        if group:
            yield group

    def _add_pictures(self, uploads: Sequence[Upload]) -> list[Added]:
        done: dict[int, Added] = {}
        pictures: dict[int, bytes] = {}
        for number, upload in enumerate(uploads):
            try:
                pictures[number] = read(upload.picture)
            except OSError as error:
                failure = InvalidRequest(f"{error.filename}: cannot be read: {error.strerror or error}")
                done[number] = Added(composed(upload.id), False, failure)

        def send(numbers: Sequence[int]) -> list[Added]:
            return self._send_pictures([(uploads[at], pictures[at]) for at in numbers])

        return self._until_done(done, [*pictures], send)

    def _send_pictures(self, pictures: Sequence[tuple[Upload, bytes]]) -> list[Added]:
        texts: dict[str, dict[str, Any]] = {"metadata": {}, "sources": {}}
        for upload, _ in pictures:
            if upload.metadata is not None:
                texts["metadata"][upload.id] = dict(upload.metadata)
            if upload.source is not None:
                texts["sources"][upload.id] = upload.source
        fields: list[tuple[str, str | None, bytes]] = [
            (name, None, json.dumps(values).encode()) for name, values in texts.items() if values
        ]
        fields += [("file", upload.id, data) for upload, data in pictures]
        body, kind = form(fields)
        return self._post(pictures, [upload.id for upload, _ in pictures], body, kind, self._send_pictures)

    def _until_done(
        self, done: dict[int, Added], waiting: list[int], send: Callable[[Sequence[int]], list[Added]]
    ) -> list[Added]:
        """Send the members of a group until each is stored or refused for good, and return what became of all.

        Args:
            done: members that are done already, by number.
            waiting: the numbers of the others.
            send: sends some of these in one request.
        """
        deadline, wait_s, together = time.monotonic() + self._patience_s, 1.0, max(1, len(waiting))
        while waiting:
            again = False
            for number, added in zip(waiting[:together], send(waiting[:together]), strict=True):
                retryable = added.error is not None and added.error.code in _AGAIN
                if retryable and time.monotonic() + wait_s < deadline:
                    again = True
                else:
                    done[number] = added
            waiting = [number for number in waiting if number not in done]
            if again:
                # Fewer members take less time, of which a service that timed out had too little.
                together = max(1, together // 2)
                time.sleep(wait_s)
                wait_s = min(2 * wait_s, _LONGEST_WAIT_S)
        return [done[number] for number in sorted(done)]

    def _post(
        self,
        members: Sequence[T],
        ids: Sequence[str],
        body: bytes,
        kind: str,
        send: Callable[[Sequence[T]], list[Added]],
    ) -> list[Added]:
        """Send members of these ids, and return what the lines of the answer say of each."""
        try:
            answer = self._connections.request("POST", "/images", body=body, headers={"Content-Type": kind})
        except ServiceError as error:
            if error.status not in _OF_ONE:
                raise
            # One picture that is too large, or metadata that cannot be, refuse the whole request.
            if len(members) > 1:
                return [added for member in members for added in send([member])]
            return [Added(composed(ids[0]), False, error)]
        lost = ServiceError(0, "unreachable", "the answer of the service ended before it told of this one")
        outcomes = [Added(composed(id), False, lost) for id in ids]
        for line in answer.data.splitlines():
            told = json.loads(line)
            good = told["status"] in (200, 201)
            refusal = None if good else ServiceError(told["status"], told["code"], told["detail"])
            if told["index"] < len(outcomes):
                outcomes[told["index"]] = Added(outcomes[told["index"]].id, told["status"] == 201, refusal)
        return outcomes


def ahead(
    members: Iterable[T], work: Callable[[T], R], parallel: int, names: Callable[[T], Iterable[str]] = lambda _: ()
) -> Iterator[R]:
    """Yield the results of the work in order, while some threads are at work on the next members.

    A member waits for the work on earlier ones that share a name with it: of two pictures of one id the later stays.
    """
    with ThreadPoolExecutor(parallel, "client") as pool:
        running: deque[tuple[Future[R], frozenset[str]]] = deque()
        try:
            for member in members:
                own = frozenset(names(member))
                while len(running) > parallel or any(own & others for _, others in running):
                    yield running.popleft()[0].result()
                running.append((pool.submit(work, member), own))
            while running:
                yield running.popleft()[0].result()
        finally:
            for future, _ in running:
                future.cancel()


def _ids(group: Sequence[Upload] | Sequence[EmbeddedUpload]) -> list[str]:
    return [composed(one.id) for one in group]
