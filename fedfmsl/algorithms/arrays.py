"""Array types, and the letters of their shapes.

B batch, C classes, D hidden size, F feature width, G gate parameters, K devices, L transformer blocks, N tokens,
P trainable parameters.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float32]  # flat
Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Labels = NDArray[np.int64]
Bools = NDArray[np.bool_]
Tensors = Mapping[str, NDArray[np.generic]]  # by name
Parts = Mapping[str, slice]  # the head and each block: where its values are in a flat vector, in order

NEVER = -1e4  # a log-probability whose exp is zero in float32
MIN_PROBABILITY = 1e-30  # lower ones count as this, so that logarithms and quotients are finite
