"""The layout of trainables: the position of each named tensor in one flat fp32 vector.

The head comes first, then the LoRA of blocks L-1, L-2, …, 0 (the order of SAL, ours). So the trainables of level k are
the first `size(k)` values of the full vector, and a higher level only appends values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from math import prod
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from fedfmsl.algorithms.arrays import Vector
from fedfmsl.errors import MessageError, one_line

HEAD = "head"


class Slot(BaseModel):
    """One trainable tensor: name, shape, first index in the flat vector, and part: `"head"`, `"gate"`, or the number of
    a block as text."""

    model_config = ConfigDict(frozen=True)

    name: str
    shape: tuple[Annotated[int, Field(ge=0, le=2**31)], ...] = Field(max_length=8)
    offset: int
    part: str

    @property
    def end(self) -> int:
        return self.offset + prod(self.shape)


class Layout:
    """Consecutive slots of one flat vector. `ends`: where they end. `parts` has the range of each part."""

    def __init__(self, slots: Sequence[Slot]) -> None:
        self.slots = tuple(slots)
        offset = 0
        for slot in self.slots:
            if slot.offset != offset:
                raise ValueError(f"slot {slot.name!r} starts at {slot.offset}, expected {offset}")
            offset = slot.end
        self.ends = tuple(slot.end for slot in self.slots)
        self.parts: dict[str, slice] = {
            part: slice(group[0].offset, group[-1].end)
            for part, group in ((p, list(g)) for p, g in groupby(self.slots, key=lambda s: s.part))
        }

    @classmethod
    def build(cls, shapes: Sequence[tuple[str, str, tuple[int, ...]]]) -> Layout:
        """Layout from (part, name, shape) triples in order."""
        slots, offset = [], 0
        for part, name, shape in shapes:
            slots.append(Slot(name=name, shape=shape, offset=offset, part=part))
            offset = slots[-1].end
        return cls(slots)

    @property
    def total(self) -> int:
        return self.slots[-1].end

    def size(self, level: int) -> int:
        """Number of trainables of the head and the LoRA of `level` blocks."""
        ends: list[int] = [part.stop for part in self.parts.values()]
        return ends[level]

    def parts_of(self, level: int) -> dict[str, slice]:
        """The range of the head and of each block up to `level`."""
        return {part: span for part, span in self.parts.items() if span.stop <= self.size(level)}

    def names(self, level: int) -> list[str]:
        return [slot.name for slot in self.slots if slot.end <= self.size(level)]

    def split(self, vector: Vector) -> dict[str, Vector]:
        """The tensors of a vector (P,), as views. A shorter vector has only the first slots."""
        return {s.name: vector[s.offset : s.end].reshape(s.shape) for s in self.slots if s.end <= vector.size}

    def join(self, tensors: Mapping[str, NDArray[np.generic]], dtype: type[np.generic] = np.float32) -> Vector:
        """The inverse of `split`.

        Raises MessageError as `checked` does.
        """
        slots = self.checked(tensors, dtype)
        if not slots:
            return np.empty(0, np.float32)
        return np.concatenate([np.asarray(tensors[s.name], np.float32).ravel() for s in slots])

    def checked(self, tensors: Mapping[str, NDArray[np.generic]], dtype: type[np.generic]) -> tuple[Slot, ...]:
        """The slots of these tensors.

        Raises MessageError unless the tensors are the first slots of this layout, with the right shapes, of type
        `dtype`, and finite.
        """
        slots = self.slots[: len(tensors)]
        if {slot.name for slot in slots} != set(tensors):
            raise MessageError(
                f"tensors {one_line(sorted(tensors)[:3])}… do not match this model's layout of trainables"
            )
        for slot in slots:
            tensor = tensors[slot.name]
            if tensor.dtype != dtype or tensor.shape != slot.shape:
                expected = f"{np.dtype(dtype)}{list(slot.shape)}"
                raise MessageError(f"tensor {slot.name!r} is {tensor.dtype}{list(tensor.shape)}, expected {expected}")
            if dtype is not np.int8 and not np.isfinite(tensor).all():
                raise MessageError(f"tensor {slot.name!r} has values that are not finite")
        return slots


def expert_layout(classes: int, feature: int, lora: Layout) -> Layout:
    """The layout of an expert: the head of C `classes` over features (F,), then the LoRA."""
    head: list[tuple[str, str, tuple[int, ...]]] = [
        (HEAD, "classifier.weight", (classes, feature)),
        (HEAD, "classifier.bias", (classes,)),
    ]
    return Layout.build([*head, *((slot.part, slot.name, slot.shape) for slot in lora.slots)])
