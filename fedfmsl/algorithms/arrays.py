"""Array types, and the letters of their shapes.

B batch, C classes, D hidden size, F feature width, K devices, L transformer blocks, N tokens, P trainables.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float32]  # flat
Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Labels = NDArray[np.int64]

NEVER = -1e4  # a log-probability whose exp is zero in float32
