"""Whether a batch fits into memory, estimated before anything is computed, from the sizes of the network's intermediate results."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.errors import UsageError

OVERHEAD = 1.5  # what kernels take for themselves, beside the results that are alive
_LAYERS = 64


def require_memory(free: int, network: nn.Module, x: Tensor, *labels: Tensor) -> None:
    """Refuse a batch like `x` [B,C,H,W] that does not fit into `free` bytes, with one that does (UsageError)."""
    if fits(free, network, x, *labels):
        return
    need = call_bytes(network, x, *labels)
    assert need is not None
    fitting = len(x)
    while fitting > 1 and OVERHEAD * need * fitting / len(x) > free:
        fitting //= 2
    raise UsageError(
        f"sampling.batch_size: got {len(x)}, whose network call takes about {_gib(OVERHEAD * need)}, expected one that fits into "
        f"{_gib(free)} of free memory. Use --batch-size {fitting}, or -s sampling.batch_size={fitting}."
    )


def fits(free: int, network: nn.Module, x: Tensor, *labels: Tensor) -> bool:
    """Whether a call with a batch like `x` [B,C,H,W] fits into `free` bytes, as far as can be told."""
    if _at_most(network, x) <= free:
        return True
    need = call_bytes(network, x, *labels)
    return need is None or OVERHEAD * need <= free


def call_bytes(network: nn.Module, x: Tensor, *labels: Tensor) -> int | None:
    """Return the most bytes of results alive at once during a call with all in the dtype of `x`.

    None of a network that cannot be called without data.
    """
    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    sizes = [torch.empty_like(x, device="meta"), torch.empty(len(x), dtype=torch.int64, device="meta")]
    sizes += [torch.empty_like(y, device="meta") for y in labels]
    try:
        with torch.no_grad(), Alive() as alive:
            meta = {
                name: torch.empty_like(tensor, device="meta", dtype=x.dtype if tensor.is_floating_point() else None)
                for name, tensor in tensors.items()
            }
            weights: int = alive.now
            torch.func.functional_call(network, meta, tuple(sizes))
    except Exception:  # a network of one's own may look at values, which are not there
        return None
    most: int = alive.most
    return most - weights


def _at_most(network: nn.Module, x: Tensor) -> int:
    """Return more bytes than a call takes, without the second that it takes to find out how many it takes: many layers at full width."""
    widest = max((len(p) for p in network.parameters() if p.dim() > 1), default=x.shape[1])
    return _LAYERS * widest * (x.numel() // x.shape[1]) * x.element_size()


class Alive(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of tensors that operations return, for as long as these live; views of one memory count once."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now, self.most = 0, 0
        self._users: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self._users:
                    self.now += size
                    self.most = max(self.most, self.now)
                self._users[key] = self._users.get(key, 0) + 1
                weakref.finalize(tensor, self._ended, key, size)
        return result

    def _ended(self, key: int, size: int) -> None:
        self._users[key] -= 1
        if not self._users[key]:
            del self._users[key]
            self.now -= size


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.3g} GiB"
