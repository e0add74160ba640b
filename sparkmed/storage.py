"""The one place where URLs are opened: any fsspec URL, and plain local paths."""

import contextlib
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
    (a pipe, a socket, a device), ``UNREADABLE`` (a folder that cannot be listed); "" for a plain file.
    """

    uri: str
    path: str
    size: int
    mtime_ns: int
    stray: str = ""


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


def walk(url: str) -> Iterator[File]:
    """All files below ``url`` in the order of their paths as :func:`spelt` spells them; a single file is itself.

    Links within the folder are files like others, but those to folders are passed over: what is in there comes under its own path.
    Raises :class:`FileNotFoundError` when there is nothing at ``url``.
    """
    root = local_path(url)
    yield from _walk_local(root) if root is not None else _walk_remote(url)


def _walk_local(root: pathlib.Path) -> Iterator[File]:
    if root.is_file():
        status = root.stat()
        yield File(f"file://{root}", root.name, status.st_size, status.st_mtime_ns)
        return
    if not root.is_dir():
        raise FileNotFoundError(root)

    # one level is held at a time; a name sorts as its whole path would ("a.b" before "a/b")
    def entries(folder: str, prefix: str):
        try:
            with os.scandir(folder) as listing:
                found = sorted(listing, key=lambda e: spelt(e.name) + ("/" if e.is_dir(follow_symlinks=False) else ""))
        except OSError:
            if folder == str(root):
                raise
            yield File(f"file://{folder}/", prefix, 0, 0, "UNREADABLE")
            return
        for entry in found:
            if entry.is_dir(follow_symlinks=False):
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


def _stray(entry: os.DirEntry, root: pathlib.Path) -> str:
    if entry.is_symlink() and not (_inside(entry.path, root) and os.path.exists(entry.path)):
        return "LINK"
    return "" if entry.is_file() else "SPECIAL_FILE"


def _inside(path: str, root: pathlib.Path) -> bool:
    return os.path.realpath(path).startswith(os.path.realpath(root) + os.sep)


def _walk_remote(url: str) -> Iterator[File]:
    fs, root = filesystem(url)

    def file(info: dict, path: str) -> File:
        changed = info.get("mtime") or info.get("LastModified") or info.get("created") or 0
        seconds = changed.timestamp() if hasattr(changed, "timestamp") else float(changed)
        return File(fs.unstrip_protocol(info["name"]), path, int(info["size"]), int(seconds * 1e9))

    # as for a local folder; an object store is asked once per folder, and its listings are not kept
    def entries(folder: str, prefix: str):
        listing = fs.ls(folder, detail=True)
        fs.dircache.clear()
        names = [(posixpath.basename(i["name"].rstrip("/")), i) for i in listing if i["name"].strip("/") != folder.strip("/")]
        for name, info in sorted(names, key=lambda n: spelt(n[0]) + ("/" if n[1]["type"] == "directory" else "")):
            if info["type"] == "directory":
                yield from entries(info["name"].rstrip("/"), f"{prefix}{name}/")
            else:
                yield file(info, prefix + name)

    top = fs.info(root)
    if top["type"] == "directory":
        yield from entries(root, "")
    else:
        yield file(top, posixpath.basename(root))


def exists(url: str) -> bool:
    fs, path = filesystem(url)
    return fs.exists(path)


def read_bytes(url: str) -> bytes:
    path = local_path(url)
    if path is not None:  # three times as quick as through a file system object: archives are full of small files
        return path.read_bytes()
    with open(url) as f:
        return f.read()


def write_bytes(url: str, data: bytes):
    """Write a whole file or nothing: a reader never sees half of it."""
    if local_path(url) is not None:
        with writing(url) as f:
            f.write(data)
        return
    fs, path = filesystem(url)
    fs.makedirs(posixpath.dirname(path), exist_ok=True)
    fs.pipe_file(path, data)  # object stores show an object when its last byte is there


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
