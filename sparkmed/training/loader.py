"""PatchLoader: each patch of a dataset exactly once per epoch, in an order that no rank, thread or machine changes."""

import queue
import threading
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from sparkmed.rejection import InputError
from sparkmed.training.dataset import Block, PatchDataset, Payloads, blocks_bytes

PREFETCHED = 2  # batches that wait for the consumer


class Order:
    """The global order of one epoch: a pure function of (seed, epoch, blocks, window).

    Blocks are shuffled and laid into windows of at most ``window_bytes`` (one block at least); rows are shuffled within a window.
    So reading stays local: whoever walks the order holds the blocks of one window at a time, of two when a batch spans them.
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


class PatchLoader:
    """Batches of a patch dataset for one rank of ``world_size``; each patch once per epoch over all ranks.

    Iterates dicts: ``image`` (B, C, I, J, K) float32; ``label`` (B, 1, I, J, K) int64 or ``target`` (B,) int64; ``patch_id``,
    ``subject``, ``volume`` lists of str; ``weight`` (B,) float32, 0 for padding; ``total`` () float32, the real samples of the
    global batch. B is always ``batch_size``: the last global batch is filled with zeros of weight 0 and patch id "".

    Global batch s holds samples [s * B * world_size, ...) of the order of the epoch, and rank r takes every world_size-th of
    them; so every rank takes the same number of steps, and the samples of a step depend on the size of the global batch only.

    ``split`` None is all splits. ``window_mb`` bounds what is shuffled together, hence what is held; a split of at most
    ``cache_mb`` (before compression) is read once and kept. Raises :class:`DatasetError`, an :class:`InputError`, that names
    the file when a dataset is not what its schema and footers say: here, or while iterating, but never a shorter epoch.
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
        cache_mb: float = 512.0,
    ):
        if batch_size < 1 or world_size < 1 or not 0 <= rank < world_size or seed < 0:
            raise InputError(
                f"PatchLoader wants batch_size >= 1, 0 <= rank < world_size, seed >= 0; got batch_size {batch_size}, rank {rank}, "
                f"world_size {world_size}, seed {seed}"
            )
        self.dataset = PatchDataset(url, split)
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.seed, self.shuffle, self.epoch = seed, shuffle, 0
        self._window_bytes = window_mb * 2**20
        self._cache: dict[int, dict] | None = {} if blocks_bytes(self.dataset.blocks) <= cache_mb * 2**20 else None
        self._position = 0  # samples of the epoch that were handed out, over all ranks
        self._resume: int | None = None

    def __len__(self) -> int:
        """Steps of a whole epoch; the same on all ranks."""
        return -(-self.dataset.rows // (self.batch_size * self.world_size))

    def set_epoch(self, epoch: int) -> None:
        """The epoch that the next iteration runs; another one than the present starts at its beginning."""
        if epoch != self.epoch:
            self.epoch, self._position, self._resume = epoch, 0, None

    def state_dict(self) -> dict:
        """Where the iteration stands, as plain values; good for another batch size and world size too."""
        position = self._position if self._resume is None else self._resume
        return {"version": 1, "dataset": self._order_key(), "seed": self.seed, "epoch": self.epoch, "position": position}

    def load_state_dict(self, state: dict) -> None:
        """The next iteration goes on behind the last sample of ``state``. :class:`InputError` when it belongs to another order."""
        mine = {"version": 1, "dataset": self._order_key(), "seed": self.seed}
        for key, value in mine.items():
            if state.get(key) != value:
                raise InputError(f"loader state has {key} {state.get(key)!r}, this loader {value!r}: another order of samples")
        if not 0 <= state["position"] <= self.dataset.rows:
            raise InputError(f"loader state has position {state['position']}, the dataset {self.dataset.rows} patches")
        self.epoch, self._position, self._resume = state["epoch"], state["position"], state["position"]

    def _order_key(self) -> str:
        return f"{self.dataset.digest[:16]}-{self._window_bytes:.0f}" + ("" if self.shuffle else "-unshuffled")

    def __iter__(self) -> Iterator[dict]:
        start = self._resume or 0
        self._position, self._resume = start, None
        order = Order(self.dataset.blocks, self.seed, self.epoch, self.shuffle, self._window_bytes)
        global_batch = self.batch_size * self.world_size
        ready: queue.Queue = queue.Queue(PREFETCHED)
        stop = threading.Event()
        batches = self._batches(order, start)
        reader = threading.Thread(target=_produce, args=(batches, ready, stop), daemon=True, name="patch-reader")
        reader.start()
        try:
            while True:
                item = ready.get()
                if item is None:
                    return
                if isinstance(item, BaseException):
                    raise item
                self._position = min(self._position + global_batch, self.dataset.rows)
                yield item
        finally:
            stop.set()
            reader.join()

    def _batches(self, order: Order, start: int) -> Iterator[dict]:
        """The batches of this rank from global position ``start`` on."""
        rows, global_batch = self.dataset.rows, self.batch_size * self.world_size
        held: dict[int, tuple[np.ndarray, dict[int, dict]]] = {}
        for low in range(start, rows, global_batch):
            high = min(low + global_batch, rows)
            samples = []
            for position in range(low + self.rank, high, self.world_size):
                window = int(np.searchsorted(order.ends, position, "right"))
                if window not in held:
                    held[window] = (order.rows(window), {} if self._cache is None else self._cache)
                sequence, blocks = held[window]
                block, row = sequence[position - order.ends[window]].tolist()  # counted from the window's end
                if block not in blocks:
                    blocks[block] = self.dataset.read(self.dataset.blocks[block])
                samples.append((blocks[block], row))
            yield self._collate(samples, high - low)
            for window in [w for w in held if order.ends[w] <= high]:
                del held[window]

    def _collate(self, samples: list[tuple[dict, int]], total: int) -> dict:
        n, size = len(samples), self.batch_size
        batch: dict = {}
        for field in self.dataset.fields:
            if field.codec == "ndarray":
                array = np.empty((size, *field.shape), field.dtype)
                payload = array.reshape(size, -1).view(np.uint8)
                for i, (columns, row) in enumerate(samples):
                    column: Payloads = columns[field.name]
                    payload[i] = column.matrix[row]
                array[n:] = 0
                batch[field.name] = torch.from_numpy(array)
            elif field.dtype == "str":
                batch[field.name] = [columns[field.name][row] for columns, row in samples] + [""] * (size - n)
            else:
                values = [columns[field.name][row] for columns, row in samples]
                batch[field.name] = torch.from_numpy(np.array(values + [0] * (size - n), field.dtype))
        batch["image"] = batch["image"].float()
        if "label" in batch:
            batch["label"] = batch["label"].long().reshape(size, 1, *batch["label"].shape[-3:])
        weight = torch.zeros(size)
        weight[:n] = 1
        return batch | {"weight": weight, "total": torch.tensor(float(total))}


def _produce(batches: Iterator[dict], ready: queue.Queue, stop: threading.Event) -> None:
    """Thread: put batches, then None, or the exception that ended them, until told to stop."""

    def put(item) -> bool:
        while not stop.is_set():
            try:
                ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    try:
        for batch in batches:
            if not put(batch):
                return
        put(None)
    except BaseException as e:  # it belongs to the consumer
        put(e)
