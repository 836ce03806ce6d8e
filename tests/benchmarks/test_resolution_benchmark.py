"""benchmarks/resolution.py: what becomes of its cases, without measuring any."""

import pytest

from benchmarks import resolution
from benchmarks.resolution import CaseFailed, Options, main


def test_a_case_that_fails_is_named_and_tried_again_and_the_others_are_kept(tmp_path, monkeypatch, capsys):
    asked = []

    def run_case(case, seconds):
        asked.append(case.model)
        if case.model == "DiT" and len(asked) <= 6:
            raise CaseFailed("no engine")
        return {"seconds": 1e-3 * case.pixels / 64, "bytes": 10**6, "whole": True}

    monkeypatch.setattr(resolution, "run_case", run_case)
    monkeypatch.setattr(resolution, "plot", lambda results, path: path.touch())
    options = Options(pixels=[256, 64], dtypes=["float32"], out=str(tmp_path / "table"))
    with pytest.raises(SystemExit, match="4 cases failed: DiT, forward, 256 px"):
        main(options)
    assert "no engine" in capsys.readouterr().out
    before = len(asked)
    main(options)
    assert set(asked[before:]) == {"DiT"}
    sizes = [row.split("|")[2].strip() for row in (tmp_path / "table.md").read_text().splitlines() if "px |" in row]
    assert sizes == ["64 px", "256 px"] * 2
