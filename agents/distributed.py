"""Many processes that train one model: ``torchrun --nproc-per-node 2 -m agents.train …``.

Every process (a *rank*) plays its share of the prompts. Then all of them are told the whole
rollout, so that counts, baselines, advantages and minibatches are what one process would have, and
each scores what it has played itself. Losses are divided by the answers of *all* ranks: gradients
are added up, not averaged.

- ``"ddp"``: every rank holds the model and its optimizer. The gradient is accumulated locally and
  added up once a step, tensor by tensor. Torch's ``DistributedDataParallel`` would average, want
  as many passes on every rank and, after its first step, sum in another order: a resumed run would
  round differently.
- ``"fsdp"``: what is trained, its gradient and its optimizer lie in shards, one a rank
  (:class:`Shards`).

`Accelerate <https://huggingface.co/docs/accelerate>`_ connects the processes and gives each its
device. Its own FSDP works on GPUs only, so the sharding is PyTorch's ``fully_shard``, which is the
same everywhere. One process needs none of this.

Rank 0 alone writes, prints and evaluates, while the others wait. If a process dies, torchrun ends
the others; the run is resumed from its last checkpoint. torchrun passes Ctrl-C and SIGTERM on, and
kills what has not stopped after ``--shutdown-timeout`` seconds (30): give it longer than an update
takes.
"""

from __future__ import annotations

import copy
import functools
import operator
import os
import socket
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from agents.launch import processes
from agents.policies.models import Critic, Scores, own_copy
from agents.settings import Strategy

T = TypeVar("T")

WAITING = timedelta(days=1)
"""How long a rank waits for the others: rank 0 may be evaluating. A death is noticed at once."""


class SharedError(FloatingPointError):
    """What one rank failed at, or several: all of them raise it."""


@dataclass(frozen=True)
class World:
    """The processes of a run, seen from one of them; by default the only one.

    Attributes:
        rank: Number of this process, 0 to ``size`` - 1.
        size: Number of processes.
        strategy: How they share the training.
        device: Where this one computes.
        accelerator: What connects them; ``None`` for a single process.
        peers: Of every rank, host name and process id.
    """

    rank: int = 0
    size: int = 1
    strategy: Strategy = "ddp"
    device: str = "auto"
    accelerator: Any = None
    peers: tuple[tuple[str, int], ...] = ()

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes, prints and evaluates."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Return the value of every rank, in their order; all ranks have to call it.

        Raises:
            SharedError: A rank has called ``tell`` instead.
        """
        if self.size == 1:
            return [value]
        return self._exchange(value, "")

    def tell(self, error: BaseException) -> str:
        """Tell the other ranks of an error, who wait in ``gather`` or have one of their own.

        Else they would wait on, and meet this rank's next message where they expect another.

        Returns:
            What it says; the first rank's words if several have one.
        """
        if self.size == 1 or isinstance(error, SharedError):  # of that, all ranks know
            return str(error)
        try:
            self._exchange(None, str(error))
        except SharedError as shared:
            return str(shared)
        raise AssertionError("an error was not passed on")

    def _exchange(self, value: T, wrong: str) -> list[T]:
        from accelerate.utils import gather_object

        found = gather_object([(value, wrong)])
        for _, told in found:
            if told:
                raise SharedError(told)
        return [each for each, _ in found]

    def total(self, value: T) -> T:
        """Return the sum of all ranks' values (numbers or tensors), the same on each."""
        return functools.reduce(operator.add, self.gather(value))

    def of_main(self, value: T) -> T:
        """Return rank 0's value; the others wait for it."""
        return self.gather(value)[0]

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Return this rank's slice of what all ranks share evenly."""
        size = len(items) // self.size
        return items[self.rank * size : (self.rank + 1) * size]

    def owns(self, row: int, rows: int) -> bool:
        """Whether this rank has played a row out of all that the ranks shared."""
        return self.size == 1 or row // (rows // self.size) == self.rank

    def seed(self, seed: int) -> int:
        """Return a seed of this rank's own; rank 0 has the run's."""
        if self.is_main:
            return seed
        own = np.random.SeedSequence(seed, spawn_key=(self.rank,))
        return int(own.generate_state(1, np.uint64)[0])

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Add the gradients of all ranks up; those in shards are added up already."""
        if self.size == 1 or self.strategy == "fsdp":
            return
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad = self.accelerator.reduce(parameter.grad, "sum")

    def lost(self, patience: float = 0.0) -> list[int]:
        """Return the ranks on this machine whose process is gone.

        Args:
            patience: Seconds to wait for one; torchrun takes a moment to bury a dead process.
        """
        here, until = socket.gethostname(), time.monotonic() + patience
        while True:
            gone = [r for r, (host, pid) in enumerate(self.peers) if host == here and _gone(pid)]
            if gone or time.monotonic() >= until:
                return gone
            time.sleep(0.05)

    def leave(self) -> None:
        """Disconnect; nothing that all ranks do can follow."""
        if self.accelerator is not None:
            self.accelerator.end_training()
            # A thread of Gloo lets go of the last message only after it has been received, and
            # takes Python's lock for that; if Python has begun to end, the process is aborted.
            time.sleep(0.5)


ALONE = World()
"""A single process."""


def join(strategy: Strategy = "ddp", device: str = "auto") -> World:
    """Connect the processes that torchrun has started; without it there is one, on its own.

    Args:
        strategy: How they share the training.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"`` (each process takes a GPU of its own); a single
            process may have any.

    Raises:
        ImportError: Accelerate is not installed.
        ValueError: The device cannot be shared.
    """
    if processes() == 1:
        return World(strategy=strategy, device=device)
    try:
        from accelerate import Accelerator, InitProcessGroupKwargs
    except ImportError as error:
        raise ImportError(
            f"torchrun started {processes()} processes, and they need the package 'accelerate' to "
            "train together, which is not installed. Install the extra with: "
            "pip install 'llm-envs[distributed]'"
        ) from error
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(
            f"The device is {device!r}, and torchrun started {processes()} processes. Use 'cuda' "
            "(each takes a GPU of its own), 'cpu', or 'auto'."
        )
    cpu = device == "cpu" or not torch.cuda.is_available()
    waiting = InitProcessGroupKwargs(backend="gloo" if cpu else "nccl", timeout=WAITING)
    accelerator = Accelerator(cpu=cpu, mixed_precision="no", kwargs_handlers=[waiting])
    alone = World(
        accelerator.process_index,
        accelerator.num_processes,
        strategy,
        str(accelerator.device),
        accelerator,
    )
    return replace(alone, peers=tuple(alone.gather((socket.gethostname(), os.getpid()))))


def _gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


# --- FSDP ----------------------------------------------------------------------------------------


class Shards:
    """A policy's model, and its critic, in shards: what is trained under FSDP.

    The policy itself keeps a whole model on every rank, which plays, is evaluated and is saved:
    sampling takes a different number of steps on each, and parts of a model cannot be fetched
    from ranks that are doing something else. With n ranks, each holds (1 + 4/n) times the model
    where Adam in one process needs 4 times.

    Args:
        policy: What plays. Its weights are those of the last ``gather``.
        critic: What judges, if anything does.
        world: The processes.
    """

    def __init__(self, policy: Any, critic: Critic | None, world: World) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        self.size = world.size
        self.mesh = init_device_mesh(torch.device(world.device).type, (world.size,))
        self._whole = _Scoring(policy, critic)
        self._split = _Scoring(own_copy(policy), copy.deepcopy(critic))
        # What transformers says must not be split: its blocks. Whatever is outside of them, tied
        # embeddings too, is one unit.
        modules = list(self._split.modules())
        blocks = {b for m in modules for b in getattr(m, "_no_split_modules", None) or ()}
        for module in modules:
            if type(module).__name__ in blocks:
                fully_shard(module, mesh=self.mesh)
        fully_shard(self._split, mesh=self.mesh, reshard_after_forward=False)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """This rank's shards of all that is trained, in the order of the whole."""
        return [p for p in self._split.parameters() if p.requires_grad]

    def score(self, sequences: Sequence[Any], reference: Any = None) -> Scores:
        """Score as the policy does, with gradients; all ranks have to call it equally often."""
        return Scores(*self._split(sequences, reference))

    def backward(self, loss: Tensor) -> None:
        """Add all ranks' gradients up into their shards; FSDP itself takes the mean."""
        (loss * self.size).backward()  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def gather(self) -> None:
        """Give the policy the weights that were trained."""
        for mine, shard in zip(self._whole.parameters(), self._split.parameters(), strict=True):
            if shard.requires_grad:
                mine.copy_(whole(shard))

    @torch.no_grad()
    def spread(self) -> None:
        """Take the policy's weights, and the critic's, into the shards."""
        for mine, shard in zip(self._whole.parameters(), self._split.parameters(), strict=True):
            shard.copy_(self.like(mine, shard))

    def like(self, value: Tensor, parameter: Tensor) -> Tensor:
        """Return the shard of a value that belongs to a parameter; what has another shape stays."""
        from torch.distributed.tensor import DTensor, distribute_tensor

        if not isinstance(parameter, DTensor) or value.shape != parameter.shape:
            return value
        on_device = value.to(parameter.device)
        return distribute_tensor(on_device, parameter.device_mesh, parameter.placements)


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor with all its shards; all ranks have to call it."""
    full = getattr(tensor, "full_tensor", None)
    return full() if full is not None else tensor


class _Scoring(nn.Module):
    """The pass that gradients come from as one module: whatever it calls is whole within it."""

    def __init__(self, policy: Any, critic: Critic | None) -> None:
        super().__init__()
        self.policy = policy
        self.model = policy.model
        self.critic = critic

    def forward(self, sequences: Sequence[Any], reference: Any) -> tuple[Tensor | None, ...]:
        scores = self.policy.score(sequences, reference, self.critic)
        # FSDP hooks its backward pass on the tensors of a tuple, and wants no views among them.
        found = (scores.log_probs, scores.entropies, scores.kls, scores.values)
        return tuple(None if t is None else t.clone() for t in found)
