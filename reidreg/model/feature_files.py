"""Files of features: written by `extract`, or by any other system.

A .npz or .safetensors file holds `features` (N, D), `pids` (N,), `camids` (N,) and, as .npz,
`paths` (N,). Nothing in either can execute: arrays of Python objects are refused.

Features in float32, float16 or bfloat16 (which .npz does not have) keep their type in memory; all
figures are computed in float32. Wider floats are rounded to float32. Integers are converted by
value, so quantised codes with a zero point or a scale have to be decoded beforehand.
"""

from __future__ import annotations

import stat
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor

from reidreg.errors import ConfigError, DataError
from reidreg.files import PRIVATE, replacing
from reidreg.values import Embeddings

DTYPES = ("float32", "float16")
_NAMES = ("features", "pids", "camids", "paths")
_KEPT = (torch.float32, torch.float16, torch.bfloat16)
# Features compress by a fraction; a file that grows a thousandfold is a decompression bomb.
UNPACKED_BYTES = 2**28  # that any file may have
_RATIO = 100  # of unpacked to packed bytes, beyond that


def save_features(
    embeddings: Embeddings, path: str | Path, dtype: Literal["float32", "float16"] = "float32"
) -> None:
    """Write features as .npz: features (N, D), pids, camids (N,) int64, paths (N,).

    Features identify people, so only the file's owner may read it.

    Args:
        embeddings: What to write.
        path: The file, ending in .npz; it is replaced atomically.
        dtype: Of the features; float16 takes half the space and keeps three digits.

    Raises:
        ConfigError: The name does not end in .npz, or the data type is unknown.
        DataError: The file cannot be written, or the features exceed the range of float16.
    """
    path = check_output(path)
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype {dtype}: features are written as {' or '.join(DTYPES)}")
    features = embeddings.features.to(getattr(torch, dtype))
    if dtype == "float16" and bool((features.isinf() & embeddings.features.isfinite()).any()):
        largest = embeddings.features.abs().max().item()
        raise DataError(
            f"features of up to {largest:.3g} do not fit float16, whose largest is 65504; "
            "write float32"
        )
    try:
        with replacing(path, PRIVATE) as file:
            np.savez(
                file,
                features=features.numpy(),
                pids=embeddings.pids.numpy(),
                camids=embeddings.camids.numpy(),
                paths=np.array(embeddings.paths, dtype=np.str_),
            )
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror or error}") from error


def check_output(path: str | Path) -> Path:
    """The path of a feature file to write.

    Raises:
        ConfigError: It does not end in .npz.
    """
    path = Path(path)
    if path.suffix != ".npz":
        raise ConfigError(f"{path}: features are written as .npz; give a name that ends in .npz")
    return path


def load_features(path: str | Path, *, labelled: bool = True) -> Embeddings:
    """Read features that `save_features` or another system wrote.

    Args:
        path: A .npz file, or a .safetensors file.
        labelled: Whether pids and camids are required; otherwise missing ones are -1.

    Returns:
        The features in float32, float16 or bfloat16, on the CPU.

    Raises:
        DataError: The file is missing or damaged, lacks an array, or arrays differ in length.
    """
    path = Path(path)
    arrays = _read(path)
    features = _features(path, arrays)
    count = len(features)
    if labelled:
        _check_labels(path, arrays, count)
    unknown = np.full(count, -1)
    pids, camids = (
        _ids(path, name, arrays.get(name, unknown), count) for name in ("pids", "camids")
    )
    return Embeddings(features, pids, camids, _paths(path, arrays, count))


# --------------------------------------------------------------------- reading


def _read(path: Path) -> dict[str, Any]:
    """The arrays or tensors of a file that have one of the known names."""
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"no feature file at {path} ({error.strerror})") from error
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"{path} is a folder or device, not a feature file")
    try:
        if path.suffix == ".safetensors":
            return _read_safetensors(path)
        return _read_npz(path, status.st_size)
    except DataError:
        raise
    # numpy and safetensors pass on whatever the archive or the parser of an array raised.
    except Exception as error:
        reason = " ".join(str(error).split())[:100] or type(error).__name__
        kind = ".safetensors" if path.suffix == ".safetensors" else ".npz"
        raise DataError(f"{path} is no {kind} file of plain arrays ({reason})") from error


def _read_npz(path: Path, size: int) -> dict[str, Any]:
    if not zipfile.is_zipfile(path):
        raise DataError(
            f"{path} is no .npz file ({size:,} bytes); numpy.savez(FILE, features=..., pids=..., "
            "camids=...) writes one"
        )
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            packed = min(member.compress_size, size)
            if member.file_size > max(UNPACKED_BYTES, _RATIO * packed):
                raise DataError(
                    f"{path}: {member.filename[:60]} would unpack from {packed:,} to "
                    f"{member.file_size:,} bytes, which no features do"
                )
    # Opened here: numpy does not close a file that it opened and cannot read.
    with path.open("rb") as file, np.load(file, allow_pickle=False) as members:
        _check_names(path, members.files)
        arrays = {name: members[name] for name in _NAMES if name in members.files}
    for name, values in arrays.items():
        if not isinstance(values, np.ndarray):
            raise ValueError(f"{name} is no array")
    return arrays


def _read_safetensors(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        names = list(file.keys())
        _check_names(path, names)
        arrays: dict[str, Any] = {
            name: file.get_tensor(name) for name in _NAMES[:3] if name in names
        }
    return arrays


def _check_names(path: Path, found: list[str]) -> None:
    if "features" not in found:
        names = ", ".join(found[:8])[:100] or "nothing"
        raise DataError(f"{path} lacks features; it holds {names}")


# --------------------------------------------------------------------- checks and conversions


def _features(path: Path, arrays: Mapping[str, Any]) -> Tensor:
    """The features, (N, D) float32, float16 or bfloat16, contiguous."""
    values = arrays["features"]
    if isinstance(values, np.ndarray):
        real = values.dtype.kind in "fiu"
    else:
        real = not values.is_complex() and values.dtype != torch.bool
    if not real or values.ndim != 2:
        hint = ""
        if isinstance(values, np.ndarray) and values.dtype.kind == "V":
            hint = "; numpy has no bfloat16, .safetensors has"
        raise DataError(f"{path}: features are {_described(values)}, not (N, D) numbers{hint}")
    if isinstance(values, np.ndarray):
        # float16 in this machine's byte order; everything else as float32.
        wanted = np.float16 if values.dtype.kind == "f" and values.itemsize == 2 else np.float32
        with np.errstate(over="ignore"):  # becomes inf, for which the evaluation names the image
            values = torch.from_numpy(np.ascontiguousarray(values, dtype=wanted))
    kept: Tensor = values if values.dtype in _KEPT else values.to(torch.float32)
    return kept.contiguous()


def _check_labels(path: Path, arrays: Mapping[str, Any], count: int) -> None:
    if "pids" not in arrays:
        raise DataError(
            f"{path} lacks pids; add pids=..., one integer for each of the {count} features"
        )
    if "camids" not in arrays:
        raise DataError(
            f"{path} lacks camids; where cameras are not known, add camids=numpy.zeros({count}, "
            "int) to both files and evaluate with --evaluator.same_camera keep"
        )


def _ids(path: Path, name: str, values: Any, count: int) -> Tensor:
    """Ids (N,) int64; whole numbers in floats, as MATLAB writes them, are converted exactly."""
    array = values
    if isinstance(values, Tensor):
        array = (values.double() if values.is_floating_point() else values).numpy()
    if array.ndim != 1 or not _whole(array):
        raise DataError(
            f"{path}: {name} are {_described(values)}, not (N,) whole numbers; "
            "use the same ones in query and gallery"
        )
    if len(array) != count:
        raise DataError(f"{path}: there are {count} features, but {len(array)} {name}")
    return torch.from_numpy(array.astype(np.int64))


def _whole(array: NDArray[Any]) -> bool:
    """Whether all values are whole numbers that fit int64 and cannot have been rounded."""
    if array.dtype.kind == "f":
        # Beyond it, neighbouring integers share a float.
        end = 2.0 ** (np.finfo(array.dtype).nmant + 1)
        return bool((np.abs(array) <= end).all() and (array == np.floor(array)).all())
    if array.dtype.kind == "u":
        return bool((array <= np.iinfo(np.int64).max).all())
    return array.dtype.kind == "i"


def _paths(path: Path, arrays: Mapping[str, Any], count: int) -> tuple[str, ...]:
    values = arrays.get("paths")
    if values is None or values.size == 0:
        return ()
    if values.dtype.kind == "S":
        values = np.char.decode(values, "utf-8", "replace")
    if values.dtype.kind != "U" or values.shape != (count,):
        raise DataError(f"{path}: paths are {_described(values)}, not ({count},) texts")
    return tuple(values.tolist())


def _described(values: NDArray[Any] | Tensor) -> str:
    """Type and shape, for errors."""
    return f"{str(values.dtype).removeprefix('torch.')} {tuple(values.shape)}"
