"""Who is trained on: subjects as pseudonyms, and a split for each that never changes."""

import hashlib
import hmac

from sparkmed import config
from sparkmed.rejection import InputError

_SPLITS = ("train", "val", "test")
_KEY_BYTES = 16


def split_of(subject: str, splits: config.Splits, given: str | None = None) -> str:
    """``train``, ``val`` or ``test`` of a subject; all its images share it.

    Without ``given`` it is a stable hash of the subject alone: the first 8 bytes of SHA-256 of ``split:<subject>`` as a
    fraction of 2^64, below ``splits.train`` for train, below train + val for val. Data added later moves nobody.

    ``given`` is what the archive says; ``splits.rename`` translates it, and of a train given so, ``splits.val_from_train``
    of the subjects become val by another hash (``val_from_train:<subject>``). An unknown one raises :class:`InputError`.
    """
    if given is None:
        position = _fraction("split", subject)
        shares = [(name, getattr(splits, name)) for name in _SPLITS if getattr(splits, name) > 0]
        for name, share in shares[:-1]:
            if position < share:
                return name
            position -= share
        return shares[-1][0]
    split = splits.rename.get(given, given)
    if split not in _SPLITS:
        raise InputError(f"split {given!r}: wanted train, val or test; volumes.splits.rename says what other names mean")
    if split == "train" and _fraction("val_from_train", subject) < splits.val_from_train:
        return "val"
    return split


def pseudonym(patient: str, key: bytes) -> str:
    """``sub-`` and 16 hex digits: HMAC-SHA256 of the patient identifier under a key that the user holds (RFC 2104).

    Spaces and NULs around the identifier do not count: DICOM pads with them (PS3.5 6.2). Raises :class:`InputError` for
    an empty identifier, which would make one subject of many people, and for a key below 16 bytes.
    """
    patient = patient.strip(" \0")
    if not patient:
        raise InputError("a pseudonym wants a patient identifier, got an empty one")
    if len(key) < _KEY_BYTES:
        raise InputError(f"the pseudonym key has {len(key)} bytes, wanted {_KEY_BYTES} or more: who guesses it names the patients")
    return "sub-" + hmac.new(key, patient.encode(), hashlib.sha256).hexdigest()[:16]


def _fraction(purpose: str, subject: str) -> float:
    """A number in [0, 1) that depends on the two texts alone."""
    first = int.from_bytes(hashlib.sha256(f"{purpose}:{subject}".encode()).digest()[:8], "big")
    return (first >> 11) / 2**53
