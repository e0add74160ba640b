"""The key under which patients become subjects."""

import hashlib
import hmac
import os
import secrets
import stat

from sparkmed import storage
from sparkmed.config import Config, Identity
from sparkmed.rejection import InputError


def load_key(config: Config) -> tuple[bytes, str]:
    """:func:`key_of` the config's section, made in the lake when nothing else is named."""
    return key_of(config.identity, storage.join(config.lake, "subject.key"))


def key_of(identity: Identity, url: str) -> tuple[bytes, str]:
    """The HMAC key and where it came from: the config's file, its environment variable, or one made at ``url``.

    A key made here is readable by its owner only; whoever loses it can no longer tell which subject a new study belongs to.
    Raises :class:`InputError` when the named file is missing or the key is shorter than 16 bytes.
    """
    if identity.key_file:
        try:
            return _long_enough(storage.read_bytes(identity.key_file).strip(), identity.key_file), identity.key_file
        except OSError as e:
            raise InputError(f"identity.key_file {identity.key_file}: {e.strerror or e}") from None
    if os.environ.get(identity.key_env):
        return _long_enough(os.environ[identity.key_env].encode(), f"environment variable {identity.key_env}"), identity.key_env
    if not storage.exists(url):
        _create(url, secrets.token_hex(32).encode())
    return _long_enough(storage.read_bytes(url).strip(), url), url


def fingerprint(key: bytes | None) -> str:
    """16 hex digits that differ between keys, and between a key and None (subjects are kept); nothing of the key is in them."""
    seen = b"kept" if key is None else hmac.new(key, b"sparkmed identity check", hashlib.sha256).digest()
    return hashlib.sha256(seen).hexdigest()[:16]


def _create(url: str, key: bytes):
    path = storage.local_path(url)
    if path is None:
        raise InputError(
            "no pseudonym key is made on remote storage: name a file in identity.key_file or set the variable of identity.key_env"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, stat.S_IRUSR | stat.S_IWUSR)
    except FileExistsError:
        return  # made by another process in between: that one counts
    with os.fdopen(descriptor, "wb") as f:
        f.write(key)


def _long_enough(key: bytes, where: str) -> bytes:
    if len(key) < 16:
        raise InputError(f"{where}: the pseudonym key has {len(key)} bytes, wanted at least 16")
    return key
