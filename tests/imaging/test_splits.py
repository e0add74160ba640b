import hashlib
import hmac
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparkmed.config import Splits
from sparkmed.imaging import splits
from sparkmed.rejection import InputError

KEY = b"0123456789abcdef"


def test_shares_are_met():
    found = Counter(splits.split_of(f"sub-{n}", Splits()) for n in range(5000))
    assert found["train"] / 5000 == pytest.approx(0.7, abs=0.02)
    assert found["val"] / 5000 == pytest.approx(0.15, abs=0.02)
    assert found["test"] / 5000 == pytest.approx(0.15, abs=0.02)


def test_membership_never_changes():
    """Written down once: a change here moves subjects between splits of users' data."""
    names = ["a", "sub-0123456789abcdef", "hippocampus_001", "Jürgen", ""]
    fractions = [int(hashlib.sha256(f"split:{n}".encode()).hexdigest()[:16], 16) / 2**64 for n in names]
    expected = ["train" if f < 0.7 else "val" if f < 0.85 else "test" for f in fractions]
    assert [splits.split_of(n, Splits()) for n in names] == expected
    assert splits.split_of("hippocampus_001", Splits()) == "train"


@given(st.text())
def test_more_training_data_takes_nobody_out_of_train(subject):
    order = [splits.split_of(subject, Splits(train=t, val=0.9 - t, test=0.1)) for t in (0.3, 0.5, 0.7)]
    assert order == sorted(order, key=lambda s: s == "train")
    assert len({s == "test" for s in order}) == 1


@pytest.mark.parametrize("name", ["train", "val", "test"])
def test_a_share_of_one_takes_all_and_of_zero_none(name):
    everything = Splits(**{s: float(s == name) for s in ("train", "val", "test")})
    assert {splits.split_of(str(n), everything) for n in range(300)} == {name}


def test_shares_that_round_to_one_leave_nobody_over():
    spec = Splits(train=0.1 + 0.2, val=0.7 - 1e-9, test=0)
    assert {splits.split_of(str(n), spec) for n in range(500)} == {"train", "val"}


def test_given_splits_are_taken_and_renamed():
    spec = Splits(rename={"val": "test", "Tr": "train"})
    assert [splits.split_of("a", spec, g) for g in ("train", "Tr", "val", "test")] == ["train", "train", "test", "test"]


def test_part_of_a_given_train_becomes_val():
    spec = Splits(val_from_train=0.2, rename={"val": "test"})
    found = Counter(splits.split_of(str(n), spec, "train") for n in range(3000))
    assert set(found) == {"train", "val"}
    assert found["val"] / 3000 == pytest.approx(0.2, abs=0.03)
    assert {splits.split_of(str(n), spec, "val") for n in range(300)} == {"test"}
    assert {splits.split_of(str(n), Splits(val_from_train=1.0), "train") for n in range(100)} == {"val"}


@pytest.mark.parametrize("given_name", ["Train", "validation", ""])
def test_unknown_splits_are_named(given_name):
    with pytest.raises(InputError, match=f"split {given_name!r}.*rename"):
        splits.split_of("a", Splits(), given_name)


def test_pseudonym_is_the_hmac():
    expected = "sub-" + hmac.new(KEY, b"DOE^JANE", hashlib.sha256).hexdigest()[:16]
    assert splits.pseudonym("DOE^JANE", KEY) == expected
    assert splits.pseudonym(" DOE^JANE \0", KEY) == expected
    assert splits.pseudonym("DOE^JANE", KEY[::-1]) != expected
    assert splits.pseudonym("DOE^JOHN", KEY) != expected


@pytest.mark.parametrize("patient", ["", "  ", "\0"])
def test_nobody_has_no_pseudonym(patient):
    with pytest.raises(InputError, match="patient identifier"):
        splits.pseudonym(patient, KEY)


@pytest.mark.parametrize("key", [b"", b"short"])
def test_short_keys_are_refused(key):
    with pytest.raises(InputError, match=f"{len(key)} bytes"):
        splits.pseudonym("a", key)
