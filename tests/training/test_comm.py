import copy
import math
import socket
import time

import pytest
import torch
import torch.multiprocessing as processes
from torch import nn

from sparkmed.training import comm, loop
from sparkmed.training.comm import LocalComm, LostContact, TorchComm

from . import datasets
from .test_loop import TINY, last_weights, project, same


def as_ranks(program, *arguments, size: int = 2, kind: type = TorchComm) -> list:
    """What ``program`` returns in each of ``size`` processes joined by ``kind(*arguments)``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = processes.get_context("fork")
    answers = context.SimpleQueue()
    ranks = [context.Process(target=_rank, args=(answers, port, r, size, program, kind, arguments)) for r in range(size)]
    for process in ranks:
        process.start()
    found = dict(answers.get() for _ in ranks)
    for process in ranks:
        process.join()
    return [found[r] for r in range(size)]


def _rank(answers, port, rank, size, program, kind, arguments):
    import os

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(size))
    torch.set_num_threads(1)
    try:
        group = kind(*arguments)
        answer = program(group)
        group.close()
    except Exception as e:
        answer = e
    answers.put((rank, answer))


def shaped(rank: int) -> list[nn.Parameter]:
    """Parameters of several sizes and types, with gradients of their own on each rank."""
    generator = torch.Generator().manual_seed(rank)
    sizes = [
        ((300, 1000), torch.float32),
        ((7,), torch.float32),
        ((), torch.float32),
        ((5, 2), torch.float64),
        ((2,), torch.float32),
    ]
    parameters = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape, dtype in sizes]
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return parameters


def summed(group) -> list:
    parameters = shaped(group.rank)
    group.sum_gradients(parameters)
    return [p.grad.numpy() for p in parameters]


@pytest.mark.parametrize("fusion_mb", [1, 64])
def test_gradients_are_summed_whatever_the_buffers(fusion_mb):
    expected = [(a.grad + b.grad).numpy() for a, b in zip(shaped(0), shaped(1), strict=True)]
    for found in as_ranks(summed, False, fusion_mb):
        assert all((a == b).all() and a.dtype == b.dtype and a.shape == b.shape for a, b in zip(found, expected, strict=True))


def test_half_sums_in_float16_and_gives_the_gradients_type_back():
    expected = [(a.grad.half() + b.grad.half()).to(a.dtype).numpy() for a, b in zip(shaped(0), shaped(1), strict=True)]
    for found in as_ranks(summed, True):
        assert all((a == b).all() and a.dtype == b.dtype for a, b in zip(found, expected, strict=True))


def test_half_means_the_same_to_horovod():
    expected = [p.grad.half().to(p.dtype).numpy() for p in shaped(0)]
    (found,) = as_ranks(summed, True, size=1, kind=comm.HorovodComm)
    assert all((a == b).all() and a.dtype == b.dtype for a, b in zip(found, expected, strict=True))


def test_buckets_keep_order_and_limit():
    tensors = [torch.zeros(n) for n in (3, 1, 2, 9, 1)] + [torch.zeros(1).double()]
    assert [[t.numel() for t in b] for b in comm._buckets(tensors, 16)] == [[3, 1], [2], [9], [1], [1]]
    assert list(comm._buckets([], 16)) == []


def values(group) -> tuple:
    running = [torch.full((2,), float(group.rank)), torch.tensor(group.rank), torch.tensor(group.rank + 1.0).double()]
    group.average([*running, running[0]])  # a network that is its own average gives its buffers twice
    said = group.broadcast({"from": group.rank, "weights": torch.ones(2)} if group.rank == 0 else None)
    where = (group.rank, group.size, group.local_rank, group.local_size)
    return [t.tolist() for t in running], said["from"], said["weights"].tolist(), group.gather("ab"[group.rank]), where


def test_values_reach_every_rank():
    for rank, found in enumerate(as_ranks(values)):
        assert found == ([[0.5, 0.5], rank, 1.5], 0, [1.0, 1.0], ["a", "b"], (rank, 2, rank, 2))


def alone(group):
    if group.rank == 1:
        return 0.0  # and closes
    began = time.monotonic()
    with pytest.raises(LostContact):
        while True:
            group.sum_gradients(shaped(0))
    with pytest.raises(LostContact):
        group.gather(1)
    return time.monotonic() - began


def test_who_waits_for_a_rank_that_left_hears_of_it():
    assert max(as_ranks(alone)) < 10


def network(**bn) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3, **bn), nn.ReLU(), nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2, **bn)
    ).double()


def images() -> torch.Tensor:
    return 40 + torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


PARTS = {"uneven": (slice(0, 3), slice(3, 5)), "nothing for rank 1": (slice(0, 5), slice(5, 5))}


def step(net: nn.Module, image: torch.Tensor) -> None:
    for _ in range(2):
        (net(image).square() * torch.linspace(0, 1, 16).view(4, 4)).sum().backward()


def learnt(net: nn.Module) -> dict:
    return {k: v.numpy() for k, v in net.state_dict().items()} | {f"{k}'": p.grad.numpy() for k, p in net.named_parameters()}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("bn", [{}, {"momentum": None}, {"affine": False}])
def test_synchronised_batch_norm_over_two_ranks_is_batch_norm_of_one(part, bn):
    def program(group):
        net = copy.deepcopy(comm.synchronised(network(**bn), group))  # as the moving average of weights copies it
        step(net, images()[PARTS[part][group.rank]])
        group.sum_gradients(list(net.parameters()))
        return learnt(net)

    whole = network(**bn)
    step(whole, images())
    expected = learnt(whole)
    for found in as_ranks(program):
        assert found.keys() == expected.keys()
        assert all(found[k] == pytest.approx(expected[k], rel=1e-6, abs=1e-6) for k in found)


def test_training_with_synchronised_batch_norm_is_that_of_one_process(tmp_path):
    """9 patches: the last global batch of 4 has one, and rank 1 nothing to normalise."""
    splits = {"train": [datasets.balls(9, prefix="t")], "val": [datasets.balls(5, seed=1, prefix="v")]}
    url = datasets.write(tmp_path / "data", splits)
    norm = {"network": TINY | {"norm": "batch"}, "scale_lr": "none"}
    both = project(**norm, processes=2, batch_size=2, sync_batch_norm=True)
    histories = as_ranks(lambda group: loop.fit(both, url, str(tmp_path / "two"), group)["history"])
    one = loop.fit(project(**norm, batch_size=4), url, str(tmp_path / "one"))["history"]
    for row, expected in zip(histories[0], one, strict=True):
        assert [row[k] for k in ("train_loss", "val_loss")] == pytest.approx(
            [expected[k] for k in ("train_loss", "val_loss")], abs=1e-5
        )
    assert same(last_weights(tmp_path / "one"), last_weights(tmp_path / "two"), 1e-5)


def test_synchronised_batch_norm_never_sees_a_part_that_is_empty_on_all_ranks(tmp_path):
    """9 patches in global batches of 8, in two parts: of the last one only the first part has any."""
    splits = {"train": [datasets.balls(9, prefix="t")], "val": [datasets.balls(5, seed=1, prefix="v")]}
    url = datasets.write(tmp_path / "data", splits)
    both = project(network=TINY | {"norm": "batch"}, processes=2, batch_size=2, accumulate=2, sync_batch_norm=True)
    (history, _) = as_ranks(lambda group: loop.fit(both, url, str(tmp_path / "two"), group)["history"])
    assert all(math.isfinite(r["train_loss"]) and math.isfinite(r["val_loss"]) for r in history)


def test_one_process_keeps_its_batch_norm():
    net = network()
    assert comm.synchronised(net, LocalComm()) is net and type(net[1]) is nn.BatchNorm2d


def test_synchronised_batch_norm_validates_as_batch_norm_does():
    class Two(LocalComm):
        size = 2

    net, plain = comm.synchronised(network(), Two()), network()
    assert isinstance(net[1], comm.SynchronisedBatchNorm) and isinstance(net[4], comm.SynchronisedBatchNorm)
    net(images())
    plain.load_state_dict(net.state_dict())
    assert torch.equal(net.eval()(images()), plain.eval()(images()))
    with pytest.raises(ValueError, match=r"\(B, C, ...\), not \(4,\)"):
        net[1].train()(torch.zeros(4))
