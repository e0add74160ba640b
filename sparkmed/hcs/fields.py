"""Images of a plate to fields: which files are the channels of one field, in which order, and why the others are none.

Nothing here reads a file. A field is one (plate, well, site, z, t) with all channels of the config, a volume ``(C, I, J, 1)`` in
the order of the config. Names of files and the vendor's index are cross-checked; where one of them is silent the other one counts.
"""

import dataclasses
import hashlib
import json
import posixpath
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from sparkmed.config import Plates
from sparkmed.formats.instance import Instance, VolumeHeader, volume_header
from sparkmed.hcs import filenames, wells
from sparkmed.hcs.filenames import Plane
from sparkmed.hcs.indexes import Index, Listed
from sparkmed.rejection import Refused, Rejection

STAGE = "volumes"
FORMAT = "plate"
OME, OME_ZARR = "ome", "ome-zarr"
"""Conventions of images that say themselves where they are, and of those of which their plate does."""
NAMELESS = "plate"
"""A plate whose name neither files nor an index give."""
CENTRES = "centres"
"""Fact of a field that a table of cells is joined with: see :func:`sparkmed.hcs.crops.joined`."""
CELL_BYTES = 64
"""Longest id of a cell, in UTF-8."""
MODALITY = "HCS"
"""No DICOM modality: high-content screening has none of its own."""


@dataclass(frozen=True)
class Fields:
    """Fields, refusals, and what is no field for a good reason: by URI ``thumbnail``, ``projection``, ``plane`` (of a z-stack whose
    projection is used), ``correction``, ``index``, ``other channel`` or ``unlisted`` (in a CSV that lists what is used)."""

    headers: list[VolumeHeader] = field(default_factory=list)
    rejections: list[Rejection] = field(default_factory=list)
    others: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Image:
    instance: Instance
    plane: Plane
    listed: Listed | None

    @property
    def key(self) -> tuple:
        """The field."""
        p = self.plane
        return p.plate, p.well, p.site, p.z, p.t

    @property
    def size(self) -> tuple:
        """(I, J) in pixels, and the size of a pixel in um to 4 digits or None."""
        pixel = self.listed.pixel_size_um if self.listed else None
        return *self.instance.shape[1:3], pixel and tuple(float(f"{x:.4g}") for x in pixel)


def assemble(instances: Iterable[Instance], settings: Plates, index: Index | None = None) -> Fields:
    """The fields of the pictures in the folder of one plate (see :func:`filenames.plate_folder`); the same whatever their order.

    Every instance is a source of exactly one header, or has one rejection, or is in ``others``. Headers are of format ``plate`` and
    modality ``HCS``; sources are in the order of ``settings.channels``; shape ``(C, I, J, 1)``; the affine is that of a picture
    with the index' pixel size in mm (1 where it is not known; the stage's position stays a fact). Facts: ``source`` (convention),
    ``batch``, ``plate``, ``well``, ``row``, ``column``, ``site``, ``z``, ``t``, ``channels`` (names), ``pixel_size_um``,
    ``stage_um``, ``projection``; one that nobody knows is absent. What OME-TIFF says of itself
    (:mod:`sparkmed.formats.ome`), and OME-Zarr of its planes (:mod:`sparkmed.formats.ome_zarr`), counts before an index of others.
    The uid is of the pixels and of the place on the plate: blank wells look alike.

    Reasons: ``UNKNOWN_NAME``, ``BAD_NAME``, ``BAD_WELL``, ``NOT_IN_INDEX``, ``INDEX_MISMATCH``, ``DUPLICATE_IMAGE`` (the same bytes
    twice: a copy), ``DUPLICATE_PLANE``, ``MISSING_CHANNEL``, ``NO_PROJECTION``, ``FIELD_SIZE``, and ``MISSING_FILE`` on the URI of
    the index, once per well.
    """
    instances = sorted(instances, key=lambda i: i.uri)
    index = index if settings.index else None
    found = _Found(settings, index)
    listed = _listed(instances, index)
    images = [image for i in instances if (image := found.image(i, listed.get(i.uri)))]
    images = found.of_kind(_with_projections(images))
    if index is not None:
        found.missing(instances, listed, index)
    by_field: dict[tuple, list[tuple[_Image, int]]] = defaultdict(list)
    for image, channel in found.of_channels(images):
        by_field[image.key].append((image, channel))
    whole = [chosen for some in by_field.values() if (chosen := found.whole(some))]
    headers = [_header(chosen, settings) for chosen in found.of_one_size(whole)]
    headers.sort(key=lambda h: [(v is not None, v) for k in ("plate", "row", "column", "site", "t", "z") for v in [h.facts.get(k)]])
    return Fields(headers, sorted(found.rejections, key=lambda r: (r.uri, r.reason, r.message)), dict(sorted(found.others.items())))


def once(headers: Iterable[VolumeHeader]) -> tuple[list[VolumeHeader], list[Rejection]]:
    """Fields of all plates, each place once: folders may hold copies of a plate, or plates that the vendor gave one name.

    Of copies (one uid) the first by its path stays, the sources of the others are ``DUPLICATE_IMAGE``; different fields of one
    plate, well, site, z and t are all refused as ``DUPLICATE_PLANE``.
    """
    by_place: dict[tuple, list[VolumeHeader]] = defaultdict(list)
    for header in sorted(headers, key=lambda h: h.source_paths):
        facts = header.facts
        by_place[tuple(facts.get(k) for k in ("plate", "well", "site", "z", "t"))].append(header)
    kept, rejections = [], []
    for place, same in by_place.items():
        differ = len({h.uid for h in same}) > 1
        kept += [] if differ else same[:1]
        reason, what = ("DUPLICATE_PLANE", "different fields") if differ else ("DUPLICATE_IMAGE", "copies of one field")
        folders = ", ".join(dict.fromkeys(posixpath.dirname(h.source_paths[0]) for h in same[:3]))
        message = f"{_place(Plane(**dict(zip(('plate', 'well', 'site', 'z', 't'), place, strict=True))))}: {what} in {folders}"
        for header in same if differ else same[1:]:
            rejections += [Rejection(uri, STAGE, reason, message) for uri in header.sources]
    return kept, rejections


class _Found:
    """What is no field, while images go through the steps of :func:`assemble`."""

    def __init__(self, settings: Plates, index: Index | None):
        self.settings, self.index = settings, index
        self.rejections: list[Rejection] = []
        self.others: dict[str, str] = {}

    def refuse(self, images: Iterable[_Image], reason: str, message: str):
        self.rejections += [Rejection(i.instance.uri, STAGE, reason, f"{_place(i.plane)}: {message}") for i in images]

    def image(self, instance: Instance, listed: Listed | None) -> _Image | None:
        """The image or projection that a file is by its name and the index, or a page by its name and what it says of itself.

        A file of one page that an index lists, or whose XML names no well, goes by index and name; its XML is asked for lengths.
        """
        ome, lengths = instance.facts.get("ome"), None
        said = _said(ome) if ome else None
        if said and said.plane.convention == OME and ome.get("pages", 1) == 1 and (listed or said.plane.well is None):
            lengths = said
        elif said:
            listed = said
        try:
            plane = self._plane(instance, listed)
        except Refused as e:
            self.rejections.append(e.at(instance.uri, STAGE))
            return None
        if plane.kind not in ("image", "projection"):
            self.others[instance.uri] = plane.kind or "unlisted"
            return None
        if lengths is not None:
            known = listed or Listed(plane)
            listed = dataclasses.replace(
                known,
                pixel_size_um=known.pixel_size_um or lengths.pixel_size_um,
                stage_um=known.stage_um or lengths.stage_um,
            )
        return _Image(instance, plane, listed)

    def _plane(self, instance: Instance, listed: Listed | None) -> Plane:
        settings, index = self.settings, self.index
        if instance.format != "raster" or instance.kind != "image":
            raise Refused("UNKNOWN_NAME", f"a file of format {instance.format} is no image of a plate")
        try:
            plane = filenames.parse(instance.path, settings.convention, settings.pattern)
        except Refused:
            if listed is None:
                raise
            plane = filenames.UNKNOWN
        if listed is not None and listed.plane.convention in (OME, OME_ZARR):
            plane = _of_ome(plane, listed.plane, instance.path)
        elif listed is not None:
            plane = _checked(plane, listed.plane)
        elif index is not None and index.convention == "csv" and plane.kind in (None, "image", "projection"):
            return Plane()
        elif index is not None and index.images and plane.kind in ("image", "projection"):
            raise Refused("NOT_IN_INDEX", f"{_place(plane)}: {posixpath.basename(index.path)} does not name the file")
        if plane.kind is None:
            wanted = settings.convention or ("the pattern" if settings.pattern else "any convention")
            raise Refused("UNKNOWN_NAME", f"the name is not one of {wanted}")
        if plane.kind in ("image", "projection"):
            wells.within(plane.row, plane.column, settings.wells)
            self._check_grid(plane)
        return plane

    def _check_grid(self, plane: Plane):
        """Against an index that says which wells and sites there are."""
        index = self.index
        if index is None or index.wells is None:
            return
        if plane.well not in index.wells:
            raise Refused(
                "INDEX_MISMATCH", f"{_place(plane)}: {posixpath.basename(index.path)} says that the well was not acquired"
            )
        if plane.site is not None and index.sites is not None and plane.site > index.sites:
            raise Refused("INDEX_MISMATCH", f"{_place(plane)}: {posixpath.basename(index.path)} has {index.sites} sites in a well")
        if plane.channel is not None and plane.channel not in index.channels:
            name = posixpath.basename(index.path)
            raise Refused(
                "INDEX_MISMATCH", f"{_place(plane)}: {name} has no wavelength {plane.channel}, only {len(index.channels)}"
            )

    def of_kind(self, images: list[_Image]) -> list[_Image]:
        """Planes or projections, whichever the config asks for."""
        wanted, other = ("image", "projection") if self.settings.z == "planes" else ("projection", "image")
        projected = {_without_z(i.plane) for i in images if i.plane.kind == "projection"}
        for i in images:
            if i.plane.kind == other == "projection":
                self.others[i.instance.uri] = "projection"
            elif i.plane.kind == other and _without_z(i.plane) in projected:
                self.others[i.instance.uri] = "plane"
            elif i.plane.kind == other:
                self.refuse([i], "NO_PROJECTION", f"a plane of channel {i.plane.channel or 1} without a projection")
        return [i for i in images if i.plane.kind == wanted]

    def of_channels(self, images: list[_Image]) -> list[tuple[_Image, int]]:
        """Images with the position of their channel in the config."""
        by_id = {key: n for n, (_, key) in enumerate(self.settings.channels)}
        chosen = []
        for i in images:
            places = {by_id[c]: c for c in reversed(self._names(i)) if c in by_id}
            if len(places) > 1:
                self.refuse([i], "INDEX_MISMATCH", f"the config knows it as channels {' and '.join(sorted(places.values()))}")
            elif places:
                chosen.append((i, next(iter(places))))
            else:
                self.others[i.instance.uri] = "other channel"
        return chosen

    def _names(self, i: _Image) -> list[str]:
        """By what the config may name the channel of an image; a name without one is of the only channel, ``1``."""
        channel = i.plane.channel or (None if i.listed and i.listed.channel_name else "1")
        name = i.listed.channel_name if i.listed else None
        return [c for c in (channel, name, self.index.channels.get(channel or "") if self.index else None) if c]

    def whole(self, some: list[tuple[_Image, int]]) -> list[_Image] | None:
        """One image per channel of a field, in the order of the config; None when one is missing."""
        by_channel: dict[int, list[_Image]] = defaultdict(list)
        for image, channel in some:
            by_channel[channel].append(image)
        chosen, contested = {}, set()
        for channel, same in by_channel.items():
            name = self.settings.channels[channel][0]
            if len({i.instance.sha256 for i in same}) > 1:
                contested.add(channel)
                self.refuse(same, "DUPLICATE_PLANE", f"{len(same)} files that differ show channel {name}")
                continue
            chosen[channel], *copies = same
            self.refuse(copies, "DUPLICATE_IMAGE", f"a copy of the file that is used for channel {name}")
        lacking = [n for n in range(len(self.settings.channels)) if n not in chosen]
        if lacking:
            names = [self.settings.channels[n][0] + (" (files that differ)" if n in contested else "") for n in lacking]
            self.refuse(chosen.values(), "MISSING_CHANNEL", f"the field lacks {', '.join(names)}")
            return None
        return [chosen[n] for n in range(len(self.settings.channels))]

    def of_one_size(self, whole: list[list[_Image]]) -> list[list[_Image]]:
        """Fields of the size that most fields of their plate have; none where two sizes are equally frequent."""
        by_plate: dict[str | None, Counter] = defaultdict(Counter)
        uniform = []
        for chosen in whole:
            sizes = {i.size for i in chosen}
            colours = max(i.instance.shape[0] for i in chosen)
            if colours > 1:
                self.refuse(chosen, "FIELD_SIZE", f"an image of {colours} colours, wanted one grey value per pixel")
            elif len(sizes) > 1:
                self.refuse(chosen, "FIELD_SIZE", f"channels of {' and '.join(sorted(map(_size_text, sizes)))}")
            else:
                uniform.append(chosen)
                by_plate[chosen[0].plane.plate].update(sizes)
        kept = []
        for chosen in uniform:
            (usual, most), *rest = by_plate[chosen[0].plane.plate].most_common(2)
            size = chosen[0].size
            if rest and rest[0][1] == most:
                self.refuse(chosen, "FIELD_SIZE", f"as many fields of {_size_text(usual)} as of {_size_text(rest[0][0])}")
            elif size != usual:
                self.refuse(chosen, "FIELD_SIZE", f"{_size_text(size)}, where {most} fields of the plate are {_size_text(usual)}")
            else:
                kept.append(chosen)
        return kept

    def missing(self, instances: list[Instance], listed: dict[str, Listed], index: Index):
        """Refuse the index for every well of which files that it names are not there."""
        kind = "image" if self.settings.z == "planes" else "projection"
        ids = {key for _, key in self.settings.channels}
        here, seen = {id(some) for some in listed.values()}, {some.plane.plate for some in listed.values()}
        lost: dict[tuple, list[str]] = defaultdict(list)
        for path, one in index.images.items():
            p = one.plane
            wanted = p.kind == kind and ids & {p.channel, one.channel_name, index.channels.get(p.channel or "")}
            if wanted and id(one) not in here and (index.convention != "csv" or p.plate in seen):
                lost[p.plate, p.well].append(path)
        for (plate, well), paths in lost.items():
            message = (
                f"{_place(Plane(plate=plate, well=well))}: {len(paths)} files that the index names are not there or were refused, "
            )
            self.rejections.append(Rejection(index.uri, STAGE, "MISSING_FILE", message + f"the first is {min(paths)[-120:]}"))
        if index.wells is not None:
            rejected = {r.uri for r in self.rejections}
            there = {
                p.well
                for i in instances
                if i.uri not in rejected and (p := _parsed(i, self.settings)).kind in ("image", "projection")
            }
            for well in sorted(index.wells - there):
                message = f"{_place(Plane(plate=(*index.plates, None)[0], well=well))}: acquired, but no image of it is there"
                self.rejections.append(Rejection(index.uri, STAGE, "MISSING_FILE", message))


def _parsed(instance: Instance, settings: Plates) -> Plane:
    try:
        return filenames.parse(instance.path, settings.convention, settings.pattern)
    except Refused:
        return filenames.UNKNOWN


def _listed(instances: list[Instance], index: Index | None) -> dict[str, Listed]:
    """What the index says of each instance, by its URI.

    Paths of an index are relative to its folder. Where none of them leads to an instance (a copied folder, a CSV with paths of
    another machine) a file is the one of the same name whose folders agree the furthest up.
    """
    if index is None or not index.images:
        return {}
    folder = posixpath.dirname(index.path)
    whole = {posixpath.normpath(posixpath.join(folder, path)): listed for path, listed in index.images.items()}
    exact = {i.uri: whole[i.path] for i in instances if i.path in whole}
    if exact:
        return exact
    by_name: dict[str, list[tuple[list[str], Listed]]] = defaultdict(list)
    for path, listed in index.images.items():
        *folders, name = path.split("/")
        by_name[name].append((folders, listed))
    near = {}
    for i in instances:
        *folders, name = i.path.split("/")
        ranked = sorted(((_common_tail(folders, f), n) for n, (f, _) in enumerate(by_name.get(name, ()))), reverse=True)
        if ranked and (len(ranked) == 1 or ranked[0][0] > ranked[1][0]):
            near[i.uri] = by_name[name][ranked[0][1]][1]
    return near


def _said(said: dict[str, Any]) -> Listed:
    """What a page of OME-TIFF says of itself, or a plate of its plane: see :func:`sparkmed.formats.ome.facts`."""
    well = (wells.name(said["row"], said["column"]), said["row"], said["column"]) if "row" in said else (None, None, None)
    channel = str(said["c"]) if "c" in said else None
    convention = OME_ZARR if "ngff" in said else OME
    plane = Plane("image", convention, said.get("plate"), *well, said.get("sample"), said.get("z"), said.get("t"), channel)
    size, stage = (tuple(said[k]) if k in said else None for k in ("pixel_size_um", "stage_um"))
    return Listed(plane, said.get("channel"), size, stage)


def _of_ome(named: Plane, said: Plane, path: str) -> Plane:
    """A page by the name of its file and by its OME-XML, which knows no vendor's numbers of sites: those of a name count."""
    if named.kind not in (None, "image", "projection"):
        return named
    if named.site is not None:
        said = dataclasses.replace(said, site=None)
    if named.kind == "projection":
        said = dataclasses.replace(said, kind="projection", z=None)
    plane = _checked(named, said)
    if plane.well is None:
        raise Refused("UNKNOWN_NAME", "neither the name of the file nor its OME-XML says of which well it is")
    return plane if plane.plate is not None else dataclasses.replace(plane, plate=filenames.folder_plate(posixpath.dirname(path)))


def _common_tail(a: list[str], b: list[str]) -> int:
    n = 0
    for x, y in zip(reversed(a), reversed(b), strict=False):
        if x != y:
            break
        n += 1
    return n


def _checked(named: Plane, listed: Plane) -> Plane:
    """What name and index say together; ``INDEX_MISMATCH`` when they contradict each other."""
    if named.kind is None or listed.kind not in ("image", "projection"):
        return dataclasses.replace(listed, plate=listed.plate or named.plate, convention=named.convention or listed.convention)
    if named.kind not in ("image", "projection"):
        raise Refused(
            "INDEX_MISMATCH", f"{_place(listed)}: by its name the file is of kind {named.kind}, by the index of {listed.kind}"
        )
    compared = ("well", "site", "t", "channel") + (("z",) if listed.kind == "image" else ())
    for what in compared:
        a, b = getattr(named, what), getattr(listed, what)
        if a is not None and b is not None and a != b:
            raise Refused("INDEX_MISMATCH", f"{_place(named)}: the name says {what} {a}, the index {what} {b}")

    def either(what: str):
        value = getattr(listed, what)
        return getattr(named, what) if value is None else value

    said = {what: either(what) for what in ("plate", "batch", "well", "row", "column", "site", "z", "t", "channel")}
    if listed.kind == "projection":
        said["z"] = None
    return Plane(kind=listed.kind, convention=named.convention, **said)


def _with_projections(images: list[_Image]) -> list[_Image]:
    """MetaXpress writes projections beside the folders of the z-steps too: images without a z of a channel that has others."""
    stacks = {_without_z(i.plane) for i in images if i.plane.convention == "imagexpress" and i.plane.z is not None}

    def told(i: _Image) -> _Image:
        beside = i.plane.convention == "imagexpress" and i.plane.z is None and _without_z(i.plane) in stacks
        return dataclasses.replace(i, plane=dataclasses.replace(i.plane, kind="projection")) if beside else i

    return [told(i) for i in images]


def _without_z(p: Plane) -> tuple:
    return p.plate, p.well, p.site, p.t, p.channel


def _place(p: Plane) -> str:
    known = (("plate", p.plate), ("well", p.well), ("site", p.site), ("z", p.z), ("t", p.t))
    return ", ".join(f"{name} {value}" for name, value in known if value is not None)


def _size_text(size: tuple) -> str:
    i, j, pixel = size
    return f"{i} x {j} pixels" + (f" of {pixel[0]:g} x {pixel[1]:g} um" if pixel else "")


def _header(chosen: list[_Image], settings: Plates) -> VolumeHeader:
    """The header of a field with one image per channel."""
    first, p = chosen[0], chosen[0].plane
    _, columns, rows, _ = first.instance.shape
    pixel = first.listed.pixel_size_um if first.listed else None
    x, y = (pixel[0] / 1000, pixel[1] / 1000) if pixel else (1.0, 1.0)
    affine = (-x, 0.0, 0.0, 0.0, 0.0, -y, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0)
    facts = {
        "source": p.convention,
        "batch": p.batch,
        "plate": p.plate,
        "well": p.well,
        "row": p.row,
        "column": p.column,
        "site": p.site,
        "z": p.z,
        "t": p.t,
        "channels": [name for name, _ in settings.channels],
        "pixel_size_um": pixel,
        "stage_um": first.listed.stage_um if first.listed else None,
        "projection": True if p.kind == "projection" else None,
    }
    sources = [dataclasses.replace(i.instance, format=FORMAT, modality=MODALITY) for i in chosen]
    header = volume_header(sources, (len(sources), columns, rows, 1), affine, facts)
    place = [header.uid, p.plate, p.well, p.site, p.z, p.t]
    return dataclasses.replace(header, uid=hashlib.sha256(json.dumps(place).encode()).hexdigest()[:32])
