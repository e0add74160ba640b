"""What the catalog knew of every file after a run: on storage, in the order of the files' URIs, read as a stream.

It is made from the tables and holds nothing that they do not; without one it is made again. As storage is walked in the same
order, what is new, changed and gone is seen by going through both side by side, whatever their length.
"""

import heapq
import itertools
import posixpath
import uuid
from collections.abc import Iterable, Iterator
from operator import itemgetter
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from pyspark import TaskContext
from pyspark.sql import DataFrame
from pyspark.sql.pandas.types import from_arrow_schema

from sparkmed import storage, tables

_CONTENTS = "contents.json"
"""Written last: a folder without it is no manifest."""
_BATCH = 8192
_PART = pa.schema([("name", pa.string()), ("rows", pa.int64()), ("identities", pa.list_(pa.string()))])


class Known(NamedTuple):
    """A file by its URI: the last finished run that read it, its size in bytes and time then, what it gave, whose key."""

    container: str
    run: int
    file_size: int
    file_mtime_ns: int
    refused: int
    members: int
    gone: bool
    identity: str | None


class Manifest:
    """The manifest after one run, if there is one: ``rows`` in it, and the ``identities`` under which they were read."""

    def __init__(self, lake: str, run: int):
        self.url = storage.join(_folder(lake), str(run))
        described = storage.join(self.url, _CONTENTS)
        self.exists = storage.exists(described)
        contents = storage.read_json(described) if self.exists else {"parts": [], "rows": 0, "identities": []}
        self.parts, self.rows, self.identities = contents["parts"], contents["rows"], set(contents["identities"])

    def __iter__(self) -> Iterator[Known]:
        """All rows by rising URI. Raises :class:`tables.Conflict` when a later run has removed them."""
        for name in self.parts:
            try:
                file = storage.open(storage.join(self.url, name))
            except FileNotFoundError:
                raise tables.Conflict(f"{self.url}: a later run has put another in its place") from None
            with file:
                for batch in pq.ParquetFile(file).iter_batches(_BATCH, columns=list(Known._fields)):
                    yield from map(Known._make, zip(*(c.to_pylist() for c in batch.columns), strict=True))


def write(files: DataFrame, lake: str, run: int):
    """Write the manifest after ``run``; ``files`` has the columns of :class:`Known`. Those of earlier runs go."""
    url = storage.join(_folder(lake), str(run))

    def part(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        name, rows, identities = f"{TaskContext.get().partitionId():06d}-{uuid.uuid4().hex}.parquet", 0, set()
        with storage.writing(storage.join(url, name)) as file:
            out = None
            for batch in batches:
                out = out or pq.ParquetWriter(file, batch.schema, compression="zstd")
                out.write_batch(batch)
                rows += batch.num_rows
                identities.update(batch["identity"].unique().to_pylist())
            if out:
                out.close()
        found = {"name": [name], "rows": [rows], "identities": [sorted(identities, key=str)]}
        yield pa.RecordBatch.from_pydict(found, schema=_PART)

    ordered = files.select(*Known._fields).orderBy("container")
    written = ordered.mapInArrow(part, from_arrow_schema(_PART)).collect()
    parts = sorted(p.name for p in written if p.rows)  # a partition's number tells its place in the order
    identities = sorted({i for p in written for i in p.identities}, key=str)
    contents = {"parts": parts, "rows": sum(p.rows for p in written), "identities": identities}
    storage.write_json(storage.join(url, _CONTENTS), contents)
    for earlier in _earlier(lake, run):
        storage.remove(earlier, recursive=True)


def compare(found: Iterable[storage.File], known: Iterable[Known]) -> Iterator[tuple[storage.File | None, Known | None]]:
    """Each file that is there or is known, both sides by rising URI as :func:`storage.spelt` spells it."""
    merged = heapq.merge(_rising(found), ((row.container, row) for row in known), key=itemgetter(0))
    for _, same in itertools.groupby(merged, itemgetter(0)):
        file = row = None
        for _, value in same:  # of two names that are spelt alike the last one counts
            if isinstance(value, Known):
                row = value
            else:
                file = value
        yield file, row


def _rising(found: Iterable[storage.File]) -> Iterator[tuple[str, storage.File]]:
    last = ""
    for file in found:
        uri = storage.spelt(file.uri)
        if uri < last:  # else what is there would be taken for gone
            raise RuntimeError(f"{uri} was listed behind {last}: not in the order of storage.walk")
        last = uri
        yield uri, file


def _folder(lake: str) -> str:
    return storage.join(tables.catalog(lake).url, "_files")


def _earlier(lake: str, run: int) -> list[str]:
    """URLs of the manifests, whole or not, of runs before ``run``."""
    fs, path = storage.filesystem(_folder(lake))
    names = [posixpath.basename(found.rstrip("/")) for found in fs.ls(path, detail=False)]
    return [storage.join(_folder(lake), name) for name in names if name.isdigit() and int(name) < run]
