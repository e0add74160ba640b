"""Delta tables by delta-rs: their schemas, files that a task writes, and commits that only one of two rivals wins.

A task writes a Parquet file into the folder of the table and returns a :class:`DataFile`; nobody sees it. The driver commits the
returned files in one step. A file of a task that was killed, retried or run twice is never committed.
"""

import datetime
import io
import json
import logging
import re
import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset
import pyarrow.parquet as pq
from deltalake import CommitProperties, DeltaTable, Transaction
from deltalake import Schema as DeltaSchema
from deltalake.exceptions import CommitFailedError, TableNotFoundError
from deltalake.transaction import AddAction, RemoveAction

from sparkmed import storage
from sparkmed.rejection import InputError

_MISREAD = re.compile(r"\\|%[0-9A-Fa-f]{2}")  # delta-kernel decodes a local path twice, and takes a backslash for a slash
SMALL, MANY = 8 << 20, 64
"""Bytes below which a file is small, and how many small files are many."""
log = logging.getLogger(__name__)
_TIME = pa.timestamp("us", tz="UTC")
_FILE = [
    ("uri", pa.string()),
    ("path", pa.string()),
    ("container", pa.string()),
    ("file_size", pa.int64()),
    ("file_mtime_ns", pa.int64()),
]
_LINEAGE = [("config_digest", pa.string()), ("code_version", pa.string()), ("run", pa.int64())]

CATALOG = pa.schema(
    [
        *_FILE,
        ("bytes", pa.int64()),
        ("sha256", pa.string()),
        ("format", pa.string()),  # dicom, nifti, raster; "gone" marks a file that is no longer there
        ("kind", pa.string()),
        ("modality", pa.string()),
        ("subject", pa.string()),  # pseudonym of the patient in the header; null without one
        ("series_uid", pa.string()),
        ("sop_uid", pa.string()),
        ("sop_class", pa.string()),
        ("transfer_syntax", pa.string()),
        ("shape", pa.list_(pa.int64())),
        ("affine", pa.list_(pa.float64())),
        ("header", pa.string()),
        ("identity", pa.string()),  # of who read the file: number of the reader, fingerprint of the key that made ``subject``
        ("seen_at", _TIME),  # when the file was read, as it is now
        *_LINEAGE,
    ]
)
QUARANTINE = pa.schema(
    [
        *_FILE,
        ("stage", pa.string()),
        ("reason", pa.string()),
        ("message", pa.string()),
        ("key", pa.string()),  # what was refused: a prediction (score), a volume of a dataset (patches)
        ("attempt", pa.int64()),  # the how-manieth of the prediction failed; 0: it was made, but without a SEG
        ("refused_at", _TIME),
        ("identity", pa.string()),  # as in the catalog; null in other stages
        *_LINEAGE,
    ]
)
VOLUMES = pa.schema(
    [
        ("uid", pa.string()),  # digest of the content: ordered sources and affine
        ("subject", pa.string()),
        ("split", pa.string()),  # train, val, test; null without a label
        ("format", pa.string()),
        ("modality", pa.string()),
        ("series_uid", pa.string()),
        ("sources", pa.list_(pa.string())),
        ("source_paths", pa.list_(pa.string())),
        ("source_sha256", pa.list_(pa.string())),
        ("shape", pa.list_(pa.int64())),
        ("spacing", pa.list_(pa.float64())),
        ("affine", pa.list_(pa.float64())),
        ("header", pa.string()),
        ("label", pa.string()),  # JSON of the label image's VolumeHeader (segmentation)
        ("label_uid", pa.string()),
        ("label_counts", pa.list_(pa.int64())),  # voxels per class
        ("target", pa.int64()),  # class index (classification)
        ("inputs", pa.string()),  # digest of what this table was made from
        *_LINEAGE,
    ]
)
SEEN = pa.schema(
    [
        ("uid", pa.string()),
        ("first_seen", _TIME),
        ("sources", pa.list_(pa.string())),
        ("source_paths", pa.list_(pa.string())),
        ("source_sha256", pa.list_(pa.string())),
    ]
)
PREDICTIONS = pa.schema(
    [
        ("key", pa.string()),  # digest of (volume, model_digest, config_digest): each key once
        ("volume", pa.string()),
        ("subject", pa.string()),
        ("split", pa.string()),
        ("model_name", pa.string()),
        ("model_version", pa.string()),
        ("model_digest", pa.string()),
        ("model_run", pa.string()),  # MLflow's
        ("dataset_digest", pa.string()),  # of what the model was trained on
        ("predicted", pa.string()),  # class name (classification)
        ("probability", pa.list_(pa.float64())),  # per class: of the image, or mean over its voxels where the class was predicted
        ("ml", pa.list_(pa.float64())),  # per class (segmentation)
        ("mask", pa.string()),  # path of the NIfTI below the lake (segmentation)
        ("seg", pa.string()),  # name of the DICOM SEG in score.seg_folder: a hash
        ("target", pa.int64()),
        (
            "score",
            pa.list_(pa.float64()),
        ),  # against a label where there is one: Dice per class (null: absent in both), or correctness
        ("quantiles", pa.list_(pa.float64())),  # of the image's values: intensity.QUANTILES, channel by channel
        ("features", pa.list_(pa.float32())),  # of the image, before the last layer (classification, where score.features)
        ("cells", pa.int64()),  # of the field that the prediction stands on (a model of single cells, no ensemble)
        ("cell_table", pa.string()),  # path of the Parquet below the lake with what is said of each of them: scoring.cell_table
        ("reliability", pa.list_(pa.float64())),  # against a label: metrics.reliability, of voxels or of the image
        ("seconds", pa.float64()),
        ("device", pa.string()),
        ("scored_at", _TIME),
        ("batch", pa.string()),  # the run that scored it, by its start, and which of its commits
        *_LINEAGE,
    ]
)
PROMOTIONS = pa.schema(
    [
        ("model_name", pa.string()),
        ("action", pa.string()),  # promoted, kept, rolled back
        ("challenger", pa.string()),
        ("champion", pa.string()),
        ("reason", pa.string()),
        ("numbers", pa.string()),  # JSON
        ("decided_at", _TIME),
        *_LINEAGE,
    ]
)
FINGERPRINTS = pa.schema(
    [
        ("key", pa.string()),  # digest of (set, source, figure): each key once
        ("set", pa.string()),  # digest of (model, grouping): the rows of one fingerprint
        ("model_name", pa.string()),
        ("model_version", pa.string()),
        ("model_digest", pa.string()),
        ("test", pa.string()),  # digest of the test split
        ("source", pa.string()),  # such as modality=CT
        ("figure", pa.string()),
        ("subjects", pa.int64()),
        ("values", pa.list_(pa.float64())),  # one per subject, in order of size; of "quarantined": how many, of how many
        ("edges", pa.list_(pa.float64())),  # of bins
        ("made_at", _TIME),
        *_LINEAGE,
    ]
)
WATCH = pa.schema(
    [
        ("model_name", pa.string()),
        ("model_version", pa.string()),
        ("model_digest", pa.string()),
        ("check", pa.string()),  # drift, quarantine, service
        ("source", pa.string()),
        ("figure", pa.string()),
        ("reference", pa.int64()),  # subjects, or volumes (quarantine), that the champion was judged on
        ("current", pa.int64()),  # new ones
        ("before", pa.float64()),  # the figure then: a median, a share
        ("value", pa.float64()),  # the figure now
        ("psi", pa.float64()),
        ("chance", pa.float64()),  # what the index may be by chance
        ("ks", pa.float64()),
        ("p", pa.float64()),
        ("adjusted", pa.float64()),  # p after Holm
        ("verdict", pa.string()),  # fine, few, drift, unseen, backlog, quarantine
        ("inputs", pa.string()),  # digest of what was compared: the same is not written again
        ("watched_at", _TIME),
        *_LINEAGE,
    ]
)
_PLACE = [("plate", pa.string()), ("well", pa.string()), ("row", pa.int64()), ("column", pa.int64())]
_TREATMENT = [
    ("compound", pa.string()),
    ("concentration", pa.float64()),
    ("unit", pa.string()),
    ("control", pa.string()),  # negative, positive, empty; null for a treated well
    ("moa", pa.string()),
    ("cell_line", pa.string()),
    ("replicate", pa.string()),
]
OF_CHANNELS = ("slope", "focus", "saturated", "at_maximum", "maximum", "background", "mean", "deviation")
FIELDS = pa.schema(
    [
        ("key", pa.string()),  # digest of (volume, settings): each key once
        ("volume", pa.string()),
        ("settings", pa.string()),  # digest of plates.quality and plates.nuclei
        ("channels", pa.list_(pa.string())),
        *((name, pa.list_(pa.float64())) for name in OF_CHANNELS),  # hcs.image_quality.ImageQuality, per channel
        ("flags", pa.list_(pa.string())),  # "GFP saturated"
        ("cells", pa.int64()),  # null where nobody counted
        *_LINEAGE,
    ]
)
WELLS = pa.schema(
    [
        ("batch", pa.string()),
        *_PLACE,
        *_TREATMENT,
        ("split", pa.string()),  # of its fields; null without a label
        ("fields", pa.int64()),
        ("cells", pa.float64()),  # in all of its fields
        ("score", pa.float64()),
        ("robust_z", pa.float64()),
        ("p_robust", pa.float64()),
        ("q_robust", pa.float64()),
        ("p_empirical", pa.float64()),
        ("q_empirical", pa.float64()),
        ("hit", pa.bool_()),  # null where it cannot be said
        ("profile", pa.list_(pa.float64())),  # on the scale of the plate's negative controls; null where there are none
        ("model_digest", pa.string()),
        *_LINEAGE,
    ]
)
PLATES = pa.schema(
    [
        ("plate", pa.string()),
        ("feature", pa.string()),
        ("positives", pa.int64()),
        ("negatives", pa.int64()),
        ("z_prime", pa.float64()),
        ("robust_z_prime", pa.float64()),
        ("ssmd", pa.float64()),
        ("robust_ssmd", pa.float64()),
        ("v_factor", pa.float64()),
        ("signal_window", pa.float64()),
        ("reason", pa.string()),  # why figures are null
        ("edge_effect", pa.float64()),
        ("edge_p", pa.float64()),
        ("model_digest", pa.string()),
        *_LINEAGE,
    ]
)
COMPOUNDS = pa.schema(
    [
        ("compound", pa.string()),
        ("moa", pa.string()),
        ("wells", pa.int64()),
        ("doses", pa.int64()),
        ("hits", pa.int64()),
        ("identified", pa.bool_()),
        ("reason", pa.string()),  # why the curve is not
        *((f"{name}{end}", pa.float64()) for name in ("start", "end", "hill", "ec50") for end in ("", "_low", "_high")),
        ("r2", pa.float64()),
        ("flat_p", pa.float64()),
        ("spearman", pa.float64()),  # of score and dose
        ("model_digest", pa.string()),
        *_LINEAGE,
    ]
)
AUDIT = pa.schema(
    [
        *_FILE,
        ("sha256", pa.string()),  # of the source; null when it could not be read
        ("status", pa.string()),  # written, held
        ("output", pa.string()),  # path below the output folder; of a held duplicate, where its twin is
        ("output_sha256", pa.string()),
        ("reason", pa.string()),  # why it is held
        ("message", pa.string()),
        ("actions", pa.list_(pa.string())),  # "(0010,0010) PatientName D": what was done to which tag, no values
        ("settings", pa.string()),  # digest of options, key and code: rows of others are void
        ("done_at", _TIME),
        *_LINEAGE,
    ]
)


class Conflict(Exception):
    """Another writer committed first."""


@dataclass(frozen=True)
class DataFile:
    """A Parquet file in the folder of a table that no commit names yet."""

    path: str
    bytes: int
    rows: int


class Keyed(NamedTuple):
    """A file of a table whose rows have a key each, and those keys."""

    file: DataFile
    keys: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """A Delta table at ``url``. All methods but :meth:`write` are for the driver."""

    url: str
    schema: pa.Schema

    def write(self, rows: Sequence[dict] | pa.Table) -> DataFile:
        """Write rows as a Parquet file that :meth:`commit` can take in; a key that the schema lacks is an error."""
        data = rows if isinstance(rows, pa.Table) else pa.Table.from_pylist([_checked(r, self.schema) for r in rows], self.schema)
        buffer = io.BytesIO()
        pq.write_table(data.cast(self.schema), buffer, compression="zstd")
        path = f"part-{uuid.uuid4().hex}.parquet"
        storage.write_bytes(storage.join(self.url, path), buffer.getvalue())
        return DataFile(path, buffer.tell(), data.num_rows)

    def commit(
        self,
        files: Iterable[DataFile],
        fence: tuple[str, int] | None = None,
        replace: Iterable[str] = (),
        same_rows: bool = False,
    ):
        """Make files visible, and those named in ``replace`` invisible, in one step.

        ``fence`` is (writer, number): raises :class:`Conflict` when that writer's number is already at or above it, whoever was
        faster. ``same_rows`` says that nothing is new but the files. A table made by an earlier version gets the columns that it
        lacks; they are null in its rows.
        """
        add = [f for f in files if f.rows]
        gone = set(replace)
        table = self._widened(self._open(create=True))
        if fence and (table.transaction_version(fence[0]) or 0) >= fence[1]:
            raise Conflict(f"{self.url}: {fence[0]} {fence[1]} is already in")
        now = int(time.time() * 1000)
        actions = [AddAction(f.path, f.bytes, {}, now, not same_rows, json.dumps({"numRecords": f.rows})) for f in add]
        current = table.get_add_actions(flatten=True)
        for path, size in zip(current["path"].to_pylist(), current["size_bytes"].to_pylist(), strict=True):
            if path in gone:
                actions.append(RemoveAction(path, not same_rows, now, size, {}))
        properties = CommitProperties(app_transactions=[Transaction(*fence)] if fence else None)
        try:
            table.create_write_transaction(actions, mode="append", schema=table.schema(), commit_properties=properties)
        except CommitFailedError as e:
            raise Conflict(f"{self.url}: {e}") from e

    def committed(self, writer: str) -> int:
        """The last number that ``writer`` committed with, 0 before the first."""
        table = self._open()
        return 0 if table is None else table.transaction_version(writer) or 0

    def paths(self) -> list[str]:
        """Names of the committed files."""
        table = self._open()
        return [] if table is None else sorted(table.get_add_actions(flatten=True)["path"].to_pylist())

    def uris(self) -> list[str]:
        """URLs of the committed files, spelt as :mod:`storage` spells them: nothing is percent-encoded."""
        return [storage.join(self.url, name) for name in self.paths()]

    def sweep(self):
        """Remove the files that no commit names and that are older than the newest one that a commit names.

        For a table whose every writer commits under the fence of one name: who may still win began after the last commit, so
        its files are younger. What a commit replaced and what a killed task left is gone then, also for those who would read
        an earlier version of the table.
        """
        files = {f.path: f for f in storage.walk(self.url) if "/" not in f.path and f.path.endswith(".parquet")}
        committed = set(self.paths())
        newest = max((files[name].mtime_ns for name in committed if name in files), default=None)
        for name, file in files.items():
            if name not in committed and newest is not None and file.mtime_ns < newest:
                storage.remove(file.uri)

    def compact(self, writer: str):
        """Put small files together when there are many, in one step under the fence of ``writer``, the only name to commit under.

        The files that were replaced stay for those who read an earlier version; :meth:`orphans` tells when they may go.
        """
        number, table = self.committed(writer), self._open()
        if table is None:
            return
        current = table.get_add_actions(flatten=True)
        sizes = dict(zip(current["path"].to_pylist(), current["size_bytes"].to_pylist(), strict=True))
        small = [path for path, size in sizes.items() if size < SMALL]
        if len(small) < MANY:
            return
        try:
            self.commit([self.write(self.read(files=small))], (writer, number + 1), replace=small, same_rows=True)
        except Conflict:
            log.info("%s is written to by another run; its small files are put together next time", self.url)

    def orphans(self, before: datetime.datetime) -> list[storage.File]:
        """Data files older than ``before`` that no version of the table names that was the newest then or later.

        A task that wrote a file before then and still runs, or somebody who still reads a version that was replaced before then,
        would miss them.
        """
        table = self._open()
        if table is None:
            return []
        named = set(self.paths())
        table.load_as_version(before)
        named |= set(table.get_add_actions(flatten=True)["path"].to_pylist())
        files = [f for f in storage.walk(self.url) if "/" not in f.path and f.path.endswith(".parquet")]
        return [f for f in files if f.path not in named and f.mtime_ns < before.timestamp() * 1e9]

    def read(
        self, columns: list[str] | None = None, where: pc.Expression | None = None, files: Iterable[str] | None = None
    ) -> pa.Table:
        """The committed rows; an empty table when nothing was ever committed. ``files`` reads the named files instead."""
        uris = self.uris() if files is None else [storage.join(self.url, name) for name in files]
        if not uris:
            names = columns or self.schema.names
            return pa.schema([self.schema.field(n) for n in names]).empty_table()
        fs = storage.filesystem(self.url)[0]
        paths = [storage.filesystem(u)[1] for u in uris]
        return pa.dataset.dataset(paths, self.schema, format="parquet", filesystem=fs).to_table(columns, where)

    def rows(self, where: pc.Expression | None = None) -> list[dict]:
        return self.read(where=where).to_pylist()

    def _open(self, create: bool = False) -> DeltaTable | None:
        target = storage.local_path(self.url)
        if target is None:
            target = self.url
        elif _MISREAD.search(str(target)):
            raise InputError(f"lake path {target} holds a backslash or an escape such as %20, which Delta tables misread")
        try:
            return DeltaTable(target)
        except TableNotFoundError:
            if not create:
                return None
        storage.makedirs(self.url)
        return DeltaTable.create(target, self.schema, mode="ignore")

    def _widened(self, table: DeltaTable) -> DeltaTable:
        """The table with all columns of :attr:`schema`."""
        known = {f.name for f in table.schema().fields}
        missing = [f for f in self.schema if f.name not in known]
        if missing:
            try:
                table.alter.add_columns(DeltaSchema.from_arrow(pa.schema(missing)).fields)
            except CommitFailedError as e:
                raise Conflict(f"{self.url}: {e}") from e
            table = self._open()
        return table


def _checked(row: dict, schema: pa.Schema) -> dict:
    unknown = set(row) - set(schema.names)
    if unknown:
        raise KeyError(f"columns {sorted(unknown)} are not in the table")
    return row


def catalog(lake: str) -> Table:
    """One row per instance of every file; :func:`current` gives those that count."""
    return Table(storage.join(lake, "catalog"), CATALOG)


def quarantine(lake: str) -> Table:
    """One row per file or volume refused."""
    return Table(storage.join(lake, "quarantine"), QUARANTINE)


def volumes(lake: str) -> Table:
    return Table(storage.join(lake, "volumes"), VOLUMES)


def seen(lake: str) -> Table:
    """Every volume that ever was in ``volumes/``: since when, and its sources. It names files, so it lies where those rows do."""
    return Table(storage.join(lake, "volumes", "_seen"), SEEN)


def predictions(lake: str) -> Table:
    """The ledger of scoring."""
    return Table(storage.join(lake, "predictions"), PREDICTIONS)


def evaluations(lake: str) -> Table:
    """Predictions on labelled volumes of the test split, by which models are compared."""
    return Table(storage.join(lake, "evaluations"), PREDICTIONS)


def promotions(lake: str) -> Table:
    """Every decision about the champion, with its numbers."""
    return Table(storage.join(lake, "promotions"), PROMOTIONS)


def fingerprints(lake: str) -> Table:
    """What the volumes that a champion was judged on are like, and what it said about them."""
    return Table(storage.join(lake, "fingerprints"), FINGERPRINTS)


def watch(lake: str) -> Table:
    """What each look at new volumes and at the service found; the rows of one look share ``watched_at``."""
    return Table(storage.join(lake, "watch"), WATCH)


def fields(lake: str) -> Table:
    """How good each field of a screen is, and its cells."""
    return Table(storage.join(lake, "screen", "fields"), FIELDS)


def wells(lake: str) -> Table:
    """What the champion says of each well of a screen: scores, p-values, profiles."""
    return Table(storage.join(lake, "screen", "wells"), WELLS)


def plates(lake: str) -> Table:
    """How far each plate tells its controls apart, by the score and by each feature."""
    return Table(storage.join(lake, "screen", "plates"), PLATES)


def compounds(lake: str) -> Table:
    """Dose-response and hits by compound."""
    return Table(storage.join(lake, "screen", "compounds"), COMPOUNDS)


def audit(out: str) -> Table:
    """What became of every file that was de-identified into ``out``. It names sources, so it lies beside ``out``, not in it."""
    return Table(f"{storage.absolute(out)}.audit", AUDIT)
