"""How fast DICOM is catalogued and read beside bare pydicom, what Spark adds, and what memory its driver takes.

usage: python benchmarks/dicom.py [files=20000] [turns=5] [headers=1500] [slices=200] [series=FOLDER] [folder=FOLDER]

Prints one JSON object. The archives are made in ``folder`` (default: the temporary one) and removed. A ratio is the median over
turns of the ratio within a turn, behind a turn that warms up; programs take turns.

``headers``: files/s of one process that catalogues, the loop that a Spark task runs (walk, SHA-256, facts of the header), against
a loop of ``pydicom.dcmread(stop_before_pixels=True)`` over the same paths that hashes what it read: ``headers`` files of 64 x 64
pixels, and a fifth as many of 512 x 512. The elements are those of a scanner: 90 of them, two sequences, a private block.
``spark``: the whole catalog stage on ``files`` files of 64 x 64, by local Spark with two slots whose session is up, against the
same stage with one slot, and against one process that runs the loop above and writes the table. ``rerun`` is the stage over
the same archive again: its share of the first time, both with two slots.
``memory``: the most that the driver's Python and its JVM had resident (VmHWM) after the stage over a tenth of ``files`` and over
all of them, each in a process of its own. The JVM runs the tasks' side of local Spark too, and lets garbage lie until its heap of
1 GB is full: ``heap`` is what it still held after the last collection.
``series``: slices/s from a catalogued series of ``slices`` 512 x 512 slices (or of the largest series in the folder ``series``) to
its volume, against a loop that reads with pydicom, sorts by position and stacks slope times pixels plus intercept;
``read_archive``, which hashes and reads the headers first; and ``dcm2niix -z n``, a program that also writes the file.
"""

import hashlib
import io
import json
import os
import pathlib
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
import pydicom
from measure import beside, take_turns
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRLittleEndian

from sparkmed import config, formats, storage, tables

HEADERS, SLOTS, RERUN, FLAT, SERIES = 0.85, 1.6, 0.03, 1.1, 0.9
"""Targets."""
LINEAGE = {"config_digest": "benchmark", "code_version": "benchmark"}
PER_SERIES = 100
_UID, _NUMBER, _POSITION = b"9.8.7.10000000", b"11111111", b"22222222"
"""What stands for these in the file that all others are copies of."""


# archives


def template(size: int) -> bytes:
    """A CT slice of ``size`` x ``size``, with as many elements as scanners write."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = "1.2.840.10008.5.1.4.1.1.2", f"1.2.3.{_UID.decode()}"
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    rng = np.random.default_rng(0)
    plain = {
        "SOPClassUID": meta.MediaStorageSOPClassUID, "SOPInstanceUID": meta.MediaStorageSOPInstanceUID,
        "SpecificCharacterSet": "ISO_IR 100", "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"], "Modality": "CT",
        "StudyDate": "20200101", "SeriesDate": "20200101", "AcquisitionDate": "20200101", "ContentDate": "20200101",
        "StudyTime": "101010", "SeriesTime": "101010", "AcquisitionTime": "101010", "ContentTime": "101010",
        "Manufacturer": "Phantom", "InstitutionName": "None", "StationName": "CT1", "StudyDescription": "Phantom",
        "SeriesDescription": "Axial 1 mm", "ManufacturerModelName": "One", "PatientName": "Phantom", "PatientID": "phantom",
        "PatientBirthDate": "", "PatientSex": "O", "PatientAge": "000Y", "PatientPosition": "HFS", "AccessionNumber": "",
        "BodyPartExamined": "CHEST", "ScanOptions": "HELICAL", "SliceThickness": "1", "KVP": "120", "SoftwareVersions": "1",
        "DataCollectionDiameter": "500", "ReconstructionDiameter": "400", "DistanceSourceToDetector": "1000",
        "DistanceSourceToPatient": "500", "GantryDetectorTilt": "0", "TableHeight": "100", "RotationDirection": "CW",
        "ExposureTime": "500", "XRayTubeCurrent": "200", "Exposure": "100", "FilterType": "BODY", "GeneratorPower": "24",
        "FocalSpots": ["1.2"], "ConvolutionKernel": "B30f", "ProtocolName": "Chest", "StudyInstanceUID": "1.2.3.4",
        "SeriesInstanceUID": f"1.2.4.{_UID.decode()}", "StudyID": "1", "SeriesNumber": "2", "AcquisitionNumber": "1",
        "InstanceNumber": _NUMBER.decode(), "ImagePositionPatient": ["-200", "-200", _POSITION.decode()],
        "ImageOrientationPatient": ["1", "0", "0", "0", "1", "0"], "FrameOfReferenceUID": "1.2.3.4.6", "SliceLocation": "0",
        "PositionReferenceIndicator": "", "ImageComments": "none", "SamplesPerPixel": 1, "PhotometricInterpretation": "MONOCHROME2",
        "Rows": size, "Columns": size, "PixelSpacing": ["0.78125", "0.78125"], "BitsAllocated": 16, "BitsStored": 12,
        "HighBit": 11, "PixelRepresentation": 0, "SmallestImagePixelValue": 0, "LargestImagePixelValue": 4095,
        "WindowCenter": ["40", "-600"], "WindowWidth": ["400", "1200"], "RescaleIntercept": "-1024", "RescaleSlope": "1",
        "RescaleType": "HU",
    }  # fmt: skip
    for name, value in plain.items():
        setattr(ds, name, value)
    reference = Dataset()
    reference.ReferencedSOPClassUID, reference.ReferencedSOPInstanceUID = meta.MediaStorageSOPClassUID, "1.2.3.4.5"
    code = Dataset()
    code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = "24627-2", "LN", "Chest CT"
    ds.ReferencedImageSequence, ds.ProcedureCodeSequence = Sequence([reference] * 3), Sequence([code])
    block = ds.private_block(0x0019, "PHANTOM HEADER", create=True)
    for n in range(20):
        block.add_new(n, "LO", f"value {n}")
    ds.PixelData = rng.integers(0, 4096, (size, size)).astype(np.uint16).tobytes()
    out = io.BytesIO()
    ds.save_as(out, enforce_file_format=True)
    return out.getvalue()


def make(folder: pathlib.Path, files: int, size: int, per_series: int = PER_SERIES) -> pathlib.Path:
    """``files`` slices in folders of one series each, written in an order that is not that of their positions."""
    head, tail = template(size).split(b"\xe0\x7f\x10\0OW")
    for n in range(files):
        series, k = divmod(n, per_series)
        place = folder / f"{series:06d}"
        if k == 0:
            place.mkdir(parents=True)
        at = k * 37 % per_series if per_series % 37 else k
        own = head.replace(b"1.2.3." + _UID, b"1.2.3.9.8.7.%d" % (10**7 + n)).replace(
            b"1.2.4." + _UID, b"1.2.4.9.8.7.%d" % (10**7 + series)
        )
        own = own.replace(_NUMBER, b"%08d" % (at + 1)).replace(_POSITION, b"%08d" % at)
        (place / f"{k:06d}.dcm").write_bytes(own + b"\xe0\x7f\x10\0OW" + tail)
    return folder


# one process


def ours(folder: pathlib.Path) -> int:
    from sparkmed.spark import catalog

    found = [i for f in storage.walk(str(folder)) for i in catalog.read_headers(f, config.Catalog())]
    return sum(isinstance(i, formats.Instance) for i in found)


def bare(folder: pathlib.Path) -> int:
    found = []
    for place, _, names in os.walk(folder):
        for name in names:
            data = pathlib.Path(place, name).read_bytes()
            found.append((hashlib.sha256(data).hexdigest(), pydicom.dcmread(io.BytesIO(data), stop_before_pixels=True)))
    return len(found)


def ratio(seconds: dict[str, list[float]], fast: str, slow: str) -> float:
    """Median of how many times as quick ``fast`` is."""
    return statistics.median(b / a for a, b in zip(seconds[fast], seconds[slow], strict=True))


def headers(folder: pathlib.Path, files: int, turns: int) -> dict:
    out = {}
    for size, n in ((64, files), (512, files // 5)):
        archive = make(folder / f"headers{size}", n, size)
        seconds = take_turns({"ours": lambda a=archive: ours(a), "pydicom": lambda a=archive: bare(a)}, turns, n)
        rates = {name: round(n / statistics.median(times)) for name, times in seconds.items()}
        out[f"{size} x {size}"] = {"files_per_s": rates, "ours/pydicom": beside(ratio(seconds, "ours", "pydicom"), HEADERS)}
        shutil.rmtree(archive)
    return out


# Spark


def session(slots: int):
    from sparkmed.spark import session

    return session.session(config.Spark(master=f"local[{slots}]", conf={"spark.driver.memory": "1g"}), "benchmark")


def update(spark, archive: pathlib.Path, lake: pathlib.Path) -> dict:
    from sparkmed.spark import catalog

    return catalog.update(spark, str(archive), str(lake), config.Catalog(), None, LINEAGE)


def alone(archive: pathlib.Path, lake: pathlib.Path):
    """The stage without Spark."""
    from sparkmed.spark import catalog

    rows = []
    for file in storage.walk(str(archive)):
        for instance in catalog.read_headers(file, config.Catalog()):
            rows.append({**instance.row(), "subject": instance.patient, **LINEAGE, "run": 1})
    table = tables.catalog(str(lake))
    table.commit([table.write(rows)])


def one_stage(slots: int, folder: pathlib.Path, archive: pathlib.Path, warm: pathlib.Path, lake: pathlib.Path):
    """Prints seconds of the stage and of its reruns, in a session that has read another archive before."""
    spark = session(slots)
    update(spark, warm, folder / f"{lake.name}-warm")
    update(spark, warm, folder / f"{lake.name}-warm")
    started = time.perf_counter()
    counts = update(spark, archive, lake)
    first, again = time.perf_counter() - started, []
    for _ in range(3):
        started = time.perf_counter()
        if update(spark, archive, lake)["new"]:
            sys.exit("an unchanged archive was read again")
        again.append(time.perf_counter() - started)
    print(json.dumps({"first": first, "again": statistics.median(again), "instances": counts["instances"]}))


def peak(pid: int | str) -> float:
    """Largest resident memory of a process so far in MB."""
    (line,) = (s for s in pathlib.Path(f"/proc/{pid}/status").read_text().splitlines() if s.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def memory_of(archive: pathlib.Path, lake: pathlib.Path):
    """Prints the peaks of the driver's two processes."""
    spark = session(2)
    update(spark, archive, lake)
    update(spark, archive, lake)
    java = spark._jvm.java.lang
    resident = {"python_mb": round(peak("self"), 1), "jvm_mb": round(peak(java.ProcessHandle.current().pid()), 1)}
    java.System.gc()
    heap = java.Runtime.getRuntime()
    print(json.dumps(resident | {"heap_mb": round((heap.totalMemory() - heap.freeMemory()) / 2**20, 1)}))


def child(*arguments) -> dict:
    done = subprocess.run([sys.executable, __file__, *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def spark_figures(folder: pathlib.Path, files: int, turns: int) -> dict:
    archive, warm = make(folder / "archive", files, 64), make(folder / "warm", 200, 64)
    seconds: dict[str, list[float]] = {"one": [], "two": [], "process": [], "again": []}
    for turn in range(turns):
        for slots, name in ((1, "one"), (2, "two")):
            lake = folder / f"lake-{slots}-{turn}"
            found = child("--stage", slots, folder, archive, warm, lake)
            if found["instances"] != files:
                sys.exit(f"{found['instances']} of {files} instances")
            seconds[name].append(found["first"])
            shutil.rmtree(lake)
        seconds["again"].append(found["again"])
        started = time.perf_counter()
        alone(archive, folder / f"lake-alone-{turn}")
        seconds["process"].append(time.perf_counter() - started)
    few = make(folder / "few", files // 10, 64)
    peaks = {n: child("--memory", a, folder / f"lake-{n}-files") for n, a in ((files // 10, few), (files, archive))}
    growth = {p: peaks[files][f"{p}_mb"] / peaks[files // 10][f"{p}_mb"] for p in ("python", "jvm", "heap")}
    shutil.rmtree(archive)
    return {
        "spark": {
            "files": files,
            "seconds": {name: round(statistics.median(times), 2) for name, times in seconds.items()},
            "two slots/one process": beside(ratio(seconds, "two", "process"), SLOTS),
            "two slots/one slot": beside(ratio(seconds, "two", "one"), None),
            "rerun/first": beside(1 / ratio(seconds, "again", "two"), RERUN, at_most=True),
        },
        "memory": {
            **{f"{n} files": p for n, p in peaks.items()},
            "python": beside(growth["python"], FLAT, at_most=True),
            "jvm": beside(growth["jvm"], None),
            "heap": beside(growth["heap"], FLAT, at_most=True),
        },
    }


# series


def stacked(paths: list[str]) -> np.ndarray:
    """(slices, rows, columns) as a careful person writes it in a notebook."""
    slices = [pydicom.dcmread(p) for p in paths]
    normal = np.cross(*np.reshape(slices[0].ImageOrientationPatient, (2, 3)))
    slices.sort(key=lambda ds: float(normal @ np.array(ds.ImagePositionPatient, float)))
    return np.stack([ds.pixel_array * float(ds.get("RescaleSlope", 1)) + float(ds.get("RescaleIntercept", 0)) for ds in slices])


def series(folder: pathlib.Path, slices: int, given: str | None, turns: int) -> dict:
    archive = pathlib.Path(given) if given else make(folder / "series", slices, 512, slices)
    found, _ = formats.read_headers(str(archive))
    header = max(found, key=lambda h: len(h.sources))
    n, paths = len(header.sources), [str(storage.local_path(s)) for s in header.sources]
    only = folder / "only"
    only.mkdir()
    for p in paths:
        (only / pathlib.Path(p).name).symlink_to(p) if given is None else shutil.copy(p, only)
    if given is None:
        only = archive
    outputs = folder / "nifti"
    outputs.mkdir()

    def by_dcm2niix() -> int:
        from dcm2niix import bin as program

        subprocess.run([program, "-z", "n", "-b", "n", "-o", str(outputs), str(only)], check=True, capture_output=True)
        for made in outputs.iterdir():
            made.unlink()
        return n

    first = stacked(paths)
    ours_first = formats.read_volume(header).array
    if ours_first.shape[0] == 1 and not np.allclose(ours_first[0].transpose(2, 1, 0), first):
        sys.exit("the two volumes differ")
    runs = {
        "read_volume": lambda: len(formats.read_volume(header).sources),
        "pydicom": lambda: len(stacked(paths)),
        "read_archive": lambda: sum(len(v.sources) for v in formats.read_archive(str(only))[0]),
        "dcm2niix": by_dcm2niix,
    }
    seconds = take_turns(runs, turns, n)
    return {
        "slices": n,
        "shape": list(header.shape),
        "slices_per_s": {name: round(n / statistics.median(times), 1) for name, times in seconds.items()},
        "read_volume/pydicom": beside(ratio(seconds, "read_volume", "pydicom"), SERIES),
        "read_archive/pydicom": beside(ratio(seconds, "read_archive", "pydicom"), None),
        "read_archive/dcm2niix": beside(ratio(seconds, "read_archive", "dcm2niix"), None),
    }


if __name__ == "__main__":
    if sys.argv[1:2] == ["--stage"]:
        one_stage(int(sys.argv[2]), *map(pathlib.Path, sys.argv[3:]))
        sys.exit()
    if sys.argv[1:2] == ["--memory"]:
        memory_of(*map(pathlib.Path, sys.argv[2:]))
        sys.exit()
    defaults = {"files": 20000, "turns": 5, "headers": 1500, "slices": 200}
    arguments = dict(a.split("=", 1) for a in sys.argv[1:] if "=" in a)
    if set(arguments) - {*defaults, "series", "folder"} or len(arguments) < len(sys.argv) - 1:
        sys.exit(__doc__)
    settings = {name: int(arguments.get(name, value)) for name, value in defaults.items()}
    out = {"machine": f"{platform.machine()}, {os.cpu_count()} cores", **settings}
    with tempfile.TemporaryDirectory(dir=arguments.get("folder")) as made:
        scratch = pathlib.Path(made).resolve()
        if settings["headers"]:
            out["headers"] = headers(scratch, settings["headers"], settings["turns"])
        if settings["slices"]:
            out["series"] = series(scratch, settings["slices"], arguments.get("series"), settings["turns"])
        if settings["files"]:
            out |= spark_figures(scratch, settings["files"], max(1, settings["turns"] // 2))
    print(json.dumps(out, indent=2))
