"""Tests that need a process of their own."""
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def pass_in_the_interpreter(folder, chosen):
    """The tests that are chosen pass where Triton interprets its kernels, which has to be decided before Triton is imported:
    of each file of a folder those that `-k` with its words finds, all in one process, and there are some."""
    some = " or ".join(f"({name} and ({words}))" for name, words in chosen.items())
    done = subprocess.run([sys.executable, "-m", "pytest", "-v", "-x", "-k", some, "-p", "no:cacheprovider", *chosen],
                          cwd=folder, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    for name in chosen: assert re.search(rf"{re.escape(name)}::.* PASSED", done.stdout), done.stdout[-4000:]


def _run(source, words, env, told):
    with open(told, "wb") as file:
        for stream in (1, 2): os.dup2(file.fileno(), stream)
    os.environ.update(env)
    import numpy
    import torch
    numpy.random.seed()  # as in a process that begins anew: nothing may rest on what the server had drawn
    torch.set_num_threads(1)
    sys.argv = ["-c", *words]
    exec(compile(source, "<program>", "exec"), dict(__name__="__main__"))


class Forked:
    """A program in a process of its own that has the libraries from its first moment on: importing them takes long.

    It is forked from a server, and is watched, killed and waited for as a `subprocess.Popen` is."""

    def __init__(self, source, *words, **env):
        context = multiprocessing.get_context("forkserver")
        studies = ["flashoptim_nb.study.h1.experiments", "flashoptim_nb.study.h2.experiments"]
        ranks = ["torch.distributed.fsdp", "torch.distributed.checkpoint.state_dict", "flashoptim_nb.optim"]
        context.set_forkserver_preload(["flashoptim_nb.cli.main", *studies, *ranks])
        descriptor, self.told = tempfile.mkstemp()
        os.close(descriptor)
        self.process = context.Process(target=_run, args=(source, [*map(str, words)], env, self.told))
        self.process.start()

    @property
    def returncode(self): return self.process.exitcode

    def poll(self): return self.process.exitcode

    def send_signal(self, number): os.kill(self.process.pid, number)

    def communicate(self, timeout=None):
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            raise subprocess.TimeoutExpired("a forked program", timeout)
        told = Path(self.told).read_text()
        os.unlink(self.told)
        return told, None


def _ranks(source, n, words, timeout):
    "Forked, and given a store at which to meet: torchrun and each rank would import the libraries anew."
    from torch.distributed import TCPStore
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    meet = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(store.port), WORLD_SIZE=str(n), LOCAL_WORLD_SIZE=str(n),
                TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT="0")
    ranks = [Forked(source, *words, RANK=str(rank), LOCAL_RANK=str(rank), **meet) for rank in range(n)]
    until = time.monotonic() + timeout
    while any(rank.poll() is None for rank in ranks) and time.monotonic() < until:
        if any(rank.poll() for rank in ranks): until = min(until, time.monotonic() + 5)  # the others wait for one that failed
        time.sleep(0.01)
    for rank in ranks:
        if rank.poll() is None: rank.process.kill()
    told = [rank.communicate(30)[0] for rank in ranks]
    return [rank.returncode for rank in ranks], "".join(told)


def on_ranks(n):
    "Marks a test of n ranks: with `kind` cpu, and cuda where there are as many GPUs."
    import pytest  # here: each program that is forked imports this module
    import torch
    enough = pytest.mark.skipif(torch.cuda.device_count() < n, reason=f"needs {n} GPUs")
    return pytest.mark.parametrize("kind", ["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, enough])])


def ranks_agree(source, n, kind, where, timeout=300):
    "Each of n ranks, on GPUs under torchrun, ends well and says that it agrees; it is told the kind of device and a folder."
    if kind == "cpu": codes, told = _ranks(source, n, (kind, where), timeout)
    else:
        script = Path(where) / "rank.py"
        script.write_text(source)
        done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}", script,
                               kind, where], capture_output=True, text=True, timeout=timeout)
        codes, told = [done.returncode] * n, done.stdout + done.stderr
    assert not any(codes), f"{codes}: {told[-3000:]}"
    assert told.count("agrees") == n, told
