"""Trainings are many here, and a few tests look at their loss curves."""

import pytest

from gspn_dit.training import record


@pytest.fixture
def loss_curves():
    """loss.png is drawn, as it always is outside of the tests."""


@pytest.fixture(autouse=True)
def curves_are_notes(request, monkeypatch):
    """Without `loss_curves`, what is to be drawn is written down as text: drawing takes a third of a tiny run."""
    if "loss_curves" not in request.fixturenames:
        monkeypatch.setattr(record, "draw_loss", lambda rows, name, path: path.write_text(f"{name}: {rows}"))
