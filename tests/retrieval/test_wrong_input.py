"""Whatever features and ids are given: the right figure, or an error of one line.

Every way to a ranking is held against the same cases, also where Python leaves out asserts.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import reidreg
from reidreg.errors import ConfigError, ReidregError
from reidreg.parts.interfaces import EVALUATORS
from reidreg.retrieval.expansion import expand_queries
from reidreg.retrieval.ranked_lists import ranked_lists
from reidreg.retrieval.ranking import match_positions, match_positions_of_rows
from reidreg.retrieval.reranking import rerank_rows
from reidreg.values import Embeddings

Ranker = Callable[..., Any]


def positions(query: Embeddings, gallery: Embeddings, metric: str) -> Any:
    found = match_positions(query, gallery, metric=metric)
    return found.positions.tolist(), found.offsets.tolist()


def as_tensor(values: Any) -> torch.Tensor:
    return values if isinstance(values, torch.Tensor) else torch.from_numpy(np.array(values))


def lists(query: Embeddings, gallery: Embeddings, metric: str) -> Any:
    return ranked_lists(query, gallery, k=5, metric=metric)[0].tolist()


def reranked(query: Embeddings, gallery: Embeddings, metric: str) -> Any:
    rows = rerank_rows(query.features, gallery.features, metric=metric, k1=4, k2=2)
    found = match_positions_of_rows(rows, query.pids, query.camids, gallery.pids, gallery.camids)
    return found.positions.tolist(), found.offsets.tolist()


def expanded(query: Embeddings, gallery: Embeddings, metric: str) -> Any:
    # It takes tensors alone.
    query, gallery = (replace(s, features=as_tensor(s.features)) for s in (query, gallery))
    moved = expand_queries(query, gallery, k=3, alpha=2.0, metric=metric)
    return positions(moved, gallery, metric)


def evaluated(query: Embeddings, gallery: Embeddings, metric: str) -> Any:
    options = {"rerank": True, "k1": 4, "verification": True, "cameras": True, "bootstrap": 10}
    return EVALUATORS.build("retrieval", metric=metric, **options).evaluate(query, gallery)


RANKERS: dict[str, Ranker] = {
    "match_positions": positions,
    "ranked_lists": lists,
    "rerank_rows": reranked,
    "expand_queries": expanded,
    "evaluator": evaluated,
}
everywhere = pytest.mark.parametrize("name", RANKERS)
both_metrics = pytest.mark.parametrize("metric", ["cosine", "euclidean"])


def integers(count: int, seed: int, width: int = 8) -> NDArray[np.float32]:
    """Vectors of small whole numbers, which every type of number holds exactly."""
    values = np.random.default_rng(seed).integers(-7, 8, (count, width))
    values[:, 0] = np.where(values[:, 0] == 0, 1, values[:, 0])  # no zero vector
    return values.astype(np.float32)


def sides() -> tuple[Embeddings, Embeddings]:
    """Six queries and twenty gallery items of four people and three cameras."""
    made = []
    for count, seed in ((6, 1), (20, 2)):
        ids = np.random.default_rng(seed + 10)
        made.append(
            Embeddings(
                torch.from_numpy(integers(count, seed)),
                torch.from_numpy(np.arange(count) % 4),
                torch.from_numpy(ids.integers(0, 3, count)),
            )
        )
    return made[0], made[1]


def naive_positions(query: NDArray[Any], gallery: NDArray[Any]) -> list[int]:
    """By sorting, with Python's whole numbers, which are never rounded."""
    one, two = sides()
    found = []
    for row, pid, camid in zip(query.tolist(), one.pids.tolist(), one.camids.tolist(), strict=True):
        far = [
            sum((a - b) ** 2 for a, b in zip(row, item, strict=True)) for item in gallery.tolist()
        ]
        order = sorted(range(len(far)), key=lambda item: (far[item], item))
        own = list(zip(two.pids.tolist(), two.camids.tolist(), strict=True))
        order = [item for item in order if own[item] != (pid, camid)]
        found += [place for place, item in enumerate(order, 1) if own[item][0] == pid]
    return found


def test_asserts_are_looked_at() -> None:
    with pytest.raises(AssertionError):
        assert not 1  # also under python -O: these are pytest's, not Python's


# --------------------------------------------------------------------- the right figure


def read_only(values: NDArray[Any]) -> NDArray[Any]:
    values = values.copy()
    values.flags.writeable = False
    return values


def every_other(values: NDArray[Any]) -> NDArray[Any]:
    wide = np.full((2 * values.shape[0], 3 * values.shape[1]), np.nan, values.dtype)
    wide[::2, ::3] = values
    return wide[::2, ::3]


def of_tensor(convert: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[NDArray[Any]], Any]:
    return lambda values: convert(torch.from_numpy(values.copy()))


FORMS: dict[str, Callable[[NDArray[Any]], Any]] = {
    "numpy": lambda values: values,
    "float64": lambda values: values.astype(np.float64),
    "float16": lambda values: values.astype(np.float16),
    "int8": lambda values: values.astype(np.int8),
    "int64": lambda values: values.astype(np.int64),
    "read-only": read_only,
    "strided": every_other,
    "backwards": lambda values: values[::-1, ::-1].copy()[::-1, ::-1],
    "Fortran order": np.asfortranarray,
    "transposed": lambda values: np.ascontiguousarray(values.T).T,
    "tensor of bfloat16": of_tensor(lambda values: values.to(torch.bfloat16)),
    "tensor of float64": of_tensor(torch.Tensor.double),
    "tensor of int8": of_tensor(lambda values: values.to(torch.int8)),
    "transposed tensor": of_tensor(lambda values: values.T.contiguous().T),
    "slice of a tensor": of_tensor(lambda values: torch.stack([values, -values], 2)[:, :, 0]),
    "with gradient": of_tensor(lambda values: values.requires_grad_()),
    "parameter": of_tensor(torch.nn.Parameter),
}


@everywhere
@both_metrics
@pytest.mark.parametrize("form", FORMS)
def test_the_figures_do_not_depend_on_how_numbers_are_kept(
    form: str, metric: str, name: str
) -> None:
    query, gallery = sides()
    given = [
        replace(side, features=FORMS[form](side.features.numpy())) for side in (query, gallery)
    ]
    assert RANKERS[name](*given, metric) == RANKERS[name](query, gallery, metric)
    for side, untouched in zip(given, sides(), strict=True):
        assert np.array_equal(as_numpy(side.features), untouched.features.numpy())


@everywhere
@both_metrics
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "uint64"])
def test_numbers_without_a_sign_are_numbers(dtype: str, metric: str, name: str) -> None:
    plain = [replace(side, features=side.features + 8) for side in sides()]
    given = [replace(side, features=side.features.numpy().astype(dtype)) for side in plain]
    assert RANKERS[name](*given, metric) == RANKERS[name](*plain, metric)


def as_numpy(values: Any) -> NDArray[Any]:
    return values.detach().float().numpy() if isinstance(values, torch.Tensor) else values


def test_the_figures_are_those_of_sorting() -> None:
    query, gallery = sides()
    expected = naive_positions(query.features.numpy(), gallery.features.numpy())
    assert positions(query, gallery, "euclidean")[0] == expected


def powers_of(name: str, metric: str) -> list[int]:
    """The powers of two that leave this way's outcome the same to the last bit."""
    powers = [100, 50, -50, -100, -149]
    if name == "expand_queries" and metric == "euclidean":
        powers.remove(-149)  # a mean of denormal numbers is rounded
    if name in ("ranked_lists", "expand_queries") and metric == "euclidean":
        powers.remove(100)  # distances are infinite then: see the test of lists below
    return powers


@pytest.mark.parametrize(
    "power, metric, name",
    [
        (power, metric, name)
        for name in RANKERS
        for metric in ("cosine", "euclidean")
        for power in powers_of(name, metric)
    ],
)
def test_huge_and_tiny_features_are_ranked_like_others(power: int, metric: str, name: str) -> None:
    # A power of two changes no digit; at -149 all are denormal, and 2**100 is beyond 1e30.
    query, gallery = sides()
    given = [
        replace(side, features=(side.features.double() * 2.0**power).float())
        for side in (query, gallery)
    ]
    assert bool((given[0].features != 0).any(dim=1).all())
    found, expected = (RANKERS[name](*pair, metric) for pair in (given, (query, gallery)))
    if name == "evaluator":
        # Thresholds are squared distances, which a factor does change.
        for figures in (found, expected):
            verification = figures["verification"]
            figures["verification"] = {key: verification[key] for key in ("num_genuine", "eer")}
    assert found == expected


@everywhere
def test_vectors_need_not_be_of_unit_length(name: str) -> None:
    query, gallery = sides()
    factors = 2.0 ** (torch.arange(20) % 7 * 9 - 30)[:, None]
    longer = replace(gallery, features=gallery.features * factors)
    assert RANKERS[name](query, longer, "cosine") == RANKERS[name](query, gallery, "cosine")


@pytest.mark.parametrize("spread", [1.0, 30.0, 1e6])
def test_the_cosine_is_that_of_the_vectors_divided_by_their_norms(spread: float) -> None:
    query, gallery = sides()
    random = np.random.default_rng(5)
    wide = []
    for count in (6, 20):
        values = random.standard_normal((count, 8)) * spread ** random.uniform(-1, 1, (count, 1))
        wide.append(values.astype(np.float32).astype(np.float64))
    given = [
        replace(side, features=torch.from_numpy(values.astype(np.float32)))
        for side, values in zip((query, gallery), wide, strict=True)
    ]
    one, two = (values / np.linalg.norm(values, axis=1, keepdims=True) for values in wide)
    order = np.argsort(-(one @ two.T), axis=1, kind="stable")
    indices, _ = ranked_lists(*given, k=20, everything=True)
    assert np.array_equal(indices.numpy(), order)


@everywhere
def test_one_huge_vector_among_small_ones_hides_nothing(name: str) -> None:
    query, gallery = sides()
    features = gallery.features.clone()
    features[7] *= 2.0**90
    given = replace(gallery, features=features)
    # For the cosine a factor is nothing.
    assert RANKERS[name](query, given, "cosine") == RANKERS[name](query, gallery, "cosine")


def test_one_huge_vector_comes_last_by_distance_and_the_others_keep_their_order() -> None:
    query, gallery = sides()
    features = gallery.features.clone()
    features[7] *= 2.0**90
    given = replace(gallery, features=features)
    wide = [side.features.numpy().astype(np.float64) for side in (query, given)]
    exact = [np.vectorize(int, otypes=[object])(values) for values in wide]
    assert positions(query, given, "euclidean")[0] == naive_positions(*exact)


@both_metrics
def test_a_list_longer_than_the_gallery_ends_in_nothing(metric: str) -> None:
    query, gallery = sides()
    indices, distances = ranked_lists(query, gallery, k=50, metric=metric, everything=True)
    assert sorted(indices[0, :20].tolist()) == list(range(20))
    assert bool((indices[:, 20:] == -1).all()) and bool(distances[:, 20:].isinf().all())
    for k in (1, 5, 19, 20, 21):
        shorter, _ = ranked_lists(query, gallery, k=k, metric=metric, everything=True)
        assert torch.equal(shorter, indices[:, :k])


@everywhere
def test_a_gallery_of_one_item_is_enough(name: str) -> None:
    query, gallery = sides()
    item = int((gallery.camids != query.camids[0]).logical_and(gallery.pids == 0).nonzero()[0])
    one = Embeddings(
        *(values[[item]] for values in (gallery.features, gallery.pids, gallery.camids))
    )
    found = RANKERS[name](query, one, "cosine")
    if name == "evaluator":
        assert found["mAP"] == found["reranked"]["mAP"] == 1
    elif name == "ranked_lists":
        assert found[0] == [0, -1, -1, -1, -1]
    else:
        assert set(found[0]) == {1}


IDS: dict[str, Callable[[torch.Tensor], Any]] = {
    "int32": lambda ids: ids.to(torch.int32),
    "int8": lambda ids: ids.to(torch.int8),
    "numpy": lambda ids: ids.numpy(),
    "uint64": lambda ids: ids.numpy().astype(np.uint64),
    "read-only": lambda ids: read_only(ids.numpy()),
    "backwards": lambda ids: ids.numpy()[::-1].copy()[::-1],
    "list": lambda ids: ids.tolist(),
    "at the top": lambda ids: ids + (2**63 - 4),
    "at the bottom": lambda ids: ids - 2**63,
    "far apart": lambda ids: torch.where(ids < 2, ids - 2**63, ids + (2**63 - 4)),
}


@pytest.mark.parametrize("name", ["match_positions", "ranked_lists", "rerank_rows"])
@pytest.mark.parametrize("form", IDS)
@pytest.mark.parametrize("which", ["pids", "camids"])
def test_ids_of_any_whole_numbers_mean_the_same(which: str, form: str, name: str) -> None:
    query, gallery = sides()
    given = [replace(s, **{which: IDS[form](getattr(s, which))}) for s in (query, gallery)]
    assert RANKERS[name](*given, "cosine") == RANKERS[name](query, gallery, "cosine")


# --------------------------------------------------------------------- a clear error


def with_value(value: float, row: int = 2) -> Callable[[NDArray[Any]], Any]:
    def change(values: NDArray[Any]) -> NDArray[Any]:
        values = values.copy()
        values[row, 3] = value
        return values

    return change


WRONG: dict[str, Callable[[NDArray[Any]], Any]] = {
    "NaN": with_value(np.nan),
    "infinite": with_value(np.inf),
    "minus infinite": with_value(-np.inf),
    "NaN in the last row": with_value(np.nan, -1),
    "all NaN": lambda values: np.full_like(values, np.nan),
    "NaN of bfloat16": lambda v: torch.from_numpy(with_value(np.nan)(v)).to(torch.bfloat16),
    "beyond float32": lambda values: with_value(1e39)(values.astype(np.float64)),
    "no rows": lambda values: values[:0],
    "no columns": lambda values: values[:, :0],
    "narrower": lambda values: values[:, :-1],
    "a vector": lambda values: values[:, 0],
    "a number": lambda values: np.array(1.0),
    "a map": lambda values: values[:, :, None],
    "fewer than ids": lambda values: values[:-1],
    "more than ids": lambda values: np.concatenate([values, values]),
    "complex": lambda values: values.astype(np.complex64),
    "complex tensor": lambda values: torch.from_numpy(values).to(torch.complex64),
    "true or false": lambda values: values > 0,
}


def one_line(error: pytest.ExceptionInfo[ReidregError]) -> bool:
    text = str(error.value)
    return "\n" not in text and 20 < len(text) < 300


@everywhere
@pytest.mark.parametrize("side", ["query", "gallery"])
@pytest.mark.parametrize("case", WRONG)
def test_features_that_cannot_be_ranked_are_an_error_of_one_line(
    case: str, side: str, name: str
) -> None:
    query, gallery = sides()
    if side == "query":
        query = replace(query, features=WRONG[case](query.features.numpy()))
    else:
        gallery = replace(gallery, features=WRONG[case](gallery.features.numpy()))
    for metric in ("cosine", "euclidean"):
        with pytest.raises(ReidregError) as caught:
            RANKERS[name](query, gallery, metric)
        assert one_line(caught)
        if "NaN" in case or "infinite" in case or case == "beyond float32":
            assert f"{side} features" in str(caught.value) and "not finite" in str(caught.value)


@pytest.mark.parametrize("dtype", ["longdouble", ">f4", ">f8"])
def test_arrays_of_types_that_torch_lacks_are_taken_as_numbers(dtype: str) -> None:
    query, gallery = sides()
    given = replace(gallery, features=gallery.features.numpy().astype(dtype))
    expected = match_positions(query, gallery).positions.tolist()
    assert match_positions(query, given).positions.tolist() == expected
    assert lists(query, given, "cosine") == lists(query, gallery, "cosine")


@pytest.mark.parametrize("name", ["match_positions", "ranked_lists", "rerank_rows", "evaluator"])
@pytest.mark.parametrize("dtype", [str, object])
def test_arrays_that_torch_does_not_take_are_an_error_of_one_line(dtype: Any, name: str) -> None:
    query, gallery = sides()
    given = replace(gallery, features=gallery.features.numpy().astype(dtype))
    with pytest.raises(ReidregError) as caught:
        RANKERS[name](query, given, "cosine")
    assert one_line(caught)


def test_lists_of_huge_features_come_without_a_warning() -> None:
    query, gallery = sides()
    given = [replace(side, features=side.features * 2.0**100) for side in (query, gallery)]
    assert lists(*given, "euclidean") == lists(query, gallery, "euclidean")


@everywhere
@pytest.mark.parametrize("side", ["query", "gallery"])
def test_a_zero_vector_has_no_cosine_but_a_distance(side: str, name: str) -> None:
    query, gallery = sides()
    changed = query if side == "query" else gallery
    changed.features[3] = 0
    with pytest.raises(ReidregError, match="zero") as caught:
        RANKERS[name](query, gallery, "cosine")
    assert one_line(caught)
    expected = naive_positions(query.features.numpy(), gallery.features.numpy())
    found = RANKERS[name](query, gallery, "euclidean")
    assert name != "match_positions" or found[0] == expected


WRONG_IDS: dict[str, Callable[[torch.Tensor], Any]] = {
    "too few": lambda ids: ids[:-1],
    "too many": lambda ids: torch.cat([ids, ids]),
    "none": lambda ids: ids[:0],
    "a column": lambda ids: ids[:, None],
    "a number": lambda ids: ids[0],
    "float": lambda ids: ids.float(),
    "float with NaN": lambda ids: ids.float() * float("nan"),
    "true or false": lambda ids: ids > 0,
    "text": lambda ids: [str(value) for value in ids.tolist()],
    "objects": lambda ids: ids.numpy().astype(object),
    "complex": lambda ids: ids.numpy().astype(complex),
}


@everywhere
@pytest.mark.parametrize("which", ["pids", "camids"])
@pytest.mark.parametrize("side", ["query", "gallery"])
@pytest.mark.parametrize("case", WRONG_IDS)
def test_ids_that_are_none_are_an_error_of_one_line(
    case: str, side: str, which: str, name: str
) -> None:
    given = dict(zip(("query", "gallery"), sides(), strict=True))
    wrong = WRONG_IDS[case](getattr(given[side], which))
    given[side] = replace(given[side], **{which: wrong})
    with pytest.raises(ReidregError) as caught:
        RANKERS[name](given["query"], given["gallery"], "cosine")
    assert one_line(caught)


@pytest.mark.parametrize(
    "options",
    [
        {"metric": "cosin"},
        {"same_camera": "dropp"},
        {"budget_mib": 0},
        {"budget_mib": float("nan")},
        {"k": 0},
        {"k": -3},
    ],
)
def test_options_that_are_wrong_are_named(options: dict[str, Any]) -> None:
    query, gallery = sides()
    if "k" not in options:
        with pytest.raises(ConfigError, match=next(iter(options))) as caught:
            match_positions(query, gallery, **options)
        assert one_line(caught)
    with pytest.raises(ConfigError, match=next(iter(options))) as caught:
        ranked_lists(query, gallery, **{"k": 5, **options})
    assert one_line(caught)


# --------------------------------------------------------------------- without asserts


@pytest.mark.slow
def test_the_checks_hold_when_python_optimises() -> None:
    quiet = ["-q", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestConfigWarning"]
    done = subprocess.run(
        [sys.executable, "-O", "-m", "pytest", *quiet, __file__, "-k", "error or asserts or zero"],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": str(Path(reidreg.__file__).parents[1])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]
