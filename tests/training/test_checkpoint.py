import pathlib
import warnings

import pytest
import torch

from sparkmed.training import checkpoint


def saved(folder, epochs) -> list[checkpoint.Checkpoint]:
    return [checkpoint.save(str(folder), e, None, {"epoch": e, "weights": torch.full((3,), float(e))}) for e in epochs]


def path(c: checkpoint.Checkpoint) -> pathlib.Path:
    return pathlib.Path(c.url.removeprefix("file://"))


def test_round_trip(tmp_path):
    saved(tmp_path, range(12))
    assert [c.epoch for c in checkpoint.present(str(tmp_path))] == list(range(12))
    state = checkpoint.latest(str(tmp_path))
    assert state["epoch"] == 11 and state["weights"].tolist() == [11, 11, 11]
    assert torch.load(path(checkpoint.present(str(tmp_path))[3]), weights_only=True)["epoch"] == 3


def test_nothing_there(tmp_path):
    assert checkpoint.latest(str(tmp_path / "none")) is None
    (tmp_path / "notes.pt").write_text("not one of ours")
    assert checkpoint.present(str(tmp_path)) == []


def test_damaged_ones_are_passed_over(tmp_path):
    files = [path(c) for c in saved(tmp_path, range(4))]
    files[3].write_bytes(files[3].read_bytes()[:-1])
    files[2].write_bytes(b"")
    with pytest.warns(UserWarning, match="epoch-00003.*its bytes have SHA-256"):
        assert checkpoint.latest(str(tmp_path))["epoch"] == 1
    files[1].unlink()
    files[0].unlink()
    with pytest.warns(UserWarning):
        assert checkpoint.latest(str(tmp_path)) is None


def test_a_half_written_file_has_another_name(tmp_path):
    saved(tmp_path, [0])
    (tmp_path / ".epoch-00001-0123456789abcdef.pt.1234.partial").write_bytes(b"half")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert checkpoint.latest(str(tmp_path))["epoch"] == 0


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return pathlib.Path.touch, (tmp_path / "ran",)

    checkpoint.save(str(tmp_path), 0, None, {"evil": Evil()})
    with pytest.warns(UserWarning):
        assert checkpoint.latest(str(tmp_path)) is None
    assert not (tmp_path / "ran").exists()


def test_pruning_keeps_the_last_and_the_best(tmp_path):
    saved(tmp_path, range(6))
    checkpoint.prune(str(tmp_path), keep=2, best_epoch=1)
    assert [c.epoch for c in checkpoint.present(str(tmp_path))] == [1, 4, 5]
    checkpoint.prune(str(tmp_path), keep=2, best_epoch=5)
    assert [c.epoch for c in checkpoint.present(str(tmp_path))] == [4, 5]
