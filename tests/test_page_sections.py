"""What is found in folders of results, and what is refused."""

from __future__ import annotations

import pytest

from animatelcm.page import document


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("nothing.txt", "", "holds nothing to show"),
        ("rows/lcm@4.json", "{", "holds no row of figures"),
        ("report.json", "[]", "where an object is needed"),
        ("report.json", '{"rows": [{"x": 1}]}', "other rows than figures"),
        ("report.json", '{"paired": [{"figures": {"n": 3}, "first": {}, "second": {}}]}', "without values"),
        ("report.json", '{"paired": [{"figures": {"n": {"value": 1}}, "first": {}, "second": {}}]}', "without values"),
        ("report.json", '{"paired": [{"figures": {}}]}', "without values"),
        ("scores.json", "<html>", "cannot read .*scores.json"),
        ("scores.json", '[{"value": 1}]', "each have a 'metric'"),
        ("claims.json", '{"rows": {}}', "each have a 'claim'"),
    ],
)
def test_bad_input_is_one_sentence(name, text, said, tmp_path):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=said) as caught:
        document.write(tmp_path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "index.html").exists()
