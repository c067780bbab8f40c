"""A Hub on loopback: the requests that huggingface_hub and datasets make to the Hugging Face Hub, answered as it does.

Two servers on ports of 127.0.0.1 share the repositories: one is the Hub, the other stands for the storage host
that the Hub redirects large (LFS) files to; the client must not send its token there. Files are sent over plain
HTTP, since no Xet headers are given. A missing repository is a 401 (404 with a valid token) as on the Hub, with the
error code that the client needs on an endpoint without TLS. Information and listings of a gated repository are public,
its files are not.
"""

import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlencode, urlsplit

LFS_PATTERNS = ("*.safetensors", "*.bin", "*.parquet")
DATE = "2024-01-01T00:00:00.000Z"
_API = re.compile(
    r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree|paths-info|refs|auth-check))?(?:/([^/]+))?(?:/(.+))?"
)
_FILE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


@dataclass(frozen=True)
class File:
    """One file of a commit. `sha256` is empty for a file that git itself holds."""

    content: bytes = field(repr=False)
    oid: str
    sha256: str = ""
    pointer_size: int = 0

    @property
    def etag(self) -> str:
        return self.sha256 or self.oid

    def as_sibling(self) -> dict:
        lfs = {"sha256": self.sha256, "size": len(self.content), "pointerSize": self.pointer_size}
        return {"size": len(self.content), "blobId": self.oid} | ({"lfs": lfs} if self.sha256 else {})

    def as_entry(self, path: str) -> dict:
        lfs = {"oid": self.sha256, "size": len(self.content), "pointerSize": self.pointer_size}
        entry = {"type": "file", "oid": self.oid, "size": len(self.content), "path": path}
        return entry | ({"lfs": lfs} if self.sha256 else {})


@dataclass
class Repository:
    """A repository; its commits map a 40-hex id to the files by path, the newest last."""

    name: str
    kind: str
    gated: bool
    licence: str
    commits: dict[str, dict[str, File]] = field(default_factory=dict)


@dataclass
class Request:
    """What was asked and what went back. `repository` and `file` are filled for GETs and HEADs of a file."""

    method: str
    path: str
    host: str
    range: str
    authorized: bool
    user_agent: str
    status: int = 0
    sent: int = 0
    repository: str = ""
    file: str = ""


class Refused(Exception):
    """An answer other than success: status, error code and message as the Hub words them."""

    def __init__(self, status: int, code: str, message: str, **headers: str):
        super().__init__(message)
        self.status, self.code, self.headers = status, code, headers


def git_oid(content: bytes) -> str:
    """Id that git gives to a blob of this content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class HubServer:
    """The Hub. `token` is the one valid token, `granted` the gated repositories that its owner may read.

    `requests` holds every request in order; `on_request` is called with it before a GET of a file is
    answered. `page_size` entries make one page of a listing. `down` answers everything with 503.
    """

    def __init__(self, lfs: Iterable[str] = LFS_PATTERNS):
        self.lfs = tuple(lfs)
        self.token = "hf_secret"
        self.granted: set[str] = set()
        self.page_size = 1000
        self.down = False
        self.requests: list[Request] = []
        self.on_request: Callable[[Request], None] | None = None
        self._repositories: dict[tuple[str, str], Repository] = {}
        self._blobs: dict[str, tuple[str, str, File]] = {}
        self._faults: list[dict] = []
        self._lock = threading.Lock()
        self._servers = [ThreadingHTTPServer(("127.0.0.1", 0), _handler(self, host)) for host in ("hub", "storage")]
        self.endpoint, self.storage = (f"http://127.0.0.1:{server.server_port}" for server in self._servers)

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.stop()

    def start(self) -> None:
        for server in self._servers:
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def stop(self) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def add(
        self, name: str, directory: str | Path, kind: str = "model", gated: bool = False, licence: str = "apache-2.0"
    ) -> str:
        """Commit the files of a folder; `main` moves there. Returns the commit, which follows from the content."""
        directory = Path(directory)
        paths = sorted(path for path in directory.rglob("*") if path.is_file())
        files = {path.relative_to(directory).as_posix(): self._file(path.read_bytes(), path.name) for path in paths}
        listing = "".join(f"{path} {file.oid}\n" for path, file in files.items())
        commit = hashlib.sha1(f"{kind} {name}\n{listing}".encode()).hexdigest()
        repository = self._repositories.setdefault((kind, name), Repository(name, kind, gated, licence))
        repository.gated, repository.licence = gated, licence
        repository.commits.pop(commit, None)
        repository.commits[commit] = files
        self._blobs |= {
            f"{name}/{file.sha256}/{path}": (name, path, file) for path, file in files.items() if file.sha256
        }
        return commit

    def _file(self, content: bytes, name: str) -> File:
        if not any(fnmatch(name, pattern) for pattern in self.lfs):
            return File(content, git_oid(content))
        sha256 = hashlib.sha256(content).hexdigest()
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(content)}\n".encode()
        return File(content, git_oid(pointer), sha256, len(pointer))

    def cut(self, name: str, file: str, after_bytes: int, times: int = 1) -> None:
        """Close the connection after so many bytes of the body, in the next `times` answers with that file."""
        self._faults.append({"key": (name, file), "times": times, "after": after_bytes})

    def corrupt(self, name: str, file: str, times: int | None = None) -> None:
        """Send the file with its last byte changed, under its true hash, `times` times or for ever."""
        self._faults.append({"key": (name, file), "times": times})

    def environment(self, folder: Path, token: str = "") -> dict[str, str]:
        """Environment of a process that knows no other Hub: caches in `folder`, `token` or none, no Xet, no proxy."""
        prefixes = ("HF_", "HUGGING", "TRANSFORMERS_", "SNAKEMAKE_")
        kept = {key: value for key, value in os.environ.items() if not key.startswith(prefixes)}
        return kept | ({"HF_TOKEN": token} if token else {}) | {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(folder / "huggingface"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_UPDATE_DOWNLOAD_COUNTS": "0",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }  # fmt: skip

    def files_asked(self, method: str = "GET") -> list[Request]:
        """The requests for contents of files that were answered with some."""
        return [each for each in self.requests if each.file and each.method == method and each.status in (200, 206)]

    def faults(self, name: str, file: str) -> dict:
        """The fault that the next answer with this file has; empty for none."""
        with self._lock:
            for fault in self._faults:
                if fault["key"] == (name, file) and fault["times"] != 0:
                    fault["times"] = None if fault["times"] is None else fault["times"] - 1
                    return fault
        return {}

    def repository(self, kind: str, name: str, token: str) -> Repository:
        if token and token != self.token:
            raise Refused(401, "", "Invalid credentials in Authorization header")
        if (kind, name) not in self._repositories:
            if token:
                raise Refused(404, "RepoNotFound", "Repository not found")
            raise Refused(401, "RepoNotFound", "Invalid username or password.")
        return self._repositories[kind, name]

    def commit(self, repository: Repository, revision: str) -> str:
        if revision not in ("main", *repository.commits):
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return list(repository.commits)[-1] if revision == "main" else revision

    def check_access(self, repository: Repository, token: str) -> None:
        name = repository.name
        if repository.gated and not token:
            message = f"Access to {repository.kind} {name} is restricted. You must have access to it and be "
            raise Refused(401, "GatedRepo", message + "authenticated to access it. Please log in.")
        if repository.gated and name not in self.granted:
            page = f"https://huggingface.co/{'datasets/' if repository.kind == 'dataset' else ''}{name}"
            message = f"Access to {repository.kind} {name} is restricted and you are not in the authorized list. "
            raise Refused(403, "GatedRepo", f"{message}Visit {page} to ask for access.")

    def information(self, repository: Repository, commit: str, query: dict[str, list[str]]) -> dict:
        files = repository.commits[commit]
        full = query.get("blobs") == ["true"]
        answer = {
            "id": repository.name,
            "author": repository.name.split("/")[0],
            "sha": commit,
            "createdAt": DATE,
            "lastModified": DATE,
            "private": False,
            "gated": "auto" if repository.gated else False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": [f"license:{repository.licence}"],
            "cardData": {"license": repository.licence},
            "siblings": [{"rfilename": path} | (file.as_sibling() if full else {}) for path, file in files.items()],
            "usedStorage": sum(len(file.content) for file in files.values()),
        }
        if "expand" in query:
            return {key: answer[key] for key in ("id", *query["expand"]) if key in answer}
        security = {"scansDone": True, "filesWithIssues": []}
        return answer | ({"securityRepoStatus": security} if query.get("securityStatus") == ["true"] else {})

    def entries(self, files: dict[str, File], commit: str, expand: bool) -> dict[str, dict]:
        """Listing by path: the files and the folders that hold them."""
        folders = {str(parent) for path in files for parent in Path(path).parents if str(parent) != "."}
        listing = {
            path: {"type": "directory", "oid": git_oid(path.encode()), "size": 0, "path": path} for path in folders
        }
        listing |= {path: file.as_entry(path) for path, file in files.items()}
        more = {"lastCommit": {"id": commit, "title": "Upload", "date": DATE}} if expand else {}
        return {path: listing[path] | more for path in sorted(listing)}

    def blob(self, key: str) -> tuple[str, str, File]:
        if key not in self._blobs:
            raise Refused(403, "", "Access denied")
        return self._blobs[key]


def _handler(hub: HubServer, host: str) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def answer(self) -> None:
            url = urlsplit(self.path)
            self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
            self.token = self.headers.get("Authorization", "").removeprefix("Bearer ")
            agent, wanted = self.headers.get("User-Agent", ""), self.headers.get("Range", "")
            self.request_record = Request(self.command, self.path, host, wanted, bool(self.token), agent)
            hub.requests.append(self.request_record)
            try:
                if hub.down:
                    raise Refused(503, "", "Service Unavailable")
                if host == "storage":
                    self.send_file(*hub.blob(unquote(url.path.removeprefix("/lfs/"))))
                elif match := _API.fullmatch(url.path):
                    self.send_api(*match.groups(), parse_qs(url.query))
                elif match := _FILE.fullmatch(url.path):
                    self.send_resolved(*match.groups())
                else:
                    raise Refused(404, "", "Sorry, we can't find the page you are looking for.")
            except Refused as refused:
                named = {"X-Error-Code": refused.code} if refused.code else {}
                named |= {"X-Error-Message": str(refused)} | refused.headers
                self.send(refused.status, json.dumps({"error": str(refused)}).encode(), named)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True

        do_GET = do_HEAD = do_POST = answer

        def send_api(self, kind, name, what, revision, path, query) -> None:
            repository = hub.repository(kind.removesuffix("s"), name, self.token)
            commit = hub.commit(repository, unquote(revision or "main"))
            files = repository.commits[commit]
            if what == "auth-check":
                hub.check_access(repository, self.token)
                self.send_json({})
            elif what == "refs":
                main = {"name": "main", "ref": "refs/heads/main", "targetCommit": commit}
                self.send_json({"branches": [main], "converts": [], "tags": [], "pullRequests": []})
            elif what == "tree":
                self.send_tree(files, commit, unquote(path or ""), query)
            elif what == "paths-info":
                form = parse_qs(self.body)
                entries = hub.entries(files, commit, form.get("expand", [""])[0].lower() == "true")
                self.send_json([entries[path] for path in form.get("paths", []) if path in entries])
            else:
                self.send_json(hub.information(repository, commit, query))

        def send_tree(self, files, commit, folder, query) -> None:
            options = {key: values[0] for key, values in query.items()}
            entries = hub.entries(files, commit, options.get("expand", "").lower() == "true")
            if folder and entries.get(folder, {}).get("type") != "directory":
                raise Refused(404, "EntryNotFound", f"{folder} does not exist on revision {commit}")
            chosen = [entry for path, entry in entries.items() if not folder or path.startswith(f"{folder}/")]
            if options.get("recursive", "").lower() != "true":
                depth = folder.count("/") + 1 if folder else 0
                chosen = [entry for entry in chosen if entry["path"].count("/") == depth]
            start = int(options.get("cursor", 0))
            end = start + hub.page_size
            following = f"{hub.endpoint}{urlsplit(self.path).path}?{urlencode(options | {'cursor': end})}"
            self.send_json(chosen[start:end], {"Link": f'<{following}>; rel="next"'} if end < len(chosen) else {})

        def send_resolved(self, prefix, name, revision, path) -> None:
            repository = hub.repository("dataset" if prefix else "model", name, self.token)
            hub.check_access(repository, self.token)
            commit, path = hub.commit(repository, unquote(revision)), unquote(path)
            file = repository.commits[commit].get(path)
            if file is None:
                raise Refused(404, "EntryNotFound", "Entry not found", **{"X-Repo-Commit": commit})
            if not file.sha256:
                self.send_file(name, path, file, {"X-Repo-Commit": commit})
                return
            headers = {
                "X-Repo-Commit": commit,
                "X-Linked-Etag": f'"{file.sha256}"',
                "X-Linked-Size": str(len(file.content)),
                "Location": f"{hub.storage}/lfs/{quote(f'{name}/{file.sha256}/{path}')}",
            }
            self.send(302, b"Found. Redirecting", headers)

        def send_file(self, name, path, file: File, headers=None) -> None:
            self.request_record.repository, self.request_record.file = name, path
            content, cut = file.content, None
            if self.command == "GET":
                if hub.on_request is not None:
                    hub.on_request(self.request_record)
                fault = hub.faults(name, path)
                cut = fault.get("after")
                if fault and cut is None:
                    content = content[:-1] + bytes([content[-1] ^ 0xFF])
            headers = {"ETag": f'"{file.etag}"', "Accept-Ranges": "bytes"} | (headers or {})
            status, length = 200, len(content)
            if match := re.fullmatch(r"bytes=(\d*)-(\d*)", self.request_record.range):
                first, last = match.groups()
                start = int(first) if first else max(length - int(last), 0)
                end = min(int(last) + 1, length) if first and last else length
                if start >= length:
                    raise Refused(416, "", "Range not satisfiable", **{"Content-Range": f"bytes */{length}"})
                status, content = 206, content[start:end]
                headers["Content-Range"] = f"bytes {start}-{end - 1}/{length}"
            self.send(status, content, headers, "application/octet-stream", cut)

        def send_json(self, value: object, headers: dict[str, str] | None = None) -> None:
            self.send(200, json.dumps(value).encode(), headers or {})

        def send(self, status, body: bytes, headers: dict[str, str], kind="application/json", cut=None) -> None:
            self.request_record.status = status
            self.send_response(status)
            for key, value in {"Content-Type": kind, "Content-Length": str(len(body)), **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "HEAD":
                return
            body = body if cut is None else body[:cut]
            for start in range(0, len(body), 1 << 16):
                self.request_record.sent += self.wfile.write(body[start : start + (1 << 16)])
            self.close_connection = self.close_connection or cut is not None

    return Handler
