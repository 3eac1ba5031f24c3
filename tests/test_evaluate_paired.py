"""Rows told apart clip by clip: pairs whose spread is known, files, and what is no pair."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from animatelcm.evaluate.frechet import frechet_distance, gaussian
from animatelcm.evaluate.judge import PROMPT_SEED, Protocol
from animatelcm.evaluate.paired import compare, keep_samples, pair_table, samples_path, to_first
from animatelcm.evaluate.report import row_path, write_row
from animatelcm.weights.files import write_safetensors
from results import ROW

N, D = 120, 6
PROTOCOL = Protocol(clips=N, real=N)
SHOTS = [PROTOCOL.data(PROMPT_SEED, N).shot(i) for i in range(N)]


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


REAL = normal(200, D, seed=1)
PROMPTS = 5 * normal(N, D, seed=2)
SHARES = (normal(N, seed=3) > 0).double()


def kept(out, setting, samples, *, shots=SHOTS, **changes):
    """A row in a folder, what its clips bring, and the real clips."""
    row = replace(ROW, setting=setting, n=N, **changes)
    path = row_path(out, row.kind, setting)
    keep_samples(samples, path, row, shots, "real-x.safetensors")
    write_row(row, path)
    write_safetensors({"features": REAL}, out / "real-x.safetensors")
    return path


@pytest.fixture
def pair(tmp_path):
    """Two rows of which the second is moved by a constant, and right where the first is in all but ten clips."""
    first = {"fvd_like": PROMPTS, "concept_accuracy": SHARES, "motion_accuracy": torch.zeros(0)}
    second = {"fvd_like": PROMPTS + 1, "concept_accuracy": torch.cat([1 - SHARES[:10], SHARES[10:]])}
    return (
        kept(tmp_path / "a", "lcm@4", first),
        kept(tmp_path / "b", "lcm@8", {**second, "motion_accuracy": torch.zeros(0)}, fingerprint="f2", model="other"),
    )


def test_the_difference_of_distances_has_the_spread_of_what_is_not_shared(pair):
    """Moved by a constant c, the distance grows by |c|^2 + 2 c (mean - real mean), whatever the covariances."""
    figures = compare(*pair).figures
    found, real = figures["fvd_like"], gaussian(REAL)
    apart = (PROMPTS - real.mean).sum(dim=1)  # c = 1 in each dimension
    assert found.value == pytest.approx(D + 2 * float(apart.mean()), rel=1e-9)
    assert found.deviation == pytest.approx(2 * float(apart.std()) / N**0.5, rel=0.12)
    distances = [frechet_distance(gaussian(PROMPTS + step), real) for step in (0, 1)]
    assert found.value == pytest.approx(distances[1] - distances[0], rel=1e-9)
    assert found.resamples == 200


def test_the_difference_of_shares_is_as_sure_as_that_of_its_clips(pair):
    figures = compare(*pair).figures
    changed = torch.cat([1 - 2 * SHARES[:10], torch.zeros(N - 10)])
    found = figures["concept_accuracy"]
    assert found.value == pytest.approx(float(changed.mean()), abs=1e-12)
    assert found.deviation == pytest.approx(float(changed.std(correction=0)) / N**0.5, rel=0.1)
    assert figures.keys() == {"fvd_like", "concept_accuracy"}  # nobody's prompt names a motion


def test_exchanged_rows_have_the_opposite_difference(pair):
    there, back = compare(*pair), compare(*reversed(pair))
    assert (there.first, there.second) == (back.second, back.first)
    for name, found in there.figures.items():
        assert (back.figures[name].value, back.figures[name].deviation) == (-found.value, found.deviation)
    json.dumps(there.to_json(), allow_nan=False)
    assert there.to_json()["second"] == {"model": "other", "setting": "lcm@8"}


def test_the_table_has_shares_in_points(pair):
    head, _, line, _, note = pair_table([compare(*pair)]).splitlines()
    assert head == "| kind | difference | FVD-like | concept, points |"
    found = compare(*pair).figures["concept_accuracy"]
    assert line.startswith("| clips | other lcm@8 less emoji lcm@4 | ")
    assert f" | {100 * found.value:+.3g} +- {100 * found.deviation:.2g} (" in line
    assert note.startswith("Paired by prompt")


def test_rows_of_a_folder_are_held_against_the_first_of_their_kind(tmp_path, caplog):
    shares = {"concept_accuracy": SHARES}
    rows = [
        replace(ROW, setting=setting, kind=kind, n=N) for kind in ("images", "plain") for setting in ("a", "b", "c")
    ]
    for row in rows:
        kept(tmp_path, row.setting, shares, kind=row.kind)
    samples_path(row_path(tmp_path, "plain", "a")).unlink()  # as an earlier version left it
    pairs = [(pair.first.kind, pair.first.setting, pair.second.setting) for pair in to_first(tmp_path, rows)]
    assert pairs == [("images", "a", "b"), ("images", "a", "c"), ("plain", "b", "c")]
    write_row(replace(rows[1], fingerprint="f9"), row_path(tmp_path, "images", "b"))  # another version wrote over it
    assert [pair.second.setting for pair in to_first(tmp_path, rows)] == ["c", "c"]
    assert "b.safetensors is of another row" in caplog.text


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"protocol": "p2"}, "is of protocol p2, but .* of protocol p1"),
        ({"kind": "plain"}, "is of kind plain, but .* of kind clips"),
        ({"shots": SHOTS[::-1]}, "is of prompts [0-9a-f]{12}, but"),
    ],
)
def test_what_is_no_pair_is_refused(tmp_path, changes, said):
    samples = {"concept_accuracy": SHARES}
    first = kept(tmp_path, "lcm@4", samples, protocol="p1")
    second = kept(tmp_path, "lcm@8", samples, **{"protocol": "p1", **changes})
    with pytest.raises(ValueError, match=said + r".*measure both rows by the same flags"):
        compare(first, second)


def test_what_is_not_there_is_named_with_what_to_do(pair):
    first, second = pair
    for path in pair:
        (path.parent.parent / "real-x.safetensors").rename(path.parent / "away")
    with pytest.raises(ValueError, match=r"real-x\.safetensors, real clips, is in neither row's folder"):
        compare(first, second)
    (second.parent / "away").rename(second.parent.parent / "real-x.safetensors")
    compare(first, second)  # one of them is enough
    write_row(replace(ROW, fingerprint="f9"), first)
    with pytest.raises(ValueError, match=r"lcm@4\.safetensors is of another row than lcm@4\.json; remove both"):
        compare(first, second)
    samples_path(second).unlink()
    with pytest.raises(ValueError, match=r"lcm@8\.json lacks lcm@8\.safetensors.*measure it again"):
        compare(second, first)
    with pytest.raises(ValueError, match=r"there is no row .*rows; give files that eval emoji wrote"):
        compare(second.parent, first)
