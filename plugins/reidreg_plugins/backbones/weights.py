"""Pretrained weights from local files: read safely, converted if necessary, and reported."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from reidreg import DataError

# Keys under which training scripts store a state dict, and prefixes that they add to its keys.
WRAPPERS = ("state_dict", "model", "model_state_dict", "state_dict_ema", "teacher", "net")
PREFIXES = ("module.", "_orig_mod.", "backbone.", "base.", "model.", "encoder.", "net.")
# First bytes of a zip archive and of a pickle, the two formats that torch.save writes.
MAGIC = (b"PK", b"\x80")

Weights = dict[str, Tensor]


def is_file(pretrained: str) -> bool:
    """Whether the option names a file rather than `imagenet` or `none`."""
    return pretrained not in ("imagenet", "none")


def check_pretrained(pretrained: str) -> None:
    """Raise ValueError unless the option is `imagenet`, `none` or an existing file."""
    if is_file(pretrained) and not Path(pretrained).expanduser().is_file():
        raise ValueError(
            f"pretrained: {pretrained!r} is neither imagenet, nor none, nor a file that is there"
        )


def read_weights(path: str | Path) -> Weights:
    """The tensors of a weights file; nothing in it is executed.

    Args:
        path: A safetensors file, or one that torch.save wrote.

    Raises:
        DataError: The file is missing, damaged, or holds more than tensors.
    """
    path = Path(path).expanduser()
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        content = _load_pickled(path)
    except FileNotFoundError as error:
        raise DataError(f"no weights file at {path}") from error
    except pickle.UnpicklingError as error:
        raise DataError(
            f"{path} holds Python objects, not tensors alone, and loading it could run code; save "
            "model.state_dict() with the program that wrote it"
        ) from error
    except Exception as error:  # unpickling a damaged file can raise anything
        raise DataError(f"{path} is damaged or no weights file ({_reason(error)})") from error
    return _unwrapped(content, path)


def _load_pickled(path: Path) -> Any:
    with path.open("rb") as file:
        start = file.read(16)
    if not start.startswith(MAGIC):
        raise ValueError(f"it begins with {start!r}")
    with warnings.catch_warnings():
        # torch warns of some files before it refuses them; the error says enough.
        warnings.simplefilter("ignore")
        return torch.load(path, map_location="cpu", weights_only=True)


def _reason(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _unwrapped(content: Any, path: Path) -> Weights:
    for _ in WRAPPERS:  # limits the depth: a mapping in a file can contain itself
        if not isinstance(content, Mapping):
            break
        inner = [content[w] for w in WRAPPERS if isinstance(content.get(w), Mapping)]
        content = inner[0] if inner else content
    tensors = (
        {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
        if isinstance(content, Mapping)
        else {}
    )
    if not tensors:
        raise DataError(f"{path} holds no tensors by name")
    return tensors


def without_prefix(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> Weights:
    """The state dict without the prefixes that wrappers added to its keys.

    A prefix is removed if more keys then match the model's.
    """
    current = dict(state)
    while True:
        shorter = [
            {key.removeprefix(prefix): value for key, value in current.items()}
            for prefix in PREFIXES
        ]
        best = max(shorter, key=lambda candidate: len(own.keys() & candidate.keys()))
        if len(own.keys() & best.keys()) <= len(own.keys() & current.keys()):
            # Several prefixes may hide the first matching key: module.backbone.conv1.
            stripped = next((s for s in shorter if s.keys() != current.keys()), None)
            if stripped is None or own.keys() & current.keys():
                return current
            best = stripped
        current = best


def load_weights_file(
    module: nn.Module, path: str | Path, convert: Callable[[Weights], Weights] | None = None
) -> str:
    """Load a weights file into a module.

    Args:
        module: The module.
        path: As for `read_weights`.
        convert: Converts weights that do not fit, such as those for another image size.

    Returns:
        A line that says what was loaded and what was not.

    Raises:
        DataError: The file has fewer than nine in ten of the module's tensors, or other shapes: it
            is of another architecture.
    """
    own = module.state_dict()
    state = without_prefix(read_weights(path), own)
    if convert is not None and not _fits(own, state):
        state = _converted(convert, state, path)
    shared = [key for key in own if key in state]
    clashes = [key for key in shared if own[key].shape != state[key].shape]
    # Only newer files have these counters of batches, and nothing here uses them.
    counted = [key for key in own if not key.endswith("num_batches_tracked")]
    found = [key for key in counted if key in state and key not in clashes]
    if clashes or len(found) < 0.9 * len(counted):
        example = (
            f"{clashes[0]} is {tuple(state[clashes[0]].shape)}, not {tuple(own[clashes[0]].shape)}"
            if clashes
            else f"it holds {next(iter(state))}, ..."
        )
        raise DataError(
            f"{path}: {len(found)} of {len(counted)} tensors fit this backbone ({example}); these "
            "are weights of another architecture"
        )
    module.load_state_dict({key: state[key] for key in shared}, strict=False)
    missing = [key for key in counted if key not in state]
    unused = [key for key in state if key not in own]
    report = f"pretrained weights: {len(found)} of {len(counted)} tensors from {path}"
    report += f"; missing: {', '.join(missing[:4])}" if missing else ""
    return report + (f"; left out: {', '.join(unused[:4])}" if unused else "")


def _fits(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> bool:
    return all(key in state and state[key].shape == own[key].shape for key in own)


def _converted(convert: Callable[[Weights], Weights], state: Weights, path: str | Path) -> Weights:
    try:
        return convert(state)
    except Exception as error:  # converters index and reshape without checks
        raise DataError(
            f"{path}: the weights cannot be fitted to this backbone and its input size "
            f"({_reason(error)})"
        ) from error
