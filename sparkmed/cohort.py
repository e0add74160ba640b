"""Who is in the study: image volumes joined with their labels, subjects and splits.

Knows no engine and reads no pixel; what comes back is one :class:`Member` per image, and a reason for everything left out.
"""

import csv
import io
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sparkmed import storage
from sparkmed.config import Config
from sparkmed.formats.instance import VolumeHeader
from sparkmed.imaging import paths, splits
from sparkmed.rejection import InputError, Refused, Rejection

STAGE = "volumes"
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
    images, labels, rejections, ignored = _roles(headers, table, config)
    members = []
    for header, named in images:
        try:
            members.append(_member(header, named, labels, table, config, key))
        except Refused as e:
            rejections += [e.at(uri, STAGE) for uri in header.sources]
    members, duplicates = _once(members)
    rejections += duplicates
    joined = {m.label.sources for m in members if m.label}
    rejections += [
        Rejection(h.sources[0], STAGE, "LABEL_WITHOUT_IMAGE", "no image belongs to this label")
        for h in labels.values()
        if h.sources not in joined and not any(h.sources[0] == r.uri for r in rejections)
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
        if patterns and not matches:
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


def _member(header: VolumeHeader, named: dict, labels: dict[str, VolumeHeader], table, config: Config, key: bytes | None) -> Member:
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
    else:
        name = entry["label"] if entry else named.get("class")
        target = None if name is None else _class_index(name, config)
    if label is None and target is None:
        return Member(header, subject)
    given = (entry or {}).get("split") or named.get("split")
    return Member(header, subject, splits.split_of(subject, settings.splits, given), label, target)


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
    if where is None:
        return None
    inside = storage.join(config.archive, where)
    url = inside if "://" not in where and not where.startswith("/") and storage.exists(inside) else where
    try:
        text = storage.read_bytes(url).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"volumes.labels.csv {where}: {getattr(e, 'strerror', None) or type(e).__name__}") from None
    rows = list(csv.DictReader(io.StringIO(text)))
    columns = set(rows[0]) if rows else set()
    if "label" not in columns or not columns & {"path", "subject"}:
        raise InputError(
            f"volumes.labels.csv {where}: wanted columns label and path or subject, got {sorted(c for c in columns if c)}"
        )
    return [{k: v.strip() for k, v in row.items() if k and v and v.strip()} for row in rows if (row.get("label") or "").strip()]


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
        raise InputError("no image volume: volumes.images names no file of the archive, or everything was refused (see quarantine)")
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
