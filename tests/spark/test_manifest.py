import itertools
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparkmed import config, storage, tables
from sparkmed.spark import catalog, manifest
from sparkmed.storage import File

LINEAGE = {"config_digest": "c", "code_version": "v"}
NAMES = st.lists(
    st.sampled_from(["a", "a.b", "a/x", "a/x/y", "b", "b\udcff", "b\\udcff", "\u00fc", "\U0001f600", "z"]), unique=True
)


def known(uri):
    return manifest.Known(uri, 1, 0, 0, 0, 1, False, None)


@given(NAMES, NAMES)
def test_both_sides_are_gone_through_together(found, before):
    spelt = {storage.spelt(n): File(n, n, 0, 0) for n in sorted(found, key=storage.spelt)}
    before = {n: known(n) for n in sorted({storage.spelt(n) for n in before})}
    files = (File(n, n, 0, 0) for n in sorted(found, key=storage.spelt))
    seen = list(manifest.compare(files, before.values()))
    assert [(f and storage.spelt(f.uri), r and r.container) for f, r in seen] == [
        (n if n in spelt else None, n if n in before else None) for n in sorted({*spelt, *before})
    ]


def test_a_listing_out_of_order_is_an_error_and_nothing_is_taken_for_gone():
    with pytest.raises(RuntimeError, match="a was listed behind b"):
        list(manifest.compare((File(n, n, 0, 0) for n in "ba"), [known("a"), known("b")]))


@pytest.mark.engine
def test_many_batches_give_what_one_gives(spark, tmp_path, monkeypatch):
    """Names whose order by folder, by whole path and by spelling differ; two files at a time on the driver."""
    names = [b"a/1", b"a/2", b"a.b/3", b"a.b4", b"a0/5", b"b\xff/6", b"b\xc3\xbc7", b"b8", b"\xf0\x9f\x98\x80/9"]
    for name in names:
        path = os.fsencode(tmp_path) + b"/archive/" + name
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as f:
            f.write(b"not an image")
    monkeypatch.setattr(catalog, "FILES_PER_SLOT", 1)

    def update():
        return catalog.update(spark, str(tmp_path / "archive"), str(tmp_path / "lake"), config.Catalog(), None, LINEAGE)

    assert update() == {"files": 9, "new": 9, "changed": 0, "gone": 0, "refused": 9, "instances": 0}
    rows = list(manifest.Manifest(str(tmp_path / "lake"), 1))
    assert [r.container for r in rows] == sorted(r.container for r in rows) and len(rows) == 9
    assert update() == {"files": 9, "new": 0, "changed": 0, "gone": 0, "refused": 9, "instances": 0}
    for name in names[:3]:
        os.unlink(os.fsencode(tmp_path) + b"/archive/" + name)
    os.truncate(os.fsencode(tmp_path) + b"/archive/" + names[3], 1)
    assert update() == {"files": 6, "new": 0, "changed": 1, "gone": 3, "refused": 6, "instances": 0}
    assert os.listdir(tmp_path / "lake" / "catalog" / "_files") == ["2"], "earlier ones go"
    storage.remove(str(tmp_path / "lake" / "catalog" / "_files"), recursive=True)  # as by an earlier version
    assert update() == {"files": 6, "new": 0, "changed": 0, "gone": 0, "refused": 6, "instances": 0}
    assert catalog.refused(spark, str(tmp_path / "lake")).count() == 6
    gone = [r["container"] for r in tables.catalog(str(tmp_path / "lake")).rows() if r["format"] == "gone"]
    assert len(gone) == 3


def test_a_manifest_that_a_later_run_removed_is_a_conflict(tmp_path):
    url = storage.join(str(tmp_path), "catalog", "_files", "1", "contents.json")
    storage.write_json(url, {"parts": ["none.parquet"], "rows": 1, "identities": [None]})
    with pytest.raises(tables.Conflict, match="later run"):
        next(itertools.chain(manifest.Manifest(str(tmp_path), 1)))
