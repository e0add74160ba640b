import io
import os
import zipfile

import numpy as np
import pytest
from archives import ct_pairs
from PIL import Image

from sparkmed import config, storage, tables
from sparkmed.spark import catalog

pytestmark = pytest.mark.engine
LINEAGE = {"config_digest": "c", "code_version": "v"}


@pytest.fixture
def archive(tmp_path):
    folder = ct_pairs(tmp_path / "archive", 2)
    with zipfile.ZipFile(folder / "more.zip", "w") as z:
        picture = io.BytesIO()
        Image.fromarray(np.zeros((4, 5), np.uint8)).save(picture, "PNG")
        z.writestr("good.png", picture.getvalue())
        z.writestr("../escape.png", picture.getvalue())
        z.writestr("broken.png", picture.getvalue()[:30])
    (folder / "notes.txt").write_text("not an image")
    return folder


def update(spark, archive, tmp_path):
    return catalog.update(spark, str(archive), str(tmp_path / "lake"), config.Catalog(), None, LINEAGE)


def snapshot(tmp_path):
    return {f.path: f.mtime_ns for f in storage.walk(str(tmp_path / "lake"))}


def rows(spark, tmp_path):
    lake = str(tmp_path / "lake")
    read = {r.path for r in catalog.current(spark, lake).collect()}
    kept_out = {(r.uri.removeprefix(f"file://{tmp_path}/archive/"), r.reason) for r in catalog.refused(spark, lake).collect()}
    return read, kept_out


def test_every_file_ends_in_exactly_one_table(spark, archive, tmp_path):
    counts = update(spark, archive, tmp_path)
    read, kept_out = rows(spark, tmp_path)
    assert read == {f"{k}/s{i:02d}.nii.gz" for k in ("img", "lab") for i in (0, 1)} | {"more.zip/good.png"}
    assert len(kept_out) == 3 and counts["refused"] == 3
    assert counts["files"] == counts["new"] == 6
    table = tables.catalog(str(tmp_path / "lake")).rows()
    assert all(len(r["sha256"]) == 64 and r["run"] == 1 for r in table)


def test_a_second_run_reads_no_body_and_writes_nothing(spark, archive, tmp_path, monkeypatch):
    update(spark, archive, tmp_path)
    before = snapshot(tmp_path)
    for path in archive.rglob("*"):
        if path.is_file():
            path.chmod(0)  # who opened one now would fail, unless root
    monkeypatch.setattr(catalog, "_write", lambda *_: pytest.fail("a body was read"))
    counts = update(spark, archive, tmp_path)
    assert (counts["new"], counts["changed"], counts["gone"]) == (0, 0, 0)
    assert snapshot(tmp_path) == before


def test_changed_added_and_deleted_files_are_noticed(spark, archive, tmp_path):
    update(spark, archive, tmp_path)
    (archive / "notes.txt").unlink()
    (archive / "img" / "s01.nii.gz").unlink()
    changed = archive / "img" / "s00.nii.gz"
    old = {r["path"]: r["sha256"] for r in tables.catalog(str(tmp_path / "lake")).rows()}
    changed.write_bytes((archive / "lab" / "s01.nii.gz").read_bytes())
    os.utime(changed, ns=(1, 1))  # an old time hides nothing
    ct_pairs(archive / "new", 1)
    counts = update(spark, archive, tmp_path)
    assert (counts["new"], counts["changed"], counts["gone"]) == (2, 1, 2)
    current = {r.path: r.sha256 for r in catalog.current(spark, str(tmp_path / "lake")).collect()}
    assert "img/s01.nii.gz" not in current and "new/img/s00.nii.gz" in current
    assert current["img/s00.nii.gz"] not in (None, old["img/s00.nii.gz"])
    assert "notes.txt" not in {u for u, _ in rows(spark, tmp_path)[1]}


def test_a_refused_file_that_was_mended_is_read(spark, archive, tmp_path):
    update(spark, archive, tmp_path)
    (archive / "notes.txt").write_bytes((archive / "img" / "s00.nii.gz").read_bytes())
    update(spark, archive, tmp_path)
    read, kept_out = rows(spark, tmp_path)
    assert "notes.txt" in read and "notes.txt" not in {u for u, _ in kept_out}


def test_a_run_killed_between_its_two_commits_is_done_again(spark, archive, tmp_path, monkeypatch):
    commit = tables.Table.commit

    def killed(self, files, *fence, **more):
        if self.url.endswith("catalog"):
            raise KeyboardInterrupt
        return commit(self, files, *fence, **more)

    with monkeypatch.context() as m:
        m.setattr(tables.Table, "commit", killed)
        with pytest.raises(KeyboardInterrupt):
            update(spark, archive, tmp_path)
    assert update(spark, archive, tmp_path)["new"] == 6
    read, _ = rows(spark, tmp_path)
    assert len(read) == 5
    assert catalog.refused(spark, str(tmp_path / "lake")).count() == 3


def test_a_missing_archive_is_an_error(spark, tmp_path):
    with pytest.raises(FileNotFoundError):
        update(spark, tmp_path / "none", tmp_path)
