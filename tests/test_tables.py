import datetime
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pytest
from deltalake import DeltaTable

from sparkmed import storage, tables
from sparkmed.rejection import InputError


@pytest.fixture
def table(tmp_path):
    return tables.promotions(str(tmp_path))


def names(table):
    return sorted(r["model_name"] for r in table.rows())


def test_an_uncommitted_file_is_invisible(table):
    file = table.write([{"model_name": "a"}])
    assert table.rows() == []
    table.commit([file])
    assert names(table) == ["a"]


def test_a_table_that_does_not_exist_is_empty(table):
    assert table.read(["model_name"]).column_names == ["model_name"]
    assert table.committed("writer") == 0
    assert table.paths() == []


def test_the_same_number_commits_once(table):
    table.commit([table.write([{"model_name": "a"}])], ("writer", 1))
    with pytest.raises(tables.Conflict):
        table.commit([table.write([{"model_name": "b"}])], ("writer", 1))
    assert names(table) == ["a"]
    assert table.committed("writer") == 1


def test_of_rivals_exactly_one_wins(table):
    table.commit([table.write([{"model_name": "first"}])], ("writer", 1))

    def attempt(i):
        try:
            table.commit([table.write([{"model_name": f"r{i}"}])], ("writer", 2))
            return 1
        except tables.Conflict:
            return 0

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(attempt, range(8))) == 1
    assert len(table.rows()) == 2


def test_replacing_is_one_step(table):
    table.commit([table.write([{"model_name": "old"}])], ("writer", 1))
    kept = table.write([{"model_name": "kept"}])
    table.commit([kept])
    old = [p for p in table.paths() if p != kept.path]
    table.commit([table.write([{"model_name": "new"}])], ("writer", 2), replace=old)
    assert names(table) == ["kept", "new"]


def test_unknown_columns_are_errors(table):
    with pytest.raises(KeyError, match="colour"):
        table.write([{"colour": "red"}])


def test_files_that_were_not_committed_do_not_count_after_a_crash(table, tmp_path):
    table.commit([table.write([{"model_name": "a"}])])
    table.write([{"model_name": "orphan"}])
    assert len([f for f in storage.walk(table.url) if f.path.endswith(".parquet") and "/" not in f.path]) == 2
    assert names(table) == ["a"]


def test_any_lake_path_but_one_that_looks_escaped(tmp_path):
    table = tables.promotions(str(tmp_path / "la ke% [1]{x}#*?a::b \u00fc"))
    table.commit([table.write([{"model_name": "a"}])])
    assert names(table) == ["a"]
    assert all(storage.exists(u) for u in table.uris())
    for name in ("la%20ke", "la\\ke"):
        with pytest.raises(InputError, match="misread"):
            tables.promotions(str(tmp_path / name)).rows()


def test_sweeping_takes_what_was_replaced_and_leaves_what_a_rival_writes(table):
    old, orphan = table.write([{"model_name": "old"}]), table.write([{"model_name": "orphan"}])
    table.commit([old])
    for file in (old, orphan):
        os.utime(storage.local_path(storage.join(table.url, file.path)), ns=(1, 1))
    new = table.write([{"model_name": "new"}])
    table.commit([new], replace=[old.path])
    rival = table.write([{"model_name": "rival"}])
    table.sweep()
    left = {f.path for f in storage.walk(table.url) if "/" not in f.path}
    assert left == {new.path, rival.path} and names(table) == ["new"]


def test_a_table_of_an_earlier_version_gets_the_new_columns(tmp_path):
    url, new = str(tmp_path / "promotions"), tables.PROMOTIONS
    before = tables.Table(url, pa.schema([f for f in new if f.name not in ("numbers", "decided_at")]))
    before.commit([before.write([{"model_name": "old"}])], ("writer", 1))
    table = tables.promotions(str(tmp_path))
    assert table.rows()[0]["numbers"] is None
    table.commit([table.write([{"model_name": "new", "numbers": "{}"}])], ("writer", 2))
    assert [(r["model_name"], r["numbers"]) for r in sorted(table.rows(), key=lambda r: r["model_name"])] == [
        ("new", "{}"),
        ("old", None),
    ]
    assert {f.name for f in DeltaTable(url).schema().fields} == set(new.names), "other readers see them as well"
    before.commit([before.write([{"model_name": "older code"}])], ("writer", 3))
    assert len(table.rows()) == 3


def age(table, days=10):
    """All that lies in the folder of the table, and what its log says of time, is older by some days."""
    then = time.time() - days * 86400
    for file in storage.walk(table.url):
        path = storage.local_path(file.uri)
        if "_delta_log" in file.path:
            for word in ("timestamp", "modificationTime", "deletionTimestamp", "createdTime"):
                path.write_text(re.sub(rf'"{word}":\d+', f'"{word}":{int(then * 1000)}', path.read_text()))
        os.utime(path, (then, then))


def test_small_files_become_one_and_stay_for_readers(table, monkeypatch):
    monkeypatch.setattr(tables, "MANY", 4)
    for n in range(4):
        table.commit([table.write([{"model_name": f"m{n}"}])], ("writer", n + 1))
        few = table.paths()
        table.compact("writer")
    assert len(table.paths()) == 1 and names(table) == ["m0", "m1", "m2", "m3"] and table.committed("writer") == 5
    assert all(storage.exists(storage.join(table.url, p)) for p in few)
    table.compact("writer")
    assert table.committed("writer") == 5, "one file is not many"


def test_orphans_are_old_and_nobody_can_need_them(table):
    week = datetime.timedelta(days=7)
    table.commit([table.write([{"model_name": "kept"}])], ("writer", 1))
    table.commit([table.write([{"model_name": "replaced"}])], ("writer", 2))
    lost = table.write([{"model_name": "lost"}])
    age(table)
    (replaced,) = [p for p in table.paths() if "replaced" in str(table.read(files=[p])["model_name"])]
    table.commit([], ("writer", 3), replace=[replaced])
    table.write([{"model_name": "a task is at work on this"}])
    now = datetime.datetime.now(datetime.UTC)
    assert [f.path for f in table.orphans(now - week)] == [lost.path], "what was replaced today may be being read"
    age(table)
    assert {f.path for f in table.orphans(now - week)} > {lost.path, replaced}
    assert names(table) == ["kept"]
