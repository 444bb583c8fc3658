"""What the optimizers launch compiles for sm_90: Triton brings its own assembler, so no GPU is needed. The interpreter
runs kernels as Python and lets pass what the compiler refuses, such as two returns of different types."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

PROGRAM = """
import sys
import torch, torch.distributed as dist, triton
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from flashoptim_nb.optim import buckets
from every import MAKERS

TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64",
         torch.int8: "i8", torch.uint8: "u8", torch.int16: "i16", torch.int32: "i32", torch.int64: "i64"}
seen = set()

def compiled(kernel, programs, arguments, constants, num_warps=4, num_stages=3):
    "In place of a launch: machine code for what would run, once for each set of constants."
    assert kernel.arg_names[len(arguments):] == [*constants], (kernel, constants)
    types = ["*" + TYPES[x.dtype] if isinstance(x, torch.Tensor) else "fp32" if isinstance(x, float) else "i32" for x in arguments]
    launched.add(kernel.__name__)
    key = (kernel.__name__, num_warps, num_stages, *types, *map(str, constants.items()))
    if key in seen: return
    seen.add(key)
    names = kernel.arg_names
    try:
        triton.compile(ASTSource(kernel, dict(zip(names, types)) | dict.fromkeys(constants, "constexpr"),
                                 {(names.index(name),): value for name, value in constants.items()}),
                       target=GPUTarget("cuda", 90, 32), options=dict(num_warps=num_warps, num_stages=num_stages))
    except Exception as error:
        print(kernel.__name__, constants, *str(error).splitlines()[-3:], sep="\\n  ")
        raise SystemExit(1)

for name, module in [*sys.modules.items()]:
    if name.startswith("flashoptim_nb.optim.") and hasattr(module, "launch"): module.launch = compiled
buckets.INTERPRETED = True  # "on_gpu", whatever the tensors' device

dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
dist.all_to_all_single = lambda *tensors, **options: None  # FlashMuon's exchange, with a rank that is not there
mesh = init_device_mesh("cpu", (2,))

def step(make, shape, dtype, cut=None, scaled=False, skewed=0, **options):
    x = torch.randn(shape[0] * shape[1] + skewed).to(dtype)[skewed:].view(shape)  # skewed: no multiple of 16 bytes
    param = torch.nn.Parameter(x if cut is None else distribute_tensor(x, mesh, [Shard(cut)], src_data_rank=None))
    opt = make([param], lr=1e-3, **options)
    param.grad = torch.randn_like(param)
    if scaled: opt.grad_scale, opt.found_inf = torch.tensor(2.0), torch.tensor(0.0)
    opt.step()

for name in sys.argv[1:]:
    make, launched = MAKERS[name], set()
    for cut in None, 0, 1:  # a whole, rows, columns
        for rounding in "nearest", "dithered":
            # a part in whole blocks, in whole runs of 16 values, in single ones
            for shape in (128, 64), (96, 16), (13, 37): step(make, shape, torch.bfloat16, cut, rounding=rounding)
    for options in (dict(quantize=False), dict(companded=False), dict(max_norm=1.0), dict(maximize=True),
                    dict(master_weight_bits=32), dict(master_weight_bits=None), dict(lr=torch.tensor(1e-3))):
        step(lambda params, lr: make(params, **dict(lr=lr) | options), (64, 64), torch.bfloat16)
    for dtype in torch.float16, torch.float32:
        for shape in (64, 64), (13, 37): step(make, shape, dtype, scaled=True, max_norm=1.0)
    step(make, (64, 64), torch.bfloat16, skewed=1)
    own = {"FlashAdamW": [dict(eps=0.0)], "FlashSGD": [dict(momentum=0.0), dict(nesterov=True, momentum=0.9), dict(weight_decay=0.1)],
           "FlashMuon": [dict(nesterov=False)], "FlashLion": []}
    for options in own[name]: step(lambda params, lr: make(params, **dict(lr=lr) | options), (64, 64), torch.bfloat16)
    if name == "FlashAdamW": step(MAKERS["FlashAdam"], (64, 64), torch.bfloat16, weight_decay=0.1)
    if name == "FlashMuon": step(make, (256, 384), torch.bfloat16)  # tiles of the products are 128 wide
    print(name, *sorted(launched))
"""


@pytest.mark.slow
@pytest.mark.parametrize("names", [("FlashAdamW", "FlashMuon"), ("FlashSGD", "FlashLion")], ids="-".join)
def test_whatever_is_launched_compiles(names, tmp_path):
    "Two in a process: they start once, and what both launch is compiled once."
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *names], capture_output=True, text=True,
        env=os.environ | dict(TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path), CUDA_VISIBLE_DEVICES="",
                              PYTHONPATH=os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])))
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    kernels = {"FlashMuon": ["directions_kernel", "moves_kernel", "symmetric_kernel"], "FlashAdamW": ["adamw_kernel"]}
    launched = {name: kernels for name, *kernels in map(str.split, done.stdout.splitlines())}
    for name in names:
        for kernel in kernels.get(name, ["momentum_kernel"]): assert any(kernel in one for one in launched[name]), done.stdout
