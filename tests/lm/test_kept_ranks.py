"""Ranks that are kept do one work after another, each as if it were the first. They import this file, so it needs little."""
import os
import pickle
import signal
import time
from operator import truediv
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from flashoptim_nb.train import ranks
from flashoptim_nb.train.ranks import RanksFailed, asked_to_stop, kept_ranks, launch_ranks, sign_of_life


def look(sign=None, until_stopped=False):
    "Both ranks' processes, and whether they are asked to stop; gives a sign."
    pids = [None, None]
    dist.all_gather_object(pids, os.getpid())
    if sign: sign_of_life(sign)
    while until_stopped and not asked_to_stop(): time.sleep(0.01)
    return pids, asked_to_stop()


def gone(pids):
    "Whether none of the processes is there any more."
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_kept_ranks_do_one_work_after_another_and_end_with_one_that_fails(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=":")
    first, later = [], []
    with pytest.raises(ZeroDivisionError), kept_ranks():
        pids, asked = launch_ranks(2, look, "a sign", True, stopped=lambda: bool(first), heard=first.append)
        assert asked and first == ["a sign"]
        assert launch_ranks(2, look, heard=later.append) == (pids, False) and not later, "nothing leaks"
        with pytest.raises(RanksFailed, match=r"rank \d of 2 was killed \(signal 9\)"):
            launch_ranks(2, signal.raise_signal, signal.SIGKILL)
        assert gone(pids)
        fresh, asked = launch_ranks(2, look)
        assert not {*pids} & {*fresh} and not asked
        launch_ranks(2, truediv, 1, 0)
    assert gone(fresh) and not [*tmp_path.iterdir()]


RENEWED = []


def renewed(device):
    RENEWED.append(device)
    if len(RENEWED) == 2: raise RuntimeError("the device is lost")
    return True


def test_a_rank_renews_its_own_gpu_and_not_the_first_ranks(tmp_path, monkeypatch):
    "What a rank took of memory would else stay with it as the peak of every later work."
    monkeypatch.setattr(torch.cuda, "set_device", (taken := []).append)
    monkeypatch.setattr(ranks, "_FOLDER", None)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "1")
    RENEWED.clear()
    for n, work in enumerate([(os.getpid, ()), (os.getpid, ()), None]):
        (tmp_path / str(n)).mkdir()
        (tmp_path / str(n) / "work").write_bytes(pickle.dumps(work))
    (tmp_path / "how").write_bytes(pickle.dumps((torch.device("cuda", 2), 1.0, renewed)))
    ranks._do_all(tmp_path, 1)
    assert taken == [torch.device("cuda", 3)] and RENEWED == 2 * taken
    good = [pickle.loads((tmp_path / str(n) / "done-1").read_bytes()) for n in range(2)]
    assert good == [True, False], "the work was done; the rank is not kept"


def peaks(size):
    "The peak of memory on both ranks, of a tensor that is taken and given back."
    torch.empty(size, dtype=torch.uint8, device="cuda")
    dist.all_gather_object(found := [None, None], torch.cuda.max_memory_allocated())
    return found


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_works_peak_is_its_own_on_every_gpu(monkeypatch):
    from flashoptim_nb.study.runner import renew_rank
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=":")
    with kept_ranks(renew_rank):
        large, small = (launch_ranks(2, peaks, size, device="cuda:0") for size in (1 << 28, 1 << 10))
    assert min(large) >= 1 << 28 and max(small) < 1 << 24
