"""A small Hugging Face hub for tests, made with the standard library: it serves folders to the real huggingface_hub.

It implements what loading and uploading need: files and commits of a repository, branches and tags, files with ETags
and ranges, large ones by a redirect to another host (as the hub's storage is), and the hub's refusals.
HF_ENDPOINT is read when huggingface_hub is imported, so set it to `Hub.address` before that.
"""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parents[1]
#: Suffixes of files in the hub's storage of large files.
LARGE = ('.safetensors', '.bin', '.ckpt', '.msgpack', '.onnx')


class LoggedRequest(NamedTuple):
    """A request: method, kind ('api', 'file' or 'storage'), what of which repository, bytes sent, range, token."""

    method: str
    kind: str
    repo: str
    what: str
    sent: int
    range: str | None
    token: str | None


@dataclass
class Repository:
    """Commits by branch or tag; a commit is a folder, which stays if its branch moves on.

    `gated`, `private`: None or the token that opens it.
    """

    folders: dict[str, Path] = field(default_factory=dict)
    history: dict[str, Path] = field(default_factory=dict)
    tags: set[str] = field(default_factory=set)
    gated: str | None = None
    private: str | None = None

    def commit(self, name: str) -> str | None:
        """Return the commit of a branch, a tag or a commit."""
        commits = {ref: hashlib.sha1(f'{ref}{folder}'.encode()).hexdigest() for ref, folder in self.folders.items()}
        return commits.get(name) or (name if name in self.history else None)

    def folder(self, commit: str) -> Path:
        """Return the folder of a commit."""
        return self.history[commit]

    def files(self, commit: str) -> dict[str, Path]:
        """Return name -> path of a commit's files."""
        folder = self.folder(commit)
        return {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob('*')) if p.is_file()}


class Hub:
    """The server, in a thread of its own.

    Attributes:
        repos: by id. log: the requests. cuts: end of a file's name -> after how many bytes each of its next answers
            breaks off. down: what of the API fails ('revision', 'tree', 'refs').
        uploads: repository -> name -> content. read_only: repositories that the token may not write to.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repository] = {}
        self.log: list[LoggedRequest] = []
        self.cuts: dict[str, list[int]] = {}
        self.down: set[str] = set()
        self.uploads: dict[str, dict[str, bytes]] = {}
        self.read_only: set[str] = set()
        self.server = ThreadingHTTPServer(('127.0.0.1', 0), type('Handler', (Handler,), {'hub': self}))
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        """Return the value for HF_ENDPOINT."""
        return f'http://127.0.0.1:{self.port}'

    def add(self, repo: str, folder: Path, revision: str = 'main', tag: bool = False, **settings: Any) -> None:
        """Serve a folder as a branch or tag of a repository."""
        repository = self.repos.setdefault(repo, Repository())
        repository.folders[revision] = folder
        repository.history[str(repository.commit(revision))] = folder
        repository.tags |= {revision} if tag else set()
        for name, value in settings.items():
            setattr(repository, name, value)

    def take_log(self) -> list[LoggedRequest]:
        """Return the requests since the last call."""
        self.log, log = [], self.log
        return log

    def stop(self) -> None:
        """Shut the server down."""
        self.server.shutdown()
        self.server.server_close()


def client(home: Path) -> dict[str, str]:
    """Return environment variables: the cache in `home`, no proxies, no other protocols, short timeouts."""
    return {'HF_HOME': str(home), 'HF_HUB_DISABLE_XET': '1', 'HF_HUB_DISABLE_TELEMETRY': '1',
            'HF_HUB_ETAG_TIMEOUT': '5', 'HF_HUB_DISABLE_PROGRESS_BARS': '1', 'no_proxy': '*', 'NO_PROXY': '*'}


def process(function: Callable[[Path], None], work: Path, **env: str) -> None:
    """Run a function of a test file in a process of its own."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(('HF_', 'HUGGING', 'TRANSFORMERS_'))}
    module, name = function.__module__.rpartition('.')[2], function.__name__
    code = f'import sys, {module}; from pathlib import Path; {module}.{name}(Path(sys.argv[1]))'
    done = subprocess.run([sys.executable, '-c', code, str(work)], capture_output=True, text=True, cwd=work, env={
        **inherited, **client(work / 'home'),
        'PYTHONPATH': os.pathsep.join(map(str, (ROOT, ROOT / 'tests', Path(function.__code__.co_filename).parent))),
        'OMP_NUM_THREADS': '1', **env})
    assert done.returncode == 0, f'{done.stdout[-3000:]}\n{done.stderr[-6000:]}'


def serve(work: Path) -> Hub:
    """Start the hub in a process that has not imported huggingface_hub yet, with the folders of `work`/served."""
    assert 'huggingface_hub' not in sys.modules
    hub = Hub()
    os.environ['HF_ENDPOINT'] = hub.address
    for folder in sorted((work / 'served').glob('*/*')):
        hub.add(f'me/{folder.parent.name}', folder, folder.name, tag=folder.name == 'v1.0')
    return hub


def fetched(log: Sequence[LoggedRequest], repo: str) -> list[str]:
    """Return the files whose content was downloaded, sorted."""
    return sorted(a.what for a in log if a.repo == repo and a.method == 'GET' and a.kind != 'api' and a.sent)


class Handler(BaseHTTPRequestHandler):
    """Answer a request, each in a connection of its own, so that none outlives the server."""

    hub: Hub

    def log_message(self, *_: Any) -> None:
        """Print nothing; the requests are in the hub's log."""

    def answer(self, status: int, body: bytes = b'', kind: str = 'api', repo: str = '', what: str = '',
               **headers: Any) -> None:
        """Send, with headers such as X_Error_Code, and log the request."""
        cuts = next((c for end, c in self.hub.cuts.items() if what.endswith(end) and c), [])
        part = body[:cuts.pop(0)] if cuts and self.command == 'GET' and kind != 'api' else body
        self.send_response(status)
        for name, value in {'Content_Length': len(body), **headers}.items():
            if value is not None:
                self.send_header(name.replace('_', '-'), str(value))
        self.end_headers()
        sent = 0 if self.command == 'HEAD' else len(part)
        self.hub.log.append(LoggedRequest(self.command, kind, repo, what, sent, self.headers.get('Range'),
                                          self.headers.get('Authorization')))
        if sent:
            self.wfile.write(part)

    def send_json(self, content: Any, **where: Any) -> None:
        """Send JSON."""
        self.answer(200, json.dumps(content).encode(), Content_Type='application/json', **where)

    def refuse(self, status: int, code: str, **where: Any) -> None:
        """Refuse as the hub does, with its error code."""
        self.answer(status, b'{}', X_Error_Code=code, X_Error_Message=f'{code}: {where.get("what")}', **where)

    def do_HEAD(self) -> None:
        """As GET, without content."""
        self.do_GET()

    def do_GET(self) -> None:
        """Answer requests of the API, of files and of the storage."""
        path = urlsplit(self.path).path
        if match := re.fullmatch(r'/api/models/([^/]+/[^/]+)/auth-check/write', path):
            allowed = match[1] in self.hub.uploads and match[1] not in self.hub.read_only
            self.answer(200, b'{}') if allowed else self.refuse(403, 'Forbidden', repo=match[1], what=path)
        elif match := re.fullmatch(r'/api/models/([^/]+/[^/]+)(?:/(revision|tree|refs)(?:/(.+))?)?', path):
            self.api(match[1], match[2] or 'revision', unquote(match[3] or 'main'))
        elif match := re.fullmatch(r'/(storage/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)', path):
            self.file(match[2], unquote(match[3]), unquote(match[4]), stored=bool(match[1]))
        else:
            self.refuse(404 if '/' in path.strip('/') else 401, 'RepoNotFound', what=path)

    def opened(self, repo: str, kind: str, what: str) -> Repository | None:
        """Return the repository if the token opens it; else refuse and return None."""
        repository, token = self.hub.repos.get(repo), (self.headers.get('Authorization') or '').removeprefix('Bearer ')
        where = {'kind': kind, 'repo': repo, 'what': what}
        if repository is not None and kind == 'storage':
            return repository  # its links are signed and need no token
        if repository is None or repository.private not in (None, token):
            self.refuse(401, 'RepoNotFound', **where)  # 401, as the hub does not reveal whether it exists
        elif repository.gated not in (None, token) and kind == 'file':
            self.refuse(403 if token else 401, 'GatedRepo', **where)  # listing it is allowed
        else:
            return repository
        return None

    def api(self, repo: str, what: str, revision: str) -> None:
        """Answer with files and commit of a revision, in two forms, or the branches and tags."""
        repository, where = self.opened(repo, 'api', what), {'repo': repo, 'what': what}
        if repository is None:
            return
        if what in self.hub.down:
            self.answer(500, b'{"error": "Internal"}', **where)
            return
        if what == 'refs':
            refs = [{'name': n, 'ref': f'refs/{"tags" if n in repository.tags else "heads"}/{n}',
                     'targetCommit': repository.commit(n)} for n in repository.folders]
            self.send_json({'branches': [r for r in refs if '/heads/' in str(r['ref'])], 'converts': [],
                      'tags': [r for r in refs if '/tags/' in str(r['ref'])]}, **where)
            return
        commit = repository.commit(revision)
        if commit is None:
            self.refuse(404, 'RevisionNotFound', **where)
            return
        files = repository.files(commit)
        if what == 'revision':
            self.send_json({'_id': '0', 'id': repo, 'modelId': repo, 'sha': commit, 'private': False, 'tags': [],
                      'siblings': [{'rfilename': name} for name in files]}, **where)
        else:
            entries = []
            for name, file in files.items():
                entry = {'type': 'file', 'path': name, 'size': file.stat().st_size, 'oid': digest(file, 'sha1')}
                large = {'lfs': {'oid': digest(file), 'size': file.stat().st_size, 'pointerSize': 130}}
                entries.append(entry | (large if name.endswith(LARGE) else {}))
            self.send_json(entries, **where)

    def file(self, repo: str, revision: str, name: str, stored: bool) -> None:
        """Answer with a file or a range of it; redirect for a large one."""
        kind = 'storage' if stored else 'file'
        repository, where = self.opened(repo, kind, name), {'kind': kind, 'repo': repo, 'what': name}
        if repository is None:
            return
        commit = repository.commit(revision)
        if commit is None:
            self.refuse(404, 'RevisionNotFound', **where)
            return
        path = repository.files(commit).get(name)
        if path is None:
            self.answer(404, b'', X_Error_Code='EntryNotFound', X_Repo_Commit=commit, **where)
            return
        size = path.stat().st_size
        if name.endswith(LARGE) and not stored:
            self.answer(302, b'', X_Repo_Commit=commit, X_Linked_Etag=f'"{digest(path)}"', X_Linked_Size=size,
                        Location=f'http://localhost:{self.hub.port}/storage/{repo}/resolve/{commit}/{name}', **where)
            return
        etag = digest(path) if name.endswith(LARGE) else digest(path, 'sha1')
        head = {'ETag': f'"{etag}"', 'X_Repo_Commit': commit, 'Accept_Ranges': 'bytes', **where}
        begin = re.fullmatch(r'bytes=(\d+)-', self.headers.get('Range') or '')
        content = b'' if self.command == 'HEAD' else path.read_bytes()
        if begin is None:
            self.answer(200, content, Content_Length=size, **head)
        else:
            rest = content[int(begin[1]):]
            self.answer(206, rest, Content_Length=len(rest),
                        Content_Range=f'bytes {begin[1]}-{size - 1}/{size}', **head)

    def do_POST(self) -> None:
        """Create a repository, negotiate uploads, and commit files."""
        path = urlsplit(self.path).path
        body = self.rfile.read(int(self.headers.get('Content-Length') or 0))
        if self.headers.get('Authorization') is None:
            self.answer(401, b'{"error": "Invalid username or password."}', what=path)
        elif path == '/api/repos/create':
            name = json.loads(body)
            repo = f'{name.get("organization") or "me"}/{name["name"]}'
            self.hub.uploads.setdefault(repo, {})
            self.send_json({'url': f'http://127.0.0.1:{self.hub.port}/{repo}', 'name': repo, 'id': '0'}, what=path)
        elif path == '/api/validate-yaml':
            self.send_json({'errors': [], 'warnings': []}, what=path)
        elif match := re.fullmatch(r'/api/models/([^/]+/[^/]+)/preupload/.+', path):
            files = json.loads(body)['files']
            self.send_json({'files': [{'path': f['path'], 'shouldIgnore': False,
                                       'uploadMode': 'lfs' if f['path'].endswith(LARGE) else 'regular'}
                                      for f in files]}, repo=match[1], what=path)
        elif match := re.fullmatch(r'/([^/]+/[^/]+)\.git/info/lfs/objects/batch', path):
            store = f'http://localhost:{self.hub.port}/put'
            self.send_json({'transfer': 'basic', 'objects': [
                {**o, 'actions': {'upload': {'href': f'{store}/{o["oid"]}'}}} for o in json.loads(body)['objects']]},
                repo=match[1], what=path)
        elif match := re.fullmatch(r'/api/models/([^/]+/[^/]+)/commit/.+', path):
            for line in map(json.loads, body.splitlines()):
                value = line['value']
                if line['key'] == 'file':
                    self.hub.uploads[match[1]][value['path']] = base64.b64decode(value['content'])
                elif line['key'] == 'lfsFile':
                    self.hub.uploads[match[1]][value['path']] = self.hub.uploads[''].pop(value['oid'])
            self.send_json({'success': True, 'commitOid': 'c' * 40, 'hookOutput': '',
                      'commitUrl': f'http://127.0.0.1:{self.hub.port}/{match[1]}/commit/{"c" * 40}'}, what=path)
        else:
            self.refuse(404, 'RepoNotFound', what=path)

    def do_PUT(self) -> None:
        """Receive a large file."""
        body = self.rfile.read(int(self.headers.get('Content-Length') or 0))
        self.hub.uploads.setdefault('', {})[self.path.rpartition('/')[2]] = body
        self.answer(200)


def digest(path: Path, kind: str = 'sha256') -> str:
    """Return a file's digest."""
    return hashlib.new(kind, path.read_bytes()).hexdigest()
