"""Shared by the tests of the native server: the broker's warning that it keeps everything in memory is no news here."""

from __future__ import annotations

import logging

import pytest


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, "pybroker.broker")
