"""Buffers that channels meet entry by entry, such as a router's correction bias or the slopes of heads.

A buffer gets labels when labelled channels first meet it, and is then cut with them. Until then it is only followed:
a rotary frequency that no channel meets in its own module stays a constant.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prunekit.compat import storage_key
from prunekit.discovery.constants import LARGEST, n_stored


@dataclass(frozen=True, eq=False)
class _Followed:
    """Memory whose numbers come from a buffer, one from one.

    Attributes:
        name: of the buffer.
        entries: int64 (n,), which entry of the buffer stands at each place of the memory.
        storage: the memory; it lives on, so that its key is given to no other.
        own: whether it is the buffer's own memory and not a copy.
    """

    name: str
    entries: Tensor
    storage: torch.UntypedStorage
    own: bool


class Buffers:
    """Follows the entries of buffers through views, copies, and operations with single numbers.

    Attributes:
        shapes: name → shape.
    """

    def __init__(self) -> None:
        self.shapes: dict[str, torch.Size] = {}
        self._followed: dict[int, _Followed] = {}

    def follow(self, name: str, buffer: Tensor) -> Tensor:
        """Begin with a buffer; very large ones stay constants."""
        if 1 < n_stored(buffer) == buffer.numel() <= LARGEST:
            self.shapes[name] = buffer.shape
            self._note(buffer, name, torch.arange(buffer.numel()).view(buffer.shape), own=True)
        return buffer

    def follow_result(self, tensors: Sequence[Tensor], result: object) -> None:
        """Go on with the result of an operation on one followed tensor, or on that and single numbers."""
        if not self._followed or not isinstance(result, Tensor):
            return
        several = [tensor for tensor in tensors if tensor.numel() != 1]
        source = self._found(several[0]) if len(several) == 1 else None
        if source is None or several[0].numel() != result.numel() or storage_key(result.untyped_storage()) in self:
            return
        if several[0].squeeze().shape == result.squeeze().shape:
            entries = _laid(source.entries, several[0]).reshape(result.shape)
            self._note(result, source.name, entries, own=False)

    def entries(self, tensor: Tensor) -> tuple[str, Tensor, torch.UntypedStorage] | None:
        """The buffer that a tensor's memory comes from, which of its entries stand where, and the memory."""
        found = self._found(tensor)
        return None if found is None else (found.name, found.entries, found.storage)

    def is_own(self, tensor: Tensor) -> bool:
        """Whether a tensor is a followed buffer itself, in whatever view."""
        found = self._found(tensor)
        return found is not None and found.own

    def __contains__(self, key: int) -> bool:
        return key in self._followed

    def _found(self, tensor: Tensor) -> _Followed | None:
        return self._followed.get(storage_key(tensor.untyped_storage()))

    def _note(self, tensor: Tensor, name: str, entries: Tensor, *, own: bool) -> None:
        storage = tensor.untyped_storage()
        flat = torch.zeros(storage.nbytes() // tensor.element_size(), dtype=torch.long)
        _laid(flat, tensor).copy_(entries)
        self._followed[storage_key(storage)] = _Followed(name, flat, storage, own)


def _laid(flat: Tensor, tensor: Tensor) -> Tensor:
    """Numbers of the places of some memory, in the form of a tensor that views it."""
    return flat.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
