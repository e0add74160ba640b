"""Fuzzes the readers with bytes: atheris, guided by the coverage of our code and of the Python libraries below it.

usage: python benchmarks/fuzz.py [seconds=3600] [targets=dicom,archive,nifti,raster] [seeds=FOLDER] [folder=FOLDER]

Wants ``pip install atheris``. Prints one JSON object. ``seconds`` are shared by the targets, one after the other, each on one core:

dicom     header and pixels of one object, in six transfer syntaxes
archive   a zip, or a tar (plain, gz, bz2, xz), and what is in it
nifti     NIfTI-1 and -2, plain and gzipped
raster    PNG, JPEG, TIFF

A target starts with files that this program writes, and with those of the folder ``seeds``. Each input is read as an archive of one
file by ``sparkmed.read_archive``. A finding is anything raised, an input that is in no volume and no rejection or in two, a voxel
that is not finite, a crash of the process, more than 20 s or 2 GB for one input. Findings of one place in the code count once;
their inputs are kept in ``folder`` (default: one that is made beside the temporary ones).
"""

import collections
import contextlib
import gzip
import io
import json
import pathlib
import re
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
import zipfile

TARGETS = ("dicom", "archive", "nifti", "raster")
SECONDS, MEGABYTES = 20, 2048
"""That one input may take."""
LIBRARIES = {
    "dicom": ["pydicom.filereader", "pydicom.fileutil", "pydicom.encaps", "pydicom.dataset", "pydicom.dataelem", "pydicom.values",
              "pydicom.pixels.decoders.base", "pydicom.pixels.common"],
    "archive": ["zipfile", "tarfile"],
    "nifti": ["nibabel.nifti1", "nibabel.nifti2", "nibabel.wrapstruct", "nibabel.volumeutils"],
    "raster": ["tifffile.tifffile", "PIL.PngImagePlugin", "PIL.JpegImagePlugin", "PIL.TiffImagePlugin", "PIL.ImageFile"],
}  # fmt: skip
"""Modules whose coverage guides the search, beside our own."""
SUFFIXES = {"dicom": [".dcm"], "nifti": [".nii"], "raster": [".png"], "archive": [".zip", ".tar"]}


# seeds


def dicom_seeds() -> list[bytes]:
    import numpy as np
    from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
    from pydicom.sequence import Sequence

    pixels = np.arange(36 * 40, dtype=np.uint16).reshape(36, 40) % 1000
    made = []
    for syntax in ("", ".1", ".1.99", ".5", ".4.90", ".4.80"):
        meta = FileMetaDataset()
        meta.TransferSyntaxUID = f"1.2.840.10008.1.2{syntax}"
        meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = "1.2.840.10008.5.1.4.1.1.4", "1.2.3"
        encapsulated = meta.TransferSyntaxUID.is_encapsulated
        wanted = meta.TransferSyntaxUID
        if encapsulated:
            meta.TransferSyntaxUID = "1.2.840.10008.1.2.1"
        ds = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
        item = Dataset()
        item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = "1.2.840.10008.5.1.4.1.1.4", "1.2.5"
        values = {
            "SOPClassUID": "1.2.840.10008.5.1.4.1.1.4", "SOPInstanceUID": "1.2.3", "StudyInstanceUID": "1.2",
            "SeriesInstanceUID": "1.3", "Modality": "MR", "ImageType": ["ORIGINAL", "PRIMARY"], "InstanceNumber": 1, "EchoTime": 7,
            "SliceThickness": 2,
            "ReferencedImageSequence": Sequence([item, item]), "ImagePositionPatient": [0, 1, 2], "PixelSpacing": [1, 2],
            "ImageOrientationPatient": [1, 0, 0, 0, 1, 0], "Rows": 36, "Columns": 40, "SamplesPerPixel": 1, "BitsAllocated": 16,
            "BitsStored": 16, "HighBit": 15, "PixelRepresentation": 0, "PhotometricInterpretation": "MONOCHROME2",
            "RescaleSlope": 2, "RescaleIntercept": -5,
        }  # fmt: skip
        for name, value in values.items():
            setattr(ds, name, value)
        ds.PixelData = pixels.tobytes()
        ds["PixelData"].VR = "OW"
        if encapsulated:
            ds.compress(wanted, generate_instance_uid=False)
        out = io.BytesIO()
        ds.save_as(out, enforce_file_format=True)
        made.append(out.getvalue())
    return made


def nifti_seeds() -> list[bytes]:
    import nibabel as nib
    import numpy as np

    made = []
    for kind, shape, dtype in (
        (nib.Nifti1Image, (4, 5, 6), np.int16),
        (nib.Nifti2Image, (4, 5, 6, 2), np.float32),
        (nib.Nifti1Image, (3, 3, 1), np.uint8),
    ):
        image = kind(np.arange(np.prod(shape)).reshape(shape).astype(dtype), np.diag([2.0, 2.0, 3.0, 1.0]))
        made.append(image.to_bytes())
    return [*made, gzip.compress(made[0])]


def raster_seeds() -> list[bytes]:
    import numpy as np
    import tifffile
    from PIL import Image

    gray, colour = np.arange(120, dtype=np.uint8).reshape(10, 12), np.zeros((10, 12, 3), np.uint8)
    made = []
    for array, kinds in ((gray, ("PNG", "JPEG")), (colour, ("PNG", "JPEG")), (gray.astype(np.uint16), ("PNG",))):
        for kind in kinds:
            out = io.BytesIO()
            Image.fromarray(array).save(out, kind)
            made.append(out.getvalue())
    for array, options in (
        (gray, {}),
        (gray, {"compression": "zlib"}),
        (gray.astype(np.float32), {"tile": (16, 16)}),
        (colour, {}),
    ):
        out = io.BytesIO()
        tifffile.imwrite(out, array, **options)
        made.append(out.getvalue())
    return made


def archive_seeds() -> list[bytes]:
    """The first byte says what it is."""
    image, made = nifti_seeds()[2], []
    files = [("a/x.nii", image), ("b.nii", image[:100]), ("../c", b"c")]
    for packing in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w", packing) as z:
            for name, data in files:
                z.writestr(name, data)
        made.append(b"\0" + out.getvalue())
    for mode in ("w", "w:gz", "w:bz2", "w:xz"):
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode=mode) as t:
            for name, data in files:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                t.addfile(info, io.BytesIO(data))
        made.append(b"\1" + out.getvalue())
    return made


# one target, in a process of its own


def check(folder: pathlib.Path, file: pathlib.Path):
    """Raises when what is read of the one file is not as it must be."""
    import numpy as np

    from sparkmed import formats

    volumes, rejections = formats.read_archive(str(folder))
    named = [s for v in volumes for s in v.sources] + [r.uri for r in rejections]
    if len(named) != len(set(named)) or {re.sub(r"#[0-9]+$", "", n).rsplit("::", 1)[-1] for n in named} != {f"file://{file}"}:
        raise AssertionError("not in exactly one place")
    for v in volumes:
        if not (np.isfinite(v.array).all() and np.isfinite(v.affine).all()):
            raise AssertionError("voxels or places that are not finite")


def fuzz(target: str, seconds: int, corpus: str, findings: str):
    import atheris

    with atheris.instrument_imports(include=["sparkmed.formats", *LIBRARIES[target]]):
        import PIL.Image

        from sparkmed import formats  # noqa: F401

        PIL.Image.preinit()

    folder = pathlib.Path(tempfile.mkdtemp(dir="/dev/shm" if pathlib.Path("/dev/shm").is_dir() else None))
    seen = set()

    def one(data: bytes):
        kind, body = (data[0] % 2, data[1:]) if target == "archive" and data else (0, data)
        file = folder / f"x{SUFFIXES[target][kind]}"
        file.write_bytes(body)
        try:
            check(folder, file)
        except Exception as e:
            frames = traceback.extract_tb(e.__traceback__)
            where = f"{type(e).__name__} at {pathlib.Path(frames[-1].filename).name}:{frames[-1].lineno}"
            if where not in seen:
                seen.add(where)
                pathlib.Path(findings, f"raised-{target}-{re.sub(r'[^A-Za-z0-9.]+', '-', where)}").write_bytes(data)
        finally:
            file.unlink()

    limits = [f"-max_total_time={seconds}", f"-timeout={SECONDS}", f"-rss_limit_mb={MEGABYTES}", "-max_len=20000", "-len_control=0"]
    atheris.Setup([sys.argv[0], corpus, *limits, f"-artifact_prefix={findings}/{target}-", "-print_final_stats=1"], one)
    atheris.Fuzz()


def run(target: str, seconds: int, seeds: str | None, scratch: pathlib.Path, findings: pathlib.Path) -> dict:
    """Fuzz one target, begun again after each crash; executions and what was found."""
    corpus = scratch / target
    corpus.mkdir()
    for n, seed in enumerate(globals()[f"{target}_seeds"]()):
        (corpus / f"seed-{n}").write_bytes(seed)
    for n, path in enumerate(sorted(pathlib.Path(seeds).rglob("*")) if seeds else []):
        if path.is_file() and path.stat().st_size < 1 << 20:
            (corpus / f"given-{n}").write_bytes((b"\0" if target == "archive" else b"") + path.read_bytes())
    executions, ends, started = 0, collections.Counter(), time.monotonic()
    while (left := int(seconds - (time.monotonic() - started))) > 0:
        command = [sys.executable, __file__, "--fuzz", target, str(left), str(corpus), str(findings)]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace")
        counted = re.findall(r"stat::number_of_executed_units:\s*(\d+)", done.stderr) or re.findall(r"^#(\d+)", done.stderr, re.M)
        executions += int(counted[-1]) if counted else 0
        if done.returncode:
            ends[done.returncode] += 1
        if not counted:
            sys.exit(done.stderr[-3000:])
    spent = time.monotonic() - started
    found = sorted(p.name for p in findings.iterdir() if p.name.startswith((f"{target}-", f"raised-{target}-")))
    out = {"seconds": round(spent), "executions": executions, "per_s": round(executions / max(spent, 1)), "findings": found}
    return out | ({"ended_with": dict(ends)} if ends else {})


if __name__ == "__main__":
    if sys.argv[1:2] == ["--fuzz"]:
        fuzz(sys.argv[2], int(sys.argv[3]), *sys.argv[4:])
    arguments = dict(a.split("=", 1) for a in sys.argv[1:] if "=" in a)
    chosen = arguments.get("targets", ",".join(TARGETS)).split(",")
    if (
        set(arguments) - {"seconds", "targets", "seeds", "folder"}
        or len(arguments) < len(sys.argv) - 1
        or set(chosen) - set(TARGETS)
    ):
        sys.exit(__doc__)
    seconds = int(arguments.get("seconds", 3600))
    kept = pathlib.Path(arguments.get("folder") or tempfile.mkdtemp(prefix="fuzz-")).resolve()
    kept.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        out = {t: run(t, seconds // len(chosen), arguments.get("seeds"), pathlib.Path(scratch), kept) for t in chosen}
    with contextlib.suppress(OSError):
        kept.rmdir()  # nothing was found
    print(json.dumps({"seconds": seconds, "targets": out, "inputs": str(kept) if kept.exists() else None}, indent=2))
