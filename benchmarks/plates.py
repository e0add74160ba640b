"""How fast names of images become fields of plates, and what the driver holds of them.

usage: python benchmarks/plates.py [images=1000000]

Prints one JSON object. The names are those of Opera plates of 384 wells, 9 sites and 5 channels, made up: no file is read.
``index`` is ``hcs.fields.assemble`` over all plates by local Spark with two slots whose workers are awake, a plate at a time,
as the volumes stage calls it; what comes back to the driver here is a count. ``memory`` is the largest resident memory of the
driver's Python after a tenth of the images and after all of them (VmHWM), in processes of their own: of this step alone, for the
volumes stage and those after it hold a row per field on the driver.
"""

import json
import os
import pathlib
import platform
import subprocess
import sys
import time

from measure import beside

from sparkmed import config
from sparkmed.formats.instance import Instance
from sparkmed.hcs import fields

WELLS, SITES, CHANNELS = 384, 9, 5
SECONDS, FLAT = 60.0, 1.1
"""Targets."""


def instances(plate: int, images: int) -> list[Instance]:
    made = []
    for n in range(images):
        well, rest = divmod(n, SITES * CHANNELS)
        site, channel = divmod(rest, CHANNELS)
        name = f"r{well // 24 + 1:02d}c{well % 24 + 1:02d}f{site + 1:02d}p01-ch{channel + 1}sk1fk1fl1.tiff"
        path = f"P{plate:05d}/Images/{name}"
        uri = f"file:///screen/{path}"
        made.append(
            Instance(
                uri,
                path,
                uri,
                1,
                1,
                1,
                f"{plate:032x}{n:032x}",
                "raster",
                "image",
                "",
                "",
                "",
                "",
                "tiff",
                (1, 2160, 2160, 1),
                None,
                "{}",
            )
        )
    return made


def assembled(images: int) -> dict:
    """Seconds of the index over that many names, and the fields that it found."""
    from sparkmed.spark import session

    spark = session.session(config.Spark(master="local[2]", conf={"spark.driver.memory": "1g"}), "benchmark")
    settings = config.Plates(convention="opera", channels={f"c{n}": str(n + 1) for n in range(CHANNELS)})
    whole, rest = divmod(images, WELLS * SITES * CHANNELS)
    plates = [(n, WELLS * SITES * CHANNELS) for n in range(whole)] + ([(whole, rest)] if rest else [])

    def one(plate):
        made = instances(*plate)
        started = time.perf_counter()
        found = fields.assemble(made, settings)
        return len(found.headers), len(found.rejections), time.perf_counter() - started

    context = spark.sparkContext
    context.parallelize(range(4), 4).map(lambda n: one((n, 45))[0]).collect()
    started = time.perf_counter()
    found = context.parallelize(plates, len(plates)).map(one).collect()
    return {
        "images": images,
        "fields": sum(f for f, _, _ in found),
        "refused": sum(r for _, r, _ in found),
        "seconds": time.perf_counter() - started,
        "of_assembling": sum(s for _, _, s in found) / 2,
    }


def child(images: int) -> dict:
    done = subprocess.run([sys.executable, __file__, "--of", str(images)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def main(images: int) -> dict:
    few, all_of_them = child(images // 10), child(images)
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "images": images,
        "fields": all_of_them["fields"],
        "refused": all_of_them["refused"],
        "seconds, making the names included": beside(all_of_them["seconds"], SECONDS, at_most=True),
        "seconds of assembling by two slots": round(all_of_them["of_assembling"], 1),
        "memory_mb": {images // 10: few["memory_mb"], images: all_of_them["memory_mb"]},
        "memory": beside(all_of_them["memory_mb"] / few["memory_mb"], FLAT, at_most=True),
    }


if __name__ == "__main__":
    if sys.argv[1:2] == ["--of"]:
        found = assembled(int(sys.argv[2]))
        (peak,) = (s for s in pathlib.Path("/proc/self/status").read_text().splitlines() if s.startswith("VmHWM"))
        print(json.dumps(found | {"memory_mb": round(int(peak.split()[1]) / 1024, 1)}))
        sys.exit()
    arguments = dict(a.split("=", 1) for a in sys.argv[1:] if "=" in a)
    if set(arguments) - {"images"} or len(arguments) < len(sys.argv) - 1:
        sys.exit(__doc__)
    print(json.dumps(main(int(arguments.get("images", 1_000_000))), indent=2))
