"""The page on lakes written by hand: what it says, and above all what it does not say."""

import base64
import datetime
import html.parser
import io
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from sparkmed import config, dataset, formats, report, storage, tables
from sparkmed.formats import nifti
from sparkmed.imaging import phantom
from sparkmed.learning import networks
from sparkmed.learning.model import Model, ModelSpec

NOW = datetime.datetime(2026, 3, 1, 12, 30, tzinfo=datetime.UTC)
SECRET = "Quillfeather"  # in a folder name: as a real archive would have it


class Registry:
    """What the report asks of MLflow."""

    uri, experiment, model = "sqlite:////nowhere/mlflow.db", "phantom", "phantom"

    def __init__(self, url=None, champion="2", latest="2"):
        self.url, self.numbers = url, (champion, latest)

    def champion(self):
        return self.numbers[0]

    def latest(self):
        return self.numbers[1]

    def version_facts(self, version):
        return {"name": self.model, "version": version, "run_id": "r1"}

    def fetch(self, version, lake):
        return self.url

    def curves(self, run_id):
        rise = [(e, 0.5 + 0.1 * e) for e in range(4)]
        return {
            "train_loss": rise[::-1],
            "val_loss": rise,
            "val_metric": rise,
            "lr": rise,
            "test_dice": [(0, 0.9)],
            "train_minutes": [(0, 2.5)],
        }


class Page(html.parser.HTMLParser):
    """Text, pictures and links of a page; raises when tags do not close."""

    VOID = {"meta", "img", "br", "link"}

    def __init__(self, source: str):
        super().__init__()
        self.source = source
        self.open, self.words, self.images, self.links, self.ids = [], [], [], [], []
        self.feed(source)
        self.close()
        assert not self.open
        self.text = re.sub(r"\s+", " ", " ".join(self.words))

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.links += [attributes[k] for k in ("href", "src") if k in attributes]
        if tag == "img":
            self.images.append(attributes)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> at {self.getpos()}"

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)


def model(folder, task, classes, size, spatial_dims):
    network = (
        config.Component(name="UNet", channels=[4, 8], strides=[2])
        if task == "segmentation"
        else config.Component(name="DenseNet", init_features=4, growth_rate=2, block_config=[1, 1])
    )
    torch.manual_seed(0)
    preprocess = config.Preprocess(orientation=None, size=None if task == "segmentation" else size)
    spec = ModelSpec(
        name="phantom",
        task=task,
        classes=classes,
        network=network,
        in_channels=1,
        spatial_dims=spatial_dims,
        preprocess=preprocess,
        window=size,
    )
    Model(spec, networks.build(network, 1, len(classes), spatial_dims)).save(str(folder))
    return str(folder)


def volume_row(header, subject, split, label=None, target=None):
    facts = {k: v for k, v in header.row().items() if k in tables.VOLUMES.names}
    spacing = np.linalg.norm(np.reshape(header.affine, (4, 4))[:3, :3], axis=0).tolist()
    return {
        **facts,
        "spacing": spacing,
        "subject": subject,
        "split": split,
        "label": json.dumps(label.row()) if label else None,
        "label_uid": label.uid if label else None,
        "target": target,
        "inputs": "x",
        "run": 1,
    }


def fill(settings, rows, scored, evaluated, url):
    """All tables of a lake in which everything happened."""
    lake = settings.lake
    catalog = [
        {
            "uri": u,
            "path": p,
            "container": u,
            "bytes": 1000,
            "format": r["format"],
            "kind": "image",
            "modality": r["modality"],
            "run": 1,
        }
        for r in rows
        for u, p in zip(r["sources"], r["source_paths"], strict=True)
    ]
    gone = f"{settings.archive}/gone.dcm"
    catalog += [
        {"uri": gone, "container": gone, "bytes": 1, "format": "dicom", "kind": "image", "run": 1},
        {"uri": gone, "container": gone, "format": "gone", "run": 2},
    ]
    bad = f"{settings.archive}/{SECRET}_Ambrosia/bad.dcm"
    refused = {"path": f"{SECRET}_Ambrosia/bad.dcm", "container": bad, "uri": bad, "run": 1, "refused_at": NOW}
    refusals = [
        refused | {"stage": "catalog", "reason": "TRUNCATED", "message": f"the file {bad} of 1.2.840.113619.2.1 holds 17 bytes"},
        refused | {"stage": "volumes", "reason": "GANTRY_TILT", "message": f"{SECRET}_Ambrosia is stacked 15.00 degrees off"},
        refused | {"container": gone, "uri": gone, "stage": "catalog", "reason": "ENCRYPTED", "message": "of a file that is gone"},
    ]
    decision = {
        "model_name": "phantom",
        "action": "promoted",
        "challenger": "2",
        "champion": "1",
        "decided_at": NOW,
        "run": 1,
        "reason": "difference to version 1 is +0.0210",
        "numbers": json.dumps({"difference": 0.021, "subjects": 4}),
    }
    digest = report._digest(url)
    common = {
        "model_name": "phantom",
        "model_version": "2",
        "model_digest": digest,
        "seconds": 0.5,
        "device": "cpu",
        "scored_at": NOW,
    }
    then = {"model_name": "phantom", "model_version": "2", "model_digest": digest, "run": 1}
    drifted = {"check": "drift", "source": "modality=MR", "reference": 40, "current": 50, "before": 10.0, "value": 14.5, "p": 1e-6}
    looks = [
        drifted | {"figure": "liver ml", "psi": 1.25, "chance": 0.4, "ks": 0.6, "adjusted": 2e-5, "verdict": "drift"},
        drifted | {"figure": "field ml", "psi": 0.05, "chance": 0.4, "ks": 0.1, "adjusted": 1.0, "verdict": "fine"},
        {"check": "quarantine", "source": "all", "figure": "quarantined", "current": 50, "before": 0.0, "value": 0.02,
         "verdict": "fine"},
        {"check": "service", "source": "all", "figure": "backlog volumes", "value": 7.0, "verdict": "fine"},
    ]  # fmt: skip
    days = [NOW - datetime.timedelta(days=d) for d in (1, 0)]
    watched = [r | then | {"watched_at": day} for day in days for r in looks]
    for table, content in (
        (tables.watch(lake), watched),
        (tables.catalog(lake), catalog),
        (tables.quarantine(lake), refusals),
        (tables.volumes(lake), rows),
        (tables.promotions(lake), [decision]),
        (tables.evaluations(lake), [common | {"key": f"e{n}"} | r for n, r in enumerate(evaluated)]),
        (tables.predictions(lake), [common | {"key": f"p{n}"} | r for n, r in enumerate(scored)]),
    ):
        table.commit([table.write(content)], ("catalog", 9))


@pytest.fixture(scope="module")
def segmented(tmp_path_factory):
    """A lake of CT phantoms, and its registry."""
    folder = tmp_path_factory.mktemp(SECRET)
    settings = config.parse(
        {
            "name": "phantom",
            "task": "segmentation",
            "classes": ["background", "liver", "kidneys"],
            "archive": str(folder / "archive"),
            "lake": str(folder / "lake"),
            "patches": {"size": [16, 16, 16], "sampler": "balanced"},
        }
    )
    rows = []
    for n, split in enumerate(["train", "train", "val", "test", "test", "test", "test"]):
        place = folder / "archive" / f"{SECRET}_{n}"
        image, label = phantom.ct(n, (24, 24, 16), (6.0, 6.0, 8.0))
        nifti.write(image, str(place / "image.nii.gz"))
        nifti.write(label, str(place / "label.nii.gz"))
        headers = {h.source_paths[0]: h for h in formats.read_headers(str(place))[0]}
        rows.append(volume_row(headers["image.nii.gz"], f"sub-{n:016x}", split, headers["label.nii.gz"]))
    url = model(folder / "model", "segmentation", settings.classes, (16, 16, 16), 3)
    test = [r for r in rows if r["split"] == "test"]
    facts = [{"volume": r["uid"], "subject": r["subject"], "split": "test"} for r in test]
    evaluated = [f | {"score": [0.99, 0.9 - 0.1 * n, None if n == 1 else 0.8]} for n, f in enumerate(facts)]
    scored = [
        f | {"ml": [1000.0, 400.0 + n, 90.0 * (n > 0)], "probability": [0.9, 0.8, 0.7], "mask": None} for n, f in enumerate(facts)
    ]
    fill(settings, rows, scored, evaluated, url)
    target = dataset.url(settings.lake, "phantom", dataset.version(rows, settings))
    facts = {"version": "abc123", "counts": {"train": 16, "val": 2, "test": 8}, "shortfall": {"kidneys": 3}, "refused": {}}
    storage.write_json(storage.join(target, dataset.DESCRIPTION), facts)
    return settings, Registry(url), rows


@pytest.fixture(scope="module")
def classified(tmp_path_factory):
    folder = tmp_path_factory.mktemp("radiographs")
    settings = config.parse(
        {
            "name": "phantom",
            "task": "classification",
            "classes": ["abdomen", "chest"],
            "archive": str(folder / "archive"),
            "lake": str(folder / "lake"),
            "preprocess": {"orientation": None, "size": [32, 32, 1]},
        }
    )
    rows = []
    for n in range(8):
        path = folder / "archive" / f"{SECRET}_{n}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(phantom.radiograph(n, n % 2, (48, 40)).array[0, :, :, 0].T).save(path)
        (header,), _ = formats.read_headers(str(path))
        rows.append(volume_row(header, f"sub-{n:016x}", "train" if n == 0 else "test", target=n % 2))
    url = model(folder / "model", "classification", settings.classes, (32, 32, 1), 2)
    chest = [None, 0.9, 0.2, 0.8, 0.6, 0.3, 0.1, 0.95]  # two are wrong: 4 and 5
    evaluated = [
        {
            "volume": r["uid"],
            "subject": r["subject"],
            "split": "test",
            "target": r["target"],
            "probability": [1 - p, p],
            "predicted": settings.classes[int(p > 0.5)],
            "score": [float((p > 0.5) == r["target"])],
        }
        for r, p in zip(rows, chest, strict=True)
        if p is not None
    ]
    fill(settings, rows, evaluated, evaluated, url)
    return settings, Registry(url), rows


def page_of(settings, registry) -> Page:
    source = storage.read_bytes(report.write(settings, registry)).decode()
    assert len(source) < 3_000_000
    return Page(source)


@pytest.fixture(scope="module")
def segmented_page(segmented):
    return page_of(*segmented[:2])


@pytest.fixture(scope="module")
def classified_page(classified):
    return page_of(*classified[:2])


def test_the_page_stands_alone_and_is_accessible(segmented_page):
    page = segmented_page
    assert {x.split(",")[0] if x.startswith("data:") else x[0] for x in page.links} == {"#", "data:image/png;base64"}
    assert {x[1:] for x in page.links if x.startswith("#")} <= set(page.ids)
    assert len(page.images) == 8 and all(len(i["alt"]) > 20 for i in page.images)
    for image in page.images:
        Image.open(io.BytesIO(base64.b64decode(image["src"].split(",")[1]))).verify()


def test_the_page_holds_no_identity(segmented, classified, segmented_page, classified_page):
    for (settings, _, rows), page in ((segmented, segmented_page), (classified, classified_page)):
        source = re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "", page.source)
        assert SECRET not in source and "Ambrosia" not in source and "1.2.840" not in source
        assert "file:" not in source and settings.archive not in source and settings.lake not in source
        for row in rows:
            assert row["uid"] not in source
            assert not any(part in source for part in (*row["sources"], *row["source_paths"]))


def test_segmentation_numbers(segmented_page):
    page = segmented_page
    assert "version 2 , the champion" in page.text
    liver, kidneys = np.mean([0.9, 0.8, 0.7, 0.6]), 0.8
    assert f"liver {liver:.3f}" in page.text and f"kidneys {kidneys:.3f}" in page.text
    assert "kidneys: 3 patches" in page.text
    worst, best = page.text.index("sub-0000000000000006"), page.text.index("sub-0000000000000003")
    assert worst < best  # worst subjects first
    assert "Best : sub-0000000000000003" in page.text and "Worst : sub-0000000000000006" in page.text
    assert "difference to version 1 is +0.0210" in page.text and "difference 0.0210" in page.text
    assert "401.5" in page.text  # median ml


def test_the_last_look_at_new_volumes(segmented_page):
    text = segmented_page.text
    assert "2 figures of new volumes were compared" in text and "of 2; version 2 was the champion" in text
    assert "liver ml, modality=MR: drifted (10.000 then, 14.500 now)" in text
    assert "The largest is 1.25, of liver ml, modality=MR." in " ".join(i["alt"] for i in segmented_page.images)
    assert "backlog volumes 7.00" in text and text.count("modality=MR") == 3


def test_what_was_refused_and_why(segmented):
    settings = segmented[0]
    found = report.refusals(settings)
    assert [(g["stage"], g["reason"], g["files"]) for g in found["groups"]] == [
        ("catalog", "TRUNCATED", 1),
        ("volumes", "GANTRY_TILT", 1),
    ]
    assert found["groups"][0]["example"] == "the file [file] of [...] holds 17 bytes"
    assert found["groups"][1]["example"] == "[file] is stacked 15.00 degrees off"


def test_gone_files_do_not_count(segmented_page):
    assert "7 instances in 7 files" in segmented_page.text


def test_classification_numbers(classified_page):
    page = classified_page
    assert "5 of 7 test images right" in page.text
    alt = " ".join(i["alt"] for i in page.images)
    assert "True abdomen, predicted chest: 1." in alt and "True chest, predicted chest: 3." in alt
    # of 12 pairs (chest, abdomen) those with the chest above: all but (0.3, 0.6)
    assert f"Area under the curve of chest: {11 / 12:.3f}" in alt
    assert page.text.index("sub-0000000000000005") < page.text.index("sub-0000000000000004")  # the surest mistake first


def test_an_empty_lake_has_a_page(tmp_path):
    settings = config.parse(
        {"name": "new", "task": "segmentation", "classes": ["a", "b"], "archive": str(tmp_path), "lake": str(tmp_path / "lake")}
    )
    page = page_of(settings, Registry(None, None, None))
    for sentence in (
        "No model is registered yet",
        "The catalog is empty",
        "No volume has been scored yet",
        "No decision",
        "Nothing has been watched yet",
        "Nothing was refused",
    ):
        assert sentence in page.text
    assert not page.images


def test_a_store_that_does_not_answer_is_said(segmented):
    class Broken(Registry):
        def champion(self):
            raise ConnectionError("no route to host 10.0.0.1")

    page = page_of(segmented[0], Broken())
    assert "MLflow could not be asked about models (ConnectionError)" in page.text and "10.0.0.1" not in page.text
    assert "24 × 24 × 16" in page.text  # the rest is there


def test_the_newest_version_without_a_champion(segmented):
    settings, registry, _ = segmented
    page = page_of(settings, Registry(registry.url, None, "3"))
    assert "version 3 , not promoted" in page.text


def test_examples_of_a_segmentation(segmented):
    settings, registry, rows = segmented
    test = [r for r in rows if r["split"] == "test"]
    found = report.examples(settings, registry.url, test)
    assert list(found) == ["best", "median", "worst"]
    assert all(Image.open(io.BytesIO(png)).size[0] > 600 for png in found.values())


@pytest.mark.parametrize("suspect", [{"header": {"burned_in": True}}, {"modality": "US"}], ids=["burned in", "ultrasound"])
def test_images_that_may_show_a_name_are_not_shown(segmented, suspect):
    settings, registry, rows = segmented
    header = {k: json.dumps(json.loads(rows[0][k]) | v) if k == "header" else v for k, v in suspect.items()}
    test = [r | header for r in rows if r["split"] == "test"]
    assert report.examples(settings, registry.url, test) == {}
    evaluated = [{"volume": r["uid"]} for r in test]
    assert "expect a name" in report._examples_section(settings, {}, test, evaluated)["missing"]
    allowed = settings.model_copy(update={"deidentify": config.Deidentify(allow=["burned_in", "ultrasound"])})
    assert len(report.examples(allowed, registry.url, test)) == 3


def test_examples_without_scores_are_the_first_three(segmented):
    settings, registry, rows = segmented
    elsewhere = settings.model_copy(update={"lake": settings.lake + "_empty"})
    assert list(report.examples(elsewhere, registry.url, rows[:2])) == ["first", "second"]
    assert report.examples(elsewhere, registry.url, []) == {}


def test_examples_of_a_classification(classified):
    settings, registry, rows = classified
    elsewhere = settings.model_copy(update={"lake": settings.lake + "_empty"})  # so that they are predicted
    for where in (settings, elsewhere):
        found = report.examples(where, registry.url, [r for r in rows if r["split"] == "test"])
        assert list(found) == ["test_images"] and Image.open(io.BytesIO(found["test_images"])).format == "PNG"


def test_roc_of_known_scores():
    false, true = report._roc(np.array([0.9, 0.8, 0.7, 0.1]), np.array([True, False, True, False]))
    assert false.tolist() == [0, 0, 0.5, 0.5, 1] and true.tolist() == [0, 0.5, 0.5, 1, 1]
