"""The public API: what `import fedfmsl` loads, and that its reference page is complete."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.bundles import Built

import fedfmsl

REFERENCE = Path(__file__).parents[2] / "docs" / "api.md"


def test_import_loads_numpy_and_the_standard_library_only() -> None:
    code = "import fedfmsl, sys; print(*{name.split('.')[0] for name in sys.modules} - set(sys.stdlib_module_names))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert set(loaded.stdout.split()) - {"__main__", "__mp_main__"} <= {"fedfmsl", "numpy"} | site_hooks()


def site_hooks() -> set[str]:
    """Packages that Python itself loads at start, such as the finders of editable installations."""
    code = "import sys; print(*{name.split('.')[0] for name in sys.modules} - set(sys.stdlib_module_names))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    return set(loaded.stdout.split())


def test_every_public_name_can_be_imported() -> None:
    for name in fedfmsl.__all__:
        assert getattr(fedfmsl, name) is not None
        assert name in dir(fedfmsl)
    with pytest.raises(AttributeError, match="no attribute 'Bundles'"):
        _ = fedfmsl.Bundles


def test_the_reference_page_lists_every_public_name_once() -> None:
    documented = re.findall(r"^\| `(\w+)` \|", REFERENCE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert sorted(documented) == sorted(fedfmsl.__all__)
    assert len(set(fedfmsl.__all__)) == len(fedfmsl.__all__)


def test_the_page_lists_the_exit_codes_of_the_errors() -> None:
    rows = re.findall(r"^\| `(\w+Error)` \| (\d+) \|", REFERENCE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert {name: getattr(fedfmsl, name).exit_code for name, _ in rows} == {name: int(code) for name, code in rows}
    assert len(rows) == 8


def test_the_examples_of_the_page_run(vit: Built) -> None:
    """In one namespace and in their order, with a tiny bundle."""
    examples = re.findall(r"^```python\n(.*?)^```", REFERENCE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    code = "".join(examples)
    assert code.count('"bundles/vit-b16"') == 1
    names: dict[str, Any] = {}
    exec(code.replace('"bundles/vit-b16"', repr(str(vit.bundle.root))), names)
    assert names["loss"] > 0
    assert names["combined"].delta.shape == names["theta"].shape
    assert names["state"].level == 1
    assert 0 < names["temperature"] < 10


def test_a_round_of_aggregation_in_three_lines() -> None:
    parts = {"head": slice(0, 2), "1": slice(2, 4)}
    contributions = [fedfmsl.Contribution.of(np.full(size, size, np.float32), size) for size in (2, 4)]
    combined = fedfmsl.WeightedMean().aggregate(contributions, parts)
    theta, _ = fedfmsl.FedAvg().step(np.zeros(4, np.float32), combined, fedfmsl.Moments.zeros(4))
    assert theta == pytest.approx([10 / 3, 10 / 3, 4, 4])


def test_the_package_is_marked_as_typed() -> None:
    assert (Path(fedfmsl.__file__).parent / "py.typed").is_file()
