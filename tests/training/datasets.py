"""Patch datasets in the layout that sparkmed writes, made with pyarrow alone."""

import io
import json
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def write(
    folder: pathlib.Path,
    splits: Mapping[str, Sequence[Sequence[dict]]],
    classes: Sequence[str] = ("background", "organ"),
    task: str = "segmentation",
    row_group: int = 4,
    counts: Mapping[str, int] | None = None,
    files: bool = True,
    compression: str = "zstd",
    group_weights: Sequence[float] | None = None,
) -> str:
    """A dataset of ``{split: [rows of file 0, rows of file 1, ...]}``; rows as :func:`balls` makes them."""
    rows = [r for parts in splits.values() for part in parts for r in part]
    image = np.asarray(rows[0]["image"])
    fields = [{"name": "image", "dtype": str(image.dtype), "shape": list(image.shape), "codec": "ndarray"}]
    types = {"patch_id": pa.string(), "subject": pa.string(), "volume": pa.string(), "image": pa.binary()}
    if task == "segmentation":
        fields.append({"name": "label", "dtype": str(rows[0]["label"].dtype), "shape": list(image.shape[1:]), "codec": "ndarray"})
        types["label"] = pa.binary()
    else:
        fields.append({"name": "target", "dtype": "int64", "shape": [], "codec": "scalar"})
        types["target"] = pa.int64()
    if "group" in rows[0]:
        fields.append({"name": "group", "dtype": "int64", "shape": [], "codec": "scalar"})
        types["group"] = pa.int64()
    fields += [{"name": n, "dtype": "str", "shape": [], "codec": "scalar"} for n in ("patch_id", "subject", "volume")]
    listed = {}
    for split, parts in splits.items():
        for i, part in enumerate(parts):
            path = folder / f"split={split}" / f"part-{i:05d}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            columns = {n: [npy(r[n]) if t == pa.binary() else r[n] for r in part] for n, t in types.items()}
            table = pa.table({n: pa.array(v, types[n]) for n, v in columns.items()})
            pq.write_table(table, path, row_group_size=row_group, compression=compression)
            listed[str(path.relative_to(folder))] = len(part)
    meta = {
        "format_version": 1, "name": "test", "version": "1", "digest": "d" * 64, "task": task, "classes": list(classes), "seed": 0,
        "counts": dict(counts) if counts is not None else {s: sum(len(p) for p in parts) for s, parts in splits.items()},
        "fields": fields, "group_weights": group_weights,
    }  # fmt: skip
    if files:
        meta["files"] = listed
    (folder / "_dataset.json").write_text(json.dumps(meta))
    return str(folder)


def numbered(n: int, shape: tuple[int, int, int, int] = (1, 4, 4, 4), start: int = 0) -> list[dict]:
    """Rows whose image is filled with their number, and whose label with its parity."""
    return [
        {
            "image": np.full(shape, i, np.float32), "label": np.full(shape[1:], i % 2, np.uint8), "target": i % 2,
            "patch_id": f"p{i:05d}", "subject": f"s{i // 2}", "volume": f"v{i // 2}",
        }
        for i in range(start, start + n)
    ]  # fmt: skip


def balls(n: int, size: tuple[int, int, int] = (16, 16, 16), seed: int = 0, prefix: str = "") -> list[dict]:
    """Rows with a bright ball in noise, and its label; ``target`` is 1 when the ball is large."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*[np.arange(s) for s in size], indexing="ij"))
    rows = []
    for i in range(n):
        target = int(rng.integers(2))
        radius = min(size[:2]) * (0.18 + 0.14 * target)
        centre = np.array([s / 2 + rng.uniform(-0.15, 0.15) * s for s in size])
        if size[2] == 1:
            centre[2] = 0
        inside = ((grid - centre[:, None, None, None]) ** 2).sum(0) <= radius**2
        image = (inside * 2.0 + rng.normal(0, 0.5, size)).astype(np.float32)[None]
        name = f"{prefix}{i:04d}"
        names = {"patch_id": name, "subject": f"{seed}/{name}", "volume": name}
        rows.append({"image": image, "label": inside.astype(np.uint8), "target": target, **names})
    return rows
