import io
import os
import zipfile

import numpy as np
import pytest
from archives import ct_pairs
from formats import dicoms
from PIL import Image

from sparkmed import config, identity, storage, tables
from sparkmed.imaging import splits
from sparkmed.rejection import InputError
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


def update(spark, archive, tmp_path, key=None):
    return catalog.update(spark, str(archive), str(tmp_path / "lake"), config.Catalog(), key, LINEAGE)


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


def test_links_out_of_the_archive_are_refused_by_name(spark, archive, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (archive / "linked").symlink_to(tmp_path / "elsewhere")
    (archive / "nowhere.nii.gz").symlink_to(tmp_path / "none")
    for _ in range(2):
        counts = update(spark, archive, tmp_path)
        assert {("linked", "LINK"), ("nowhere.nii.gz", "LINK")} <= set(rows(spark, tmp_path)[1])
    assert counts["new"] == counts["changed"] == 0
    (archive / "nowhere.nii.gz").unlink()
    assert update(spark, archive, tmp_path)["gone"] == 1
    assert "nowhere.nii.gz" not in {path for path, _ in rows(spark, tmp_path)[1]}


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


def test_an_archive_that_is_its_own_lake_is_an_error(spark, archive):
    with pytest.raises(InputError, match="both"):
        catalog.update(spark, str(archive), str(archive), config.Catalog(), None, LINEAGE)


def test_a_lake_inside_the_archive_is_no_image(spark, archive):
    lake = archive / "lake"
    for _ in range(2):
        counts = catalog.update(spark, str(archive), str(lake), config.Catalog(), None, LINEAGE)
        assert counts["files"] == 6
    assert counts["new"] == 0


def test_a_lake_inside_the_archive_by_another_name_is_no_image(spark, archive, tmp_path):
    (tmp_path / "link").symlink_to(archive)
    for url in (tmp_path / "link", archive):
        counts = catalog.update(spark, str(url), str(archive / "lake"), config.Catalog(), None, LINEAGE)
        assert counts["files"] == 6


def test_an_archive_inside_the_lake_is_read(spark, archive, tmp_path):
    counts = catalog.update(spark, str(archive), str(tmp_path), config.Catalog(), None, LINEAGE)
    assert counts["files"] == 6


def bytes_of(folder):
    return b"".join(p.read_bytes() for p in folder.rglob("*") if p.is_file())


def test_the_fingerprint_tells_keys_apart_and_not_what_they_are():
    keys = [None, b"0" * 16, b"1" * 16]
    prints = [identity.fingerprint(k) for k in keys]
    assert len(set(prints)) == 3 and prints == [identity.fingerprint(k) for k in keys]
    assert all(len(p) == 16 for p in prints)


@pytest.fixture
def patients(tmp_path):
    folder = tmp_path / "archive"
    folder.mkdir()
    for n, ds in enumerate(dicoms.series(dicoms.stack((6, 5, 4)))):
        ds.PatientID = "Miller-1957"
        (folder / f"{n}.dcm").write_bytes(dicoms.encoded(ds))
    (folder / "notes.txt").write_text("not an image")
    return folder


def subjects(tmp_path):
    return {r["subject"] for r in tables.catalog(str(tmp_path / "lake")).rows()}


def test_names_that_were_kept_are_nowhere_once_they_are_not(spark, patients, tmp_path):
    update(spark, patients, tmp_path)
    (patients / "0.dcm").unlink()
    (patients / "notes.txt").unlink()
    update(spark, patients, tmp_path)  # superseded rows and marks of files that are gone
    assert b"Miller" in bytes_of(tmp_path / "lake")
    key = b"k" * 16
    counts = update(spark, patients, tmp_path, key)
    assert (counts["new"], counts["changed"], counts["gone"], counts["instances"], counts["refused"]) == (0, 3, 0, 3, 0)
    assert subjects(tmp_path) == {None, splits.pseudonym("Miller-1957", key)}  # None: a mark of a file that is gone
    assert b"Miller" not in bytes_of(tmp_path / "lake")
    assert {r.path for r in catalog.current(spark, str(tmp_path / "lake")).collect()} == {f"{n}.dcm" for n in (1, 2, 3)}
    before = snapshot(tmp_path)
    assert update(spark, patients, tmp_path, key)["changed"] == 0
    assert snapshot(tmp_path) == before
    assert update(spark, patients, tmp_path, b"another key " * 2)["changed"] == 3


def test_a_lake_of_an_earlier_reader_is_read_again(spark, patients, tmp_path, monkeypatch):
    update(spark, patients, tmp_path)
    monkeypatch.setattr(catalog, "READER", catalog.READER + 1)
    assert update(spark, patients, tmp_path)["changed"] == 5
    assert update(spark, patients, tmp_path)["changed"] == 0
    assert len(tables.catalog(str(tmp_path / "lake")).rows()) == 4


def test_names_of_files_that_are_all_gone_go_too(spark, patients, tmp_path):
    update(spark, patients, tmp_path)
    for path in patients.iterdir():
        path.unlink()
    update(spark, patients, tmp_path)
    update(spark, patients, tmp_path, b"k" * 16)
    assert b"Miller" not in bytes_of(tmp_path / "lake")


def test_old_data_files_go_even_if_the_run_was_killed_before_it_removed_them(spark, patients, tmp_path, monkeypatch):
    update(spark, patients, tmp_path)
    with monkeypatch.context() as m:
        m.setattr(tables.Table, "sweep", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            update(spark, patients, tmp_path, b"k" * 16)
    assert b"Miller" in bytes_of(tmp_path / "lake")
    assert update(spark, patients, tmp_path, b"k" * 16)["changed"] == 0
    assert b"Miller" not in bytes_of(tmp_path / "lake")


@pytest.mark.parametrize("fate", ["finishes", "is killed"])
def test_a_run_that_meets_another_between_its_commits_loses_no_refusal(spark, archive, tmp_path, monkeypatch, fate):
    """Run A stands between its two commits while run B does the same work."""
    commit = tables.Table.commit
    state = {"runs": 0}

    def meeting(self, files, *fence, **more):
        if self.url.endswith("catalog"):
            state["runs"] += 1
            if state["runs"] == 1:
                try:
                    update(spark, archive, tmp_path)
                except KeyboardInterrupt:
                    pass
            elif fate == "is killed":
                raise KeyboardInterrupt
        return commit(self, files, *fence, **more)

    with monkeypatch.context() as m:
        m.setattr(tables.Table, "commit", meeting)
        if fate == "finishes":
            with pytest.raises(tables.Conflict):
                update(spark, archive, tmp_path)
        else:
            update(spark, archive, tmp_path)
    read, kept_out = rows(spark, tmp_path)
    assert len(read) == 5 and len(kept_out) == 3
    assert update(spark, archive, tmp_path)["refused"] == 3
    assert len(tables.quarantine(str(tmp_path / "lake")).rows()) == 3  # what the loser wrote is gone
    assert rows(spark, tmp_path) == (read, kept_out)


def test_any_name_of_a_file(spark, archive, tmp_path):
    picture = (archive / "img" / "s00.nii.gz").read_bytes()
    for folder in (b"bad\xff", b"a::b [x]"):
        os.makedirs(os.fsencode(archive) + b"/" + folder)
        with open(os.fsencode(archive) + b"/" + folder + b"/i.nii.gz", "wb") as f:
            f.write(picture)
    counts = update(spark, archive, tmp_path)
    read, kept_out = rows(spark, tmp_path)
    assert ("bad\\udcff/i.nii.gz", "BAD_NAME") in kept_out and "a::b [x]/i.nii.gz" in read
    assert (counts["instances"], counts["refused"]) == (6, 4)
    assert update(spark, archive, tmp_path)["new"] == 0
