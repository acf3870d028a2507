"""Material for tiny runs of the main job."""

from __future__ import annotations

from pathlib import Path

import pytest

from tune_runs import write_decoder, write_encoder, write_reviews


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny encoder."""
    return write_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="session")
def causal_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny decoder."""
    return write_decoder(tmp_path_factory.mktemp("decoder"))


@pytest.fixture(scope="session")
def reviews_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty labelled rows that no test changes."""
    return write_reviews(tmp_path_factory.mktemp("reviews") / "reviews.csv")


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    """Forty labelled rows of a test's own."""
    return write_reviews(tmp_path / "reviews.csv")


@pytest.fixture(autouse=True)
def no_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing a report takes longer than a tiny run; the command line's tests draw it, and so does ``finished``, which is made before this."""
    monkeypatch.setattr("partwise.report.write_report", lambda run, describe: run / "report.html")
