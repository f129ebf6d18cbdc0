"""Many processes, one a device, as `torchrun` starts them: PyTorch's DDP and FSDP2, and the few collectives of a run.

Every rank computes on its share of a step's micro-batches, with the same weights and the same scales. The first rank
alone reads the data, writes the run folder and logs. Without `torchrun` there is one rank, and nothing here does
anything.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import os
import socket
import sys
import threading
import time
from concurrent.futures import Future

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from qat.config import Config
from qat.errors import ConfigError, UserError
from qat.utils.device import get_device
from qat.utils.environment import is_main_process, rank, world_size

TIMEOUT = datetime.timedelta(days=1)  # how long ranks wait for one another: the first may wait for a network for hours
INIT_TIMEOUT = datetime.timedelta(minutes=10)  # how long ranks wait for all to be there: they may start minutes apart
_NOTICE = 5.0  # seconds after which a rank says whom it waits for


def init() -> None:
    """Let the ranks talk to each other from now on; all but the first fall silent. Errors: UserError when some do not
    come, or it is not said where to."""
    if world_size() == 1 or dist.is_initialized():
        return
    if get_device().type == "cuda":
        torch.cuda.set_device(get_device())
    # Named, or PyTorch starts NCCL alone where there is a GPU.
    backend = "cpu:gloo,cuda:nccl" if get_device().type == "cuda" else "gloo"
    dist.init_process_group(backend, store=_rendezvous(), rank=rank(), world_size=world_size(), timeout=TIMEOUT)
    atexit.register(dist.destroy_process_group)
    if not is_main_process():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  until the process ends


def _rendezvous() -> dist.Store:
    """Return a store that all ranks have come to. PyTorch's own rendezvous is deaf to signals while it waits, and after
    a restart of torchrun's finds the addresses of ranks that are gone."""
    absent = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if absent:
        raise UserError(
            f"{', '.join(absent)}: not set, and WORLD_SIZE={world_size()} asks for so many processes; start them with "
            f"torchrun, or unset WORLD_SIZE"
        )
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    if not (port.isdecimal() and 0 < int(port) < 2**16):
        raise UserError(f"MASTER_PORT={port}: must be the number of a free port, as in MASTER_PORT=29500")
    opened, began, told = _open_store(address, int(port)), time.monotonic(), False
    while missing := _missing_ranks(opened):
        who = f"rank{'s' * (len(missing) > 1)} {', '.join(map(str, missing))} of {world_size()}"
        waited, limit = time.monotonic() - began, INIT_TIMEOUT.total_seconds()
        if waited > limit:
            raise UserError(
                f"{who} did not come to {address}:{port} within {limit / 60:g} minutes; start them all with the same "
                f"MASTER_ADDR and MASTER_PORT (torchrun does), or unset WORLD_SIZE to train with one process"
            )
        if waited > _NOTICE and not told:
            print(f"rank {rank()}: waiting for {who} at {address}:{port}; Ctrl-C stops waiting", flush=True)
            told = True
        time.sleep(0.1)
    return opened.result()


def _open_store(address: str, port: int) -> Future[dist.Store]:
    """Return the store of this start of the ranks with this one's name in it, once it can be reached."""
    future = Future()
    # Under torchrun its agent has the store, for all restarts; else the first rank.
    hosts = is_main_process() and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    start = f"{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/{world_size()}"

    def work() -> None:
        try:
            until = time.monotonic() + INIT_TIMEOUT.total_seconds()
            while not hosts and not _is_listening(address, port):  # the store's own tries fill a page each
                if time.monotonic() > until:
                    return
                time.sleep(0.1)
            how = {"timeout": 2 * INIT_TIMEOUT, "wait_for_workers": False, "multi_tenant": True}
            store = dist.PrefixStore(start, dist.TCPStore(address, port, world_size(), hosts, **how))
            store.set_timeout(TIMEOUT)
            store.set(str(rank()), "here")
            future.set_result(store)
        except RuntimeError as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future


def _is_listening(address: str, port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((address, port), timeout=5):
        return True
    return False


def _missing_ranks(opened: Future[dist.Store]) -> list[int]:
    """Return the ranks that have not come to the store. Errors: UserError when it cannot be opened."""
    if not opened.done():
        return [0]
    try:
        store, names = opened.result(), [str(rank) for rank in range(world_size())]
        return [] if store.check(names) else [int(name) for name in names if not store.check([name])]
    except RuntimeError as error:
        reason = str(error).split("\n")[0]
        raise UserError(
            f"MASTER_PORT={os.environ['MASTER_PORT']}: {reason}; choose a free port for all ranks"
        ) from error


def abort() -> None:
    """Leave, as this rank fails while others may wait for it, without the farewell that NCCL's ranks wait for."""
    atexit.unregister(dist.destroy_process_group)


def check_world_size(cfg: Config) -> None:
    """Raise `ConfigError` for what many ranks cannot do, and `UserError` on the rank that has no GPU."""
    gpus = torch.cuda.device_count()
    if get_device().type == "cuda" and get_device().index >= gpus:
        raise UserError(
            f"LOCAL_RANK={get_device().index}: this machine has {gpus} GPUs; start at most so many processes on it "
            f"(torchrun --nproc-per-node={gpus})"
        )
    calls = cfg.batch[1]
    if calls % world_size():
        part = f" ({calls} here)" if calls != cfg.budget.accumulation else ""  # of a batch smaller by batch_factor
        raise ConfigError(
            f"budget.accumulation={cfg.budget.accumulation}: {world_size()} ranks cannot share so many micro-batches a "
            f"step{part} evenly; the nearest valid value is {cfg.nearest_accumulation(world_size())}, or start another "
            f"number of ranks"
        )


def refuse_other_world_size(cfg: Config, before: int) -> None:
    """Raise `UserError` when a run that `before` ranks began would go on otherwise with another number of them."""
    found = _depends_on_world_size(cfg)
    if found and world_size() != before:
        raise UserError(f"{found}: its amax histories depend on the number of ranks, {before} until now")


def warn_other_world_size(cfg: Config, before: int) -> None:
    """Say of a run that `before` ranks trained when this many would have had other numbers."""
    found, now = _depends_on_world_size(cfg), world_size()
    if found and now != before:
        print(f"warning: {found}: its amax histories are those of {before} ranks, not of {now}", flush=True)


def _depends_on_world_size(cfg: Config) -> str | None:
    """What, of a quantized run's scaling, makes its numbers depend on how many ranks there are."""
    words = (("tick", "call"), ("sync", "none")) if cfg.quantized else ()
    return next((f"scaling.{key}={value}" for key, value in words if getattr(cfg.scaling, key) == value), None)


# Between ranks -----------------------------------------------------------------------------------------------------


def broadcast_object(value):
    """Return the first rank's value, on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, device=get_device())
    return box[0]


def all_gather_object(value) -> list:
    """Return every rank's value, by rank."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Return the sum over ranks."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def all_reduce_max(tensor: torch.Tensor) -> torch.Tensor:
    """Return the element-wise maximum over ranks."""
    if world_size() > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor


def any_rank(flag: bool) -> bool:
    """Return whether the flag is true on any rank."""
    return bool(all_reduce_max(torch.tensor(float(flag), device=get_device()))) if world_size() > 1 else flag


def check_agreement(what: str, tensor: torch.Tensor) -> None:
    """Raise `UserError` on every rank when they do not hold the same values. NaN agrees with NaN."""
    if world_size() == 1:
        return
    bits = tensor.to(get_device()).float().contiguous().view(torch.int32).to(torch.int64)
    extremes = all_reduce_max(torch.stack([bits, -bits]))
    differing = int((extremes[0] != -extremes[1]).sum())
    if differing:
        raise UserError(
            f"{what}: {differing} of {tensor.numel()} differ between {world_size()} ranks, so a reduction did not run "
            f"or their folders differ; give all of them the same runs_dir and start again from the last checkpoint"
        )


# The model on many ranks -------------------------------------------------------------------------------------------


def distribute(module: nn.Module, blocks: list[nn.Module], kind: str) -> nn.Module:
    """Return the module whose forward pass every rank calls on its share: as it is for one rank, else in DDP, or
    sharded by FSDP2 block by block. Gradients are summed: each rank's loss is its share of the mean over all tokens of
    the step."""
    if world_size() == 1:
        return module
    if kind == "ddp":
        # Dynamo would cut the graph at DDP's buckets, which it cannot do with checkpoints and gradients of our own.
        torch._dynamo.config.optimize_ddp = False
        parallel = DistributedDataParallel(module, device_ids=[get_device()] if get_device().type == "cuda" else None)
        parallel.register_comm_hook(None, _sum_bucket)
        return parallel
    for each in (*blocks, module):
        fully_shard(each)
        each.set_gradient_divide_factor(1.0)
        each.set_force_sum_reduction_for_comms(True)  # gloo has no other
    return module


def _sum_bucket(_, bucket):  # DDP looks at the annotations, and does not understand postponed ones
    # DDP's own hook divides by the number of ranks first. A loss scaled up against that would scale the gradients that
    # the quantizers see, and their amaxes would depend on the number of ranks.
    return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda done: done.value()[0])


@contextlib.contextmanager
def gradient_sync(module: nn.Module, last: bool):
    """Forward and backward of one micro-batch: gradients travel between ranks with the last one of a step."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(last)
    with module.no_sync() if isinstance(module, DistributedDataParallel) and not last else contextlib.nullcontext():
        yield


def is_sharded(module: nn.Module) -> bool:
    """Return whether parameters are whole only inside the forward and backward pass."""
    return isinstance(module, FSDPModule)


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Return a sharded tensor as one, gathered by all ranks together; others as they are."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def full_tensor_on_main(tensor: torch.Tensor) -> torch.Tensor | None:
    """Return a sharded tensor as one, in the memory of the first rank's CPU, where more of them fit than on a GPU; None
    on the other ranks, all of which must ask. Others as they are."""
    if not isinstance(tensor, DTensor):
        return tensor
    gathered_here = tensor.detach().full_tensor()
    return gathered_here.cpu() if is_main_process() else None


def shard_like(tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """Return `tensor`, whole and the same on every rank, on the parameter's device and sharded as it is."""
    tensor = tensor.to(parameter.device)
    if isinstance(parameter, DTensor) and tensor.shape == parameter.shape:
        return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return tensor
