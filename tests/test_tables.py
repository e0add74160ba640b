import os
from concurrent.futures import ThreadPoolExecutor

import pytest

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
