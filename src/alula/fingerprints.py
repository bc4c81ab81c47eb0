"""Hashes of tensors by what they hold."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def fingerprint_tensor(tensor: Tensor, context: str = "") -> str:
    """Hash of a tensor's shape, dtype and content, and of ``context``."""
    plain = tensor.detach().cpu().contiguous()
    digest = hashlib.blake2b(f"{plain.dtype}{tuple(plain.shape)}{context}".encode(), digest_size=16)
    digest.update(plain.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
