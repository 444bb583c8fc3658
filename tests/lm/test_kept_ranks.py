"""Ranks that are kept do one work after another, each as if it were the first. They import this file, so it needs little."""
import os
import signal
import time
from operator import truediv
from pathlib import Path

import pytest
import torch.distributed as dist

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
