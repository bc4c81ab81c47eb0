"""What a stage computes: loss, gradients, learning rates, precision, and what it leaves behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForImageTextToText, AutoProcessor, DynamicCache, TrainerCallback

import alula
from alula.anatomy import Anatomy
from alula.data import Collator
from alula.errors import AlulaError, DataError, RecipeError, UsageError
from alula.hosts import build_host, load_host, save_host
from alula.seam.dialect import cache_of
from alula.training import check, train
from alula.training.stage import open_data
from tests.data.test_collate import LLAVA_TEMPLATE
from tests.hosts import tiny
