import datetime
import pathlib

import pytest

from sparkmed import config
from sparkmed.rejection import InputError

LEAST = {"name": "p", "task": "segmentation", "classes": ["background", "organ"], "archive": "a"}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"trian": {}}, "unknown key trian; did you mean train?"),
        ({"train": {"epoch": 3}}, "did you mean train.epochs?"),
        ({"volumes": {"labels": {"patern": "x"}}}, "did you mean volumes.labels.pattern?"),
        ({"train": {"network": {"nam": "UNet"}}}, "train.network.name is missing"),
        ({"train": {"epochs": 0}}, "train.epochs: Input should be greater than 0, got 0"),
        ({"classes": ["a"]}, "classes"),
        ({"classes": ["a", "a"]}, "classes repeat"),
        ({"patches": {"class_weights": [1.0]}}, "wants 2 weights"),
        ({"preprocess": {"intensity": {"kind": "window", "low": 3, "high": 1}}}, "wants low < high"),
        ({"task": "classification"}, "wants preprocess.size"),
        ({"task": "classification", "preprocess": {"size": [8, 8, 1]}, "patches": {"sampler": "balanced"}}, "needs label images"),
        ({"volumes": {"splits": {"train": 0.9, "val": 0.2, "test": 0.1}}}, "train + val + test is 1.2"),
        ({"volumes": {"labels": {"pattern": "l/{subject}", "csv": "l.csv"}}}, "both pattern and csv"),
        ({"volumes": {"labels": {"csv": "l.csv", "segments": {"organ": "Liver"}}}}, "both csv and segments"),
        (
            {"volumes": {"labels": {"segments": {"liver": "Liver"}}}},
            "by foreground classes of a segmentation, .'organ'.; got .'liver'.",
        ),
        ({"volumes": {"labels": {"segments": {"organ": ["Liver", "liver"]}}}}, "names a segment twice"),
        ({"score": {"masks": "seg"}}, "score.masks seg wants score.seg_folder: DICOM SEG hold the names of patients"),
        ({"score": {"segments": {"background": {}}}}, "score.segments is by foreground classes"),
        ({"score": {"segments": {"organ": {"type": ["10200004", "SCT"]}}}}, "score.segments.organ.type"),
        ({"score": {"segments": {"organ": {"type": ["1", "a scheme of many words", "Liver"]}}}}, "at most 16 characters"),
        ({"preprocess": {"orientation": "RAX"}}, "preprocess.orientation"),
        ({"score": {"postprocess": {"background": {}}}}, "score.postprocess is by foreground classes"),
        ({"score": {"postprocess": {"organ": {"treshold": 0.5}}}}, "unknown key score.postprocess.organ.treshold"),
        ({"score": {"postprocess": {"organ": {"threshold": 0}}}}, "score.postprocess.organ.threshold: Input should be greater"),
        ({"score": {"mirrors": [3]}}, "score.mirrors.0"),
        ({"preprocess": {"cascade": {"digest": "x", "model": "m"}}}, "preprocess.cascade.digest"),
        ({"preprocess": {"cascade": {"output": "labels"}}}, "preprocess.cascade.model is missing"),
        ({"imports": ["os; import sys"]}, "imports.0"),
        ({"plates": {}}, "plates.channels is missing"),
        ({"plates": {"channels": {}}}, "plates.channels"),
        ({"plates": {"channels": {"DNA": 1, "GFP": 1}}}, "ids of channels repeat or are empty: .'1', '1'."),
        ({"plates": {"channels": {"DNA": ""}}}, "ids of channels repeat or are empty"),
        ({"plates": {"channels": {"DNA": 1}, "convension": "sbs"}}, "did you mean plates.convention?"),
        ({"plates": {"channels": {"DNA": 1}, "convention": "phenix"}}, "plates.convention: Input should be 'imagexpress'"),
        ({"plates": {"channels": {"DNA": 1}, "wells": 100}}, "plates.wells: Input should be 6, 12"),
        ({"plates": {"channels": {"DNA": 1}, "convention": "sbs", "pattern": "(?P<well>.*)"}}, "pattern and convention both say"),
        ({"plates": {"channels": {"DNA": 1}, "pattern": "(?P<wel>.*)"}}, "names wel, wanted groups among batch, channel"),
        ({"plates": {"channels": {"DNA": 1}, "maps": {"columns": {"dose": "x"}}}}, "columns names dose; did you mean"),
        ({"patches": {"per_volume": 0}}, "patches.per_volume: wanted a number above 0, or all for cells, got 0"),
        ({"patches": {"per_volume": "all"}}, "patches: per_volume all is for sampler cells, sampler is random"),
        ({"patches": {"crops": {"table": "t.csv"}}}, "patches: crops are for sampler cells, sampler is random"),
        ({"patches": {"sampler": "cells"}}, "patches.sampler cells wants task classification"),
    ],
)
def test_a_wrong_config_is_one_sentence(change, sentence):
    with pytest.raises(InputError, match=sentence.replace("?", r"\?").replace("+", r"\+")):
        config.parse(LEAST | change)


OF_CELLS = LEAST | {
    "task": "classification", "plates": {"channels": {"GFP": 1, "DNA": 2}, "nuclei": {"diameter": 9}},
    "preprocess": {"orientation": None}, "patches": {"sampler": "cells", "crops": {"size": 40}},
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"plates": None}, "patches.sampler cells is for the fields of plates: wanted a section plates"),
        ({"plates": {"channels": {"DNA": 1}}}, "cells wants plates.nuclei, which says how they are found, or patches.crops.table"),
        ({"preprocess": {}}, "wanted no preprocess.orientation; preprocess.orientation: null keeps the stored one"),
        ({"preprocess": {"orientation": None, "size": [40, 40, 1]}}, "fields as they are stored.* wanted no preprocess.size"),
        ({"preprocess": {"orientation": None, "spacing": [1, 1, 1]}}, "wanted no preprocess.spacing"),
        (
            {"patches": {"sampler": "cells", "size": [32, 32, 1]}},
            r"patches: crops.size 96 makes patches of \[96, 96, 1\], size says \[32, 32, 1\]: leave size out",
        ),
        ({"patches": {"sampler": "cells", "per_volume": "some"}}, "wanted a number above 0, or all for cells, got 'some'"),
        ({"patches": {"sampler": "cells", "crops": {"border": "cut"}}}, "patches.crops.border"),
    ],
)
def test_a_config_of_cells_that_is_wrong_is_one_sentence(change, sentence):
    with pytest.raises(InputError, match=sentence):
        config.parse(OF_CELLS | change)


def test_patches_of_cells_are_as_large_as_their_crops_and_all_of_them():
    found = config.parse(OF_CELLS)
    assert (found.patches.size, found.patches.per_volume) == ((40, 40, 1), "all")
    assert (
        found.cells == config.Cells(crops=config.Crops(size=40), nuclei=found.plates.nuclei, channel=1) and not found.cells.listed
    )
    assert config.parse(found.model_dump(mode="json")) == found
    patches = {"sampler": "cells", "per_volume": 50, "crops": {"table": "cells.csv"}}
    listed = config.parse(OF_CELLS | {"plates": {"channels": {"DNA": 1}}, "patches": patches})
    assert listed.cells == config.Cells(crops=config.Crops()) and listed.cells.listed and listed.patches.per_volume == 50
    whole = {"task": "classification", "preprocess": {"size": [8, 8, 1]}}
    assert config.parse(LEAST | whole).cells is None


def test_overrides_replace_values_at_any_depth(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("name: p\ntask: segmentation\nclasses: [a, b]\narchive: a\n")
    loaded = config.load(str(path), ["archive=/data", "train.epochs=3", "train.optimizer.lr=0.01", "patches.size=[8,8,8]"])
    assert (loaded.archive, loaded.train.epochs, loaded.train.optimizer.lr, loaded.patches.size) == ("/data", 3, 0.01, (8, 8, 8))
    with pytest.raises(InputError, match="wanted key=value"):
        config.load(str(path), ["train.epochs"])
    with pytest.raises(InputError, match="name is a value, not a section"):
        config.load(str(path), ["name.x=1"])


def test_files_that_are_no_config(tmp_path):
    with pytest.raises(InputError, match="No such file"):
        config.load(str(tmp_path / "missing.yaml"))
    for text, sentence in [("a: [", "not YAML"), ("- a", "wanted a mapping"), ("name: p\nname: q", "occurs twice")]:
        path = tmp_path / "c.yaml"
        path.write_text(text)
        with pytest.raises(InputError, match=sentence):
            config.load(str(path))


def test_a_classifier_sees_whole_images_by_default():
    loaded = config.parse(LEAST | {"task": "classification", "preprocess": {"size": [64, 64, 1]}})
    assert loaded.patches.size == (64, 64, 1)
    assert loaded.patches.sampler == "grid"


def test_digest_follows_values_not_spelling():
    a = config.parse(LEAST | {"seed": 0})
    assert config.digest(a) == config.digest(config.parse(LEAST))
    assert config.digest(a) != config.digest(config.parse(LEAST | {"seed": 1}))


def test_components_keep_their_arguments():
    c = config.parse(LEAST | {"train": {"network": {"name": "UNet", "channels": [4, 8]}}})
    assert c.train.network.arguments == {"channels": [4, 8]}


@pytest.mark.parametrize("path", sorted(pathlib.Path(__file__).parents[1].glob("conf/*.yaml")), ids=lambda p: p.name)
def test_the_configs_that_come_along_are_valid(path):
    assert config.load(str(path)).name


def test_deidentification_takes_its_sections_of_a_project(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(
        "name: p\ntask: segmentation\nclasses: [a, b]\narchive: a\nlake: /l\nidentity: {key_env: K}\ndeidentify: {device: kept}\n"
    )
    wanted = config.deidentification("/in", "/out", ["deidentify.allow=[ultrasound]"], str(path))
    assert (wanted.archive, wanted.out, wanted.identity.key_env, wanted.key) == ("/in", "/out", "K", "/l/subject.key")
    assert (wanted.deidentify.device, wanted.deidentify.dates, wanted.deidentify.allow) == ("kept", "shifted", ("ultrasound",))


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("identity.keep_subjects=true", "must not"),
        ("deidentify.date=removed", "did you mean deidentify.dates?"),
        ("deidentify.allow=[ultrasounds]", "deidentify.allow.0"),
        ("train.epochs=3", "unknown key train"),
    ],
)
def test_a_wrong_deidentification_is_one_sentence(override, sentence):
    with pytest.raises(InputError, match=sentence.replace("?", r"\?")):
        config.deidentification("/in", "/out", [override])


def test_how_masks_are_written_counts_only_when_it_is_not_as_ever():
    score = config.Score()
    assert score.outputs == [] == config.Score(segments={"organ": {}}, seg_folder="/seg").outputs
    segs = [config.Score(masks=m, seg_folder=f, seg_type=t) for m, f, t in
            [("seg", "/a", "BINARY"), ("seg", "/b", "BINARY"), ("both", "/a", "BINARY"), ("seg", "/a", "LABELMAP")]]  # fmt: skip
    assert segs[0].outputs == segs[1].outputs
    assert len({config.digest(*s.outputs) for s in segs}) == 3
    assert all(s.numbers == score for s in segs)


def test_codes_may_be_written_as_numbers():
    assert config.Segment(type=[10200004, "SCT", "Liver"]).type == ("10200004", "SCT", "Liver")


def test_what_a_model_was_validated_with_counts_unless_something_else_is_said():
    own = config.Score(mirrors=[2, 0], postprocess={"organ": {"components": 1}})
    said = config.Score(overlap=0.25)
    assert (said.over(own).mirrors, said.over(own).postprocess, said.over(own).overlap) == ((0, 2), own.postprocess, 0.25)
    assert (
        said.changes(own) == own.changes(own) == config.Score().changes(config.Score(mirrors=[], postprocess={"organ": {}})) == []
    )
    cleanings = [{}, {"organ": {}}, {"organ": {"components": 1, "fill_holes": True}}]
    others = [config.Score(mirrors=[0]), config.Score(mirrors=[]), *[config.Score(postprocess=p) for p in cleanings]]
    digests = [config.digest(*o.changes(own)) for o in others]
    assert len(set(digests)) == 4 and digests[2] == digests[3]


def test_new_keys_that_say_nothing_leave_digests_alone():
    assert config.digest(config.Score(mirrors=None, postprocess=None, ensemble=[])) == config.digest(config.Score())
    assert config.digest(config.Preprocess(cascade=None)) == config.digest(config.Preprocess())
    assert config.Score(ensemble=[3, "champion", "models:/other/1"]).ensemble == ("3", "champion", "models:/other/1")
    assert config.Score(ensemble=[3]).numbers == config.Score()


def test_a_backfill_is_all_a_date_or_a_share():
    for text, value in (("all", "all"), ("2026-01-31", datetime.date(2026, 1, 31)), ("0.25", 0.25), ("1", 1.0)):
        data = {}
        config._override(data, f"score.backfill={text}")
        assert config.Score(**data["score"]).backfill == value
    for text in ("some", "2026-13-01", "7", "true"):
        with pytest.raises(ValueError, match="wanted all, a date such as 2026-01-31 or a share from 0 to 1"):
            data = {}
            config._override(data, f"score.backfill={text}")
            config.Score(**data["score"])
    tonight = config.Score(backfill=0.5, per_night=3, attempts=1, retry_refused=True)
    assert tonight.numbers == config.Score(), "when a volume is scored is no part of a model"


def test_the_order_of_channels_counts():
    one, other = (config.parse({"channels": c}, "p", config.Plates) for c in ({"DNA": 1, "GFP": 2}, {"GFP": 2, "DNA": 1}))
    assert one.channels == (("DNA", "1"), ("GFP", "2"))
    assert config.digest(one) != config.digest(other)
    assert config.parse(one.model_dump(mode="json"), "p", config.Plates) == one  # as a saved config has it
    assert config.digest(config.parse({"channels": {"DNA": "1", "GFP": "02"}}, "p", config.Plates)) == config.digest(one)


def test_a_config_without_plates_keeps_its_digest():
    assert config.parse(LEAST).plates is None
    assert config.digest(config.parse(LEAST)) == config.digest(LEAST)
    assert config.digest(config.parse(LEAST | {"plates": {"channels": {"DNA": 1}}})) != config.digest(LEAST)


def test_plates_in_yaml(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(
        "name: p\ntask: segmentation\nclasses: [a, b]\narchive: a\n"
        "plates:\n  channels: {DNA: 2, GFP: 01, ER: DAPI - DAPI}\n  maps:\n    tables: maps/*.txt\n    controls: {-1: negative}\n"
    )
    plates = config.load(str(path)).plates
    assert plates.channels == (("DNA", "2"), ("GFP", "1"), ("ER", "DAPI - DAPI"))
    assert (plates.maps.tables, plates.maps.controls) == (("maps/*.txt",), {"-1": "negative"})
    assert config.load(str(path), ["plates.channels={X: 7}"]).plates.channels == (("X", "7"),)
