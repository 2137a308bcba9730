"""Serve a small Hub on 127.0.0.1 from memory, with the part of the API that the real clients need to push and load.

    with HubServer() as hub:
        subprocess.run([...], env=hub.environment(tmp_path, token=WRITE_TOKEN))
        assert "model_index.json" in hub.repos["me/model"].files

Known tokens are in `TOKENS`. Every file goes up inside the commit ("regular"), there is one branch, `main`, and no
Xet, so clients need `HF_HUB_DISABLE_XET=1`. They read `HF_ENDPOINT` when huggingface_hub is imported, hence the
subprocess. Both are in `environment()`.
"""

import base64
import hashlib
import json
import os
import socket
import threading
from dataclasses import dataclass, field
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.responses import JSONResponse, Response
from starlette.routing import Route


WRITE_TOKEN = "hf_ThisOneMayWriteAndIsNoRealToken00001"
READ_TOKEN = "hf_ThisOneMayReadAndIsNoRealToken000002"
TOKENS = {WRITE_TOKEN: "write", READ_TOKEN: "read"}
USER = "me"


@dataclass
class Repo:
    """One repository: its files at the head of main, and what each commit brought."""

    private: bool = False
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[dict] = field(default_factory=list)
    variables: dict[str, str] = field(default_factory=dict)  # of a Space

    @property
    def sha(self) -> str:
        return hashlib.sha1(f"{len(self.commits)}".encode()).hexdigest()


def refusal(status: int, message: str, code: str = "") -> Response:
    """The Hub explains errors in headers: huggingface_hub picks the exception by X-Error-Code."""
    return JSONResponse(
        {"error": message}, status, {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
    )


class HubServer:
    """The server; a context manager that listens while it is open.

    Attributes:
        repos: id -> Repo; a dataset's id starts with `datasets/`, a Space's with `spaces/`.
        requests: (method, path, status) of everything asked so far.
        fail: part of a path -> status; a request whose path has it is refused with that status, or, for "drop", its
            connection is cut. A list of such fails as many requests and lets the rest in.
    """

    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.requests: list[tuple[str, str, int]] = []
        self.fail: dict[str, int | str | list] = {}
        repo = "/api/{kind}s/{owner}/{name}"
        routes = [
            Route("/api/whoami-v2", self.whoami),
            Route("/api/repos/create", self.create, methods=["POST"]),
            Route("/api/validate-yaml", self.validate_yaml, methods=["POST"]),
            Route(repo, self.info),
            Route(repo + "/revision/{revision}", self.info),
            Route(repo + "/auth-check", self.auth_check),
            Route(repo + "/auth-check/write", self.auth_check),
            Route(repo + "/tree/{revision}", self.tree),
            Route(repo + "/tree/{revision}/{path:path}", self.tree),
            Route(repo + "/variables", self.variables, methods=["POST"]),
            Route(repo + "/paths-info/{revision}", self.paths_info, methods=["POST"]),
            Route(repo + "/preupload/{revision}", self.preupload, methods=["POST"]),
            Route(repo + "/commit/{revision}", self.commit, methods=["POST"]),
            Route("/{owner}/{name}/resolve/{revision}/{path:path}", self.resolve),
            Route("/{kind}s/{owner}/{name}/resolve/{revision}/{path:path}", self.resolve),
        ]
        app = Starlette(routes=routes, middleware=[Middleware(BaseHTTPMiddleware, dispatch=self.gate)])
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]}, daemon=True)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *error):
        self.server.should_exit = True
        self.thread.join()
        self.socket.close()

    def environment(self, home: Path, token: str | None = None) -> dict[str, str]:
        """Return the environment of a client that knows this Hub only, with an empty cache and at most this token."""
        keep = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
        ours = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home / "hf"),
            "HF_HUB_DISABLE_XET": "1",
            "OMP_NUM_THREADS": "1",
        }
        return keep | ours | ({"HF_TOKEN": token} if token else {})

    def add_folder(self, repo_id: str, folder: Path, private: bool = False):
        """Make a repository of a folder, e.g. `add_folder("datasets/ylecun/mnist", path)`."""
        files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
        self.repos[repo_id] = Repo(private, files)

    async def gate(self, request, call_next):
        """Let a request in, or refuse it: a planned failure, a wrong token, no right to write, a hidden repository."""
        path = request.url.path
        token = request.headers.get("authorization", "").removeprefix("Bearer ")
        writes = request.method == "POST" and "paths-info" not in path or path.endswith("/write")
        planned = next((status for part, status in self.fail.items() if part in path), None)
        hidden = any(repo.private and f"/{repo_id}/" in path + "/" for repo_id, repo in self.repos.items())
        if planned:
            planned = planned.pop(0) if isinstance(planned, list) else planned
            if planned == "drop":
                for connection in self.server.server_state.connections:
                    connection.transport.abort()
            response = refusal(500 if planned == "drop" else planned, "planned by the test")
        elif token and token not in TOKENS:
            response = refusal(401, "Invalid credentials in Authorization header")
        elif hidden and not token:
            response = refusal(401, "Repository not found", "RepoNotFound")
        elif (writes or path == "/api/whoami-v2") and not token:
            response = refusal(401, "Invalid username or password.")
        elif writes and TOKENS[token] != "write":
            response = refusal(403, "You don't have the rights to write here")
        else:
            response = await call_next(request)
        self.requests.append((request.method, path, response.status_code))
        return response

    def find(self, request) -> tuple[str, Repo | None]:
        at = request.path_params
        kind = at.get("kind", "model")
        repo_id = ("" if kind == "model" else f"{kind}s/") + f"{at['owner']}/{at['name']}"
        return repo_id, self.repos.get(repo_id)

    async def whoami(self, request):
        role = TOKENS[request.headers["authorization"].removeprefix("Bearer ")]
        return JSONResponse({"type": "user", "name": USER, "orgs": [], "auth": {"accessToken": {"role": role}}})

    async def create(self, request):
        asked = await request.json()
        kind = asked.get("type") or "model"
        repo_id = ("" if kind == "model" else f"{kind}s/") + f"{asked.get('organization') or USER}/{asked['name']}"
        known = repo_id in self.repos
        self.repos.setdefault(
            repo_id, Repo(private=asked.get("visibility") == "private" or bool(asked.get("private")))
        )
        return JSONResponse({"url": f"{self.url}/{repo_id}", "name": repo_id}, 409 if known else 200)

    async def variables(self, request):
        _, repo = self.find(request)
        asked = await request.json()
        repo.variables[asked["key"]] = asked["value"]
        return JSONResponse({})

    async def validate_yaml(self, request):
        return JSONResponse({"errors": [], "warnings": []})

    async def auth_check(self, request):
        return JSONResponse({}) if self.find(request)[1] else refusal(404, "Repository not found", "RepoNotFound")

    async def info(self, request):
        _, repo = self.find(request)
        if repo is None:
            return refusal(404, "Repository not found", "RepoNotFound")
        if request.path_params.get("revision", "main") not in ("main", repo.sha):
            return refusal(404, "Revision not found", "RevisionNotFound")
        repo_id = "{owner}/{name}".format(**request.path_params)
        about = {"id": repo_id, "sha": repo.sha, "private": repo.private}
        files = {"siblings": [{"rfilename": path} for path in repo.files], "tags": [], "gated": False}
        return JSONResponse(about | files | {"disabled": False, "downloads": 0, "likes": 0})

    async def tree(self, request):
        _, repo = self.find(request)
        if repo is None:
            return refusal(404, "Repository not found", "RepoNotFound")
        folder = request.path_params.get("path", "")
        prefix = f"{folder}/" if folder else ""
        inside = {path for path in repo.files if path.startswith(prefix)}
        if folder and not inside:
            return refusal(404, f"{folder} does not exist", "EntryNotFound")
        if request.query_params.get("recursive", "false").lower() != "true":
            inside = {prefix + path.removeprefix(prefix).split("/")[0] for path in inside}
        return JSONResponse([self.entry(repo, path) for path in sorted(inside)])

    async def paths_info(self, request):
        _, repo = self.find(request)
        form = await request.json()
        return JSONResponse([self.entry(repo, path) for path in form["paths"] if path in repo.files])

    def entry(self, repo, path):
        if path not in repo.files:
            return {"type": "directory", "path": path, "oid": repo.sha, "size": 0}
        return {"type": "file", "path": path, "oid": etag(repo.files[path]), "size": len(repo.files[path])}

    async def preupload(self, request):
        _, repo = self.find(request)
        if repo is None:
            return refusal(404, "Repository not found", "RepoNotFound")
        paths = [file["path"] for file in (await request.json())["files"]]
        known = {path: {"oid": etag(repo.files[path])} for path in paths if path in repo.files}
        regular = {"uploadMode": "regular", "shouldIgnore": False}
        return JSONResponse({"files": [{"path": path} | regular | known.get(path, {}) for path in paths]})

    async def commit(self, request):
        repo_id, repo = self.find(request)
        if repo is None:
            return refusal(404, "Repository not found", "RepoNotFound")
        lines = [json.loads(line) for line in (await request.body()).splitlines()]
        new = {
            line["value"]["path"]: base64.b64decode(line["value"]["content"])
            for line in lines
            if line["key"] == "file"
        }
        for line in lines:
            if line["key"] == "deletedFile":
                del repo.files[line["value"]["path"]]
        repo.files.update(new)
        repo.commits.append({"message": lines[0]["value"]["summary"], "paths": sorted(new)})
        return JSONResponse({"commitOid": repo.sha, "commitUrl": f"{self.url}/{repo_id}/commit/{repo.sha}"})

    async def resolve(self, request):
        _, repo = self.find(request)
        path = request.path_params["path"]
        if repo is None:
            return refusal(404, "Repository not found", "RepoNotFound")
        if path not in repo.files:
            return refusal(404, f"{path} does not exist", "EntryNotFound")
        headers = {"X-Repo-Commit": repo.sha, "ETag": f'"{etag(repo.files[path])}"'}
        return Response(repo.files[path], 200, headers, media_type="application/octet-stream")


def etag(content: bytes) -> str:
    """Git's hash of the content, as the Hub has it: lets a client see that a file is unchanged."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
