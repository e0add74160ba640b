"""The one place where URLs are opened: any fsspec URL, and plain local paths."""

import contextlib
import hashlib
import json
import os
import pathlib
import posixpath
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, unquote

import fsspec


@dataclass(frozen=True)
class File:
    """A file below a folder: ``uri``, ``path`` relative to that folder with forward slashes, bytes, modification time.

    ``stray`` is why it cannot be read as a file of that folder: ``LINK`` (it leads out of the folder, or nowhere), ``SPECIAL_FILE``
    (a pipe, a socket, a device), ``UNREADABLE`` (a folder that cannot be listed); "" for a plain file. A ``folder`` that
    :func:`walk` was to take for one file has the bytes of all files below it; its time is that of the newest one to the
    millisecond, and below that a digest of all their names, sizes and times: it is another whenever any of them is. ``part`` is
    which of how many parts of such a folder is meant, counted from 0.
    """

    uri: str
    path: str
    size: int
    mtime_ns: int
    stray: str = ""
    folder: bool = False
    part: tuple[int, int] = (0, 1)


def absolute(url: str | os.PathLike) -> str:
    """``url`` with its scheme; a local path becomes ``file:///...``. The path stays as it is spelt: no percent-encoding.

    >>> absolute("/data/a b")
    'file:///data/a b'
    >>> absolute("s3://bucket/x")
    's3://bucket/x'
    """
    url = os.fspath(url)
    if url.startswith("dbfs:/"):  # Databricks mounts DBFS as a folder on every node
        return absolute("/dbfs/" + url.removeprefix("dbfs:").lstrip("/"))
    if url.startswith("file:"):
        url = "/" + url.removeprefix("file:").lstrip("/")
    if "://" in url:
        return url.rstrip("/")
    return "file://" + os.path.abspath(os.path.expanduser(url))


def local_path(url: str) -> pathlib.Path | None:
    """The path of a local URL, None of a remote one."""
    url = absolute(url)
    return pathlib.Path(url.removeprefix("file://")) if url.startswith("file://") else None


def join(url: str, *parts: str) -> str:
    """``parts`` below ``url``."""
    return posixpath.join(absolute(url), *(str(p).strip("/") for p in parts))


def real(url: str) -> str:
    """``url`` as :func:`absolute` has it, links of a local path followed: two names of one place are one."""
    path = local_path(url)
    return absolute(url) if path is None else absolute(os.path.realpath(path))


def filesystem(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of ``url`` and the path in it."""
    path = local_path(url)
    if path is not None:  # fsspec takes "::" in a name for a chain of file systems
        return fsspec.filesystem("file"), str(path)
    return fsspec.core.url_to_fs(absolute(url))


def open(url: str, mode: str = "rb"):
    """A file object; seekable when reading."""
    path = local_path(url)
    if path is not None:
        return path.open(mode)
    fs, path = filesystem(url)
    return fs.open(path, mode)


def spelt(name: str) -> str:
    r"""``name`` as text that can be written: a byte that is not UTF-8 becomes ``\udcXX``, everything else stays.

    >>> spelt("bad\udcff.nii.gz")
    'bad\\udcff.nii.gz'
    """
    return name.encode(errors="backslashreplace").decode()


def walk(url: str, whole: tuple[str, ...] = ()) -> Iterator[File]:
    """All files below ``url`` in the order of their paths as :func:`spelt` spells them; a single file is itself.

    A folder whose name ends with one of ``whole`` (in lower case) is one file, also when it is ``url``. Links within the folder are
    files like others, but those to folders are passed over: what is in there comes under its own path. Raises
    :class:`FileNotFoundError` when there is nothing at ``url``.
    """
    root = local_path(url)
    yield from _walk_local(root, whole) if root is not None else _walk_remote(url, whole)


def _walk_local(root: pathlib.Path, whole: tuple[str, ...]) -> Iterator[File]:
    if root.is_file():
        status = root.stat()
        yield File(f"file://{root}", root.name, status.st_size, status.st_mtime_ns)
        return
    if not root.is_dir():
        raise FileNotFoundError(root)
    if root.name.lower().endswith(whole):
        yield _as_one(f"file://{root}", root.name, _listed_local(str(root)))
        return

    # one level is held at a time; a name sorts as its whole path would ("a.b" before "a/b")
    def entries(folder: str, prefix: str):
        try:
            found = _scanned(folder, whole)
        except OSError:
            if folder == str(root):
                raise
            yield File(f"file://{folder}/", prefix, 0, 0, "UNREADABLE")
            return
        for entry in found:
            if entry.is_dir(follow_symlinks=False):
                if entry.name.lower().endswith(whole):
                    yield _as_one(f"file://{entry.path}", prefix + entry.name, _listed_local(entry.path))
                else:
                    yield from entries(entry.path, f"{prefix}{entry.name}/")
                continue
            try:
                stray = _stray(entry, root)
                status = entry.stat(follow_symlinks=not stray)
            except FileNotFoundError:  # removed since it was listed
                continue
            except OSError:
                yield File(f"file://{entry.path}", prefix + entry.name, 0, 0, "UNREADABLE")
                continue
            if not (entry.is_symlink() and stray == "SPECIAL_FILE"):  # a link to a folder
                yield File(f"file://{entry.path}", prefix + entry.name, status.st_size, status.st_mtime_ns, stray)

    yield from entries(str(root), "")


def _scanned(folder: str, whole: tuple[str, ...] = ()) -> list[os.DirEntry]:
    """The entries of a folder in the order of the paths below them."""

    def key(entry: os.DirEntry) -> str:
        inner = entry.is_dir(follow_symlinks=False) and not entry.name.lower().endswith(whole)
        return spelt(entry.name) + ("/" if inner else "")

    with os.scandir(folder) as listing:
        return sorted(listing, key=key)


def _listed_local(folder: str, prefix: str = "") -> Iterator[tuple[str, int, int]]:
    """(path, bytes, time in ns) of all that is below a folder and no folder; links are not followed."""
    try:
        found = _scanned(folder)
    except OSError:
        yield prefix + "?", 0, 0  # another listing than the one when it could be read
        return
    for entry in found:
        if entry.is_dir(follow_symlinks=False):
            yield from _listed_local(entry.path, f"{prefix}{entry.name}/")
            continue
        with contextlib.suppress(FileNotFoundError):
            status = entry.stat(follow_symlinks=False)
            yield prefix + entry.name, status.st_size, status.st_mtime_ns


def _as_one(uri: str, path: str, listed: Iterator[tuple[str, int, int]]) -> File:
    """The folder of which these are all files."""
    size, newest, digest = 0, 0, hashlib.sha256()
    for name, length, changed in listed:
        size, newest = size + length, max(newest, changed)
        digest.update(f"{spelt(name)}\0{length}\0{changed}\n".encode())
    told = int.from_bytes(digest.digest()[:8]) % 1_000_000
    return File(uri, path, size, newest // 1_000_000 * 1_000_000 + told, folder=True)


def _stray(entry: os.DirEntry, root: pathlib.Path) -> str:
    if entry.is_symlink() and not (_inside(entry.path, root) and os.path.exists(entry.path)):
        return "LINK"
    return "" if entry.is_file() else "SPECIAL_FILE"


def _inside(path: str, root: pathlib.Path) -> bool:
    return os.path.realpath(path).startswith(os.path.realpath(root) + os.sep)


def _walk_remote(url: str, whole: tuple[str, ...]) -> Iterator[File]:
    fs, root = filesystem(url)

    def file(info: dict, path: str) -> File:
        return File(fs.unstrip_protocol(info["name"]), path, int(info["size"]), _changed(info))

    # as for a local folder; an object store is asked once per folder, and its listings are not kept
    def entries(folder: str, prefix: str):
        names = [(name, info, info["type"] == "directory") for name, info in _listing(fs, folder)]
        one = {name for name, _, inner in names if inner and name.lower().endswith(whole)}
        for name, info, inner in sorted(names, key=lambda n: spelt(n[0]) + ("/" if n[2] and n[0] not in one else "")):
            if inner and name in one:
                yield folder_of(info["name"].rstrip("/"), prefix + name)
            elif inner:
                yield from entries(info["name"].rstrip("/"), f"{prefix}{name}/")
            else:
                yield file(info, prefix + name)

    def folder_of(path: str, relative: str) -> File:
        return _as_one(fs.unstrip_protocol(path), relative, _listed_remote(fs, path))

    top = fs.info(root)
    if top["type"] == "directory" and posixpath.basename(root.rstrip("/")).lower().endswith(whole):
        yield folder_of(root.rstrip("/"), posixpath.basename(root.rstrip("/")))
    elif top["type"] == "directory":
        yield from entries(root, "")
    else:
        yield file(top, posixpath.basename(root))


def _listing(fs: fsspec.AbstractFileSystem, folder: str) -> list[tuple[str, dict]]:
    """(name, facts) of what is in a folder; the listing is not kept."""
    listing = fs.ls(folder, detail=True)
    fs.dircache.clear()
    return [(posixpath.basename(i["name"].rstrip("/")), i) for i in listing if i["name"].strip("/") != folder.strip("/")]


def _changed(info: dict) -> int:
    """Modification time in ns, 0 where the storage knows none."""
    changed = info.get("mtime") or info.get("LastModified") or info.get("created") or 0
    return int((changed.timestamp() if hasattr(changed, "timestamp") else float(changed)) * 1e9)


def _listed_remote(fs: fsspec.AbstractFileSystem, folder: str, levels: int = 2, prefix: str = "") -> Iterator[tuple[str, int, int]]:
    """As :func:`_listed_local`. An object store is asked once per folder of two levels and then for all keys below: there may be
    millions, in a folder of few each."""
    for name, info in sorted(_listing(fs, folder), key=lambda n: n[0]):
        if info["type"] != "directory":
            yield prefix + name, int(info["size"] or 0), _changed(info)
        elif levels:
            yield from _listed_remote(fs, info["name"].rstrip("/"), levels - 1, f"{prefix}{name}/")
        else:
            found = fs.find(info["name"].rstrip("/"), detail=True)
            fs.dircache.clear()
            yield from ((path, int(i["size"] or 0), _changed(i)) for path, i in sorted(found.items()))


def exists(url: str) -> bool:
    fs, path = filesystem(url)
    return fs.exists(path)


def read_bytes(url: str) -> bytes:
    path = local_path(url)
    if path is not None:  # three times as quick as through a file system object: archives are full of small files
        return path.read_bytes()
    with open(url) as f:
        return f.read()


def read_each(urls: Sequence[str], most: int) -> list[bytes | None]:
    """The first ``most`` bytes of files of one storage, None of one that is not there. A remote one is asked at once."""
    if not urls:
        return []
    if local_path(urls[0]) is None:
        fs, _ = filesystem(urls[0])
        paths = [filesystem(u)[1] for u in urls]
        found = fs.cat_ranges(paths, [0] * len(paths), [most] * len(paths), on_error="return")
        for data in found:
            if isinstance(data, Exception) and not isinstance(data, FileNotFoundError):
                raise data
        return [None if isinstance(data, Exception) else bytes(data) for data in found]
    found = []
    for url in urls:
        try:
            with open(url) as f:
                found.append(f.read(most))
        except (FileNotFoundError, NotADirectoryError):
            found.append(None)
    return found


def folder(url: str) -> list[tuple[str, bool]]:
    """(name, whether it is a folder) of what is in a folder, by name; a local link is none. [] when there is no such folder."""
    path = local_path(url)
    try:
        if path is not None:
            return [(e.name, e.is_dir(follow_symlinks=False)) for e in _scanned(str(path))]
        fs, path = filesystem(url)
        return sorted((name, info["type"] == "directory") for name, info in _listing(fs, path))
    except (FileNotFoundError, NotADirectoryError):
        return []


def write_bytes(url: str, data: bytes):
    """Write a whole file or nothing: a reader never sees half of it."""
    if local_path(url) is not None:
        with writing(url) as f:
            f.write(data)
        return
    fs, path = filesystem(url)
    fs.makedirs(posixpath.dirname(path), exist_ok=True)
    fs.pipe_file(path, data)  # object stores show an object when its last byte is there


def create(url: str, data: bytes) -> bool:
    """Write a file unless there is one; whether it was written. Of several who try on a local disk one succeeds; a remote store may
    let two believe so."""
    path = local_path(url)
    if path is None:
        fs, target = filesystem(url)
        fs.makedirs(posixpath.dirname(target), exist_ok=True)
        try:
            fs.pipe_file(target, data, mode="create")
        except FileExistsError:
            return False
        return True
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with path.open("xb") as f:
            f.write(data)
    except FileExistsError:
        return False
    return True


@contextlib.contextmanager
def writing(url: str):
    """A file object for a whole file, which is there when the block ends, and not when the block raises."""
    fs, path = filesystem(url)
    fs.makedirs(posixpath.dirname(path), exist_ok=True)
    if local_path(url) is None:
        with tempfile.TemporaryDirectory() as folder:
            partial = os.path.join(folder, "partial")
            with open(partial, "wb") as f:
                yield f
            fs.put_file(partial, path)
        return
    partial = f"{posixpath.dirname(path)}/.{posixpath.basename(path)}.{uuid.uuid4().hex}.partial"
    try:
        with open(partial, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(partial, path)
    except BaseException:
        if os.path.exists(partial):
            os.remove(partial)
        raise


def read_ranges(ranges: Sequence[tuple[str, int, int]]) -> list[bytes]:
    """The bytes from ``start`` to before ``end`` of files of one storage: (url, start, end) each. A remote one is asked at once.

    Raises :class:`EOFError` where a file is shorter.
    """
    found: list[bytes] = []
    if ranges and local_path(ranges[0][0]) is None:
        urls, starts, ends = zip(*ranges, strict=True)
        fs, _ = filesystem(urls[0])
        found = fs.cat_ranges([filesystem(u)[1] for u in urls], list(starts), list(ends), on_error="raise")
    else:
        with contextlib.ExitStack() as opened:
            files = {url: opened.enter_context(open(url)) for url in dict.fromkeys(url for url, _, _ in ranges)}
            for url, start, end in ranges:
                files[url].seek(start)
                found.append(files[url].read(end - start))
    for (url, start, end), data in zip(ranges, found, strict=True):
        if len(data) != end - start:
            raise EOFError(f"{url}: {len(data)} bytes at {start}, wanted {end - start}")
    return found


def read_json(url: str) -> Any:
    return json.loads(read_bytes(url))


def write_json(url: str, value: Any):
    write_bytes(url, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())


def makedirs(url: str):
    fs, path = filesystem(url)
    fs.makedirs(path, exist_ok=True)


def remove(url: str, recursive: bool = False):
    fs, path = filesystem(url)
    fs.rm(path, recursive=recursive)


def move(source: str, target: str):
    """Rename; one atomic step for a local folder whose target does not exist."""
    fs, path = filesystem(source)
    if local_path(source) is not None:
        os.makedirs(os.path.dirname(local_path(target)), exist_ok=True)
        os.rename(local_path(source), local_path(target))
    else:
        fs.mv(path, filesystem(target)[1], recursive=True)


def component(text: str) -> str:
    """``text`` as one safe path component; :func:`unquote` gives it back.

    >>> component("a/b c")
    'a%2Fb%20c'
    """
    return quote(text, safe="")


def text(path_component: str) -> str:
    return unquote(path_component)
