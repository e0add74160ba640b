"""Each DICOM instance once: which of several files under one SOPInstanceUID counts, when they are copies and when they are not.

Copies are told by their headers and, where their bytes differ, by their pixels, which nothing else decodes before a volume is read.
"""

import contextlib
import hashlib
from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from sparkmed.formats import archive, dicom, isolation
from sparkmed.formats.instance import Instance
from sparkmed.rejection import Refused, Rejection

STAGE = "volumes"


def _identity(i: Instance) -> tuple:
    """What two encodings of one instance have in common: all facts but how colours are encoded."""
    facts = {k: v for k, v in i.facts.items() if k != "photometric" or v in ("MONOCHROME1", "MONOCHROME2", "PALETTE COLOR")}
    return i.shape, i.sop_class, i.modality, i.patient, i.series_uid, facts


def once(instances: list[Instance]) -> tuple[list[Instance], list[Rejection]]:
    """Each SOP instance once. A second copy is listed; two different images under one UID are both refused."""
    by_uid: dict[str, list[Instance]] = defaultdict(list)
    for i in instances:
        by_uid[i.sop_uid or i.sha256].append(i)
    kept, rejections = [], []
    for same in by_uid.values():
        if len(same) > 1:
            sound, faulty = _sound(same)
            if not sound:
                kept += same  # each is refused for what is wrong with it
                continue
            same, rejections = sound, rejections + faulty
        whole, broken = _comparable(same)
        rejections += broken
        (first, seen), *others = whole
        if all(i.sha256 == first.sha256 or (_identity(i) == _identity(first) and _alike(pixels, seen)) for i, pixels in others):
            kept.append(first)
            refused = Refused("DUPLICATE_INSTANCE", "a copy of an instance that is used once")
            rejections += [refused.at(i.uri, STAGE) for i, _ in others]
        else:
            refused = Refused("CONFLICTING_INSTANCE", f"{len(whole)} different images have the same SOPInstanceUID")
            rejections += [refused.at(i.uri, STAGE) for i, _ in whole]
    return sorted(kept, key=lambda i: i.uri), rejections


def _sound(same: list[Instance]) -> tuple[list[Instance], list[Rejection]]:
    """Copies whose headers say that they are whole, and why not of the others."""
    problems = {i.uri: i.facts.get("problem") for i in same}
    faulty = [Refused(*problems[i.uri]).at(i.uri, STAGE) for i in same if problems[i.uri]]
    return [i for i in same if not problems[i.uri]], faulty


@dataclass(frozen=True)
class _Pixels:
    """What is compared of two copies: a digest per frame, and one frame for copies that lost something."""

    digests: list[str]
    frame: np.ndarray
    lossy: bool


def _comparable(same: list[Instance]) -> tuple[list[tuple[Instance, _Pixels | None]], list[Rejection]]:
    """Copies of one instance, the one to use first, with their pixels (None where there is no decoder, or nothing to compare); and
    those that cannot be decoded while another can."""
    ordered = sorted(same, key=lambda i: (not _can_be_decoded(i), _lossy(i), i.uri))
    if len({i.sha256 for i in same}) == 1:
        return [(i, None) for i in ordered], []
    seen: dict[str, _Pixels | Refused | None] = {}
    for i in ordered:
        if i.sha256 not in seen:
            try:
                seen[i.sha256] = _pixels(i) if _can_be_decoded(i) else None
            except Refused as e:
                seen[i.sha256] = e
    whole = [(i, found) for i in ordered if not isinstance(found := seen[i.sha256], Refused)]
    if not whole:  # whichever is used says why it cannot be read
        return [(i, None) for i in ordered], []
    return whole, [e.at(i.uri, STAGE) for i in ordered if isinstance(e := seen[i.sha256], Refused)]


def _pixels(i: Instance) -> _Pixels:
    frames = list(range(i.shape[3]))
    what = f"{dicom.decoder(i.transfer_syntax, i.facts) or 'native'} on a copy of an instance"
    ((_, data),) = archive.read_many([i.uri])
    digests, first = [], np.zeros(0)
    for n, frame in enumerate(isolation.decode_each(dicom.read_frames, data, i.facts, i.transfer_syntax, frames, what=what)):
        digests.append(hashlib.sha256(np.ascontiguousarray(frame, frame.dtype.newbyteorder("<"))).hexdigest())
        first = frame if n == 0 else first
    return _Pixels(digests, first, _lossy(i))


def _alike(a: _Pixels | None, b: _Pixels | None) -> bool:
    """Equal voxel by voxel; where one lost something, nearly so: on average within a twentieth of the range."""
    if a is None or b is None or a.digests == b.digests:
        return True
    if not (a.lossy or b.lossy) or a.frame.shape != b.frame.shape:
        return False
    x, y = a.frame.astype(np.float64), b.frame.astype(np.float64)
    return bool(np.abs(x - y).mean() <= 1 + 0.05 * max(np.ptp(x), np.ptp(y)))


def _can_be_decoded(instance: Instance) -> bool:
    with contextlib.suppress(Refused):
        dicom.decoder(instance.transfer_syntax, instance.facts)
        return True
    return False


_LOSSY = (".4.50", ".4.51", ".4.81", ".4.91", ".4.203")


def _lossy(instance: Instance) -> bool:
    return instance.transfer_syntax.endswith(_LOSSY)
