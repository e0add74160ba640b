"""What ranks say to each other. The loop knows this protocol and nothing of who launched it."""

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sparkmed.rejection import InputError

MISSING_HOROVOD = (
    "training with processes > 1 needs Horovod, which is not installed: run `make horovod`, or pip install 'sparkmed[horovod]'; "
    "train.processes=1 trains without it"
)


class Comm(Protocol):
    """A group of processes; every rank calls every method in the same order."""

    rank: int
    size: int
    local_rank: int
    local_size: int

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace each parameter's gradient by its sum over ranks; all have one."""

    def average(self, tensors: Iterable[Tensor]) -> None:
        """Replace each floating tensor by its mean over ranks (running statistics)."""

    def broadcast(self, value: Any) -> Any:
        """Rank 0's picklable value, on every rank."""

    def gather(self, value: Any) -> list[Any]:
        """The picklable values of all ranks in rank order, on every rank."""

    def close(self) -> None:
        """Leave the group; ranks that still wait for this one get an error instead of waiting on."""


class LocalComm:
    """One process."""

    rank, size, local_rank, local_size = 0, 1, 0, 1

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        pass

    def average(self, tensors: Iterable[Tensor]) -> None:
        pass

    def broadcast(self, value: Any) -> Any:
        return value

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def close(self) -> None:
        pass


class HorovodComm:
    """The processes that Horovod started, this one among them."""

    def __init__(self):
        try:
            import horovod.torch as hvd
        except ImportError as e:
            raise InputError(f"{MISSING_HOROVOD} ({e})") from None
        hvd.init()
        self._hvd = hvd
        self.rank, self.size, self.local_rank, self.local_size = hvd.rank(), hvd.size(), hvd.local_rank(), hvd.local_size()

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        self._hvd.grouped_allreduce_([p.grad for p in parameters], name="gradients", op=self._hvd.Sum)

    def average(self, tensors: Iterable[Tensor]) -> None:
        floating = [t for t in tensors if t.is_floating_point()]
        if floating:
            with torch.no_grad():
                self._hvd.grouped_allreduce_(floating, name="average", op=self._hvd.Average)

    def broadcast(self, value: Any) -> Any:  # a name, because Horovod's default is the type, and ranks differ in it
        return self._hvd.broadcast_object(value, root_rank=0, name="object")

    def gather(self, value: Any) -> list[Any]:
        return self._hvd.allgather_object(value, name="objects")

    def close(self) -> None:
        self._hvd.shutdown()
