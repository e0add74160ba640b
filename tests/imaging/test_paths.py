import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparkmed.imaging.paths import PathPattern
from sparkmed.rejection import InputError

component = st.text(st.characters(exclude_characters="/{}*", exclude_categories=["Cs"]), min_size=1, max_size=12)


@pytest.mark.parametrize(
    "pattern, path, names",
    [
        ("imagesTr/{subject}.nii.gz", "imagesTr/hippocampus_001.nii.gz", {"subject": "hippocampus_001"}),
        ("imagesTr/{subject}.nii.gz", "imagesTr/hippocampus_001xnii.gz", None),
        ("imagesTr/{subject}.nii.gz", "old/imagesTr/a.nii.gz", None),
        ("imagesTr/{subject}.nii.gz", "imagesTr/a/b.nii.gz", None),
        ("imagesTr/{subject}.nii.gz", "imagesTr/.nii.gz", None),
        ("imagesTr/{subject}.nii.gz", "imagesTr/a.nii.gz.bak", None),
        ("./a/{s}.png", "a/b.png", {"s": "b"}),
        ("{split}/{class}/*.png", "train/chst/abd1.png", {"split": "train", "class": "chst"}),
        ("{split}/{class}/*.png", "train/chst/deep/abd1.png", None),
        ("{split}/{class}/*.png", "train/chst/.png", {"split": "train", "class": "chst"}),
        ("**/*.dcm", "a.dcm", {}),
        ("**/*.dcm", "a/b/c.zip/d.dcm", {}),
        ("**/thumbnails/*", "thumbnails/x", {}),
        ("**/thumbnails/*", "mythumbnails/x", None),
        ("**/thumbnails/*", "a/thumbnails/b/x", None),
        ("{subject}/**", "s1/a/b/c.dcm", {"subject": "s1"}),
        ("{subject}/**/ct.nii", "s1/ct.nii", {"subject": "s1"}),
        ("a**z", "a/b/z", {}),
        ("a**/z", "ab/c/z", {}),
        ("a**/z", "az", None),
        ("{subject}/{subject}_ct.nii", "s1/s1_ct.nii", {"subject": "s1"}),
        ("{subject}/{subject}_ct.nii", "s1/s2_ct.nii", None),
        ("{subject}_{time}.nii", "a_b_c.nii", {"subject": "a_b", "time": "c"}),
        ("a+b(1)[x]?.$/{s}^|.png", "a+b(1)[x]?.$/y^|.png", {"s": "y"}),
        ("a+b/{s}", "aab/y", None),
        ("a.b/{s}", "axb/y", None),
        ("{s}.png", "two\nlines.png", {"s": "two\nlines"}),
        ("{s}.png", "x.png\n", None),
        ("\\d{s}", "5", None),
        ("\\d{s}", "\\d5", {"s": "5"}),
        ("plain.csv", "plain.csv", {}),
    ],
)
def test_match(pattern, path, names):
    assert PathPattern(pattern).match(path) == names


@given(component, component, component, component)
def test_what_is_filled_in_is_found_again(folder, subject, between, ending):
    pattern = PathPattern(f"x{folder}/{{subject}}/{between}/{{subject}}{ending}")
    path = pattern.fill(subject=subject)
    assert path == f"x{folder}/{subject}/{between}/{subject}{ending}"
    assert pattern.match(path) == {"subject": subject}


def test_names_are_listed_once():
    assert PathPattern("{a}/{b}/{a}.png").names == ("a", "b")
    assert repr(PathPattern("{a}.png")) == "PathPattern('{a}.png')"


def test_further_values_are_ignored():
    assert PathPattern("labels/{subject}.nii").fill(subject="a", split="train") == "labels/a.nii"


@pytest.mark.parametrize(
    "pattern, problem",
    [
        ("", "relative"),
        ("/data/{subject}.nii", "relative"),
        ("s3://bucket/{subject}.nii", "relative"),
        ("{subject.nii", "unmatched { at character 1"),
        ("a/subject}.nii", "unmatched } at character 10"),
        ("{}.nii", "{} is not a name"),
        ("{my subject}.nii", "{my subject} is not a name"),
        ("{1}.nii", "{1} is not a name"),
        ("{{subject}}.nii", "unmatched {"),
        ("{subject}{time}.nii", "no text between"),
        ("{subject}{subject}.nii", "no text between"),
        ("a/***/b", "neither"),
    ],
)
def test_bad_patterns_say_what_is_wrong(pattern, problem):
    with pytest.raises(InputError) as e:
        PathPattern(pattern)
    assert problem in str(e.value) and repr(pattern) in str(e.value)


@pytest.mark.parametrize(
    "pattern, values, problem",
    [
        ("*/{subject}.nii", {"subject": "a"}, "stands for many paths"),
        ("**/{subject}.nii", {"subject": "a"}, "stands for many paths"),
        ("{subject}.nii", {}, "{subject} wants a text"),
        ("{subject}.nii", {"subject": ""}, "{subject} wants a text"),
        ("{subject}.nii", {"subject": "a/b"}, "'a/b'"),
    ],
)
def test_what_cannot_be_filled(pattern, values, problem):
    with pytest.raises(InputError) as e:
        PathPattern(pattern).fill(**values)
    assert problem in str(e.value)
