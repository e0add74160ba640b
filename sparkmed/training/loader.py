"""PatchLoader: each patch of a dataset exactly once per epoch, in an order that no rank, thread or machine changes."""

import functools
import itertools
import queue
import threading
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sparkmed.cache import FileCache
from sparkmed.dataset import Field
from sparkmed.rejection import InputError
from sparkmed.training.dataset import Block, PatchDataset, blocks_bytes

READERS = 2
"""Threads that read row groups ahead, beside the one that makes batches."""

ALLOCATED = 1.4
"""Memory that Arrow's allocator takes for what comes and goes, over what is in use (1.3 to 2 were seen)."""

OVERHEAD = 24 << 20
"""Bytes that are no rows: modules of the first use, stacks and pages of the threads, what allocators keep to begin with."""

SMALL = 32768
"""Bytes of a payload below which a second copy costs less than a step of a Python loop."""


HANDFUL = 1 << 20
"""Bytes of small batches that are made, and change hands, together: either costs some Python each time."""


class Order:
    """The global order of one epoch: a pure function of (seed, epoch, blocks, window).

    Blocks are shuffled and laid into windows of at most ``window_bytes`` (one block at least); rows are shuffled within a window.
    So reading stays local: whoever walks the order holds the blocks of one window at a time, of two when a batch spans them.
    A global batch is sorted by block and row, so that a rank, which takes a stretch of it, needs few blocks of a window.
    """

    def __init__(self, blocks: Sequence[Block], seed: int, epoch: int, shuffle: bool, window_bytes: float):
        self._blocks = blocks
        self._key = (seed, epoch) if shuffle else None
        order = self._generator(0).permutation(len(blocks)) if shuffle else np.arange(len(blocks))
        self.windows: list[list[int]] = []
        room = 0.0
        for b in order.tolist():
            if blocks[b].bytes > room or not self.windows:
                self.windows.append([])
                room = window_bytes
            self.windows[-1].append(b)
            room -= blocks[b].bytes
        sizes = [sum(blocks[b].rows for b in window) for window in self.windows]
        self.ends = np.cumsum(sizes, dtype=np.int64)
        """Global position behind the last row of each window."""

    def _generator(self, stream: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64(np.random.SeedSequence([*self._key, stream])))

    def rows(self, window: int) -> np.ndarray:
        """(rows, 2) int64 of (block, row in the block), in order."""
        pairs = [np.column_stack([np.full(n, b), np.arange(n)]) for b in self.windows[window] for n in [self._blocks[b].rows]]
        pairs = np.concatenate(pairs).astype(np.int64)
        return pairs if self._key is None else self._generator(1 + window).permutation(pairs)

    def steps(self, start: int, batch_size: int, rank: int, world_size: int) -> Iterator["Step"]:
        """What ``rank`` takes of each global batch from global position ``start`` on."""
        total, global_batch = int(self.ends[-1]) if len(self.ends) else 0, batch_size * world_size
        pending, window = np.empty((0, 2), np.int64), int(np.searchsorted(self.ends, start, "right"))
        skipped = start - (int(self.ends[window - 1]) if window else 0)
        for low in range(start, total, global_batch):
            high = min(low + global_batch, total)
            while len(pending) < high - low:
                pending, window, skipped = np.concatenate([pending, self.rows(window)[skipped:]]), window + 1, 0
            batch, pending = pending[: high - low], pending[high - low :]
            batch = batch[np.lexsort((batch[:, 1], batch[:, 0]))]
            first, last = rank * len(batch) // world_size, (rank + 1) * len(batch) // world_size
            finished = int(np.searchsorted(self.ends, high, "right"))
            yield Step(batch[first:last], high, high - low, finished)


@dataclass(frozen=True)
class Step:
    """One rank's part of a global batch: (samples, 2) int64 of (block, row in the block), the global position behind the batch,
    how many samples it has over all ranks, and how many windows are finished with it."""

    samples: np.ndarray
    end: int
    total: int
    finished: int

    @functools.cached_property
    def blocks(self) -> list[int]:
        """Which blocks it takes samples of."""
        return list(dict.fromkeys(self.samples[:, 0].tolist()))


class PatchLoader:
    """Batches of a patch dataset for one rank of ``world_size``; each patch once per epoch over all ranks.

    Iterates dicts: ``image`` (B, C, I, J, K) and ``label`` (B, 1, I, J, K) or ``target`` (B,) as the dataset stores them
    (:meth:`to_device` makes float32 and int64 of them); ``patch_id``, ``subject``, ``volume`` lists of str; ``weight`` (B,), 0 for
    padding; ``total`` (), the real samples of the global batch. B is always ``batch_size``: the last global batch is filled with
    zeros of weight 0 and patch id "".

    Global batch s holds samples [s * B * world_size, ...) of the order of the epoch and is cut into one stretch per rank; so every
    rank takes the same number of steps, and the samples of a step depend on the size of the global batch only.

    ``split`` None is all splits. ``window_mb`` is how much is shuffled together; it decides the order. ``memory_mb`` bounds what is
    held of the dataset, read ahead included, and decides no more than speed: a split that fits is read once and kept, else blocks
    are read anew each epoch (a window is held in any case, two where a batch spans them); up to two batches wait besides.
    ``pin_memory`` makes batches in page-locked memory, for a GPU. ``cache`` keeps copies of remote files (None: as
    :class:`FileCache` does by itself).

    ``schema`` vouches for a Petastorm dataset of others, which has no description beside it: {"fields": [{"name", "dtype", "shape",
    "codec" (:data:`sparkmed.training.dataset.CODECS`), "column" if that is not the name}, ...]}; fields may have any name besides
    ``image``, which may have any shape; without a field ``patch_id`` patches are named after file, row group and row.

    Sizes are those before compression. Raises :class:`DatasetError`, an :class:`InputError`, that names the file when a dataset is
    not what its schema and footers say: here, or while iterating, but never a shorter epoch.
    """

    def __init__(
        self,
        url: str,
        batch_size: int = 8,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        split: str | None = None,
        window_mb: float = 64.0,
        memory_mb: float = 512.0,
        pin_memory: bool = False,
        cache: FileCache | None = None,
        schema: dict | None = None,
    ):
        if batch_size < 1 or world_size < 1 or not 0 <= rank < world_size or seed < 0 or not (window_mb >= 0 and memory_mb >= 0):
            raise InputError(
                "PatchLoader wants batch_size >= 1, 0 <= rank < world_size, seed, window_mb and memory_mb >= 0; got batch_size "
                f"{batch_size}, rank {rank}, world_size {world_size}, seed {seed}, window_mb {window_mb}, memory_mb {memory_mb}"
            )
        self.dataset = PatchDataset(url, split, cache, schema)
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.seed, self.shuffle, self.epoch = seed, shuffle, 0
        self.pin_memory = pin_memory
        self._window_bytes = window_mb * 2**20
        largest = max((b.bytes for b in self.dataset.blocks), default=0)
        # bytes of row groups that may be held; a read takes twice its own size while it lasts
        self._room = (memory_mb * 2**20 - OVERHEAD) / ALLOCATED - 2 * READERS * largest
        self._kept: dict[int, dict] | None = {} if blocks_bytes(self.dataset.blocks) <= self._room else None
        self._position = 0  # samples of the epoch that were handed out, over all ranks
        self._resume: int | None = None

    def __len__(self) -> int:
        """Steps of a whole epoch; the same on all ranks."""
        return -(-self.dataset.rows // (self.batch_size * self.world_size))

    @property
    def position(self) -> int:
        """Samples of this epoch, over all ranks, that were handed out."""
        return self._position if self._resume is None else self._resume

    def set_epoch(self, epoch: int) -> None:
        """The epoch that the next iteration runs; another one than the present starts at its beginning."""
        if epoch != self.epoch:
            self.epoch, self._position, self._resume = epoch, 0, None

    def state_dict(self) -> dict:
        """Where the iteration stands, as plain values; good for another batch size and world size too."""
        return {"version": 1, "dataset": self._order_key(), "seed": self.seed, "epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict) -> None:
        """The next iteration goes on behind the last sample of ``state``. :class:`InputError` when it belongs to another order."""
        mine = {"version": 1, "dataset": self._order_key(), "seed": self.seed}
        for key, value in mine.items():
            if state.get(key) != value:
                raise InputError(f"loader state has {key} {state.get(key)!r}, this loader {value!r}: another order of samples")
        whole = all(isinstance(state.get(key), int) for key in ("epoch", "position"))
        if not whole or not 0 <= state["position"] <= self.dataset.rows:
            where = f"epoch {state.get('epoch')}, position {state.get('position')}"
            raise InputError(f"loader state has {where}, the dataset {self.dataset.rows} patches")
        self.epoch, self._position, self._resume = state["epoch"], state["position"], state["position"]

    def _order_key(self) -> str:
        return f"{self.dataset.digest[:16]}-{self._window_bytes:.0f}" + ("" if self.shuffle else "-unshuffled")

    def to_device(self, batch: dict, device: torch.device) -> dict:
        """The real samples of ``batch`` on ``device``: ``image`` float32, scaled as the dataset says, ``label`` int64."""
        n = int(batch["weight"].sum())
        moved = {
            k: v if k == "total" else v[:n].to(device, non_blocking=True) if isinstance(v, Tensor) else v[:n]
            for k, v in batch.items()
        }
        image = moved["image"].float()
        scale, offset = self.dataset.scaling
        moved["image"] = image if (scale, offset) == (1.0, 0.0) else image.mul(scale).add_(offset)
        return moved | ({"label": moved["label"].long()} if "label" in moved else {})

    def __iter__(self) -> Iterator[dict]:
        start = self._resume or 0
        self._position, self._resume = start, None
        order = Order(self.dataset.blocks, self.seed, self.epoch, self.shuffle, self._window_bytes)
        steps = order.steps(start, self.batch_size, self.rank, self.world_size)
        ready: queue.Queue = queue.Queue(1)  # one batch waits here, one is being made; or a handful of small ones
        stop = threading.Event()
        maker = threading.Thread(target=_produce, args=(self._batches(order, steps), ready, stop), daemon=True, name="patch-reader")
        maker.start()
        try:
            while True:
                item = ready.get()
                if item is None:
                    return
                if isinstance(item, BaseException):
                    raise item
                while item:
                    self._position, batch = item.popleft()
                    yield batch
                    del batch  # who holds it is the consumer alone
        finally:
            stop.set()
            maker.join()

    def _batches(self, order: Order, steps: Iterator[Step]) -> Generator[deque[tuple[int, dict]], None, None]:
        """(position behind it, batch) of each step, by the handful; row groups are read ahead as far as memory allows."""
        blocks, kept = self.dataset.blocks, self._kept
        reading: dict[int, Future] = {}  # what is held, or being read
        ahead: deque[Step] = deque()
        room = self._room
        finished, upcoming = 0, next(steps, None)
        handful = max(1, HANDFUL * self.dataset.rows // (self.batch_size * max(1, blocks_bytes(blocks))))
        pool = ThreadPoolExecutor(READERS, "patch-reader")
        try:
            while upcoming or ahead:
                while upcoming:
                    needed = [b for b in upcoming.blocks if b not in reading]
                    size = sum(blocks[b].bytes for b in needed)
                    if ahead and (size > room or len(ahead) >= 1000):
                        break
                    for b in needed:
                        reading[b] = _done(kept[b]) if kept and b in kept else pool.submit(self.dataset.read, blocks[b])
                    room -= size
                    ahead.append(upcoming)
                    upcoming = next(steps, None)
                together = [ahead.popleft() for _ in range(min(len(ahead), handful))]
                held = {b: reading[b].result() for b in {b for step in together for b in step.blocks}}
                if kept is not None:
                    kept.update(held)
                yield deque(zip([step.end for step in together], self._collate(together, held), strict=True))
                for window in order.windows[finished : together[-1].finished]:
                    for b in window:
                        if reading.pop(b, None) is not None:
                            room += blocks[b].bytes
                finished = together[-1].finished
        finally:
            pool.shutdown(cancel_futures=True)

    def _collate(self, steps: list[Step], held: dict[int, dict]) -> Iterator[dict]:
        """The batches of ``steps``, from the columns of their row groups; one copy from row group to batch."""
        size = self.batch_size
        samples = np.concatenate([step.samples for step in steps])
        places = np.concatenate([i * size + np.arange(len(step.samples)) for i, step in enumerate(steps)])
        padding = np.setdiff1d(np.arange(len(steps) * size), places)
        order = np.argsort(samples[:, 0], kind="stable")
        samples, places = samples[order], places[order]
        edges = [0, *(np.flatnonzero(np.diff(samples[:, 0])) + 1).tolist(), len(samples)]
        runs = [slice(*edge) for edge in itertools.pairwise(edges)] if len(samples) else []
        parts = [(held[samples[r.start, 0].item()], samples[r, 1], places[r]) for r in runs]
        columns = {field.name: self._column(field, parts, padding, len(steps) * size) for field in self.dataset.fields}
        columns["weight"] = torch.ones(len(steps) * size)
        columns["weight"][padding] = 0
        for i, step in enumerate(steps):
            batch = {name: column[i * size : (i + 1) * size] for name, column in columns.items()}
            yield batch | {"total": torch.tensor(float(step.total))}

    def _column(self, field: Field, parts: list[tuple[dict, np.ndarray, np.ndarray]], padding: np.ndarray, size: int):
        """Of ``size`` samples: (columns of a row group, rows of it, where they go), and where there is nothing."""
        if field.dtype == "str":
            texts = [""] * size
            for columns, rows, places in parts:
                column = columns[field.name]
                for place, row in zip(places.tolist(), rows.tolist(), strict=True):
                    texts[place] = column[row]
            return texts
        shape = () if field.codec == "scalar" else field.shape
        tensor = torch.empty((size, *shape), dtype=_torch_dtype(field.dtype), pin_memory=self.pin_memory)
        array = tensor.numpy()
        array[padding] = 0
        for columns, rows, places in parts:
            if field.codec == "scalar":
                array[places] = columns[field.name][rows]
            else:
                _copy(columns[field.name].matrix, rows, array.reshape(size, -1).view(np.uint8), places)
        return tensor[:, None] if field.name == "label" and tensor.ndim == 4 else tensor


def _copy(matrix: np.ndarray, rows: np.ndarray, out: np.ndarray, places: np.ndarray) -> None:
    """``out[places] = matrix[rows]``, with one copy where that counts."""
    if matrix.shape[1] >= SMALL:
        for place, row in zip(places.tolist(), rows.tolist(), strict=True):
            out[place] = matrix[row]
    elif (np.diff(rows) == 1).all() and (np.diff(places) == 1).all():
        out[places[0] : places[-1] + 1] = matrix[rows[0] : rows[-1] + 1]
    else:
        out[places] = matrix[rows]


def _torch_dtype(name: str) -> torch.dtype:
    return torch.from_numpy(np.empty(0, name)).dtype


def _done(value) -> Future:
    future: Future = Future()
    future.set_result(value)
    return future


def _produce(batches: Generator, ready: queue.Queue, stop: threading.Event) -> None:
    """Thread: put handfuls of batches, then None, or the exception that ended them, until told to stop."""

    def put(item) -> bool:
        while not stop.is_set():
            try:
                ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    try:
        for handful in batches:
            if not put(handful):
                return
            del handful
        put(None)
    except BaseException as e:  # it belongs to the consumer
        put(e)
    finally:
        batches.close()
