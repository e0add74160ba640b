"""Arrays of Zarr v2 and v3: where a plane of one is stored, and the plane as bytes of its own.

The bytes of a plane are a head in JSON and the chunks that hold it, as they are stored and row by row: what :func:`read_array`
reads with the package ``zarr``. Of the array's metadata the head has what pixels depend on, and not where in the array the plane
lies: a plane stays the same one when the array grows. Nothing is decoded before :func:`read_array`; what a chunk says itself of its
size is looked at first.
"""

import contextlib
import importlib.util
import itertools
import json
import math
import os
import re
import struct
import zlib
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from sparkmed import storage
from sparkmed.formats.instance import check_size
from sparkmed.rejection import Refused

MAGIC = b"\x89ZARRPLANE\r\n\x1a\n"
"""How the bytes of a plane begin."""
MOST_METADATA = 64 << 20
"""Bytes of JSON beyond which metadata are refused."""
MOST_CHUNKS = 65_536
"""Chunks of a plane beyond which it is refused."""
MOST_BYTES = 1 << 30
"""A plane or a chunk of more, unpacked, is refused, and a plane whose chunks hold twice as much."""
KEPT = 128 << 20
"""Bytes of chunks of several planes that are kept for the next plane."""
_NOT_THERE = 2**64 - 1
_TYPE = re.compile(r"[<>|][biuf][1248]")
_TYPES = frozenset({"bool", *(f"{sign}int{n}" for sign in ("", "u") for n in (8, 16, 32, 64)), "float16", "float32", "float64"})
_PACKED = {"blosc": "blosc", "zstd": "zstd", "zlib": "gzip", "gzip": "gzip"}
NOT_INSTALLED = "OME-Zarr is read with the package zarr: pip install 'sparkmed[zarr]', for the driver and the executors"


def is_installed() -> bool:
    """Whether the package that decodes is there."""
    return importlib.util.find_spec("zarr") is not None


# metadata


def broken(what: str) -> Refused:
    return Refused("BROKEN_ZARR", what)


@contextlib.contextmanager
def understood(what: str):
    """Whatever metadata of unexpected kinds raise becomes a :class:`Refused`."""
    try:
        yield
    except Refused:
        raise
    except (MemoryError, RecursionError, Exception) as e:
        raise broken(f"{what} cannot be understood ({type(e).__name__})") from None


def json_object(data: bytes, name: str) -> dict[str, Any]:
    if len(data) > MOST_METADATA:
        raise Refused("TOO_LARGE", f"{name} has more than {MOST_METADATA} bytes")
    try:
        parsed = json.loads(data)
    except (ValueError, RecursionError):
        raise broken(f"{name} is no JSON") from None
    return of_kind(parsed, dict, f"{name} holds")


def of_kind(value: Any, kind: type, what: str) -> Any:
    if not isinstance(value, kind) or isinstance(value, bool):
        names = {dict: "an object", list: "a list", str: "a text", int: "a whole number"}
        raise broken(f"{what} {json.dumps(value)[:40]}, wanted {names[kind]}")
    return value


def short(value: Any) -> str:
    return repr(value)[:80]


@dataclass(frozen=True)
class Array:
    """An array, as far as its planes are cut out of it; of one in shards the chunks are those within."""

    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    dtype: np.dtype
    packed: str  # a value of _PACKED, or "" for plain
    checksum: bool
    metadata: dict[str, Any]  # without the shape
    key: tuple[str, str] = ("", ".")  # what a chunk's key begins with, and what is between its numbers
    shards: tuple[int, ...] = ()
    index: tuple[bool, bool] = (False, False)  # whether the index of a shard is at its start, and whether it has a checksum

    @property
    def chunk_bytes(self) -> int:
        return math.prod(self.chunks) * self.dtype.itemsize

    @property
    def plane_bytes(self) -> int:
        return math.prod(self.shape[-2:]) * self.dtype.itemsize

    @property
    def grid(self) -> tuple[int, int]:
        """Chunks of a plane along rows and columns."""
        return tuple(-(-n // c) for n, c in zip(self.shape[-2:], self.chunks[-2:], strict=True))

    def require_bounded(self):
        if max(self.chunk_bytes, self.plane_bytes) > MOST_BYTES or math.prod(self.grid) * self.chunk_bytes > 2 * MOST_BYTES:
            raise Refused("TOO_LARGE", f"an array of shape {short(self.shape)} in chunks of {short(self.chunks)}, of "
                                       f"{self.dtype}; planes and chunks of {MOST_BYTES} bytes are the limit")  # fmt: skip
        if math.prod(self.grid) > MOST_CHUNKS:
            raise Refused("TOO_LARGE", f"a plane of {math.prod(self.grid)} chunks, the limit is {MOST_CHUNKS}")


def parse(said: dict[str, Any]) -> Array:
    """Raises ``BROKEN_ZARR``, ``BAD_TYPE``, ``NO_DECODER``, ``TOO_LARGE``."""
    with understood("the metadata of the array"):
        array = {2: _array_2, 3: _array_3}.get(said.get("zarr_format"), _no_array)(said)
        for what in ("chunks", "shards"):
            if getattr(array, what) and len(getattr(array, what)) != len(array.shape):
                raise broken(f"an array of shape {short(array.shape)} in {what} of {short(getattr(array, what))}")
        if array.shards and any(s % c for s, c in zip(array.shards, array.chunks, strict=True)):
            raise broken(f"shards of {short(array.shards)} do not hold whole chunks of {short(array.chunks)}")
        if not 2 <= len(array.shape) <= 5:
            raise broken(f"an array of shape {short(array.shape)}, wanted 2 to 5 axes")
        array.require_bounded()
        return array


def _no_array(said: dict[str, Any]):
    raise broken(f"the array has zarr_format {short(said.get('zarr_format'))}, wanted 2 or 3")


def _lengths(value: Any, what: str) -> tuple[int, ...]:
    found = tuple(of_kind(n, int, f"{what} of the array holds") for n in of_kind(value, list, f"{what} of the array is"))
    if not all(1 <= n < 2**40 for n in found):
        raise broken(f"{what} of the array is {short(list(found))}")
    return found


def _separator(value: Any) -> str:
    if value not in (".", "/"):
        raise broken(f"numbers of chunks are separated by {short(value)}, wanted . or /")
    return value


def _array_2(said: dict[str, Any]) -> Array:
    """Zarr v2, https://zarr-specs.readthedocs.io/en/latest/v2/v2.0.html"""
    text, compressor = said.get("dtype"), said.get("compressor")
    if not isinstance(text, str) or not _TYPE.fullmatch(text):
        raise Refused("BAD_TYPE", f"an array of dtype {short(text)}, wanted numbers")
    if said.get("filters"):
        raise Refused("NO_DECODER", f"filters {json.dumps(said['filters'])[:80]} are not read")
    kind = of_kind(compressor, dict, "the compressor is").get("id") if compressor is not None else None
    if compressor is not None and kind not in _PACKED:
        raise Refused("NO_DECODER", f"compressor {short(kind)}, wanted one of {', '.join(_PACKED)} or none")
    if said.get("order", "C") not in ("C", "F"):
        raise broken(f"the array has order {short(said['order'])}")
    dtype, chunks = np.dtype(text), _lengths(said.get("chunks"), "chunks")
    metadata = {"zarr_format": 2, "chunks": list(chunks), "dtype": text, "compressor": compressor, "order": said.get("order", "C"),
                "filters": None, "fill_value": False if dtype.kind == "b" else 0, "dimension_separator": "."}  # fmt: skip
    key = "", _separator(said.get("dimension_separator", "."))
    return Array(_lengths(said.get("shape"), "shape"), chunks, dtype, _PACKED.get(kind, ""), False, metadata, key)


def _array_3(said: dict[str, Any]) -> Array:
    """Zarr v3 core and sharding, https://zarr-specs.readthedocs.io/en/latest/v3/core/index.html"""
    if said.get("node_type") != "array":
        raise broken("a Zarr group where an array is expected")
    if not isinstance(said.get("data_type"), str) or said["data_type"] not in _TYPES:
        raise Refused("BAD_TYPE", f"an array of data type {short(said.get('data_type'))}, wanted numbers")
    grid, keys = said.get("chunk_grid") or {}, said.get("chunk_key_encoding") or {"name": "default"}
    if grid.get("name") != "regular" or said.get("storage_transformers"):
        raise Refused("NO_DECODER", f"an array in chunks of kind {short(grid.get('name'))}, wanted regular ones")
    chunks = _lengths(grid["configuration"].get("chunk_shape"), "chunk_shape")
    default = {"default": "/", "v2": "."}.get(keys.get("name"))
    if default is None:
        raise Refused("NO_DECODER", f"chunks with keys of kind {short(keys.get('name'))}, wanted default or v2")
    separator = _separator((keys.get("configuration") or {}).get("separator", default))
    key = "c" + separator if keys["name"] == "default" else "", separator
    shards, index = (), (False, False)
    codecs = [of_kind(c, dict, "codecs hold") for c in of_kind(said.get("codecs"), list, "codecs are")]
    if [c.get("name") for c in codecs] == ["sharding_indexed"]:
        inner = codecs[0].get("configuration") or {}
        shards, chunks = chunks, _lengths(inner.get("chunk_shape"), "chunk_shape of shards")
        codecs = [of_kind(c, dict, "codecs hold") for c in of_kind(inner.get("codecs"), list, "codecs are")]
        of_index = [(c.get("name"), (c.get("configuration") or {}).get("endian")) for c in inner.get("index_codecs") or []]
        if of_index not in ([("bytes", "little")], [("bytes", "little"), ("crc32c", None)]):
            raise Refused("NO_DECODER", "shards whose index is packed in another way than little-endian numbers with a crc32c")
        index = inner.get("index_location", "end") == "start", len(of_index) == 2
    names = [c.get("name") for c in codecs]
    rest = names[names.index("bytes") + 1 :] if names.count("bytes") == 1 else [None]
    packed = "".join(_PACKED.get(n, "") for n in rest[:1] if n != "zlib")
    tail = rest[1:] if packed else rest
    if names[: len(names) - len(rest) - 1] not in ([], ["transpose"]) or tail not in ([], ["crc32c"]):
        listed = ", ".join(short(n) for n in names[:8])
        raise Refused(
            "NO_DECODER", f"codecs {listed}; read are transpose, bytes, one of blosc, zstd, gzip, crc32c, and shards of them"
        )
    dtype = np.dtype(said["data_type"])
    metadata = {"zarr_format": 3, "node_type": "array", "data_type": said["data_type"], "codecs": codecs,
                "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunks)}},
                "chunk_key_encoding": {"name": "v2", "configuration": {"separator": "."}},
                "fill_value": {"b": False, "f": 0.0}.get(dtype.kind, 0)}  # fmt: skip
    shape = _lengths(said.get("shape"), "shape")
    return Array(shape, chunks, dtype, packed, bool(tail), metadata, key, shards, index)


# files


class Store:
    """The files of a Zarr hierarchy: metadata and the bytes of planes, by paths below ``url``. A local link is not followed."""

    def __init__(self, url: str):
        self.url = storage.absolute(url)
        local = storage.local_path(url)
        self._real = local and os.path.realpath(local)
        self._arrays: dict[str, Array] = {}
        self._indexes: OrderedDict[str, np.ndarray | None] = OrderedDict()
        self._chunks: OrderedDict[str, bytes | None] = OrderedDict()

    def _require_no_link(self, paths: list[str]):
        for path in paths if self._real else ():
            if os.path.realpath(os.path.join(self._real, path)) != os.path.join(self._real, path):
                raise Refused("LINK", "a link inside a Zarr is not followed")

    def folder(self, path: str) -> list[tuple[str, bool]]:
        """As :func:`storage.folder`; raises ``LINK``, ``UNREADABLE``."""
        self._require_no_link([path] if path else [])
        try:
            return storage.folder(storage.join(self.url, path) if path else self.url)
        except (OSError, ValueError) as e:
            raise Refused("UNREADABLE", f"the folder cannot be listed: {type(e).__name__}") from None

    def fetch(self, paths: list[str], most: int) -> list[bytes | None]:
        """As :func:`storage.read_each`; raises ``LINK``, ``UNREADABLE``."""
        self._require_no_link(paths)
        try:
            return storage.read_each([storage.join(self.url, p) for p in paths], most)
        except (OSError, ValueError) as e:
            raise Refused("UNREADABLE", f"the file cannot be read: {type(e).__name__}") from None

    def array(self, path: str) -> Array | None:
        """The array at ``path``, None where there is none; raises as :func:`parse` does."""
        if path not in self._arrays:
            new, old = self.fetch([f"{path}/zarr.json", f"{path}/.zarray"], MOST_METADATA + 1)
            if new is None and old is None:
                return None
            array = parse(json_object(new, "zarr.json") if new is not None else json_object(old, ".zarray"))
            if len(self._arrays) > 1000:
                self._arrays.clear()
            self._arrays[path] = array
        return self._arrays[path]

    def plane(self, path: str, at: tuple[int, ...]) -> bytes:
        """The bytes of the plane at ``at`` along all axes but the last two.

        Raises ``UNREADABLE``, ``LINK``, ``MISSING_CHUNK``, ``TRUNCATED``, ``BOMB``, ``BROKEN_PICTURE``, and as :func:`parse` does.
        """
        array = self.array(path)
        if array is None or len(at) + 2 != len(array.shape) or any(n >= most for n, most in zip(at, array.shape, strict=False)):
            raise Refused("UNREADABLE", "the plane is not in the Zarr any more")
        lead = tuple(n // c for n, c in zip(at, array.chunks, strict=False))
        numbers = [(*lead, *place) for place in itertools.product(*map(range, array.grid))]
        chunks = self._stored(path, array, numbers)
        absent = sum(c is None for c in chunks)
        if absent:
            message = f"{absent} of the {len(chunks)} chunks of the plane are not there; Zarr would take them for the fill value"
            raise Refused("MISSING_CHUNK", f"{message}. If they are empty, have them written (write_empty_chunks)")
        for chunk in chunks:
            require_whole(chunk, array)
        within = [n % c for n, c in zip(at, array.chunks, strict=False)]
        shape = [*array.chunks[:-2], *array.shape[-2:]]
        head = {"array": array.metadata | {"shape": shape}, "at": within, "bytes": [len(c) for c in chunks]}
        text = json.dumps(head, separators=(",", ":"), sort_keys=True).encode()
        return b"".join([MAGIC, struct.pack(">I", len(text)), text, *chunks])

    def _stored(self, path: str, array: Array, numbers: list[tuple[int, ...]]) -> list[bytes | None]:
        """Chunks as they are stored, by their numbers; those of several planes are kept for the next one."""
        names = [f"{path}/{'.'.join(map(str, n))}" for n in numbers]
        lacking = [(name, n) for name, n in zip(names, numbers, strict=True) if name not in self._chunks]
        most = array.chunk_bytes + (array.chunk_bytes >> 3) + 65_536
        read = self._of_shards if array.shards else self._of_files
        fresh = dict(zip((name for name, _ in lacking), read(path, array, [n for _, n in lacking], most), strict=True))
        if any(c is not None and len(c) > most for c in fresh.values()):
            raise Refused("BOMB", f"a chunk of more than {most} bytes, which holds {array.chunk_bytes} when it is unpacked")
        chunks = [fresh[name] if name in fresh else self._chunks[name] for name in names]
        if max(array.chunks[:-2], default=1) > 1:
            self._chunks.update(fresh)
            size = sum(len(c or b"") for c in self._chunks.values())
            while size > KEPT or len(self._chunks) > MOST_CHUNKS:
                size -= len(self._chunks.popitem(last=False)[1] or b"")
        return chunks

    def _of_files(self, path: str, array: Array, numbers: list[tuple[int, ...]], most: int) -> list[bytes | None]:
        prefix, separator = array.key
        return self.fetch([f"{path}/{prefix}{separator.join(map(str, n))}" for n in numbers], most + 1)

    def _of_shards(self, path: str, array: Array, numbers: list[tuple[int, ...]], most: int) -> list[bytes | None]:
        """Chunks within shards: ranges of their bytes, as their indexes say (sharding codec 1.0 of Zarr v3)."""
        prefix, separator = array.key
        within = [s // c for s, c in zip(array.shards, array.chunks, strict=True)]
        ranges: list[tuple[str, int, int] | None] = []
        for number in numbers:
            outer, inner = zip(*(divmod(n, w) for n, w in zip(number, within, strict=True)), strict=True)
            key = f"{path}/{prefix}{separator.join(map(str, outer))}"
            index = self._index(key, array, math.prod(within))
            start, count = (int(n) for n in index[np.ravel_multi_index(inner, within)]) if index is not None else (_NOT_THERE,) * 2
            if start == count == _NOT_THERE:
                ranges.append(None)
                continue
            if count > most:
                raise Refused("BOMB", f"a chunk of {count} bytes in a shard, which holds {array.chunk_bytes} when it is unpacked")
            ranges.append((storage.join(self.url, key), start, start + count))
        try:
            data = iter(storage.read_ranges([r for r in ranges if r is not None]))
        except EOFError:
            raise Refused("TRUNCATED", "a shard ends before a chunk that its index names") from None
        except (OSError, ValueError, OverflowError) as e:
            raise Refused("UNREADABLE", f"the file cannot be read: {type(e).__name__}") from None
        return [None if r is None else next(data) for r in ranges]

    def _index(self, key: str, array: Array, count: int) -> np.ndarray | None:
        """(chunks, 2) start and bytes of the chunks of a shard, None when there is no such shard."""
        if key in self._indexes:
            return self._indexes[key]
        at_start, checksum = array.index
        size = 16 * count + 4 * checksum
        if size > MOST_METADATA:
            raise Refused("TOO_LARGE", f"a shard of {count} chunks")
        self._require_no_link([key])
        try:
            with storage.open(storage.join(self.url, key)) as stream:
                length = stream.seek(0, os.SEEK_END)
                stream.seek(0 if at_start else max(length - size, 0))
                data = stream.read(size)
        except (FileNotFoundError, NotADirectoryError):
            data = None
        except (OSError, ValueError) as e:
            raise Refused("UNREADABLE", f"the file cannot be read: {type(e).__name__}") from None
        if data is not None and len(data) < size:
            raise Refused("TRUNCATED", f"a shard of {length} bytes, its index alone has {size}")
        if data is not None and checksum:
            import google_crc32c

            if google_crc32c.value(data[:-4]) != int.from_bytes(data[-4:], "little"):
                raise Refused("TRUNCATED", "the index of a shard does not have its checksum: the shard was cut or changed")
        index = None
        if data is not None:
            index = np.frombuffer(data, "<u8", 2 * count).reshape(count, 2)
            starts, counts = index[(index != _NOT_THERE).any(1)].T
            if (counts > length).any() or (starts > length - counts).any():
                raise Refused("TRUNCATED", f"a shard of {length} bytes, its index names chunks beyond")
        self._indexes[key] = index
        while len(self._indexes) > 64:
            self._indexes.popitem(last=False)
        return index


# the bytes of a plane


def require_whole(chunk: bytes, array: Array):
    """Raise ``TRUNCATED``, ``BOMB`` or ``BROKEN_PICTURE`` for a chunk that says itself that it is not what the array is made of."""
    wanted = array.chunk_bytes
    chunk = chunk[:-4] if array.checksum else chunk
    exact = True
    if not chunk:
        raise Refused("TRUNCATED", "a chunk has no bytes")
    if array.packed == "blosc":
        if len(chunk) < 16 or (count := int.from_bytes(chunk[12:16], "little")) > len(chunk):
            raise Refused("TRUNCATED", f"a chunk has {len(chunk)} bytes" + (f" of {count}" if len(chunk) >= 16 else ""))
        found = int.from_bytes(chunk[4:8], "little")
    elif array.packed == "zstd":
        found, exact = _zstd_size(chunk)
    elif array.packed:
        return  # deflate does not say
    else:
        found = len(chunk)
        if found < wanted:
            raise Refused("TRUNCATED", f"a chunk has {found} of {wanted} bytes")
    if found > (wanted if exact else 4 * wanted + (1 << 20)):
        raise Refused("BOMB", f"a chunk of {wanted} bytes unpacks to {found}")
    if exact and found < wanted:
        raise Refused("BROKEN_PICTURE", f"a chunk unpacks to {found} bytes, the array has chunks of {wanted}")


def _zstd_size(data: bytes) -> tuple[int, bool]:
    """Bytes that frames of RFC 8878 unpack to, and whether they say so; else what their blocks may unpack to at most."""
    at, total, exact = 0, 0, True
    while at + 6 <= len(data):
        magic = int.from_bytes(data[at : at + 4], "little")
        if magic & 0xFFFFFFF0 == 0x184D2A50:  # to be skipped
            at += 8 + int.from_bytes(data[at + 4 : at + 8], "little")
            continue
        if magic != 0xFD2FB528:
            raise Refused("BROKEN_PICTURE", "a chunk is not what its compressor writes")
        said = data[at + 4]
        single, length = said >> 5 & 1, (said >> 5 & 1, 2, 4, 8)[said >> 6]
        at += 5 + (1 - single) + (0, 1, 2, 4)[said & 3]
        claimed = int.from_bytes(data[at : at + length], "little") + (256 if length == 2 else 0)
        at, most, last = at + length, 0, False
        while not last and at + 3 <= len(data):
            block = int.from_bytes(data[at : at + 3], "little")
            last, kind, size = bool(block & 1), block >> 1 & 3, block >> 3
            at += 3 + (1 if kind == 1 else size)
            most += size if kind < 2 else 1 << 17
        at += 4 * (said >> 2 & 1)
        if not last or at > len(data):
            raise Refused("TRUNCATED", f"a chunk of {len(data)} bytes ends before its data do")
        total, exact = total + (claimed if length else most), exact and bool(length)
    if at < len(data) or not data:
        raise Refused("TRUNCATED", f"a chunk of {len(data)} bytes ends before its data do")
    return total, exact


def _head(stream: BinaryIO, size: int) -> tuple[Array, tuple[int, ...], list[int], int]:
    """(array of the one chunk deep that the plane is in, place in it, bytes of the chunks, where the first one starts)"""
    start = stream.read(len(MAGIC) + 4)
    length = int.from_bytes(start[len(MAGIC) :], "big")
    if not start.startswith(MAGIC) or length > MOST_METADATA:
        raise Refused("BROKEN_PICTURE", "not a plane of a Zarr")
    with understood("the head of the plane"):
        said = json_object(stream.read(length), "the head of the plane")
        array, counts = parse(said["array"]), list(_lengths(said["bytes"], "bytes"))
        at = tuple(of_kind(n, int, "at holds") for n in said["at"])
        lead = list(zip(at, array.shape[:-2], array.chunks[:-2], strict=True))
    if array.shards or any(n != c or not 0 <= a < c for a, n, c in lead) or len(counts) != math.prod(array.grid):
        raise Refused("BROKEN_PICTURE", "the head of the plane contradicts itself")
    first = len(start) + length
    if first + sum(counts) != size:
        raise Refused("TRUNCATED", f"a plane of {size} bytes, its head says {first + sum(counts)}")
    return array, at, counts, first


def read_header(stream: BinaryIO, size: int) -> tuple[tuple[int, int, int, int], str]:
    """Shape (1, I = x, J = y, 1) and type with packing of a plane from its bytes; raises :class:`Refused`."""
    array, *_ = _head(stream, size)
    rows, columns = array.shape[-2:]
    check_size((columns, rows), array.dtype.itemsize, size, True)
    return (1, columns, rows, 1), f"{array.dtype.name} {array.packed}".strip()


def read_array(stream: BinaryIO, size: int) -> np.ndarray:
    """(rows, columns) of a plane from its bytes. Raises ``NOT_INSTALLED``, ``BOMB``, what :func:`read_header` does, and whatever
    the decoder does."""
    if not is_installed():
        raise Refused("NOT_INSTALLED", NOT_INSTALLED)
    array, at, counts, first = _head(stream, size)
    stream.seek(first)
    from zarr import open_array
    from zarr.buffer import cpu
    from zarr.storage import MemoryStore

    name = "zarr.json" if array.metadata["zarr_format"] == 3 else ".zarray"
    stored = {name: json.dumps(array.metadata | {"shape": list(array.shape)}).encode()}
    for place, count in zip(itertools.product(*map(range, array.grid)), counts, strict=True):
        chunk = stream.read(count)
        require_whole(chunk, array)
        if array.packed == "gzip":
            _require_bounded(chunk[:-4] if array.checksum else chunk, array.chunk_bytes)
        stored[".".join(map(str, (*(0 for _ in at), *place)))] = chunk
    store = MemoryStore({k: cpu.Buffer.from_bytes(v) for k, v in stored.items()}, read_only=True)
    return np.asarray(open_array(store=store, mode="r", zarr_format=array.metadata["zarr_format"])[at])


def _require_bounded(packed: bytes, wanted: int):
    """Raise ``BOMB`` for deflated bytes that unpack to more than ``wanted``."""
    size = 0
    while packed and size <= wanted:
        unpack = zlib.decompressobj(47)  # with the head of zlib or of gzip; several members may follow each other
        while packed and size <= wanted:
            size += len(unpack.decompress(packed, 1 << 20))
            packed = unpack.unconsumed_tail
        packed = unpack.unused_data
    if size > wanted:
        raise Refused("BOMB", f"a chunk of {wanted} bytes unpacks to more")
