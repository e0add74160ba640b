"""Archives: the files inside zip and tar, the pages of OME-TIFF, and the planes of OME-Zarr, read where they are.

A file is its own only member. A member has a virtual path (``folder/a.zip/member.dcm``) and a URI
(``zip://member.dcm::file:///archive/folder/a.zip``, fsspec's spelling) that :func:`open_uri` reads again. A page of an OME-TIFF
of several (see :mod:`ome`) is a member too, under the path of its file, which may be in a zip or tar itself:
``tiff://4::file:///archive/plate/A01.ome.tif``, counted from 0. Nothing is ever unpacked to disk. Limits hold for the bytes that
really come out of an archive, not for what its headers claim.

A folder whose name ends with ``.zarr`` is one container, with all that is in it: it is read again when any file in it is another.
The planes of an OME-Zarr plate (see :mod:`ome_zarr`) are its members, under the path of their image
(``plates/P1.zarr/A/1/0``): ``zarr://A/1/0/0?t=0&c=1&z=4::file:///archive/plates/P1.zarr``. Metadata, lower resolutions and labels
are parts of it and have no row of their own; what the metadata name and is not there, and folders that they do not name, have.
"""

import contextlib
import dataclasses
import errno
import functools
import gzip
import io
import itertools
import re
import stat
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from sparkmed import config, storage
from sparkmed.formats import ome, ome_zarr, zarr_array
from sparkmed.imaging import paths
from sparkmed.rejection import Refused, Rejection

STAGE = "catalog"
CHUNK = 1 << 20
SLACK = 16 << 20
"""Bytes that may come out of an archive before the ratio counts: a few zeros are no bomb."""
IN_MEMORY = 64 << 20
"""A plain file up to this size in bytes is read at once, a larger one in pieces."""

ZIP_SUFFIXES = (".zip",)
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tbz", ".tar.xz", ".txz")
OTHER_ARCHIVES = (".7z", ".rar", ".tar.zst", ".tar.lz4", ".tar.z", ".ozx")
PART_BYTES = 256 << 20
"""Of a folder that is one container: read in parts of about so many bytes, on several cores."""
MOST_PARTS = 1536
"""One for each well of the largest plate."""

_INNER = re.compile(r"^(zip|tar)://(.*)::([A-Za-z0-9+.-]+://.*)$", re.DOTALL)
_PAGE = re.compile(r"^tiff://([0-9]+)::(.*)$", re.DOTALL)
_PLANE = re.compile(r"^zarr://([^:]+)::([A-Za-z0-9+.-]+://.*)$", re.DOTALL)
_ZARR = re.compile(r"(?:[^/]*/)*?[^/]*\.zarr(?=/)", re.IGNORECASE)
_STRAY_MESSAGES = {
    "LINK": "a link that leads out of the archive, or nowhere",
    "NOT_INSTALLED": zarr_array.NOT_INSTALLED,
    "SPECIAL_FILE": "neither a file nor a folder",
    "UNREADABLE": "the folder cannot be listed",
}
_DRIVE = re.compile(r"^[A-Za-z]:")


@dataclass(frozen=True)
class Member:
    """One file to look at: a plain file, or a member of a zip or tar.

    ``path`` is relative to the archive's root, ``container`` the URI of the file on storage (the member's own for a
    plain file), ``file_size`` and ``file_mtime_ns`` are those of the container, ``bytes`` is the size of the member, of a plane the
    unpacked one. ``ome`` is what a plate says of its plane, see :class:`ome_zarr.Plane`.
    """

    uri: str
    path: str
    container: str
    file_size: int
    file_mtime_ns: int
    bytes: int
    source: Callable[[], bytes] | None = field(default=None, repr=False, compare=False)
    """Reads the member from its open container; None reads by ``uri``."""
    ome: dict[str, Any] | None = field(default=None, compare=False)

    def read(self) -> bytes:
        """All bytes; raises :class:`Refused` when the container does not give them."""
        return self.source() if self.source else open_uri(self.uri)

    def open(self):
        """A seekable file object over the bytes; a large plain file is not read into memory."""
        if self.container == self.uri and self.bytes > IN_MEMORY:
            return storage.open(self.uri)
        return io.BytesIO(self.read())

    def __getstate__(self):
        return {**self.__dict__, "source": None}


def kind(path: str) -> str:
    """``zip``, ``tar``, ``other`` (an archive that is not read) or ``""`` by the name of a file."""
    name = path.lower()
    if name.endswith(ZIP_SUFFIXES):
        return "zip"
    if name.endswith(TAR_SUFFIXES):
        return "tar"
    return "other" if name.endswith(OTHER_ARCHIVES) else ""


def files(url: str, limits: config.Catalog | None = None) -> Iterator[storage.File]:
    """:func:`storage.walk` without the files that ``limits.exclude`` names; a folder ``*.zarr`` is one file."""
    ignored = [paths.PathPattern(p) for p in (limits or config.Catalog()).exclude]
    found = storage.walk(url, whole=ome_zarr.SUFFIXES)
    return (readable(f) for f in found if all(p.match(f.path) is None for p in ignored))


def readable(file: storage.File) -> storage.File:
    """``file``, or a stray of size 0 where this process lacks the package for it: it is another file once that is installed."""
    if file.folder and not zarr_array.is_installed():
        return dataclasses.replace(file, size=0, mtime_ns=0, stray="NOT_INSTALLED")
    return file


def parts(file: storage.File) -> Iterator[storage.File]:
    """``file``; a large folder that is one container in several parts, of which :func:`members` reads each by itself."""
    count = min(max(1, -(-file.size // PART_BYTES)), MOST_PARTS) if file.folder else 1
    return (dataclasses.replace(file, part=(n, count)) for n in range(count))


def members(file: storage.File, limits: config.Catalog | None = None) -> Iterator[Member | Rejection]:
    """What is in ``file``, in stored order: members, and rejections of those that must not be read; at least one of them, in all
    parts of it together.

    Read members while iterating: then a compressed tar is decompressed once; later each is looked up again.
    A name that is not UTF-8 is refused under the spelling of :func:`storage.spelt`.
    Reasons: ``BAD_NAME``, ``BROKEN_ARCHIVE``, ``EMPTY_ARCHIVE``, ``BOMB``, ``ENCRYPTED``, ``ESCAPES_FOLDER``, ``LINK``,
    ``SPECIAL_FILE``, ``NESTED_ARCHIVE``, ``DUPLICATE_MEMBER``, ``UNSUPPORTED_COMPRESSION``, ``UNSUPPORTED_ARCHIVE``,
    ``UNREADABLE``, ``NOT_INSTALLED``, of an OME-TIFF what :class:`ome.Pages` raises, of a Zarr what :meth:`ome_zarr.Plate.planes`
    gives.
    """
    limits = limits or config.Catalog()
    if storage.spelt(file.uri) != file.uri:
        yield Rejection(storage.spelt(file.uri), STAGE, "BAD_NAME", _NAME_MESSAGES["BAD_NAME"])
        return
    if file.stray:
        yield Rejection(file.uri, STAGE, file.stray, _STRAY_MESSAGES[file.stray])
        return
    if file.folder:
        yield from _planes(file)
        return
    sort = kind(file.path)
    if sort == "":
        yield from _with_pages(Member(file.uri, file.path, file.uri, file.size, file.mtime_ns, file.size))
        return
    if sort == "other":
        yield Rejection(file.uri, STAGE, "UNSUPPORTED_ARCHIVE", "only zip and tar (plain, gz, bz2, xz) archives are read")
        return
    empty = True
    try:
        for member in (_zip_members if sort == "zip" else _tar_members)(file, limits):
            empty = False
            yield from _with_pages(member)
    except Refused as e:
        yield e.at(file.uri, STAGE)
    else:
        if empty:
            yield Rejection(file.uri, STAGE, "EMPTY_ARCHIVE", "the archive has no member")


def _planes(file: storage.File) -> Iterator[Member | Rejection]:
    """The planes of an OME-Zarr plate."""
    plate = ome_zarr.Plate(file.uri)
    for name, found in plate.planes(file.part):
        uri = f"zarr://{name}::{file.uri}" if name else file.uri
        if isinstance(found, Refused):
            yield found.at(uri, STAGE)
            continue
        read, path = functools.partial(plate.read, name), f"{file.path}/{found.path}"
        yield Member(uri, path, file.uri, file.size, file.mtime_ns, found.nbytes, read, found.facts)


def _with_pages(member: Member | Rejection) -> Iterator[Member | Rejection]:
    """The pages of an OME-TIFF of several; anything else as it is."""
    if isinstance(member, Rejection) or not member.path.lower().endswith(ome.SUFFIXES):
        yield member
        return
    try:
        data = None if member.uri == member.container else member.read()
        if data is not None:
            member = dataclasses.replace(member, source=lambda: data)  # what is compressed is read once
        with _paged(member.uri, data) as (stream, pages):
            for number in pages.numbers:

                def read(number=number, uri=f"tiff://{number}::{member.uri}") -> bytes:
                    return open_uri(uri) if stream.closed else pages.page(number)

                yield dataclasses.replace(member, uri=f"tiff://{number}::{member.uri}", source=read)
            for number in pages.homeless:
                message = f"the OME-XML of the file does not say what page {number + 1} of it shows"
                yield Rejection(f"tiff://{number}::{member.uri}", STAGE, "MULTI_PAGE", message)
            if not pages.numbers:
                yield member
    except Refused as e:
        yield e.at(member.uri, STAGE)


@contextlib.contextmanager
def _paged(uri: str, data: bytes | None) -> Iterator[tuple[BinaryIO, ome.Pages]]:
    """A file that may be an OME-TIFF, open: from its bytes, or read where it lies."""
    try:
        with io.BytesIO(data) if data is not None else storage.open(uri) as stream:
            yield stream, ome.Pages(stream)
    except (OSError, ValueError) as e:
        raise Refused("UNREADABLE", f"the file cannot be read: {type(e).__name__}") from None
    except Refused as e:
        if isinstance(e.__context__, OSError):  # of the storage: what is read of a TIFF raises no such thing
            raise Refused("UNREADABLE", f"the file cannot be read: {type(e.__context__).__name__}") from None
        raise


def open_uri(uri: str, limits: config.Catalog | None = None) -> bytes:
    """The bytes of one file or member; raises :class:`Refused`."""
    for _, data in read_many([uri], limits):
        return data
    raise Refused("UNREADABLE", "the file is not there any more")


def read_many(uris: Iterable[str], limits: config.Catalog | None = None) -> Iterator[tuple[int, bytes]]:
    """(position in ``uris``, bytes) of files and members, in the order that reads each container once.

    Raises :class:`Refused` when one of them is missing, broken or larger than the limits allow.
    """
    limits = limits or config.Catalog()
    inside: dict[tuple[str, str], list[tuple[int, str]]] = {}
    paged: dict[str, list[tuple[int, int]]] = {}
    plates: dict[str, ome_zarr.Plate] = {}
    for position, uri in enumerate(uris):
        match, page, plane = _INNER.match(uri), _PAGE.match(uri), _PLANE.match(uri)
        if plane:
            yield position, plates.setdefault(plane[2], ome_zarr.Plate(plane[2])).read(plane[1])
        elif page:
            paged.setdefault(page[2], []).append((position, int(page[1])))
        elif match:
            inside.setdefault((match[1], match[3]), []).append((position, match[2]))
        else:
            yield position, _read_file(uri)
    for (sort, container), wanted in inside.items():
        yield from (_read_zip if sort == "zip" else _read_tar)(container, wanted, limits)
    packed = [uri for uri in paged if _INNER.match(uri)]
    unpacked = ((packed[n], data) for n, data in read_many(packed, limits)) if packed else ()
    for uri, data in itertools.chain(((uri, None) for uri in paged if uri not in packed), unpacked):
        with _paged(uri, data) as (_, pages):
            for position, number in paged[uri]:
                yield position, pages.page(number)


def _read_file(uri: str) -> bytes:
    try:
        return storage.read_bytes(uri)
    except (OSError, ValueError) as e:
        raise Refused("UNREADABLE", f"the file cannot be read: {type(e).__name__}") from None


@contextlib.contextmanager
def _broken_archive(what: str):
    """Whatever zipfile and tarfile raise on damaged bytes becomes a :class:`Refused` without the bytes' text, and so does what the
    storage raises: that may pass."""
    try:
        yield
    except Refused:
        raise
    except Exception as e:  # struct.error, zlib.error, lzma.LZMAError and whatever else a decoder knows
        passing = e if isinstance(e, MemoryError) else _of_storage(e)
        if passing is not None:
            raise Refused("UNREADABLE", f"the archive cannot be read: {type(passing).__name__}") from None
        raise Refused("BROKEN_ARCHIVE", f"{what}: {type(e).__name__}") from None


def _of_storage(e: Exception) -> OSError | None:
    """What the storage raised, which zipfile may have made an error of its own; decoders raise a plain OSError about bytes, without
    a number or with that of a place before the start."""
    for found in (e, e.__context__):
        about_bytes = type(found) in (OSError, gzip.BadGzipFile) and found.errno in (None, errno.EINVAL)
        if isinstance(found, OSError) and not about_bytes:
            return found
    return None


def _name_problem(name: str) -> str:
    """Why a member of this name is not read, or ``""``."""
    parts = name.replace("\\", "/").split("/")
    if not name:
        return "BROKEN_ARCHIVE"
    if name.startswith(("/", "\\")) or ".." in parts or _DRIVE.match(name) or "\0" in name:
        return "ESCAPES_FOLDER"
    if storage.spelt(name) != name:
        return "BAD_NAME"
    return "NESTED_ARCHIVE" if kind(name) else ""


_NAME_MESSAGES = {
    "BAD_NAME": "the name is not UTF-8: rename it",
    "BROKEN_ARCHIVE": "a member without a name",
    "ESCAPES_FOLDER": "the member's name leads out of its archive",
    "NESTED_ARCHIVE": "an archive inside an archive is not read",
}
_ZIPPED_ZARR = "an OME-Zarr inside an archive is not read: unpack it"


# zip


def _open_zip(uri: str):
    return zipfile.ZipFile(storage.open(uri))


def _zip_uri(name: str, container: str) -> str:
    return f"zip://{storage.spelt(name)}::{container}"


def _zip_entries(zf: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    """The files of a zip; raises ``BOMB`` when two share bytes (Fifield, WOOT 2019)."""
    entries = zf.infolist()
    end = -1
    for info in sorted(entries, key=lambda i: i.header_offset):
        if info.header_offset < end:
            raise Refused("BOMB", "members of the zip overlap")
        end = info.header_offset + 30 + info.compress_size
    return entries


def _zip_problem(info: zipfile.ZipInfo, limits: config.Catalog) -> tuple[str, str] | None:
    """(reason, message) why a member is not read."""
    name_problem = _name_problem(info.orig_filename if "\0" in info.orig_filename else info.filename)
    if name_problem:
        return name_problem, _NAME_MESSAGES[name_problem]
    if stat.S_ISLNK(info.external_attr >> 16):
        return "LINK", "a link is not followed"
    if info.flag_bits & 1:
        return "ENCRYPTED", "the member is encrypted"
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # the others cannot be read in bounded memory
        return "UNSUPPORTED_COMPRESSION", f"zip compression method {info.compress_type}, wanted 0 (stored) or 8 (deflate)"
    if info.file_size > limits.max_member_bytes:
        return "BOMB", f"{info.file_size} bytes unpacked, the limit is {limits.max_member_bytes}"
    if info.file_size > SLACK and info.file_size > limits.max_ratio * max(info.compress_size, 1):
        return "BOMB", f"{info.compress_size} bytes unpack to {info.file_size}, the limit is a ratio of {limits.max_ratio}"
    return None


def _read_zip_member(zf: zipfile.ZipFile, info: zipfile.ZipInfo, limits: config.Catalog) -> bytes:
    """Bytes of a member; what comes out is counted, whatever the header says."""
    with _broken_archive("the zip member is damaged"):
        out, size = [], 0
        with zf.open(info) as f:
            while piece := f.read(CHUNK):
                size += len(piece)
                if size > limits.max_member_bytes or (size > SLACK and size > limits.max_ratio * max(info.compress_size, 1)):
                    raise Refused("BOMB", f"{info.compress_size} bytes unpack to more than {size}")
                out.append(piece)
        if size != info.file_size:
            raise Refused("BROKEN_ARCHIVE", f"the zip member holds {size} of {info.file_size} bytes")
        return b"".join(out)


def _zip_members(file: storage.File, limits: config.Catalog) -> Iterator[Member | Rejection]:
    with _broken_archive("not a readable zip"):
        zf = _open_zip(file.uri)
    with contextlib.closing(zf):
        with _broken_archive("not a readable zip"):
            entries = _zip_entries(zf)
        if any(info.filename in ome_zarr.OF_GROUPS for info in entries):
            raise Refused("UNSUPPORTED_ARCHIVE", _ZIPPED_ZARR)
        seen: dict[str, int] = {}
        for info in entries:
            name = info.filename
            if name.endswith("/"):
                continue
            uri = _zip_uri(name, file.uri)
            seen[name] = seen.get(name, 0) + 1
            if inside := _ZARR.match(name):
                if inside[0] not in seen:  # said once, not of each chunk
                    yield Rejection(_zip_uri(inside[0], file.uri), STAGE, "NESTED_ARCHIVE", _ZIPPED_ZARR)
                seen[inside[0]] = 1
                continue
            if seen[name] > 1:  # readers disagree which of the two is meant; the first keeps the URI
                yield Rejection(f"{uri}#{seen[name]}", STAGE, "DUPLICATE_MEMBER", f"member number {seen[name]} of this name")
                continue
            problem = _zip_problem(info, limits)
            if problem:
                yield Rejection(uri, STAGE, *problem)
                continue

            def read(info=info, uri=uri) -> bytes:
                return _read_zip_member(zf, info, limits) if zf.fp else open_uri(uri, limits)

            yield Member(uri, f"{file.path}/{name}", file.uri, file.size, file.mtime_ns, info.file_size, read)


def _read_zip(container: str, wanted: list[tuple[int, str]], limits: config.Catalog) -> Iterator[tuple[int, bytes]]:
    with _broken_archive("not a readable zip"):
        zf = _open_zip(container)
    with contextlib.closing(zf):
        first: dict[str, zipfile.ZipInfo] = {}
        for info in zf.infolist():
            first.setdefault(info.filename, info)
        for position, name in wanted:
            if name not in first:
                raise Refused("UNREADABLE", "the member is not in the zip any more")
            problem = _zip_problem(first[name], limits)
            if problem:
                raise Refused(*problem)
            yield position, _read_zip_member(zf, first[name], limits)


# tar


class _Bounded(io.RawIOBase):
    """The bytes of a (compressed) file, read forward in small pieces, refused when too many come out of too few."""

    def __init__(self, uri: str, limits: config.Catalog):
        self.raw = storage.open(uri)
        head = self.raw.read(6)
        self.raw.seek(0)
        self.inner, self.plain = self.raw, False
        if head[:2] == b"\x1f\x8b":
            self.inner = gzip.GzipFile(fileobj=self.raw)
        elif head[:3] == b"BZh":
            import bz2

            self.inner = bz2.BZ2File(self.raw)
        elif head == b"\xfd7zXZ\0":
            import lzma

            self.inner = lzma.LZMAFile(self.raw)
        else:
            self.plain = True
        self.ratio = limits.max_ratio
        self.most = SLACK + self.ratio * self.raw.seek(0, io.SEEK_END)
        self.raw.seek(0)
        self.position = 0

    def readable(self):
        return True

    def seekable(self):
        return True

    def tell(self):
        return self.position

    def read(self, size: int = -1) -> bytes:
        if size < 0 or size > SLACK:  # tarfile reads whole extended headers at once
            raise Refused("BOMB", f"a tar header claims {size} bytes")
        data = self.inner.read(size)
        self.position += len(data)
        if not self.plain and self.position > SLACK + self.ratio * max(self.raw.tell(), 1):
            raise Refused("BOMB", f"{self.raw.tell()} bytes unpack to more than {self.position}, "
                                  f"the limit is a ratio of {self.ratio}")  # fmt: skip
        return data

    def seek(self, offset: int, whence: int = 0):
        if whence == 1:
            offset += self.position
        elif whence == 2:
            raise OSError("a tar is read from its start")
        if self.plain:
            self.position = self.inner.seek(offset)
            return self.position
        if offset < self.position:
            self.inner.seek(0)
            self.position = 0
        while self.position < offset and self.read(min(CHUNK, offset - self.position)):
            pass
        return self.position

    def close(self):
        if self.inner is not self.raw:
            self.inner.close()
        self.raw.close()
        super().close()


def _tar_uri(name: str, container: str) -> str:
    return f"tar://{storage.spelt(name)}::{container}"


def _tar_entries(stream: _Bounded) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """The entries of a tar in stored order; a damaged header raises instead of looking like the end."""
    with _broken_archive("not a readable tar"):
        tar = tarfile.open(fileobj=stream, mode="r:")
    while True:
        with _broken_archive("the tar is damaged"):
            info = tar.next()
            tar.members.clear()  # a million entries are not held
        if info is None:
            break
        yield tar, info
    with _broken_archive("the tar is damaged"):
        stream.seek(tar.offset)
        rest = stream.read(tarfile.BLOCKSIZE)
        if rest.strip(b"\0"):
            raise Refused("BROKEN_ARCHIVE", f"the header at byte {tar.offset} of the tar is damaged; what follows is not read")


def _tar_problem(info: tarfile.TarInfo, stream: _Bounded, limits: config.Catalog) -> tuple[str, str] | None:
    name_problem = _name_problem(info.name)
    if name_problem:
        return name_problem, _NAME_MESSAGES[name_problem]
    if info.issym() or info.islnk():
        return "LINK", "a link is not followed"
    if not info.isreg() or info.issparse():
        return "SPECIAL_FILE", "only plain files are read from a tar"
    if not stream.plain and info.size > stream.most:
        return "BOMB", f"{info.size} bytes unpacked, the limit for a tar of its size is {stream.most}"
    if info.size > limits.max_member_bytes:
        return "BOMB", f"{info.size} bytes unpacked, the limit is {limits.max_member_bytes}"
    return None


def _read_tar_member(stream: _Bounded, info: tarfile.TarInfo) -> bytes:
    with _broken_archive("the tar member is damaged"):
        stream.seek(info.offset_data)
        out, left = [], info.size
        while left:
            piece = stream.read(min(CHUNK, left))
            if not piece:
                raise Refused("BROKEN_ARCHIVE", f"the tar member holds {info.size - left} of {info.size} bytes")
            out.append(piece)
            left -= len(piece)
        return b"".join(out)


def _tar_members(file: storage.File, limits: config.Catalog) -> Iterator[Member | Rejection]:
    with _broken_archive("not a readable tar"):
        stream = _Bounded(file.uri, limits)
    with contextlib.closing(stream):
        seen: dict[str, int] = {}
        for _, info in _tar_entries(stream):
            if info.isdir():
                continue
            uri = _tar_uri(info.name, file.uri)
            seen[info.name] = seen.get(info.name, 0) + 1
            if inside := _ZARR.match(info.name):
                if inside[0] not in seen:
                    yield Rejection(_tar_uri(inside[0], file.uri), STAGE, "NESTED_ARCHIVE", _ZIPPED_ZARR)
                seen[inside[0]] = 1
                continue
            if seen[info.name] > 1:
                yield Rejection(f"{uri}#{seen[info.name]}", STAGE, "DUPLICATE_MEMBER",
                                f"member number {seen[info.name]} of this name")  # fmt: skip
                continue
            problem = _tar_problem(info, stream, limits)
            if problem:
                yield Rejection(uri, STAGE, *problem)
                continue

            def read(info=info, uri=uri) -> bytes:
                return open_uri(uri, limits) if stream.closed else _read_tar_member(stream, info)

            yield Member(uri, f"{file.path}/{info.name}", file.uri, file.size, file.mtime_ns, info.size, read)


def _read_tar(container: str, wanted: list[tuple[int, str]], limits: config.Catalog) -> Iterator[tuple[int, bytes]]:
    positions: dict[str, list[int]] = {}
    for position, name in wanted:
        positions.setdefault(name, []).append(position)
    with _broken_archive("not a readable tar"):
        stream = _Bounded(container, limits)
    with contextlib.closing(stream):
        for _, info in _tar_entries(stream):
            if info.name not in positions:
                continue
            problem = _tar_problem(info, stream, limits)
            if problem:
                raise Refused(*problem)
            data = _read_tar_member(stream, info)
            for position in positions.pop(info.name):
                yield position, data
            if not positions:
                return
    raise Refused("UNREADABLE", f"{len(positions)} members are not in the tar any more")
