"""Classes that devices propose to add: they have labelled samples of classes that the task lacks (ours).

A device says the name and how many samples it has. The names come from devices: they are valid names of classes, and
every device proposes a few at most, but they may be false.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from fedfmsl.common.class_folders import plain_name, similar
from fedfmsl.protocol.class_names import MAX_CLASSES
from fedfmsl.protocol.messages import DeviceStatus


@dataclass(frozen=True)
class Proposal:
    """`devices`: those that propose the class. `samples`: the number of samples that they say they have together."""

    name: str
    devices: tuple[str, ...]
    samples: int


def proposals(
    classes: Collection[str], statuses: Iterable[DeviceStatus], excluded: Collection[str] = ()
) -> list[Proposal]:
    """What devices that are not `excluded` propose besides these `classes`, the classes of most devices first. A device
    that is offline counts with its last status."""
    found: dict[str, dict[str, int]] = {}
    for status in statuses:
        for name, samples in status.proposed.items():
            if name not in classes and status.device not in excluded:
                found.setdefault(name, {})[status.device] = samples
    listed = [Proposal(name, tuple(sorted(counts)), sum(counts.values())) for name, counts in found.items()]
    return sorted(listed, key=lambda each: (-len(each.devices), -each.samples, each.name))


def least_devices(rule: str) -> int:
    """The number in a rule like min-devices=2."""
    return int(rule.partition("=")[2])


def approved_by(
    rule: str, classes: Collection[str], statuses: Iterable[DeviceStatus], excluded: Collection[str]
) -> tuple[str, ...]:
    """The proposed classes that the rule of --approve-classes adds to these `classes`, as many as there may be. Of
    names that differ in case or outer spaces only it adds the first one."""
    known, found = {*map(plain_name, classes)}, []
    for each in proposals(classes, statuses, excluded):
        if len(each.devices) >= least_devices(rule) and plain_name(each.name) not in known:
            known.add(plain_name(each.name))
            found.append(each.name)
    return tuple(found[: max(MAX_CLASSES - len(classes), 0)])


def why_not_new(names: Sequence[str], classes: Collection[str], pending: Collection[str] = ()) -> str:
    """Why these names cannot be those of new classes, or "". `pending`: classes that are added after the present round.
    The rule for similar names is that of devices, which do not propose such a class."""
    for index, name in enumerate(names):
        if name in classes:
            return f"the run has the class {name!r} already"
        if name in pending:
            return f"the class {name!r} is added after the present round already"
        if name in names[:index]:
            return f"the class {name!r} is named twice"
        if hint := similar(name, (*classes, *pending, *names[:index])):
            return f"the name {name!r} differs from that of another class in case or outer spaces only; {hint}"
    return ""
