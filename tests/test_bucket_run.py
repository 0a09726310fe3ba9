"""A run in a bucket: data, run and model at gs:// addresses, on one machine and then on another.

The server is the part of Cloud Storage that gcsfs and TensorStore use, strict about generations. Source:
https://cloud.google.com/storage/docs/json_api/v1
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

import jaxllm
from jaxllm.convert import main as convert
from jaxllm.core import bucket
from jaxllm.data.prepare import prepare
from jaxllm.data.prepare_config import BytesTokenizer, PrepareConfig
from jaxllm.data.reading.sources import World
from jaxllm.preflight import preflight
from jaxllm.recipe import load_recipe
from jaxllm.wiring import train

pytest.importorskip("gcsfs", reason="needs the extra gcs")
RECIPE = """
steps: 4
model: {preset: tiny, n_layers: 1, d_model: 16, n_heads: 2, d_ff: 32, vocab_size: 300, max_seq_len: 32}
data: {packing: {seq_len: 32}, batch_size: 8, verify: false, threads: 0}
optim: {lr: 1e-2, schedule: {kind: cosine, warmup: 0}}
checkpoint: {every: 2}
monitor: {log_every: 1, evaluate_every: 2, evaluate_batches: 1}
platform: {compile_cache: none}
compute: {layers: scan, dtype: float32}
"""


class Objects(dict[str, tuple[int, bytes]]):
    """{name: (generation, content)} of the one bucket; `lock` makes a condition and what it guards one."""

    def __init__(self):
        self.lock, self.generation, self.uploads = threading.RLock(), 0, {}

    def put(self, name: str, content: bytes) -> dict:
        self.generation += 1
        self[name] = self.generation, content
        return self.describe(name)

    def describe(self, name: str) -> dict:
        generation, content = self[name]
        return {
            "kind": "storage#object", "name": name, "bucket": "bucket", "id": f"bucket/{name}/{generation}",
            "generation": str(generation), "metageneration": "1", "size": str(len(content)),
            "updated": "2026-01-01T00:00:00.000Z", "timeCreated": "2026-01-01T00:00:00.000Z", "etag": str(generation),
            "md5Hash": base64.b64encode(hashlib.md5(content).digest()).decode(), "contentType": "text/plain",
        }  # fmt: skip

    def listed(self, prefix: str, delimiter: str) -> dict:
        found = sorted(name for name in self if name.startswith(prefix))
        cut = lambda name: name[: name.index(delimiter, len(prefix)) + 1]
        below = {cut(name) for name in found if delimiter and delimiter in name[len(prefix) :]}
        items = [self.describe(name) for name in found if not delimiter or delimiter not in name[len(prefix) :]]
        return {"kind": "storage#objects", "items": items, "prefixes": sorted(below)}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    objects: Objects

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, status: int, content: bytes | dict = b"", **headers: str) -> None:
        if isinstance(content, dict):
            content, headers = json.dumps(content).encode(), {**headers, "Content_Type": "application/json"}
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _handle(self) -> None:
        url = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        path = re.sub(r"^/(upload/|download/|resumable/)*(upload/)?", "/", url.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        copy = r"(?P<copy>/\w+To(?:/b/bucket)?/o/.+)?"
        match = re.fullmatch(rf"/storage/v1/b/bucket(?:/o(?:/(?P<name>[^/]+))?)?{copy}", path)
        with self.objects.lock:
            if match is None:
                return self._answer(404)
            name = unquote(match["name"] or query.get("name", ""))
            if self.command in ("POST", "PUT") and not match["copy"]:
                return self._upload(name, query, body)
            if not name:
                listing = path.endswith("/o")
                found = self.objects.listed(query.get("prefix", ""), query.get("delimiter", ""))
                return self._answer(200, found if listing else {"name": "bucket", "kind": "storage#bucket"})
            if name not in self.objects:
                return self._answer(404, {"error": {"code": 404, "message": f"no {name}"}})
            if (status := self._refused(name, query)) is not None:
                return self._answer(status)
            if match["copy"]:
                target = unquote(match["copy"].rpartition("/o/")[2])
                take = self.objects.pop if "moveTo" in match["copy"] else self.objects.get
                made = self.objects.put(target, take(name)[1])
                return self._answer(200, {"done": True, "resource": made} if "rewriteTo" in match["copy"] else made)
            if self.command == "DELETE":
                del self.objects[name]
                return self._answer(204)
            if query.get("alt") != "media":
                return self._answer(200, self.objects.describe(name))
            return self._download(name)

    do_GET = do_POST = do_PUT = do_DELETE = _handle

    def _refused(self, name: str, query: dict) -> int | None:
        """What a condition on the generation says: 412 or 304, or None."""
        now = self.objects.get(name, (0, b""))[0]
        if int(query.get("ifGenerationMatch", now)) != now:
            return 412
        return 304 if query.get("ifGenerationNotMatch") == str(now) else None

    def _download(self, name: str) -> None:
        generation, content = self.objects[name]
        size, status, headers = len(content), 200, {}
        if asked := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or ""):
            start = int(asked[1]) if asked[1] else max(0, size - int(asked[2]))
            stop = min(size, int(asked[2]) + 1) if asked[1] and asked[2] else size
            if start >= size:
                return self._answer(416)
            content, status, headers = content[start:stop], 206, {"Content_Range": f"bytes {start}-{stop - 1}/{size}"}
        return self._answer(status, content, x_goog_generation=str(generation), **headers)

    def _upload(self, name: str, query: dict, body: bytes) -> None:
        kind = query.get("uploadType")
        if "upload_id" in query:  # the bytes of a resumable upload
            name, query = self.objects.uploads[query["upload_id"]]
        elif kind == "resumable":
            key = str(len(self.objects.uploads))
            self.objects.uploads[key] = name or json.loads(body)["name"], query
            place = f"http://{self.headers['Host']}/upload/storage/v1/b/bucket/o?uploadType=resumable&upload_id={key}"
            return self._answer(200, Location=place)
        elif kind == "multipart":
            boundary = re.search(r"""boundary=['"]?([^'";]+)""", self.headers["Content-Type"])[1]
            parts = body.split(f"--{boundary}".encode())[1:3]  # gcsfs ends lines with \n, TensorStore with \r\n
            described, body = (re.split(rb"\r?\n\r?\n", part, maxsplit=1)[1] for part in parts)
            name, body = name or json.loads(described)["name"], re.sub(rb"\r?\n\Z", b"", body)
        if self._refused(name, query):
            return self._answer(412)
        return self._answer(200, self.objects.put(name, body))


@contextmanager
def serving() -> Iterator[tuple[str, Objects]]:
    """The address of a server with an empty bucket called "bucket", and what is in it."""
    objects = Objects()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"objects": objects}))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", objects
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def objects(tmp_path, monkeypatch):
    """What is in the bucket."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    monkeypatch.setattr(bucket, "TWINS", tmp_path / "here")
    monkeypatch.setattr(bucket, "_mirrored", set())
    with serving() as (address, objects):
        for name in ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"):
            monkeypatch.setenv(name, address)
        monkeypatch.setenv("NO_GCE_CHECK", "true")  # nobody asks a metadata server for credentials
        monkeypatch.setenv("GCE_METADATA_ROOT", address.removeprefix("http://"))
        yield objects


def recipe(home: str, *overrides: str):
    out, data = f"out={home}/run", f"data.sources=[{{path: '{home}/data'}}]"
    return load_recipe("recipe.yaml", [out, data, *overrides])


@pytest.mark.soak
def test_a_run_goes_on_elsewhere_and_is_the_one_that_never_left(objects, tmp_path, monkeypatch, capsys):
    world = {"inputs": (World(count=120),), "tokenizer": BytesTokenizer(), "validation": 10, "seq_len": 32}
    for home in ("gs://bucket", "local"):
        prepare(PrepareConfig(out=f"{home}/data", **world))
    train(recipe("local"))
    assert {each.name: each.text for each in preflight(recipe("gs://bucket")) if not each.good} == {}
    assert {name.split("/")[0] for name in objects} == {"data"}
    train(recipe("gs://bucket", "monitor.max_skipped=4", "checkpoint.keep_last=3"))
    for name in ("manifest.json", "train/shard-00000.tokens.npy"):
        assert objects[f"data/{name}"][1] == (tmp_path / "local/data" / name).read_bytes()
    for name in [name for name in objects if name.startswith("run/checkpoints/4/params/")]:
        objects.put(name, b"damaged")
    objects.put("run/checkpoints/2/metrics/metrics", b"damaged")
    monkeypatch.setattr(bucket, "TWINS", tmp_path / "there")
    monkeypatch.setattr(bucket, "_mirrored", set())
    capsys.readouterr()
    train(load_recipe("gs://bucket/run"))
    train(load_recipe("gs://bucket/run"))
    said = capsys.readouterr()
    assert "python -m jaxllm.train gs://bucket/run steps=N" in said.out and str(tmp_path) not in said.out + said.err
    assert {name.split("/")[2] for name in objects if name.startswith("run/damaged/")} == {"4", "README"}
    assert not any(name.startswith("run/checkpoints/2/metrics/") for name in objects)
    assert "checkpoints" not in {path.name for path in (tmp_path / "there").rglob("*")}
    assert objects["run/metrics.jsonl"][1] == (tmp_path / "local/run/metrics.jsonl").read_bytes()
    for source, target in (("run", "exported"), ("exported", "back")):
        convert([f"gs://bucket/{source}", f"gs://bucket/{target}"])
    assert "exported/config.json" in objects and "back/golden.json" in objects
    assert b"gs://bucket/back" in objects["back/recipe.yaml"][1]
    assert not list(tmp_path.glob("gs:*"))
    ask = lambda model: jaxllm.load(model).generate(["Anna"], max_new_tokens=4)[0]
    assert ask("gs://bucket/run") == ask("local/run")
    assert ask("gs://bucket/run/checkpoints/2") == ask("local/run/checkpoints/2")
