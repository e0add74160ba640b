"""What ranks say to each other. The loop knows this protocol and nothing of who launched it."""

import socket
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sparkmed.rejection import InputError

MISSING_HOROVOD = (
    "train.launcher horovod with processes > 1 needs Horovod, which is not installed: run `make horovod`, or pip install "
    "'sparkmed[horovod]'; train.processes=1 and train.launcher=torch train without it"
)


class LostContact(RuntimeError):
    """Another rank is gone, or has left the group."""


class Comm(Protocol):
    """A group of processes; every rank calls every method in the same order. All but ``close`` may raise :class:`LostContact`."""

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
    """The processes that Horovod started, this one among them; with ``half`` gradients are summed in float16."""

    def __init__(self, half: bool = False):
        try:
            import horovod.torch as hvd
        except ImportError as e:
            raise InputError(f"{MISSING_HOROVOD} ({e})") from None
        self._hvd, self._half = hvd, half
        with self._contact():
            hvd.init()
        self.rank, self.size, self.local_rank, self.local_size = hvd.rank(), hvd.size(), hvd.local_rank(), hvd.local_size()

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        with self._contact(), _travelling(parameters, self._half) as gradients:
            self._hvd.grouped_allreduce_(gradients, name="gradients", op=self._hvd.Sum)

    def average(self, tensors: Iterable[Tensor]) -> None:
        floating = [t for t in tensors if t.is_floating_point()]
        if floating:
            with self._contact(), torch.no_grad():
                self._hvd.grouped_allreduce_(floating, name="average", op=self._hvd.Average)

    def broadcast(self, value: Any) -> Any:  # a name, because Horovod's default is the type, and ranks differ in it
        with self._contact():
            return self._hvd.broadcast_object(value, root_rank=0, name="object")

    def gather(self, value: Any) -> list[Any]:
        with self._contact():
            return self._hvd.allgather_object(value, name="objects")

    def close(self) -> None:
        self._hvd.shutdown()

    @contextmanager
    def _contact(self) -> Iterator[None]:
        from horovod.common.exceptions import HorovodInternalError

        try:
            yield
        except HorovodInternalError as e:
            raise LostContact(str(e)) from e


class TorchComm:
    """The processes that torchrun started, this one among them: NCCL between GPUs, one for each rank, gloo for everything else.

    Gradients travel in buffers of up to ``fusion_mb`` MiB, in the order of the parameters; with ``half`` they are summed in
    float16.
    """

    def __init__(self, half: bool = False, fusion_mb: int = 64):
        self._half, self._bytes = half, fusion_mb * 2**20
        self._nccl = torch.cuda.is_available() and dist.is_nccl_available()
        with _torch_contact():
            dist.init_process_group("cpu:gloo,cuda:nccl" if self._nccl else "gloo")
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        hosts = self.gather(socket.gethostname())  # torchrun knows only the ranks of its own, and each Spark task has one
        here = [rank for rank, host in enumerate(hosts) if host == hosts[self.rank]]
        self.local_rank, self.local_size = here.index(self.rank), len(here)

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        with _travelling(parameters, self._half) as gradients:
            self._sum(gradients)

    def average(self, tensors: Iterable[Tensor]) -> None:
        floating = [t for t in tensors if t.is_floating_point()]
        with torch.no_grad():
            self._sum(floating, self.size)

    def broadcast(self, value: Any) -> Any:
        box = [value]
        with _torch_contact():
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        values = [None] * self.size
        with _torch_contact():
            dist.all_gather_object(values, value)
        return values

    def close(self) -> None:
        dist.destroy_process_group()

    def _sum(self, tensors: Sequence[Tensor], divisor: int = 1) -> None:  # a tensor may be given twice
        buckets = list(_buckets(tensors, self._bytes))
        buffers = [torch.cat([t.reshape(-1) for t in bucket]) for bucket in buckets]
        with _torch_contact():
            if self._nccl:
                dist.all_reduce(torch.zeros(1))  # by gloo: NCCL would wait for a rank that has left, gloo says so
            for work in [dist.all_reduce(buffer, async_op=True) for buffer in buffers]:
                work.wait()
        for bucket, buffer in zip(buckets, buffers, strict=True):
            for tensor, summed in zip(bucket, buffer.div_(divisor).split([t.numel() for t in bucket]), strict=True):
                tensor.copy_(summed.view_as(tensor))


@contextmanager
def _torch_contact() -> Iterator[None]:
    try:
        yield
    except RuntimeError as e:  # gloo has no class of its own
        raise LostContact(str(e)) from e


@contextmanager
def _travelling(parameters: Sequence[nn.Parameter], half: bool) -> Iterator[list[Tensor]]:
    """The gradients as they are sent; what is written into them becomes the gradients."""
    gradients = [p.grad for p in parameters]
    if not half:
        yield gradients
        return
    sent = [g.half() for g in gradients]
    yield sent
    torch._foreach_copy_(gradients, sent)


def _buckets(tensors: Sequence[Tensor], limit: int) -> Iterator[list[Tensor]]:
    """Neighbours of one type and device, up to ``limit`` bytes together, or a single larger tensor."""
    bucket, size = [], 0
    for tensor in tensors:
        bytes_of = tensor.numel() * tensor.element_size()
        if bucket and (size + bytes_of > limit or (tensor.dtype, tensor.device) != (bucket[0].dtype, bucket[0].device)):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += bytes_of
    if bucket:
        yield bucket


class SynchronisedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm of ``(B, C, ...)`` with the mean and variance of all ranks' samples; a rank may have none (B = 0).

    A training step averages moments over ranks, once forward and once backward: every rank must run both. Plain tensor code, which
    works on CPU and GPU under every :class:`Comm`; those of torch and Horovod know CUDA only. It has the state dict of the batch
    norm that it replaces. Source: Ioffe and Szegedy 2015, arXiv:1502.03167; moments merged as in Chan, Golub and LeVeque 1979.
    """

    def __init__(self, plain: nn.modules.batchnorm._BatchNorm, comm: Comm):
        super().__init__(plain.num_features, plain.eps, plain.momentum, plain.affine, plain.track_running_stats)
        self._parameters, self._buffers, self.training = plain._parameters, plain._buffers, plain.training
        self._ranks, self._over_ranks = comm.size, lambda moments: _OverRanks.apply(moments, comm)  # a copy shares the group

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"batch norm takes (B, C, ...), not {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        self._check_input_dim(input)
        image, axes = input.to(torch.promote_types(input.dtype, torch.float32)), [0, *range(2, input.dim())]
        mean, square, count = self._moments(image, axes)
        variance = square - mean.square()
        if self.track_running_stats:
            self._remember(mean.detach(), variance.detach() * count / (count - 1).clamp(min=1))
        shape = [1, -1] + [1] * (input.dim() - 2)
        scale = torch.rsqrt(variance + self.eps)
        if self.affine:
            scale, shift = scale * self.weight, self.bias
        else:
            shift = torch.zeros_like(scale)
        shift = shift - mean * scale
        return (image * scale.to(image).view(shape) + shift.to(image).view(shape)).to(input.dtype)

    def _moments(self, image: Tensor, axes: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and mean square per channel over all ranks, float64, and the number of values per channel."""
        count = image.numel() // image.shape[1]
        mean = image.sum(axes) / max(count, 1)
        spread = (image - mean.view([1, -1] + [1] * (image.dim() - 2))).square().sum(axes)
        mean, spread = mean.double(), spread.double()
        moments = torch.stack([torch.full_like(mean, count), count * mean, spread + count * mean.square()])
        moments = self._over_ranks(moments)
        return moments[1] / moments[0], moments[2] / moments[0], moments[0, 0].detach() * self._ranks

    def _remember(self, mean: Tensor, variance: Tensor) -> None:
        self.num_batches_tracked.add_(1)
        share = self.momentum if self.momentum is not None else 1 / self.num_batches_tracked.item()
        self.running_mean.lerp_(mean.to(self.running_mean), share)
        self.running_var.lerp_(variance.to(self.running_var), share)


class _OverRanks(torch.autograd.Function):
    """The mean over ranks. The loss is summed over ranks, so its gradient is the mean of the ranks' gradients."""

    @staticmethod
    def forward(ctx, tensor: Tensor, comm: Comm) -> Tensor:
        ctx.comm, mean = comm, tensor.clone()
        comm.average([mean])
        return mean

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        mean = gradient.clone()
        ctx.comm.average([mean])
        return mean, None


def synchronised(network: nn.Module, comm: Comm) -> nn.Module:
    """``network``, changed in place, with every batch norm over all ranks of ``comm``; a single process changes nothing."""
    if comm.size == 1:
        return network
    for name, child in network.named_children():
        setattr(network, name, synchronised(child, comm))
    return SynchronisedBatchNorm(network, comm) if isinstance(network, nn.modules.batchnorm._BatchNorm) else network
