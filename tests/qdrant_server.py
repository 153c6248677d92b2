"""A Qdrant server for the tests: the part of its REST interface that an index uses, over Qdrant's own embedded mode.

What is asked goes as JSON over HTTP, from the same client that asks a real server, and is answered by the same code
that answers in a folder. It keeps all in memory.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from qdrant_client import QdrantClient, models


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, *, keeps_metadata: bool = True, api_key: str | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.embedded, self.lock = QdrantClient(":memory:"), threading.Lock()
        self.keeps_metadata, self.api_key = keeps_metadata, api_key
        self.asked: list[str] = []
        """Method and path of each request."""
        self.exact: list[bool] = []
        """Of each search, whether it was to be exact."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def handle_any(self) -> None:
        path = self.path.partition("?")[0]
        body = json.loads(self.rfile.read(int(self.headers.get("content-length", 0))) or "{}")
        self.server.asked.append(f"{self.command} {path}")
        if self.server.api_key is not None and self.headers.get("api-key") != self.server.api_key:
            self.answer(401, {"status": {"error": "Must provide an API key"}, "time": 0.0})
            return
        try:
            with self.server.lock:
                result = answer(self.server, self.command, path.strip("/").split("/"), body)
        except (ValueError, KeyError) as error:
            self.answer(400, {"status": {"error": str(error)}, "time": 0.0})
            return
        self.answer(200, {"result": result, "status": "ok", "time": 0.0})

    do_GET = do_PUT = do_POST = do_DELETE = do_PATCH = handle_any

    def answer(self, status: int, content: dict[str, Any]) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def answer(server: Server, method: str, path: list[str], body: dict[str, Any]) -> Any:
    qdrant, done = server.embedded, {"operation_id": 0, "status": "completed"}
    match (method, *path):
        case ("GET", "collections"):
            return plain(qdrant.get_collections())
        case ("GET", "collections", name, "exists"):
            return {"exists": qdrant.collection_exists(name)}
        case ("GET", "collections", name):
            return plain(qdrant.get_collection(name))
        case ("PUT", "collections", name):
            asked = models.CreateCollection.model_validate(body)
            metadata = asked.metadata if server.keeps_metadata else None
            return qdrant.create_collection(name, vectors_config=asked.vectors, metadata=metadata)  # pyright: ignore
        case ("DELETE", "collections", name):
            return qdrant.delete_collection(name)
        case ("PUT", "collections", _, "index"):
            return done
        case ("POST", "collections", name, "points"):
            asked = models.PointRequest.model_validate(body)
            found = qdrant.retrieve(name, asked.ids, bool(asked.with_payload), bool(asked.with_vector))
            return [plain(record) for record in found]
        case ("PUT", "collections", name, "points"):
            qdrant.upsert(name, points=models.PointsBatch.model_validate(body).batch)
            return done
        case ("POST", "collections", name, "points", "query", "batch"):
            requests = models.QueryRequestBatch.model_validate(body).searches
            server.exact += [bool(each.params and each.params.exact) for each in requests]
            requests = [each.model_copy(update={"params": None}) for each in requests]  # it is exact, and says so
            return [plain(each) for each in qdrant.query_batch_points(name, requests=requests)]
        case ("POST", "collections", name, "points", "count"):
            return plain(qdrant.count(name))
        case ("POST", "collections", name, "points", "scroll"):
            asked = models.ScrollRequest.model_validate(body)
            records, offset = qdrant.scroll(
                name,
                limit=asked.limit or 10,
                offset=asked.offset,
                order_by=asked.order_by,  # pyright: ignore
                with_payload=bool(asked.with_payload),
            )
            return {"points": [plain(record) for record in records], "next_page_offset": offset}
        case ("POST", "collections", name, "points", "delete"):
            qdrant.delete(name, points_selector=models.PointIdsList.model_validate(body))
            return done
        case ("POST", "collections", name, "points", "batch"):
            operations = models.UpdateOperations.model_validate(body).operations
            qdrant.batch_update_points(name, update_operations=operations)
            return [done for _ in operations]
    raise ValueError(f"{method} /{'/'.join(path)} is not known here")


def plain(value: Any) -> Any:
    return value.model_dump(mode="json")


@contextmanager
def qdrant_server(**options: Any) -> Iterator[Server]:
    with Server(**options) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
            server.embedded.close()
