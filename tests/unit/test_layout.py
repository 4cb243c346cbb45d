"""Layouts: the positions of trainables in a flat vector."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.bundles import Built
from support.wire import layouts, vector_of

from fedfmsl.errors import MessageError
from fedfmsl.protocol.layout import Layout, Slot


@given(layouts(), st.integers(0, 9), st.data())
def test_join_is_the_inverse_of_split(layout: Layout, seed: int, data: st.DataObject) -> None:
    vector = vector_of(layout, seed)
    end = data.draw(st.sampled_from([slot.end for slot in layout.slots]))
    tensors = layout.split(vector[:end])
    shuffled = dict(data.draw(st.permutations(list(tensors.items()))))
    assert np.array_equal(layout.join(shuffled), vector[:end])
    assert layout.join({}).size == 0


@given(layouts(), st.integers(0, 9), st.data())
def test_join_refuses_tensors_with_another_name_shape_type_or_infinite_values(
    layout: Layout, seed: int, data: st.DataObject
) -> None:
    tensors: dict[str, NDArray[Any]] = dict(layout.split(vector_of(layout, seed)))
    name = data.draw(st.sampled_from(list(tensors)))
    wrong = {
        "dtype": tensors[name].astype(np.float64),
        "shape": tensors[name][np.newaxis],
        "nan": np.full_like(tensors[name], np.nan),
        "infinite": np.full_like(tensors[name], -np.inf),
    }
    with pytest.raises(MessageError, match=name):
        layout.join({**tensors, name: wrong[data.draw(st.sampled_from(list(wrong)))]})
    with pytest.raises(MessageError):
        layout.join({**tensors, "more": tensors[name]})
    if name != layout.slots[-1].name:
        with pytest.raises(MessageError):
            layout.join({key: tensor for key, tensor in tensors.items() if key != name})


def test_a_layout_with_a_gap_is_refused() -> None:
    with pytest.raises(ValueError, match="starts at 3, expected 2"):
        Layout([Slot(name="a", shape=(2,), offset=0, part="p"), Slot(name="b", shape=(1,), offset=3, part="p")])


def test_a_higher_level_appends_blocks_from_the_head_to_the_input(vit: Built) -> None:
    layout, levels = vit.bundle.expert, range(vit.bundle.manifest.levels + 1)
    assert list(layout.parts) == ["head", "2", "1", "0"]
    for level in levels:
        assert layout.names(level) == list(layout.split(np.zeros(layout.size(level), np.float32)))
    assert [len(layout.names(level)) for level in levels] == [2, 6, 10, 14]
