"""What a run sets for its process, and restores."""

import pytest
import torch

import train
from twdpo import dist
from twdpo.dist import expand_segments


@pytest.mark.parametrize("before", [True, False])
def test_cudnn_is_off_while_a_run_lasts(before, toy_flags, tmp_path, monkeypatch):
    seen, original = [], train.prepare
    monkeypatch.setattr(train, "prepare", lambda *args: seen.append(torch.backends.cuda.cudnn_sdp_enabled())
                        or original(*args))
    usual = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        torch.backends.cuda.enable_cudnn_sdp(before)
        train.main([*toy_flags, "--output-dir", str(tmp_path / "run")])
        with pytest.raises(SystemExit):
            train.main(["--model", str(tmp_path / "nowhere"), "--data", "toy"])
        assert seen == [False, False] and torch.backends.cuda.cudnn_sdp_enabled() == before
    finally:
        torch.backends.cuda.enable_cudnn_sdp(usual)


def test_the_allocator_is_set_up_unless_the_user_has():
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        given = {name: "max_split_size_mb:128"}
        expand_segments(given)
        assert given == {name: "max_split_size_mb:128"}
    empty: dict[str, str] = {}
    expand_segments(empty)
    assert empty == {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}


def test_a_start_that_fails_or_comes_twice_restores_what_was():
    before = torch.backends.cuda.cudnn_sdp_enabled()
    dist.start()
    with pytest.raises(ValueError, match="twice"):
        dist.start()
    dist.stop()
    assert torch.backends.cuda.cudnn_sdp_enabled() == before
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANK", "0")  # and nothing else of what torchrun sets
        with pytest.raises(ValueError, match="WORLD_SIZE"):
            train.main(["--model", "toy"])
    assert torch.backends.cuda.cudnn_sdp_enabled() == before


def test_a_stop_without_a_start_changes_nothing():
    before = torch.backends.cuda.cudnn_sdp_enabled()
    dist.stop()
    assert torch.backends.cuda.cudnn_sdp_enabled() == before


def test_what_is_sent_to_a_gpu_can_be_pinned(monkeypatch):
    """torch pins no tensor whose elements share memory, as positions of plain rows do, nor one that is there."""
    pinned = []

    def pin(tensor):
        assert tensor.is_contiguous() and tensor.device.type == "cpu"
        pinned.append(tensor)
        return tensor
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device, non_blocking: tensor)
    cuda = torch.device("cuda")
    assert dist.send(torch.arange(3).expand(2, 3), cuda).tolist() == [[0, 1, 2]] * 2 and len(pinned) == 1
    dist.send(torch.zeros(2, device="meta"), cuda)
    dist.send(torch.zeros(2), torch.device("cpu"))
    assert len(pinned) == 1


class Unsendable(Exception):
    """It can be pickled, and not made again: it takes two arguments."""

    def __init__(self, one, two):
        super().__init__(f"{one} {two}")


def test_an_error_that_can_not_be_sent_is_its_text(process):
    error = Unsendable("a", "b")
    for each in (error, ValueError(lambda: None)):
        assert str(dist.carriable(each)).startswith(f"{type(each).__name__}: ")
    assert str(dist.carriable(error)) == "Unsendable: a b"
    same = ValueError("x")
    assert dist.carriable(same) is same and dist.carriable(None) is None

    def fails():
        raise error
    with pytest.raises(Unsendable) as raised:  # itself, where it was raised
        process.on_main(fails)
    assert raised.value is error
