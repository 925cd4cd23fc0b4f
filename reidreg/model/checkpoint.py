"""Checkpoints: one self-describing file, written and read here only.

The file is a safetensors file: named tensors, and a header of text in which the rest stands as
JSON. Nothing in it can execute. A tree of mappings, lists, numbers, strings and tensors is kept by
taking the tensors out of it, so that JSON remains. A SHA-256 over all of it is in the header,
since the format itself notices truncation but not a flipped bit.

Writing goes to a temporary place in the same folder; what stands there is synced and then renamed:
a reader, or a resume after a kill, always finds a whole checkpoint.
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
        labels: The training set's numbering.
        preprocessing: Size, mean and std that the weights were trained with.
        epoch: Whole epochs done.
        step: Optimizer steps done.
        metrics: The last evaluation's figures, if there was one.
        training: What only a resume needs: optimizer, random states, place in the epoch.
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
    """Write a checkpoint so that the file is either the old or the new one, and whole.

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
    text = json.dumps(_take_out(content, "", tensors))
    header = {
        "format": FORMAT,
        "version": str(VERSION),
        "content": text,
        "sha256": digest_of(text, tensors),
    }
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        # A folder: safetensors writes to a file of a name of its own first, which a kill leaves.
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
        DamagedError: The file is damaged, or no checkpoint of reidreg.
        CheckpointError: The file is missing, other weights, or of a newer format.
    """
    path = Path(os.path.expanduser(path))
    text, tensors = _read(path)
    content = _put_back(json.loads(text), tensors)
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
    """Delete what a killed run left half-written."""
    for partial in folder.glob(".*.partial"):
        shutil.rmtree(partial, ignore_errors=True)


def _read(path: Path) -> tuple[str, dict[str, Tensor]]:
    """The text and the tensors of a file, checked."""
    size = _size(path)
    try:
        # In one piece: safetensors' own reader opens the path twice, and beside a run that saves
        # it would find the header of one checkpoint and the tensors of the next.
        data = path.read_bytes()
        tensors = load(data)
        length = int.from_bytes(data[:8], "little")
        header: dict[str, str] = json.loads(data[8 : 8 + length]).get("__metadata__", {})
        if header.get("format") != FORMAT:
            raise CheckpointError(
                f"{path} is a safetensors file, but no checkpoint of reidreg; weights of "
                "other systems load through --backbone.pretrained"
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
    """The size of a file that has to be there."""
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
    """What an error says, without the path that the line has already."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())[:100]


def digest_of(text: str, tensors: dict[str, Tensor]) -> str:
    """A SHA-256 over a text and named tensors, which are on the CPU."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        # The shape too: one without elements has no bytes that would tell.
        digest.update(f"{name} {tensors[name].dtype} {list(tensors[name].shape)}".encode())
        # As bytes, whatever the type: numpy has no bfloat16.
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _take_out(tree: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """A tree with its tensors replaced by their names, which end up in `tensors`."""
    if isinstance(tree, Tensor):
        while path in tensors:
            path += "'"  # {"a/b": x} and {"a": {"b": x}} are two places
        # Contiguous and its own: safetensors refuses views of shared memory.
        tensors[path] = tree.detach().to("cpu", copy=True).contiguous()
        return {_TENSOR: path}
    if isinstance(tree, dict):
        # Optimizers number their state by integers, which JSON would turn into strings.
        pairs = [
            [key, _take_out(value, f"{path}/{key}" if path else str(key), tensors)]
            for key, value in tree.items()
        ]
        return {"__dict__": pairs}
    if isinstance(tree, (list, tuple)):
        return [_take_out(item, f"{path}/{i}", tensors) for i, item in enumerate(tree)]
    return tree


def _put_back(tree: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(tree, dict):
        if _TENSOR in tree:
            return tensors[tree[_TENSOR]]
        return {key: _put_back(value, tensors) for key, value in tree["__dict__"]}
    if isinstance(tree, list):
        return [_put_back(item, tensors) for item in tree]
    return tree
