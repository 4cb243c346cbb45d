"""From settings to a daemon at work: everything opened, measured and put together, in the order in which it can fail."""

from __future__ import annotations

import contextlib
import os
import time
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path

from edge_runtime.cache import DiskCache
from edge_runtime.device import Device
from edge_runtime.download import fetch_bundle, find_server
from edge_runtime.engines import open_engine
from edge_runtime.features import FeatureCache
from edge_runtime.folder import SampleFolder
from edge_runtime.gate import Gate
from edge_runtime.governor import Limits
from edge_runtime.home_assistant import Described, discovery
from edge_runtime.level_cap import LevelCap
from edge_runtime.lock import locked
from edge_runtime.pace import Pace, PacedEngine
from edge_runtime.presence import device_link, progress_to
from edge_runtime.probe import make_plan
from edge_runtime.sensors import Sensors
from edge_runtime.service import Service
from edge_runtime.settings import Settings
from edge_runtime.store import DeviceStore
from edge_runtime.watcher import Watcher
from edge_runtime.work import Worker
from protocol.bundle import Bundle
from protocol.topics import Topics
from shell.identity import device_name
from shell.log import fields, log, set_up_log
