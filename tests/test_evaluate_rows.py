"""Rows go to a batch and come back as the files that were asked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from animatelcm.evaluate.rows import give_names, write_rows
from animatelcm.evaluate.ucf101 import prompts

SMALL = {"num_frames": 2, "height": 64, "width": 64}
ROWS = [
    {"file": 'a "caf\u00e9"\u2028, $5-0.mp4', "prompt": 'a "caf\u00e9"\u2028, $5', "seed": 3, **SMALL},
    {"file": "a fox-0.mp4", "prompt": "a fox", "seed": 2**60, **SMALL},
    {"file": "a fox-1.mp4", "prompt": "a fox", "seed": 5, **SMALL},
]


def batch(folder: Path, rows=ROWS, suffix: str = ".mp4", **changes) -> Path:
    """What a batch leaves: numbered files, and a manifest whose newest line of a row holds."""
    folder.mkdir()
    lines = [{"row": 1, "prompt": rows[1]["prompt"], "error": "it failed at first"}]
    for number, row in enumerate(rows):
        file = f"{number:06}{suffix}"
        (folder / file).write_text(row["prompt"])
        lines.append({"row": number, "file": file, "prompt": row["prompt"], "seed": row["seed"], **changes})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "manifest.jsonl").write_text(text + '{"row": 0, "fi')
    return folder


def test_a_batch_reads_what_was_written(tmp_path):
    from animatelcm.batch import read_rows

    for rows in (ROWS, prompts(150, settings=SMALL)):
        write_rows(rows, tmp_path / "new" / "rows.jsonl")
        read = read_rows(tmp_path / "new" / "rows.jsonl")
        assert not [row.error for row in read if row.error]
        assert [(row.prompt, row.request.seed) for row in read] == [(row["prompt"], row["seed"]) for row in rows]
        assert all(row.request.shape == (2, 64, 64) for row in read)


def test_videos_get_the_names_that_were_asked_for(tmp_path):
    made, out = batch(tmp_path / "made"), tmp_path / "named"
    for _ in range(2):
        assert give_names(ROWS, made, out) == []
        assert {path.name: path.read_text() for path in out.iterdir()} == {row["file"]: row["prompt"] for row in ROWS}


def test_what_was_not_made_comes_back(tmp_path):
    made = batch(tmp_path / "made")
    (made / "000002.mp4").unlink()
    more = [*ROWS, {"file": "a cat-0.mp4", "prompt": "a cat", "seed": 9}]
    assert give_names(more, made, tmp_path / "named") == ["a fox-1.mp4", "a cat-0.mp4"]
    assert len(list((tmp_path / "named").iterdir())) == 2


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seed": 8}, "row 0 .* other prompts or seeds"),
        ({"prompt": "a dog"}, "row 0 .* other prompts or seeds"),
        ({"suffix": ".webp"}, "make the batch as .mp4"),
    ],
)
def test_another_batch_is_refused(tmp_path, changes, said):
    with pytest.raises(ValueError, match=said):
        give_names(ROWS, batch(tmp_path / "made", **changes), tmp_path / "named")
    with pytest.raises(ValueError, match=r"there is no .*manifest\.jsonl; give the folder"):
        give_names(ROWS, tmp_path, tmp_path / "named")
