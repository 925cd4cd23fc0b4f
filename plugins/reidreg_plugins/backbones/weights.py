"""Pretrained weights from local files: read safely, fitted, and reported."""

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

# What training scripts wrap a state dict in, and what they put before its keys.
WRAPPERS = ("state_dict", "model", "model_state_dict", "state_dict_ema", "teacher", "net")
PREFIXES = ("module.", "_orig_mod.", "backbone.", "base.", "model.", "encoder.", "net.")
# Of a zip archive and of a pickle, the two forms that torch.save writes.
BEGINNINGS = (b"PK", b"\x80")

Weights = dict[str, Tensor]


def is_file(pretrained: str) -> bool:
    """Whether the option names a file rather than `imagenet` or `none`."""
    return pretrained not in ("imagenet", "none")


def check_pretrained(pretrained: str) -> None:
    """Raise ValueError unless the option is `imagenet`, `none` or a file that is there."""
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
            f"{path} holds Python objects, not tensors alone; loading it could run code, so save "
            "model.state_dict() from where it came"
        ) from error
    except Exception as error:  # damage makes a pickle raise whatever its next opcode meets
        raise DataError(f"{path} is damaged or no weights file ({_reason(error)})") from error
    return _unwrapped(content, path)


def _load_pickled(path: Path) -> Any:
    with path.open("rb") as file:
        beginning = file.read(16)
    if not beginning.startswith(BEGINNINGS):
        raise ValueError(f"it begins with {beginning!r}")
    with warnings.catch_warnings():
        # torch warns of some files before it refuses them; the refusal says enough.
        warnings.simplefilter("ignore")
        return torch.load(path, map_location="cpu", weights_only=True)


def _reason(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _unwrapped(content: Any, path: Path) -> Weights:
    for _ in WRAPPERS:  # no deeper: a file can hold a mapping that holds itself
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
    """The state dict without what a wrapper put before its keys.

    Prefixes go as long as more keys then match the model's own.
    """
    current = dict(state)
    while True:
        shorter = [
            {key.removeprefix(prefix): value for key, value in current.items()}
            for prefix in PREFIXES
        ]
        best = max(shorter, key=lambda candidate: len(own.keys() & candidate.keys()))
        if len(own.keys() & best.keys()) <= len(own.keys() & current.keys()):
            # Two prefixes may have to go before the first key matches: module.backbone.conv1.
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
        convert: Fits weights that do not fit as they are, such as those for another image size.

    Returns:
        A line that says what was loaded and what was not.

    Raises:
        DataError: Fewer than nine in ten of the module's tensors are in the file, or shapes differ:
            these are weights of another architecture.
    """
    own = module.state_dict()
    state = without_prefix(read_weights(path), own)
    if convert is not None and not _fit_as_they_are(own, state):
        state = _converted(convert, state, path)
    shared = [key for key in own if key in state]
    clashes = [key for key in shared if own[key].shape != state[key].shape]
    # Counters of batches seen are in newer files only, and of no use here.
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


def _fit_as_they_are(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> bool:
    return all(key in state and state[key].shape == own[key].shape for key in own)


def _converted(convert: Callable[[Weights], Weights], state: Weights, path: str | Path) -> Weights:
    try:
        return convert(state)
    except Exception as error:  # converters index and reshape as their own weights allow
        raise DataError(
            f"{path}: the weights cannot be fitted to this backbone and its input size "
            f"({_reason(error)})"
        ) from error
