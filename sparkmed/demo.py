"""A phantom archive with everything that real ones have, and the whole path on it."""

import gzip
import io
import pathlib
import tarfile
import zipfile

import numpy as np

from sparkmed import config as configuration
from sparkmed import pipeline, report, storage, tracking
from sparkmed.formats import dicom_write, nifti
from sparkmed.formats.dicom_write import Patient
from sparkmed.imaging import phantom
from sparkmed.imaging.patches import generator
from sparkmed.imaging.volume import Volume

SHAPE, SPACING = (48, 48, 32), (6.0, 6.0, 6.0)
ZIPPED, FOLDERS, TARRED, SINGLE = range(1, 9), range(9, 12), range(12, 15), range(15, 25)
"""Numbers of the subjects whose CT is a zip, a folder, or a tar.gz of DICOM, or a NIfTI file."""
_FAMILY = ("Quillfeather", "Thistlewood", "Marchbanks", "Okonkwo-Vale", "Zubrowska", "Hallgrimur", "Brandybuck")
_GIVEN = ("Ambrosia", "Bartholomew", "Clementine", "Dagobert", "Euphemia")
KEY = "the demo key is no secret: 42"
"""Makes the splits the same for everybody. A real key is random, and known to its owner only."""

CONFIG = """\
# The demo of sparkmed: CT phantoms as DICOM and NIfTI, some of them broken.
name: demo
task: segmentation
classes: [background, liver, kidneys]
archive: {folder}/archive
lake: {folder}/lake
seed: 0
identity:
  key_file: {folder}/key         # a subject is an HMAC of its name under this key
volumes:
  images: ["ct/{{subject}}.zip/**", "ct/{{subject}}.tar.gz/**", "ct/{{subject}}/**", "nifti/{{subject}}.nii.gz"]
  labels: {{pattern: "labels/{{subject}}.nii.gz"}}
  splits: {{train: 0.6, val: 0.15, test: 0.25}}
preprocess:
  orientation: RAS
  spacing: [6.0, 6.0, 6.0]
  intensity: {{kind: window, low: -200, high: 400}}
patches:
  size: [32, 32, 32]
  sampler: balanced
  per_volume: 4
train:
  processes: 2
  network: {{name: UNet, channels: [8, 16, 32], strides: [2, 2], num_res_units: 1, norm: instance}}
  optimizer: {{name: AdamW, lr: 0.003}}
  batch_size: 4
  epochs: 12
  warmup_epochs: 2
  patience: null
  augment: {{noise: 0.02}}
promote: {{minimum: 0.5}}
score: {{overlap: 0.25}}
spark: {{master: "local[2]"}}
"""


def main(folder: str = "demo") -> int:
    """Write the archive unless it is there, run all stages, say where to look. Exit status."""
    url = write_archive(folder)
    settings = configuration.load(url)
    print(f"archive of phantoms: {settings.archive}", flush=True)
    pipeline.run(settings, lambda line: print(line, flush=True))
    _say(settings, url)
    return 0


def _say(settings: configuration.Config, url: str):
    """Where everything is, and what was left out."""
    refusals = report.refusals(settings)
    lake, registry = storage.local_path(settings.lake), tracking.of(settings)
    print(f"\nRefused: {refusals['files']} files, each in {lake}/quarantine with its reason:")
    for group in refusals["groups"]:
        print(f"  {group['files']:4d}  {group['stage']:8s} {group['reason']:20s} {group['meaning']}")
    print("\nLook at")
    print(f"  the report       {lake}/{report.PAGE}")
    print(f"  the label maps   {lake}/predictions/masks/")
    print(f"  runs and models  mlflow ui --backend-store-uri {registry.uri}")
    print(f"  the config       {url}   (change it, then: sparkmed run {url})")


def write_archive(folder: str, seed: int = 0) -> str:
    """Phantoms below ``folder``/archive, a key, and a config for them; its path. What is there already stays.

    Organs and file names are a pure function of ``seed``. The config is written last: without it the archive is written again.
    """
    root = pathlib.Path(folder).expanduser().resolve()
    target = root / "demo.yaml"
    if target.exists():
        return str(target)
    archive = root / "archive"
    for number in (*ZIPPED, *FOLDERS, *TARRED):
        image, label = _phantom(seed, number)
        files = _shuffled(_series(image, number, seed), f"{seed}/{number}")
        if number == 3:
            files["report.dcm"] = dicom_write.report(patient(number), f"{seed}/{number}")
        if number == 4:
            files["copy_of_a_slice.dcm"] = next(iter(files.values()))
        _store(archive / "ct", code(number), files, "zip" if number in ZIPPED else "tar.gz" if number in TARRED else "")
        _write_nifti(archive / "labels" / f"{code(number)}.nii.gz", label)
    for number in SINGLE:
        image, label = _phantom(seed, number)
        _write_nifti(archive / "nifti" / f"{code(number)}.nii.gz", image)
        _write_nifti(archive / "labels" / f"{code(number)}.nii.gz", label)
    _write_broken(archive, seed)
    storage.write_bytes(str(root / "key"), KEY.encode())
    storage.write_bytes(str(target), CONFIG.format(folder=root).encode())
    return str(target)


def code(number: int) -> str:
    """The study's code of a subject, of which file names are made."""
    return f"P{number:02d}"


def patient(number: int) -> Patient:
    """Invented; stands in the DICOM headers and must stand nowhere else."""
    name = f"{_FAMILY[number % len(_FAMILY)]}^{_GIVEN[number % len(_GIVEN)]}"
    return Patient(name, f"MRN{7_310_000 + 977 * number}", f"19{40 + number}0{1 + number % 9}17", f"ACC{5_520_000 + 613 * number}")


def _phantom(seed: int, number: int, slices: int = SHAPE[2]) -> tuple[Volume, Volume]:
    return phantom.ct(1000 * seed + number, (*SHAPE[:2], slices), SPACING, organs=2, noise=30.0)


def _series(image: Volume, number: int, seed: int) -> list[bytes]:
    """Slices whose instance numbers say nothing about where they lie."""
    numbers = generator(f"demo/{seed}/{number}").permutation(image.spatial_shape[2]) + 1
    return dicom_write.ct_series(image, patient(number), f"{seed}/{number}", numbers)


def _shuffled(slices: list[bytes], identity: str) -> dict[str, bytes]:
    """File name to bytes, in an order that is not the slices'."""
    order = generator(f"demo/names/{identity}").permutation(len(slices))
    return {f"IM{n:04d}.dcm": slices[k] for n, k in enumerate(order)}


def _write_broken(archive: pathlib.Path, seed: int):
    """What must be refused, each in its own way."""
    image, label = _phantom(seed, 25, 12)
    slices = _series(image, 25, seed)
    _store(archive / "ct", code(25), _shuffled(slices[:5] + slices[6:], "gap"), "")  # a slice is missing
    image, label_26 = _phantom(seed, 26, 12)
    tilted = image.affine.copy()
    tilted[1, 2] += np.tan(np.deg2rad(15)) * SPACING[2]
    _store(archive / "ct", code(26), _shuffled(_series(image.with_array(image.array, tilted), 26, seed), "tilt"), "zip")
    image, label_28 = _phantom(seed, 28)
    cut_off = archive / "nifti" / f"{code(28)}.nii.gz"
    _write_nifti(cut_off, image)
    _write(cut_off, cut_off.read_bytes()[:20_000])
    for number, orphan in ((25, label), (26, label_26), (28, label_28), (30, label)):  # the last never had an image
        _write_nifti(archive / "labels" / f"{code(number)}.nii.gz", orphan)
    _write(archive / "broken" / "truncated.dcm", slices[0][: len(slices[0]) // 2])
    _write(archive / "broken" / "notes.dcm", b"Scanned on Tuesday; please call back.\n")
    _write(archive / "broken" / "readme.txt", b"Copied from the old archive.\n")
    _write(archive / "broken" / "protected.zip", _encrypted(_zip({"IM0000.dcm": slices[1]})))
    _write(archive / "broken" / "escape.zip", _zip({"../../outside.dcm": slices[2]}))


def _store(folder: pathlib.Path, name: str, files: dict[str, bytes], kind: str):
    if kind == "zip":
        _write(folder / f"{name}.zip", _zip(files))
    elif kind == "tar.gz":
        _write(folder / f"{name}.tar.gz", _tar(files))
    else:
        for file, data in files.items():
            _write(folder / name / file, data)


def _zip(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as out:
        for name, data in files.items():
            out.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def _encrypted(archive: bytes) -> bytes:
    """A zip of one member whose headers say that it is encrypted (bit 0 of the flags, APPNOTE 4.4.4)."""
    out = bytearray(archive)
    out[6] |= 1
    out[archive.rindex(b"PK\x01\x02") + 8] |= 1
    return bytes(out)


def _tar(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with gzip.GzipFile(fileobj=buffer, mode="wb", mtime=0) as packed, tarfile.open(fileobj=packed, mode="w") as out:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            out.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def _write_nifti(path: pathlib.Path, volume: Volume):
    nifti.write(volume, str(path))


def _write(path: pathlib.Path, data: bytes):
    storage.write_bytes(str(path), data)
