"""All families of backbones."""

from __future__ import annotations

from export.families.bert import BERT
from export.families.clip import CLIP
from export.families.deit import DEIT
from export.families.dinov2 import DINOV2
from export.families.vit import VIT

FAMILIES = {family.model_type: family for family in (VIT, DEIT, DINOV2, CLIP, BERT)}
