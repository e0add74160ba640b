"""Who is in the study: image volumes joined with their labels, subjects and splits.

Knows no engine and reads no pixel; what comes back is one :class:`Member` per image, and a reason for everything left out.
"""

import csv
import dataclasses
import fnmatch
import hashlib
import io
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import pandas as pd

from sparkmed import storage
from sparkmed.config import HEADER_GROUPS, Config, folded
from sparkmed.formats import ome_zarr, segmentation
from sparkmed.formats.instance import VolumeHeader, to_json
from sparkmed.hcs import crops, fields, platemap
from sparkmed.imaging import paths, splits
from sparkmed.rejection import InputError, Refused, Rejection

STAGE = "volumes"
MOST_GROUPS = 64
HELD_OUT_FIRST = {"test": 0, "val": 1, "train": 2, None: 3}


@dataclass(frozen=True)
class Member:
    """An image of the cohort: its subject, its label (a label image or a class index) and its split (None without a label)."""

    image: VolumeHeader
    subject: str
    split: str | None = None
    label: VolumeHeader | None = None
    target: int | None = None


@dataclass(frozen=True)
class Cohort:
    members: list[Member]
    rejections: list[Rejection]
    ignored: int
    """Volumes that neither ``volumes.images`` nor the labels name."""


def assemble(headers: Iterable[VolumeHeader], config: Config, key: bytes | None) -> Cohort:
    """The cohort of the volumes of an archive, in the order of their paths.

    ``headers[].patient`` is a pseudonym already; names from paths become pseudonyms under ``key`` here. Raises
    :class:`InputError` when images lack labels (unless the config allows it), have different channel counts, or a class or
    split is not one of the config's.
    """
    table = label_table(config)
    headers = list(headers)
    maps, unread = plate_maps(config)
    segmentations = [h for h in headers if segmentation.is_segmentation(h)]
    images, labels, rejections, ignored = _roles((h for h in headers if not segmentation.is_segmentation(h)), table, config)
    rejections += unread
    bound: dict[tuple, VolumeHeader | Refused] = {}
    if config.volumes.labels.segments:
        truths = [h for h in segmentations if not h.facts.get("predicted")]  # what a model said is no truth to learn from
        labels |= {h.source_paths[0]: h for h in truths}
        bound, refused = _bound(truths, [h for h, _ in images], config)
        rejections += refused
    ignored += len(segmentations) - len(labels.keys() & {h.source_paths[0] for h in segmentations})
    members = []
    for header, named in images:
        try:
            if header.format == fields.FORMAT:
                members.append(_field(header, maps, config, key))
            else:
                members.append(_member(header, named, labels, bound, table, config, key))
        except Refused as e:
            rejections += [e.at(uri, STAGE) for uri in header.sources]
    members, duplicates = _once(members)
    rejections += duplicates
    joined = {uri for m in members if m.label for uri in m.label.sources}
    rejections += [
        Rejection(h.sources[0], STAGE, "LABEL_WITHOUT_IMAGE", _homeless(h))
        for h in labels.values()
        if h.sources[0] not in joined and not any(h.sources[0] == r.uri for r in rejections)
    ]
    _require_labels(members, config)
    _require_same_channels(members, config)
    return Cohort(members, rejections, ignored)


def require_splits(members: Sequence[Member], config: Config):
    """Raise :class:`InputError` when a split that training needs has nobody in it."""
    subjects = defaultdict(set)
    for m in members:
        subjects[m.split].add(m.subject)
    empty = [s for s in ("train", "val", "test") if not subjects[s]]
    if empty:
        have = ", ".join(f"{s} {len(subjects[s])}" for s in ("train", "val", "test"))
        raise InputError(
            f"split {' and '.join(empty)} is empty (subjects: {have}): add data, change volumes.splits, "
            "or set volumes.splits.val_from_train for given splits"
        )


def _roles(headers: Iterable[VolumeHeader], table: list[dict] | None, config: Config):
    """Images with what their pattern says, labels by path, refusals, and how many volumes are neither."""
    wanted = config.volumes.images
    patterns = [paths.PathPattern(p) for p in ([wanted] if isinstance(wanted, str) else wanted or [])]
    label_pattern = paths.PathPattern(config.volumes.labels.pattern) if config.volumes.labels.pattern else None
    listed = {r["label"] for r in table} if table and config.task == "segmentation" else set()
    images, labels, rejections, ignored = [], {}, [], 0
    for header in sorted(headers, key=lambda h: h.source_paths):
        path = header.source_paths[0]
        if (label_pattern and label_pattern.match(path)) or path in listed:
            labels[path] = header
            continue
        matches = [m for p in patterns if (m := p.match(path)) is not None]
        if (patterns and not matches) or not _has(header, config.volumes.only):
            ignored += 1
            continue
        named = matches[0] if matches else {}
        others = [p for p in header.source_paths if patterns and not any(q.match(p) == named for q in patterns)]
        if others:
            message = f"{len(others)} of the {len(header.sources)} files of one volume lie under another subject, class or split"
            rejections += [Rejection(uri, STAGE, "MIXED_PATHS", message) for uri in header.sources]
            continue
        images.append((header, named))
    return images, labels, rejections, ignored


def _has(header: VolumeHeader, only: dict[str, str | float]) -> bool:
    """Whether the facts of a volume are those of ``volumes.only``."""
    facts = {**header.facts, **header.facts.get("part", {}), "modality": header.modality}
    return all(fnmatch.fnmatchcase(_text(facts.get(name)), _text(pattern)) for name, pattern in only.items())


def _text(fact) -> str:
    """As ``sparkmed inspect`` shows it.

    >>> _text(4.0), _text(["ORIGINAL", "PRIMARY"]), _text(None)
    ('4', 'ORIGINAL\\\\PRIMARY', '')
    """
    if isinstance(fact, list):
        return "\\".join(map(_text, fact))
    return "" if fact is None else f"{fact:g}" if isinstance(fact, float) else str(fact)


def _bound(segmentations: list[VolumeHeader], images: list[VolumeHeader], config: Config):
    """By :func:`_place` of an image its label as a class map, or why it has none; and refusals of segmentations.

    Segmentations of one image are put together when each holds other classes. An image whose segmentations name no class of the
    config has no label; that is allowed when ``allow_missing`` says so. Raises :class:`InputError` for a segment of the config
    that no segmentation has.
    """
    wanted = {folded(name): config.classes.index(c) for c, names in config.volumes.labels.segments.items() for name in names}
    _require_names(segmentations, config)
    series = segmentation.by_series(images)
    offers: dict[tuple, list[tuple[VolumeHeader, VolumeHeader]]] = defaultdict(list)
    bound: dict[tuple, VolumeHeader | Refused] = {}
    spoilt: dict[tuple, Refused] = {}  # what was refused may have held a class
    refused: dict[str, Rejection] = {}
    for label in sorted(segmentations, key=lambda h: h.sources):
        found = segmentation.images_of(label, series)
        fits, problem = [], None
        for image in found:
            try:
                classes = segmentation.named(label.facts["segments"], wanted)
                if not classes:
                    raise Refused("LABEL_WITHOUT_SEGMENT", "the segmentation holds none of the segments of volumes.labels.segments")
                fits.append((image, segmentation.on_grid(label, image, classes)))
            except Refused as e:
                problem = e
        for image, fit in fits:
            offers[_place(image)].append((label, fit))
        if problem and not fits:
            refused.setdefault(label.sources[0], problem.at(label.sources[0], STAGE))
            places = {_place(image): Refused("LABEL_REFUSED", f"its segmentation was refused: {problem.reason}") for image in found}
            if problem.reason != "LABEL_WITHOUT_SEGMENT":
                spoilt |= places
            elif not config.volumes.labels.allow_missing:
                bound |= places
    for place, several in offers.items():
        bound[place] = segmentation.merged([fit for _, fit in several])
        held = Counter(c for _, fit in several for c in set(fit.facts["classes"].values()))
        twice = [config.classes[c] for c, count in sorted(held.items()) if count > 1]
        if twice:
            bound[place] = Refused("CONFLICTING_LABELS", f"{len(several)} segmentations of one image hold {' and '.join(twice)}")
            for label, _ in several:
                refused.setdefault(label.sources[0], bound[place].at(label.sources[0], STAGE))
    return bound | spoilt, list(refused.values())


def _require_names(segmentations: list[VolumeHeader], config: Config):
    """Every segment of the config is in some object: else a slip of the pen would make it background everywhere."""
    have = [segmentation.names(s) for h in segmentations for s in h.facts["segments"]]
    known = {folded(n) for several in have for n in several}
    for c, several in config.volumes.labels.segments.items():
        for name in several:
            if segmentations and folded(name) not in known:
                listed = ", ".join(sorted({n[0] for n in have if n} - {segmentation.WITHHELD})[:10]) or "none that can be read"
                raise InputError(
                    f"volumes.labels.segments.{c}: no segmentation of the archive has a segment {name!r}; there are: {listed}"
                )


def _homeless(label: VolumeHeader) -> str:
    return segmentation.without_image(label).message if segmentation.is_segmentation(label) else "no image belongs to this label"


def _place(header: VolumeHeader) -> tuple:
    """What tells one image volume from all others, copies included."""
    return header.uid, header.sources


def _member(header: VolumeHeader, named: dict, labels: dict, bound: dict, table, config: Config, key: bytes | None) -> Member:
    """The member of an image; raises :class:`Refused`."""
    settings = config.volumes
    raw = named.get("subject")
    if raw is not None:
        subject = raw if key is None else splits.pseudonym(raw, key)
    elif header.patient:
        subject = header.patient
    else:
        whole = header.source_paths[0]
        subject = storage.component(whole) if key is None else splits.pseudonym(whole, key)
    entry = _entry(table, header, raw, subject, key) if table is not None else None
    label = target = None
    if config.task == "segmentation":
        if settings.labels.pattern and raw is not None:
            label = labels.get(paths.PathPattern(settings.labels.pattern).fill(**named))
        elif entry:
            label = labels.get(entry["label"])
        elif config.volumes.labels.segments:
            label = bound.get(_place(header))
            if isinstance(label, Refused):
                raise label
    else:
        name = entry["label"] if entry else named.get("class")
        target = None if name is None else _class_index(name, config)
    if label is None and target is None:
        return Member(header, subject)
    given = (entry or {}).get("split") or named.get("split")
    return Member(header, subject, splits.split_of(subject, settings.splits, given), label, target)


def _field(header: VolumeHeader, maps: platemap.Maps | None, config: Config, key: bytes | None) -> Member:
    """The member of a field of a plate: its subject is the group that no split may tear, its target what the plate map says.

    What the map says of the well is a fact ``treatment`` of the image. Raises :class:`Refused` for a well that the map leaves open.
    """
    facts, plates = header.facts, config.plates
    entry = None if maps is None else platemap.entry(maps, facts.get("plate"), facts["well"])
    well = f"{facts.get('plate') or 'plate'}-{facts['well']}"
    groups = {"well": well, "plate": facts.get("plate"), "batch": facts.get("batch")}
    groups["compound"] = entry.compound if entry and entry.control in (None, "positive") else None
    group = groups[plates.split_by] or (groups["plate"] if plates.split_by == "compound" else None)
    if group is None:
        raise Refused("NO_GROUP", f"well {well} has no {plates.split_by}, by which plates.split_by splits")
    subject = storage.component(group) if key is None else splits.pseudonym(group, key)
    if entry is None:
        return Member(header, subject)
    said = {k: v for k, v in vars(entry).items() if v is not None and k not in ("well", "row", "column", "others")}
    header = dataclasses.replace(header, header=to_json(facts | {"treatment": said}))
    name = getattr(entry, plates.target)
    if name not in config.classes:
        return Member(header, subject)
    given = (split for split, wells in plates.splits.items() if any(fnmatch.fnmatchcase(facts["well"], w) for w in wells))
    split = next(given, None) or splits.split_of(subject, config.volumes.splits)
    return Member(header, subject, split, target=config.classes.index(name))


def plate_maps(config: Config) -> tuple[platemap.Maps | None, list[Rejection]]:
    """The plate maps of ``plates.maps`` and refusals of tables that cannot be read; None where the config names none."""
    files = plate_tables(config)
    if files is None:
        return None, []
    tables, barcodes = files
    try:
        return platemap.read(tables, config.plates.maps, barcodes, config.plates.wells)
    except Refused as e:
        raise InputError(f"plates.maps.barcodes {config.plates.maps.barcodes}: {e.message}") from None


def plate_tables(config: Config) -> tuple[list[tuple[str, bytes]], bytes | None] | None:
    """(URL, bytes) of each table of plate maps, and the bytes of the table of barcodes."""
    maps = config.plates and config.plates.maps
    if not maps:
        return None

    def read(url: str) -> bytes:
        try:
            return storage.read_bytes(url)
        except OSError as e:
            raise InputError(f"plates.maps: {url} cannot be read: {e.strerror or type(e).__name__}") from None

    found = []
    for pattern in maps.tables:
        fixed = pattern.partition("*")[0].rpartition("/")[0]
        inside = "://" not in pattern and not pattern.startswith("/")
        folder = storage.join(config.archive, fixed) if inside and fixed else config.archive if inside else fixed
        rest = pattern.removeprefix(fixed).lstrip("/")
        if "*" not in pattern:
            found.append(storage.join(folder, rest))
            continue
        try:
            urls = sorted(
                f.uri for f in storage.walk(folder, whole=ome_zarr.SUFFIXES) if paths.PathPattern(rest).match(f.path) is not None
            )
        except FileNotFoundError:
            urls = []
        if not urls:
            raise InputError(f"plates.maps.tables {pattern}: no such file")
        found += urls
    barcodes = maps.barcodes
    if barcodes and "://" not in barcodes and not barcodes.startswith("/"):
        barcodes = storage.join(config.archive, barcodes)
    return [(url, read(url)) for url in found], read(barcodes) if barcodes else None


def plate_digest(config: Config) -> str:
    """SHA-256 of what the plate maps hold; empty without any."""
    files = plate_tables(config)
    if files is None:
        return ""
    tables, barcodes = files
    parts = [hashlib.sha256(data).hexdigest() for data in (*(d for _, d in tables), barcodes or b"")]
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def _class_index(name: str, config: Config) -> int:
    if name in config.classes:
        return config.classes.index(name)
    if name.isdigit() and int(name) < len(config.classes):
        return int(name)
    raise InputError(f"class {name!r} of the archive is not in classes {list(config.classes)}")


def _entry(table: list[dict], header: VolumeHeader, raw: str | None, subject: str, key: bytes | None) -> dict | None:
    """The row of the label CSV that names this image, by path or by subject (as in the path, the header, or a pseudonym)."""

    def names(r):
        who = r.get("subject")
        return r.get("path") in header.source_paths or (
            who is not None and (who in (raw, subject) or (key is not None and splits.pseudonym(who, key) == subject))
        )

    rows = [r for r in table if names(r)]
    if len({tuple(sorted(r.items())) for r in rows}) > 1:
        raise Refused("TWO_LABELS", f"{len(rows)} rows of the label CSV name this image")
    return rows[0] if rows else None


def label_table(config: Config) -> list[dict] | None:
    """The rows of ``volumes.labels.csv`` that hold a label; None when the config names no CSV."""
    where = config.volumes.labels.csv
    return None if where is None else [r for r in _table(config, "volumes.labels.csv", where, ("label",)) if "label" in r]


def groups(rows: Sequence[dict], config: Config, key: bytes | None) -> dict[str, dict[str, str]]:
    """By uid of volume rows the group that each is in, by name of the grouping; one that is not known is left out.

    Raises :class:`InputError` when the table of ``groups.csv`` says two things of one, or a grouping has so many values that it
    names subjects rather than groups.
    """
    settings = config.groups
    named = [c for c in settings.by if c not in HEADER_GROUPS]
    table = _table(config, "groups.csv", settings.csv, named) if settings.csv else []
    columns = [c for c in settings.by if c in named or any(c in row for row in table)]
    found: dict[tuple[str, str], dict[str, str]] = {}
    for row in table:
        said = {c: row[c] for c in columns if c in row}
        who = row.get("subject")
        names = [("path", row["path"])] if "path" in row else []
        names += [("subject", n) for n in (who, key and splits.pseudonym(who, key)) if n] if who else []
        for name in names:
            if found.setdefault(name, said) != said:
                raise InputError(f"groups.csv {settings.csv}: two rows of one {name[0]} differ")
    for c in columns:
        values = {said[c] for said in found.values() if c in said}
        if len(values) > MOST_GROUPS:
            raise InputError(f"groups.csv {settings.csv}: column {c} has {len(values)} values, wanted at most {MOST_GROUPS} groups")
    out = {}
    for r in rows:
        names = [*(("path", p) for p in r["source_paths"]), ("subject", r["subject"])]
        said = next((found[n] for n in names if n in found), {})
        facts = {"modality": r["modality"] or r["format"], "scanner": json.loads(r["header"] or "{}").get("scanner")}
        out[r["uid"]] = {c: value for c in settings.by if (value := said.get(c) if c in columns else facts[c])}
    return out


def _table(config: Config, setting: str, where: str, wanted: Sequence[str]) -> list[dict]:
    """The rows of a CSV inside the archive or at a URL, blanks left out; it has columns ``wanted``, and ``path`` or ``subject``."""
    try:
        text = storage.read_bytes(_inside(config, where)).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"{setting} {where}: {getattr(e, 'strerror', None) or type(e).__name__}") from None
    rows = list(csv.DictReader(io.StringIO(text)))
    columns = set(rows[0]) if rows else set()
    if not set(wanted) <= columns or not columns & {"path", "subject"}:
        raise InputError(
            f"{setting} {where}: wanted columns {', '.join(wanted)} and path or subject, got {sorted(c for c in columns if c)}"
        )
    return [{k: v.strip() for k, v in row.items() if k and v and v.strip()} for row in rows]


def _inside(config: Config, where: str) -> str:
    """URL of a table inside the archive or elsewhere."""
    inside = storage.join(config.archive, where)
    return inside if "://" not in where and not where.startswith("/") and storage.exists(inside) else where


def cells(config: Config) -> pd.DataFrame | None:
    """The table of ``patches.crops.table``; None where cells come from no table."""
    return crops.read(_inside(config, config.patches.crops.table)) if config.cells and config.cells.listed else None


def cells_digest(config: Config) -> str:
    """SHA-256 of the table of cells; empty without one."""
    if not config.cells or not config.cells.listed:
        return ""
    try:
        return hashlib.sha256(storage.read_bytes(_inside(config, config.patches.crops.table))).hexdigest()
    except OSError as e:
        raise InputError(f"table of cells {config.patches.crops.table}: {e.strerror or type(e).__name__}") from None


def _once(members: list[Member]) -> tuple[list[Member], list[Rejection]]:
    """Each content once. Of copies the held-out one stays, so that nothing is trained on that is tested on."""
    copies = defaultdict(list)
    for m in members:
        copies[m.image.uid].append(m)
    kept, rejections = [], []
    for group in copies.values():
        truths = {(m.target, m.label.uid if m.label else None) for m in group if m.split}
        if len(truths) > 1:
            message = f"{len(group)} files hold the same image with {len(truths)} different labels"
            rejections += [Rejection(u, STAGE, "CONFLICTING_LABELS", message) for m in group for u in m.image.sources]
            continue
        first, *others = sorted(group, key=lambda m: (HELD_OUT_FIRST[m.split], m.image.source_paths))
        kept.append(first)
        for m in others:
            message = f"the same image as another file of the archive, which is used (split {first.split})"
            rejections += [Rejection(u, STAGE, "DUPLICATE_IMAGE", message) for u in m.image.sources if u not in first.image.sources]
    order = {id(m): i for i, m in enumerate(members)}
    kept.sort(key=lambda m: order[id(m)])
    return _whole_subjects(kept), rejections


def _whole_subjects(members: list[Member]) -> list[Member]:
    """A subject is in one split; given splits that say otherwise are an error."""
    given = defaultdict(set)
    for m in members:
        if m.split:
            given[m.subject].add(m.split)
    torn = {s: sorted(x) for s, x in given.items() if len(x) > 1}
    if torn:
        subject, both = next(iter(sorted(torn.items())))
        raise InputError(
            f"{len(torn)} subjects are in more than one split, such as {subject} in {' and '.join(both)}: "
            "nobody may be both trained on and tested on"
        )
    return members


def _require_labels(members: list[Member], config: Config):
    if not members:
        raise InputError(
            "no image volume: volumes.images and volumes.only leave no file of the archive, or everything was refused (quarantine)"
        )
    bare = [m for m in members if m.split is None]
    if bare and not config.volumes.labels.allow_missing:
        names = ", ".join(m.image.source_paths[0] for m in bare[:3])
        raise InputError(
            f"{len(members)} images but {len(members) - len(bare)} labels: none for {names}{' ...' if len(bare) > 3 else ''}; "
            "volumes.labels.allow_missing: true lets them in for scoring"
        )


def _require_same_channels(members: list[Member], config: Config):
    counts = Counter(1 if config.preprocess.channels == "gray" else m.image.shape[0] for m in members)
    if len(counts) > 1:
        odd = min(counts, key=counts.get)
        example = next(m.image.source_paths[0] for m in members if m.image.shape[0] == odd)
        found = ", ".join(f"{n} images with {c}" for c, n in sorted(counts.items()))
        raise InputError(
            f"images have different channel counts: {found}, such as {example}; preprocess.channels: gray makes them one"
        )
