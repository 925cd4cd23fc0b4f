"""The rule of `Embeddings.without_junk`."""

from __future__ import annotations

from dataclasses import replace

import torch

from reidreg import Embeddings


def test_junk_is_left_out_where_pids_are_known() -> None:
    features, camids = torch.eye(4), torch.arange(4)
    some = Embeddings(features, torch.tensor([3, -1, 0, -1]), camids, ("a", "b", "c", "d"))
    kept = some.without_junk()
    assert kept.pids.tolist() == [3, 0] and kept.camids.tolist() == [0, 2]
    assert kept.paths == ("a", "c") and torch.equal(kept.features, features[[0, 2]])
    assert replace(some, paths=()).without_junk().paths == ()


def test_embeddings_without_junk_or_without_any_pid_stay_as_they_are() -> None:
    features, camids = torch.eye(2), torch.arange(2)
    for pids in ([3, 0], [-1, -1]):
        side = Embeddings(features, torch.tensor(pids), camids)
        assert side.without_junk() is side
