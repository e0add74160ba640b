"""From an archive to a patch dataset: catalog, volumes, patches; and de-identified copies."""

import logging
import uuid

from sparkmed import dataset, identity, storage, tables
from sparkmed.config import Config, Deidentification, digest
from sparkmed.imaging import paths
from sparkmed.pipeline import common
from sparkmed.reasons import sentence
from sparkmed.rejection import InputError, Rejection
from sparkmed.spark import catalog as spark_catalog
from sparkmed.spark import deidentify as spark_deidentify
from sparkmed.spark import patches as spark_patches
from sparkmed.spark import session as spark_session
from sparkmed.spark import volumes as spark_volumes

log = logging.getLogger("sparkmed")


def catalog(config: Config) -> dict:
    """Bring ``catalog/`` and ``quarantine/`` up to date with the archive."""
    key, origin = common.key_of(config)
    if origin.endswith("subject.key"):
        log.info("subjects are pseudonyms under the key %s: keep it, and keep it secret", origin)
    _claim_lake(config)
    return _catalog(config, key)


def _claim_lake(config: Config):
    """A lake is of one project: two would take each other's files for deleted."""
    where = storage.join(config.lake, "project.json")
    owner = storage.read_json(where)["name"] if storage.exists(where) else None
    if owner is None:
        storage.write_json(where, {"name": config.name})
    elif owner != config.name:
        raise InputError(f"lake {config.lake} is of project {owner}, the config is of {config.name}: give each its own lake")


def volumes(config: Config) -> dict:
    """Make ``volumes/`` from the catalog: geometry, subjects, labels, splits."""
    if not tables.catalog(config.lake).committed(spark_catalog.STAGE):
        raise InputError(f"lake {config.lake} has no catalog: run the catalog stage first")
    return _make_volumes(config, common.key_of(config)[0])


def _catalog(config: Config, key: bytes | None) -> dict:
    lineage = common.lineage(config, config.catalog, config.identity)
    try:
        counts = spark_catalog.update(common.spark_of(config), config.archive, config.lake, config.catalog, key, lineage)
    except FileNotFoundError:
        raise InputError(f"archive {config.archive} does not exist: say where the images are with archive=FOLDER") from None
    if not counts["files"]:
        raise InputError(f"archive {config.archive} holds no file")
    refused, total = counts["refused"], counts["refused"] + counts["instances"]
    common.require_few(refused, total, config.catalog.max_refused, "catalog.max_refused", "files")
    return counts


def _make_volumes(config: Config, key: bytes | None) -> dict:
    counts = spark_volumes.build(common.spark_of(config), config, key, common.lineage(config, config.volumes, config.identity))
    common.require_few(counts["refused"], counts["files"], config.volumes.max_refused, "volumes.max_refused", "files")
    return counts


def patches(config: Config) -> dict:
    """Write the patch dataset of the labelled volumes, unless it is there."""
    config = common.pinned(config)
    rows = common.labelled_rows(config)
    spark = common.spark_of(config)
    lineage = common.lineage(config, config.preprocess, config.patches)
    url = spark_patches.write(spark, rows, config, lineage)
    facts = dataset.describe(url)
    quarantine = tables.quarantine(config.lake)
    known = set(quarantine.read(["key"])["key"].to_pylist()) if facts["refused"] else set()
    sources = {r["uid"]: r["sources"] for r in rows}
    refusals = []
    for uid, (reason, message) in facts["refused"].items():
        key = f"{facts['version']}/{uid}"
        if key not in known:  # a run that was killed before it could say so is made up for
            found = [Rejection(uri, dataset.STAGE, reason, message) for uri in sources[uid]]
            refusals += [spark_catalog.quarantine_row(r, lineage, key=key) for r in found]
    if refusals:
        quarantine.commit([quarantine.write(refusals)])
    common.require_few(len(facts["refused"]), len(rows), config.volumes.max_refused, "volumes.max_refused", "volumes")
    for name, missing in facts["shortfall"].items():
        log.info("class %s fell short by %d patches, which are centred on other classes", name, missing)
    return {"dataset": url, **facts["counts"], "refused": len(facts["refused"])}


def archive_is_there(config: Config):
    try:
        first = next(storage.walk(config.archive), None)
    except FileNotFoundError:
        raise InputError(f"archive {config.archive} does not exist: say where the images are with archive=FOLDER") from None
    if first is None:
        raise InputError(f"archive {config.archive} holds no file")


def patterns(config: Config):
    images, labels = config.volumes.images, config.volumes.labels.pattern
    for pattern in [
        *([images] if isinstance(images, str) else images or []),
        *([labels] if labels else []),
        *config.catalog.exclude,
    ]:
        paths.PathPattern(pattern)


def rehearse(config: Config):
    """The first two stages in a lake that is thrown away."""
    key, _ = common.key_of(config)
    archive, lake = storage.absolute(config.archive), storage.absolute(config.lake)
    limits = config.catalog
    if lake.startswith(f"{archive}/"):  # the scratch lake is left out by itself, the real one is not
        limits = limits.model_copy(update={"exclude": (*limits.exclude, f"{lake.removeprefix(f'{archive}/')}/**")})
    scratch = config.model_copy(update={"lake": storage.join(lake, f"check-{uuid.uuid4().hex[:8]}"), "catalog": limits})
    try:
        _catalog(scratch, key)
        _make_volumes(scratch, key)
    finally:
        if storage.exists(scratch.lake):
            storage.remove(scratch.lake, recursive=True)


def deidentify(wanted: Deidentification) -> dict:
    """De-identified copies of the DICOM files of an archive, each proven clean, and one audit row for every file."""
    if not storage.exists(wanted.archive):
        raise InputError(f"archive {wanted.archive} does not exist: say where the DICOM files are")
    wanted = wanted.model_copy(update={"archive": storage.absolute(wanted.archive), "out": storage.absolute(wanted.out)})
    place = storage.absolute(wanted.key or f"{wanted.out}.key")
    key, origin = identity.key_of(wanted.identity, place)
    if origin == place:
        log.info(
            "pseudonyms, dates and UIDs are functions of the key %s: keep it, keep it secret, and never hand it on with them",
            origin,
        )
    settings = digest(wanted.deidentify, identity.fingerprint(key), common.code_version())[:16]
    lineage = {**common.lineage(None, wanted.deidentify, wanted.identity), "settings": settings}
    spark = spark_session.session(wanted.spark, "sparkmed deidentify")
    spark_session.require_shared(spark, wanted.out)
    counts = spark_deidentify.run(spark, wanted, key, lineage)
    reasons = tables.audit(wanted.out).read(["reason"])["reason"].value_counts().to_pylist()
    for reason, count in sorted((r["values"], r["counts"]) for r in reasons if r["values"]):
        log.info("%6d held back: %s (%s)", count, sentence(reason), reason)
    return counts
