"""The state directory of a device."""

from edge_runtime.store.device_store import DeviceStore

__all__ = ["DeviceStore"]
