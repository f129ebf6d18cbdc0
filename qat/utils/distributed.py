"""Train on many processes, one a device, as `torchrun` starts them: start-up, collectives, DDP and FSDP2.

Every rank computes on its share of a step's micro-batches, with the same weights and the same scales. Only the first
rank writes the run folder and logs. Without `torchrun` there is one rank, and everything here is a no-op.
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
from qat.errors import ConfigError, UserError, first_line
from qat.utils.device import get_device
from qat.utils.environment import is_main_process, rank, world_size

TIMEOUT = datetime.timedelta(days=1)  # of a collective: the first rank may wait for a network for hours
INIT_TIMEOUT = datetime.timedelta(minutes=10)  # of the start: ranks may start minutes apart
_NOTICE = 5.0  # seconds after which a rank prints which ranks it waits for


def init() -> None:
    """Connect the ranks, and silence all but the first. Errors: UserError when ranks or the address are missing."""
    if world_size() == 1 or dist.is_initialized():
        return
    if get_device().type == "cuda":
        torch.cuda.set_device(get_device())
    # Both, because by default PyTorch starts NCCL alone where there is a GPU.
    backend = "cpu:gloo,cuda:nccl" if get_device().type == "cuda" else "gloo"
    dist.init_process_group(backend, store=_rendezvous(), rank=rank(), world_size=world_size(), timeout=TIMEOUT)
    atexit.register(dist.destroy_process_group)
    if not is_main_process():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  until the process ends


def _rendezvous() -> dist.Store:
    """Return a store that all ranks have connected to.

    PyTorch's own rendezvous ignores signals while it waits, and after a restart by torchrun it finds the addresses of
    ranks that are gone.
    """
    absent = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if absent:
        raise UserError(
            f"{', '.join(absent)}: not set, and WORLD_SIZE={world_size()} asks for so many processes; start them with "
            f"torchrun, or unset WORLD_SIZE"
        )
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    if not (port.isdecimal() and 0 < int(port) < 2**16):
        raise UserError(f"MASTER_PORT={port}: must be the number of a free port, as in MASTER_PORT=29500")
    store, start, printed = _open_store(address, int(port)), time.monotonic(), False
    while missing := _missing_ranks(store):
        ranks = f"rank{'s' * (len(missing) > 1)} {', '.join(map(str, missing))} of {world_size()}"
        waited, limit = time.monotonic() - start, INIT_TIMEOUT.total_seconds()
        if waited > limit:
            raise UserError(
                f"{ranks} did not come to {address}:{port} within {limit / 60:g} minutes; start them all with the same "
                f"MASTER_ADDR and MASTER_PORT (torchrun does), or unset WORLD_SIZE to train with one process"
            )
        if waited > _NOTICE and not printed:
            print(f"rank {rank()}: waiting for {ranks} at {address}:{port}; Ctrl-C stops waiting", flush=True)
            printed = True
        time.sleep(0.1)
    return store.result()


def _open_store(address: str, port: int) -> Future[dist.Store]:
    """Open the store and register this rank in it, in a thread, so that the main thread can handle signals.

    After each restart by torchrun the ranks use other keys of it.
    """
    future = Future()
    # Under torchrun its agent hosts the store, for all restarts; otherwise the first rank does.
    is_host = is_main_process() and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    prefix = f"{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/{world_size()}"

    def connect() -> None:
        try:
            deadline = time.monotonic() + INIT_TIMEOUT.total_seconds()
            while not is_host and not _is_listening(address, port):  # TCPStore would print a page for each failed try
                if time.monotonic() > deadline:
                    return
                time.sleep(0.1)
            options = {"timeout": 2 * INIT_TIMEOUT, "wait_for_workers": False, "multi_tenant": True}
            store = dist.PrefixStore(prefix, dist.TCPStore(address, port, world_size(), is_host, **options))
            store.set_timeout(TIMEOUT)
            store.set(str(rank()), "here")
            future.set_result(store)
        except RuntimeError as error:
            future.set_exception(error)

    threading.Thread(target=connect, daemon=True).start()
    return future


def _is_listening(address: str, port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((address, port), timeout=5):
        return True
    return False


def _missing_ranks(future: Future[dist.Store]) -> list[int]:
    """Return the ranks that have not come to the store. Errors: UserError when it cannot be opened."""
    if not future.done():
        return [0]
    try:
        store, names = future.result(), [str(rank) for rank in range(world_size())]
        return [] if store.check(names) else [int(name) for name in names if not store.check([name])]
    except RuntimeError as error:
        raise UserError(
            f"MASTER_PORT={os.environ['MASTER_PORT']}: {first_line(error)}; choose a free port for all ranks"
        ) from error


def abort() -> None:
    """Let this failing rank end at once: in an orderly end NCCL's ranks would wait for each other."""
    atexit.unregister(dist.destroy_process_group)


def check_world_size(cfg: Config, ranks: int | None = None) -> None:
    """Raise `ConfigError` when the ranks cannot share a step evenly, and `UserError` on a rank without a GPU.

    ranks: how many; None: as many as this process is one of.
    """
    ranks = ranks or world_size()
    gpus = torch.cuda.device_count()
    if get_device().type == "cuda" and get_device().index >= gpus:
        raise UserError(
            f"LOCAL_RANK={get_device().index}: this machine has {gpus} GPUs; start at most so many processes on it "
            f"(torchrun --nproc-per-node={gpus})"
        )
    calls = cfg.batch[1]
    if calls % ranks:
        part = f" ({calls} here)" if calls != cfg.budget.accumulation else ""  # of a batch smaller by batch_factor
        raise ConfigError(
            f"budget.accumulation={cfg.budget.accumulation}: {ranks} ranks cannot share so many micro-batches a "
            f"step{part} evenly; the nearest valid value is {cfg.nearest_accumulation(ranks)}, or start another "
            f"number of ranks"
        )


def refuse_other_world_size(cfg: Config, before: int) -> None:
    """Raise `UserError` when resuming a run of `before` ranks on another number of ranks would change its numbers."""
    setting = _world_size_setting(cfg)
    if setting and world_size() != before:
        raise UserError(f"{setting}: its amax histories depend on the number of ranks, {before} until now")


def warn_other_world_size(cfg: Config, before: int) -> None:
    """Print a warning when a finished run of `before` ranks would have had other numbers on this many."""
    setting, now = _world_size_setting(cfg), world_size()
    if setting and now != before:
        print(f"warning: {setting}: its amax histories are those of {before} ranks, not of {now}", flush=True)


def _world_size_setting(cfg: Config) -> str | None:
    """Return the setting that makes a run's numbers depend on the number of ranks; None when they do not."""
    settings = (("tick", "call"), ("sync", "none")) if cfg.quantized else ()
    return next((f"scaling.{key}={value}" for key, value in settings if getattr(cfg.scaling, key) == value), None)


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
    """Sum a tensor over the ranks, in place; returns it."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def all_reduce_max(tensor: torch.Tensor) -> torch.Tensor:
    """Take the element-wise maximum over the ranks, in place; returns the tensor."""
    if world_size() > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor


def any_rank(flag: bool) -> bool:
    """Return whether the flag is true on any rank."""
    return bool(all_reduce_max(torch.tensor(float(flag), device=get_device()))) if world_size() > 1 else flag


def check_agreement(what: str, tensor: torch.Tensor) -> None:
    """Raise `UserError` on every rank when their values differ. NaN equals NaN."""
    if world_size() == 1:
        return
    bits = tensor.to(get_device()).float().contiguous().view(torch.int32).to(torch.int64)
    largest, minus_smallest = all_reduce_max(torch.stack([bits, -bits]))
    differing = int((largest != -minus_smallest).sum())
    if differing:
        raise UserError(
            f"{what}: {differing} of {tensor.numel()} differ between {world_size()} ranks, so a reduction did not run "
            f"or their folders differ; give all of them the same runs_dir and start again from the last checkpoint"
        )


# The model on many ranks -------------------------------------------------------------------------------------------


def distribute(module: nn.Module, blocks: list[nn.Module], kind: str) -> nn.Module:
    """Return the module in DDP, or sharded block by block by FSDP2; on one rank as it is.

    Gradients are summed, not averaged: a rank's loss is its share of the mean over all tokens of the step.
    """
    if world_size() == 1:
        return module
    if kind == "ddp":
        # Dynamo would split the graph at DDP's buckets, which fails with checkpointing and custom gradients.
        torch._dynamo.config.optimize_ddp = False
        parallel = DistributedDataParallel(module, device_ids=[get_device()] if get_device().type == "cuda" else None)
        parallel.register_comm_hook(None, _sum_bucket)
        return parallel
    for part in (*blocks, module):
        fully_shard(part)
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)  # the only one that gloo has
    return module


def _sum_bucket(_, bucket):  # no annotations: DDP checks them, and cannot read postponed ones
    # DDP's own hook divides by the number of ranks first. Scaling up the loss against that would scale the gradients
    # that the quantizers see, so their amaxes would depend on the number of ranks.
    return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda done: done.value()[0])


@contextlib.contextmanager
def gradient_sync(module: nn.Module, last: bool):
    """Run one micro-batch within this context; gradients are reduced over the ranks with the last one of a step."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(last)
    with module.no_sync() if isinstance(module, DistributedDataParallel) and not last else contextlib.nullcontext():
        yield


def is_sharded(module: nn.Module) -> bool:
    """Return whether parameters are sharded, so that they are whole only inside a forward or backward pass."""
    return isinstance(module, FSDPModule)


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor whole: a sharded one is gathered, which all ranks must call together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's shard of a sharded tensor, in the same memory; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor_on_main(tensor: torch.Tensor) -> torch.Tensor | None:
    """Return a tensor whole; all ranks must call this together.

    A sharded one goes to the first rank's CPU memory, where more fit than on a GPU; other ranks get None.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    whole = tensor.detach().full_tensor()
    return whole.cpu() if is_main_process() else None


def shard_like(tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """Return a whole tensor, equal on every rank, on the parameter's device and sharded like the parameter."""
    tensor = tensor.to(parameter.device)
    if isinstance(parameter, DTensor) and tensor.shape == parameter.shape:
        return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return tensor
