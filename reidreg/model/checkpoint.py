"""Checkpoints: one self-describing file, written and read only here.

It is a safetensors file: named tensors, and a text header with everything else as JSON. Nothing in
it can execute. A tree of mappings, lists, numbers, strings and tensors is stored by replacing its
tensors with their names, so that JSON remains. The header has a SHA-256 over all of it, since the
format itself detects truncation but not a flipped bit.

A checkpoint is written to a temporary folder beside it, synced and then renamed: a reader, or a
resume after a kill, always finds a whole one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from reidreg.config.sections import Config, config_from_dict
from reidreg.data.labels import Labels
from reidreg.errors import CheckpointError, DamagedError
from reidreg.files import sync

FORMAT = "reidreg checkpoint"
VERSION = 1
_TENSOR = "__tensor__"


@dataclass
class Checkpoint:
    """Everything that evaluation, fine-tuning and an exact resume need.

    Args:
        model: The model's state dict.
        config: The resolved configuration, as plain values.
        labels: The identities and cameras of the training set.
        preprocessing: Size, mean and std that the weights were trained with.
        epoch: Completed epochs.
        step: Completed optimizer steps.
        metrics: The figures of the last evaluation; empty before the first.
        training: What only a resume needs: optimizer, random states, position in the epoch.
    """

    model: dict[str, Tensor]
    config: dict[str, Any]
    labels: Labels
    preprocessing: dict[str, Any]
    epoch: int
    step: int
    metrics: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] | None = None

    def resolved_config(self) -> Config:
        """The configuration as an object."""
        return config_from_dict(self.config)


def save_checkpoint(checkpoint: Checkpoint, path: Path) -> None:
    """Write a checkpoint atomically: the file is either the old one or the new one.

    Raises:
        CheckpointError: The folder cannot be written to, or the disk is full.
    """
    tensors: dict[str, Tensor] = {}
    content = {
        "config": checkpoint.config,
        "labels": {"pids": checkpoint.labels.pids, "camids": checkpoint.labels.camids},
        "preprocessing": checkpoint.preprocessing,
        "epoch": checkpoint.epoch,
        "step": checkpoint.step,
        "metrics": checkpoint.metrics,
        "model": checkpoint.model,
        "training": checkpoint.training,
    }
    text = json.dumps(_without_tensors(content, "", tensors))
    header = {
        "format": FORMAT,
        "version": str(VERSION),
        "content": text,
        "sha256": digest_of(text, tensors),
    }
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        # A folder: safetensors first writes to a file of another name, which a kill would leave.
        partial.mkdir(parents=True, exist_ok=True)
        save_file(tensors, partial / path.name, metadata=header)
        sync(partial / path.name)
        os.replace(partial / path.name, path)
        sync(path.parent)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write {path}: {_reason(error)}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint, on the CPU. Nothing in the file is executed.

    Raises:
        DamagedError: The file is damaged, or not a checkpoint of reidreg.
        CheckpointError: The file is missing, holds other weights, or has a newer format.
    """
    path = Path(os.path.expanduser(path))
    text, tensors = _read(path)
    content = _with_tensors(json.loads(text), tensors)
    labels = content.pop("labels")
    return Checkpoint(
        labels=Labels(tuple(labels["pids"]), tuple(labels["camids"])),
        **content,
    )


def run_folder_of(ckpt: Path) -> Path:
    """The folder of the run that a checkpoint belongs to, judged by the file's location."""
    ckpt = ckpt.expanduser()
    return ckpt.parent.parent if ckpt.parent.name == "checkpoints" else ckpt.parent


def remove_partial_files(folder: Path) -> None:
    """Delete the temporary folders that a killed run left."""
    for partial in folder.glob(".*.partial"):
        shutil.rmtree(partial, ignore_errors=True)


def _read(path: Path) -> tuple[str, dict[str, Tensor]]:
    """The JSON text and the tensors of a file, after all checks."""
    size = _size(path)
    try:
        # In one read: safetensors' own reader opens the path twice, and while a run saves could
        # get the header of one checkpoint and the tensors of the next.
        data = path.read_bytes()
        tensors = load(data)
        length = int.from_bytes(data[:8], "little")
        header: dict[str, str] = json.loads(data[8 : 8 + length]).get("__metadata__", {})
        if header.get("format") != FORMAT:
            raise CheckpointError(
                f"{path} is a safetensors file, but not a checkpoint of reidreg; to load the "
                "weights of another system, use --backbone.pretrained"
            )
        if int(header["version"]) > VERSION:
            raise CheckpointError(
                f"{path} has format {header['version']}, this reidreg reads up to {VERSION}: "
                "upgrade reidreg"
            )
        content, digest = header["content"], header["sha256"]
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise DamagedError(
            f"{path} is damaged or no checkpoint of reidreg ({size:,} bytes; {_reason(error)})"
        ) from error
    if digest_of(content, tensors) != digest:
        raise DamagedError(f"{path} is damaged: its content does not match its checksum")
    return content, tensors


def _size(path: Path) -> int:
    """The size of a checkpoint's file.

    Raises:
        CheckpointError: There is none; the message names the checkpoints in the folder.
    """
    try:
        status = path.stat()
        if stat.S_ISREG(status.st_mode):
            return status.st_size
        reason, folder = "not a file", path
    except OSError as error:
        reason, folder = _reason(error), path.parent
    found = sorted(folder.glob("*.ckpt")) or sorted(folder.glob("*/*.ckpt"))
    names = ", ".join(str(other.relative_to(folder)) for other in found[:3])
    hint = f"; there is {names} in {folder}" if found else ""
    raise CheckpointError(f"no checkpoint at {path} ({reason}){hint}")


def _reason(error: Exception) -> str:
    """An error's text, without the path that the message already has."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())[:100]


def digest_of(text: str, tensors: dict[str, Tensor]) -> str:
    """A SHA-256 over a text and named tensors, which are on the CPU."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        # The shape too: tensors without elements have no bytes in which to differ.
        digest.update(f"{name} {tensors[name].dtype} {list(tensors[name].shape)}".encode())
        # As bytes: numpy has no bfloat16.
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _without_tensors(tree: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Replace the tensors of a tree by their names, and collect them in `tensors`."""
    if isinstance(tree, Tensor):
        while path in tensors:
            path += "'"  # {"a/b": x} and {"a": {"b": x}} are two tensors
        # A contiguous copy: safetensors refuses views of shared memory.
        tensors[path] = tree.detach().to("cpu", copy=True).contiguous()
        return {_TENSOR: path}
    if isinstance(tree, dict):
        # Optimizers number their state by integers, which JSON would turn into strings.
        pairs = [
            [key, _without_tensors(value, f"{path}/{key}" if path else str(key), tensors)]
            for key, value in tree.items()
        ]
        return {"__dict__": pairs}
    if isinstance(tree, (list, tuple)):
        return [_without_tensors(item, f"{path}/{i}", tensors) for i, item in enumerate(tree)]
    return tree


def _with_tensors(tree: Any, tensors: dict[str, Tensor]) -> Any:
    """The inverse of `_without_tensors`."""
    if isinstance(tree, dict):
        if _TENSOR in tree:
            return tensors[tree[_TENSOR]]
        return {key: _with_tensors(value, tensors) for key, value in tree["__dict__"]}
    if isinstance(tree, list):
        return [_with_tensors(item, tensors) for item in tree]
    return tree
