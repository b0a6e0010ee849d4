"""Three random faults on a run under Ray change nothing, through to the answers of its bundle."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from tools import soak


def test_every_kind_of_fault_is_drawn_as_often_as_the_others():
    drawn = soak.deck(20, random.Random(3))
    counts = Counter(drawn)
    assert len(counts) == 9 and set(counts.values()) == {2, 3} and drawn == soak.deck(20, random.Random(3))


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_three_faults_change_nothing(tmp_path, monkeypatch):
    # The faults of this seed: a rank is killed, the driver gets SIGTERM, the raylet is killed in the final evaluation.
    monkeypatch.setenv("RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", "12")
    figures = soak.soak(tmp_path, kills=3, seed=633, workers=2, epochs=3)
    assert figures["survived"] == 3 and figures["exact"] and figures["most_steps_repeated"] <= soak.INTERVAL
    assert set(figures["faults"]) == {"worker SIGKILL", "driver SIGTERM", "raylet SIGKILL"}
