"""The patches of a dataset on disk: which there are, and how a row group becomes arrays. pyarrow only; nothing is unpickled."""

import contextlib
import hashlib
import io
import math
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads

from sparkmed import storage
from sparkmed.cache import FileCache, version
from sparkmed.dataset import DESCRIPTION, Field
from sparkmed.rejection import InputError

_PARQUET = pads.ParquetFileFormat()
CODECS = ("ndarray", "compressed_ndarray", "image", "scalar")
"""How a value is stored: as :func:`numpy.save` writes it (Petastorm's NdarrayCodec), as :func:`numpy.savez_compressed` does
(CompressedNdarrayCodec), as PNG or JPEG (CompressedImageCodec), or as it is (ScalarCodec)."""


class DatasetError(InputError):
    """The dataset on disk is not what its index says; the message names the file."""


@dataclass(frozen=True)
class Block:
    """A row group of a file: the unit of reading. ``bytes`` is its size in memory."""

    path: str
    row_group: int
    rows: int
    bytes: int


class PatchDataset:
    """The row groups of a dataset, or of one split of it, in the order of their paths.

    Row groups of a remote dataset are read from copies of its files in ``cache`` (None: ``FileCache()``), as many as fit in there;
    the rest, and all footers, are read where they are. A local dataset is not copied.

    Raises :class:`DatasetError` for a dataset without ``_dataset.json`` (unfinished, or somebody else's), a split that is not
    there, and files whose rows do not add up to what ``_dataset.json`` says.
    """

    def __init__(self, url: str, split: str | None = None, cache: FileCache | None = None, schema: dict | None = None):
        self.url = storage.absolute(url)
        self.split = split
        self.meta = _read_meta(self.url) if schema is None else _checked(schema, "schema")
        self.fields = tuple(
            Field(f["name"], f["dtype"], tuple(f.get("shape", ())), f.get("codec", "scalar")) for f in self.meta["fields"]
        )
        if all(f.name != "patch_id" for f in self.fields):
            self.fields += (Field("patch_id", "str"),)
        self._columns = {f["name"]: f.get("column", f["name"]) for f in self.meta["fields"]}
        image = next(f for f in self.meta["fields"] if f["name"] == "image")
        self.scaling = float(image.get("scale", 1.0)), float(image.get("offset", 0.0))
        """Factor and summand that make values of what field ``image`` stores."""
        self._sizes: dict[str, int] = {}
        self._cache = FileCache() if cache is None else cache
        self._versions: dict[str, str] = {}
        """Of the remote files that are read from copies."""
        files = self._files()
        with ThreadPoolExecutor(8) as pool:
            self._groups = dict(zip(files, pool.map(self._footer, files), strict=True))
            copied = self._copied(files)
            self._versions = dict(zip(copied, pool.map(self._version, copied), strict=True))
        row = sum(math.prod(f.shape) * np.dtype(f.dtype).itemsize for f in self.fields if f.codec != "scalar")
        groups = [(p, i, n, max(b, n * row)) for p, found in self._groups.items() for i, (n, b) in enumerate(found)]
        self.blocks = tuple(Block(*g) for g in groups if g[2])
        self.rows = sum(b.rows for b in self.blocks)
        self._check_counts()

    @property
    def digest(self) -> str:
        """Changes when a file, a row group or the schema does."""
        return hashlib.sha256(repr((self.blocks, self.fields, self.scaling, self.meta.get("digest"))).encode()).hexdigest()

    def field(self, name: str) -> Field:
        for field in self.fields:
            if field.name == name:
                return field
        raise DatasetError(f"dataset {self.url}: no field {name}, it has {', '.join(f.name for f in self.fields)}")

    def _files(self) -> list[str]:
        files = []
        try:
            found = list(storage.walk(self.url))
        except FileNotFoundError:
            raise DatasetError(f"dataset {self.url}: there is no such folder") from None
        if [f.uri for f in found] == [self.url]:
            raise DatasetError(f"dataset {self.url} is a file, wanted the folder that it is in")
        for file in found:
            parts = file.path.split("/")
            if not file.path.endswith(".parquet") or any(p.startswith(("_", ".")) for p in parts):
                continue
            if self.split is None or f"split={self.split}" in parts:
                files.append(file.path)
                self._sizes[file.path] = file.size
        listed = self.meta.get("files")
        if listed is not None:
            wanted = {p for p in listed if self.split is None or f"split={self.split}" in p.split("/")}
            for path in sorted(wanted - set(files)):
                raise DatasetError(f"dataset {self.url}: {path} is missing")
            for path in sorted(set(files) - wanted):
                raise DatasetError(
                    f"dataset {self.url}: {path} is not in {DESCRIPTION}: it was added after the dataset was finished"
                )
        if not files:
            of_split = f" of split {self.split}; splits: {', '.join(self.meta.get('counts', {})) or 'none'}" if self.split else ""
            raise DatasetError(f"dataset {self.url}: no Parquet file{of_split}")
        return files

    def _check_counts(self):
        counts = self.meta.get("counts")
        if counts is None:
            return
        wanted = counts.get(self.split, 0) if self.split is not None else sum(counts.values())
        if wanted != self.rows:
            found = ", ".join(f"{path} {sum(n for n, _ in groups)}" for path, groups in list(self._groups.items())[:20])
            raise DatasetError(f"dataset {self.url}: {self.rows} patches, {DESCRIPTION} says {wanted}; rows by file: {found}")

    @contextlib.contextmanager
    def _open(self, path: str, cached: bool = True) -> Iterator[pads.ParquetFileFragment]:
        url = storage.join(self.url, path)
        local, copied = storage.local_path(url), self._versions.get(path) if cached else None
        if local:
            source = pa.OSFile(str(local), memory_pool=_memory_pool())
        else:
            source = self._cache.open(url, self._sizes[path], copied) if copied else storage.open(url)
        with source:
            yield _PARQUET.make_fragment(source)

    def _copied(self, files: list[str]) -> list[str]:
        """The remote files that fit in the cache together: to swap whole files in and out for a row group each would be slower."""
        if storage.local_path(self.url):
            return []
        room, copied = self._cache.limit_bytes, []
        for path in files:
            if self._sizes[path] <= room:
                room -= self._sizes[path]
                copied.append(path)
        return copied

    def _version(self, path: str) -> str:
        try:
            return version(storage.join(self.url, path))
        except OSError as e:
            raise DatasetError(f"dataset {self.url}: {path}: {_line(e)}") from None

    def _footer(self, path: str) -> list[tuple[int, int]]:
        """(rows, bytes before compression) of each row group."""
        try:
            with self._open(path) as file:
                return _groups(file)
        except (OSError, pa.ArrowException) as e:
            size = self._sizes[path]
            raise DatasetError(f"dataset {self.url}: {path} ({size} bytes) is not a readable Parquet file: {_line(e)}") from None

    def read(self, block: Block) -> dict[str, "Payloads | np.ndarray | list[str]"]:
        """The columns of a row group. Raises :class:`DatasetError` when the file is gone, damaged, or not the one indexed."""
        columns, where = list(self._columns.values()), f"dataset {self.url}: {block.path}, row group {block.row_group}"
        try:
            with self._open(block.path) as file:
                groups = _groups(file)
                if groups != self._groups[block.path]:
                    raise DatasetError(
                        f"dataset {self.url}: {block.path} changed while it was being read: it had row groups of "
                        f"{[n for n, _ in self._groups[block.path]]} rows, now {[n for n, _ in groups]}"
                    )
                missing = sorted(set(columns) - set(file.physical_schema.names))
                if missing:
                    raise DatasetError(f"dataset {self.url}: {block.path} has no column {', '.join(missing)}")
                group = file.subset(row_group_ids=[block.row_group])
                table = group.to_table(columns=columns, use_threads=False, memory_pool=_memory_pool())
        except (OSError, pa.ArrowException) as e:
            raise DatasetError(f"{where}: {_line(e)}") from None
        if table.num_rows != block.rows:
            raise DatasetError(f"{where}: {table.num_rows} rows, wanted {block.rows}")
        try:
            place = f"{block.path}/{block.row_group}/"
            named = {"patch_id": [f"{place}{r}" for r in range(block.rows)]} if "patch_id" not in self._columns else {}
            return {f.name: _decode(table[self._columns[f.name]], f) for f in self.fields if f.name in self._columns} | named
        except (ValueError, TypeError, SyntaxError, OSError, EOFError, zlib.error, pa.ArrowException) as e:
            raise DatasetError(f"{where}: {_line(e)}") from None

    def subjects(self) -> set[str]:
        """Of all patches; none in a dataset without them. Reads nothing else, and remote files where they are."""
        column, found = self._columns.get("subject"), set()
        for path in dict.fromkeys(b.path for b in self.blocks) if column else ():
            try:
                with self._open(path, cached=False) as file:
                    found.update(pc.unique(file.to_table(columns=[column])[column]).to_pylist())
            except (OSError, pa.ArrowException) as e:
                raise DatasetError(f"dataset {self.url}: {path}: {_line(e)}") from None
        return found


def _memory_pool() -> pa.MemoryPool:
    """mimalloc where Arrow has it: row groups come and go, and jemalloc gives their pages back each time (1/3 of the speed)."""
    return pa.mimalloc_memory_pool() if "mimalloc" in pa.supported_memory_backends() else pa.default_memory_pool()


def _groups(file: pads.ParquetFileFragment) -> list[tuple[int, int]]:
    """(rows, bytes before compression) of each row group."""
    groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
    return [(g.num_rows, g.total_byte_size) for g in groups]


@dataclass(frozen=True, eq=False)
class Payloads:
    """The arrays of a column: row r of ``matrix`` (rows, bytes) uint8 is array r in C order; a view of what was read."""

    matrix: np.ndarray


def _read_meta(url: str) -> dict:
    try:
        meta = storage.read_json(storage.join(url, DESCRIPTION))
    except FileNotFoundError:
        raise DatasetError(
            f"dataset {url}: no {DESCRIPTION}, so it is unfinished or not of sparkmed; to vouch for it, give "
            'PatchLoader schema={"fields": [{"name": "image", "column": ..., "dtype": ..., "shape": ..., "codec": ...}, ...]}'
        ) from None
    except ValueError as e:
        raise DatasetError(f"dataset {url}: {DESCRIPTION} is not JSON: {_line(e)}") from None
    found = meta.get("format_version") if isinstance(meta, dict) else None
    if found != 1:
        raise DatasetError(f"dataset {url}: {DESCRIPTION} has format_version {found!r}, wanted 1")
    return _checked(meta, f"dataset {url}: {DESCRIPTION}")


def _checked(meta: dict, where: str) -> dict:
    """``meta`` when its fields make sense; a field ``patch_id`` need not be there: patches are then named after their place."""
    fields = meta.get("fields") if isinstance(meta, dict) else None
    if not isinstance(fields, list) or not all(isinstance(f, dict) and {"name", "dtype"} <= set(f) for f in fields):
        raise DatasetError(f"{where} wants a list of fields, each with name and dtype; got {fields}")
    names = [f["name"] for f in fields]
    if "image" not in names or len(set(names)) < len(names) or {"weight", "total"} & set(names):
        raise DatasetError(
            f"{where} wants fields of different names, image among them, not weight or total; got {', '.join(names)}"
        )
    for f in fields:
        problem = _problem(f)
        if problem:
            raise DatasetError(f"{where}: field {f['name']} {problem}")
    return meta


def _problem(field: dict) -> str | None:
    unknown = set(field) - {"name", "column", "dtype", "shape", "codec", "scale", "offset"}
    if unknown:
        return f"has keys {', '.join(sorted(unknown))}, which mean nothing"
    codec, shape = field.get("codec", "scalar"), field.get("shape", ())
    if codec not in CODECS:
        return f"has codec {codec!r}; known are {', '.join(CODECS)}"
    if codec == "scalar" and field["name"] == "image":
        return f"has codec scalar, wanted one of {', '.join(CODECS[:-1])}"
    if not isinstance(shape, list | tuple) or not all(isinstance(n, int) and n > 0 for n in shape):
        return f"has shape {shape}, wanted whole numbers above 0: patches of one dataset have one shape"
    if field["dtype"] == "str":
        return None if codec == "scalar" else "is text, which only scalars are"
    try:
        dtype = np.dtype(field["dtype"])
    except TypeError:
        return f"has dtype {field['dtype']!r}, which numpy does not know"
    if field["name"] == "patch_id":
        return "wants dtype str"
    return None if dtype.kind in "biuf" and dtype.isnative else f"has dtype {dtype}, wanted whole or real numbers in native order"


def _decode(column: pa.ChunkedArray, field: Field) -> Payloads | np.ndarray | list[str]:
    if column.null_count:
        raise ValueError(f"field {field.name} has {column.null_count} empty values")
    if field.codec == "ndarray":
        parts = [_payloads(chunk, field) for chunk in column.chunks if len(chunk)]
        return Payloads(parts[0] if len(parts) == 1 else np.concatenate(parts))
    if field.codec != "scalar":
        decode = _image if field.codec == "image" else _unpacked
        return Payloads(np.stack([_bytes_of(decode(p), field) for p in column.to_pylist()]))
    if field.dtype == "str":
        if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
            raise ValueError(f"field {field.name} is a column of {column.type}, wanted text")
        return column.to_pylist()
    return column.to_numpy().astype(field.dtype, casting="safe", copy=False)


def _payloads(chunk: pa.Array, field: Field) -> np.ndarray:
    """The bytes behind the header of each .npy payload, (rows, bytes) uint8, as a view where all headers are equal."""
    wide = pa.types.is_large_binary(chunk.type)
    if not (wide or pa.types.is_binary(chunk.type)):
        raise ValueError(f"field {field.name} is a column of {chunk.type}, wanted binary")
    _, offsets, data = chunk.buffers()
    offsets = np.frombuffer(offsets, np.int64 if wide else np.int32)[chunk.offset : chunk.offset + len(chunk) + 1]
    data = np.frombuffer(data, np.uint8)
    lengths = np.diff(offsets)
    first = data[offsets[0] : offsets[1]]
    header = _header(first, field)
    if header is not None and (lengths == lengths[0]).all():
        matrix = data[offsets[0] : offsets[-1]].reshape(len(chunk), lengths[0])
        if (matrix[:, :header] == first[:header]).all():
            return matrix[:, header:]
    return np.stack([_array(data[a:b], field) for a, b in zip(offsets[:-1], offsets[1:], strict=True)])


def _header(payload: np.ndarray, field: Field) -> int | None:
    """Length of the .npy header of a C-order payload that is exactly the field's array; None for Fortran order."""
    stream = io.BytesIO(payload[:4096].tobytes())
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(stream)
    if shape != field.shape or dtype != np.dtype(field.dtype):
        raise ValueError(f"field {field.name} holds an array {shape} of {dtype}, wanted {field.shape} of {field.dtype}")
    wanted = stream.tell() + dtype.itemsize * int(np.prod(shape))
    if len(payload) != wanted:
        raise ValueError(f"field {field.name} holds {len(payload)} bytes, wanted {wanted}")
    return None if fortran and len(shape) > 1 else stream.tell()


def _array(payload: np.ndarray, field: Field) -> np.ndarray:
    _header(payload, field)
    return _bytes_of(np.load(io.BytesIO(payload.tobytes()), allow_pickle=False), field)


def _unpacked(payload: bytes) -> np.ndarray:
    try:
        with np.load(io.BytesIO(payload), allow_pickle=False) as arrays:
            return arrays["arr"]  # Petastorm's name for it
    except (zipfile.BadZipFile, KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"not a compressed array of Petastorm: {e}") from None


def _image(payload: bytes) -> np.ndarray:
    with PIL.Image.open(io.BytesIO(payload)) as image:
        return np.asarray(image)


def _bytes_of(array: np.ndarray, field: Field) -> np.ndarray:
    if array.shape != field.shape or array.dtype != np.dtype(field.dtype):
        raise ValueError(f"field {field.name} holds an array {array.shape} of {array.dtype}, wanted {field.shape} of {field.dtype}")
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def blocks_bytes(blocks: Sequence[Block]) -> int:
    """Size of ``blocks`` before compression."""
    return sum(b.bytes for b in blocks)
