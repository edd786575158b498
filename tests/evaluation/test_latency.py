"""Latencies are those of the calls."""

import time

import numpy as np

from micronet.evaluation import latency
from micronet.evaluation.latency import time_calls


def test_time_in_which_other_work_runs_does_not_count_in_one_thread():
    def interrupted(_):
        time.sleep(0.005)

    given = np.zeros(1, np.float32)
    [alone], [whole] = (time_calls([interrupted], [given], 0.02, one_thread=each) for each in (True, False))
    assert float(np.median(alone)) < 0.0025
    assert min(whole) >= 0.005


def test_no_network_pays_for_the_caches_of_the_one_before(monkeypatch):
    """Every timed call follows one of the same network that is not timed, and no network is always the next."""
    monkeypatch.setattr(latency, "WARM_UP_SECONDS", 0)
    called, timed, given = [], [], np.zeros(1, np.float32)
    monkeypatch.setattr(latency, "time_call", lambda run, _, **options: timed.append(len(called)) or run(given) or 1e-3)
    time_calls([lambda _, name=name: called.append(name) for name in "abc"], [given] * 3, 0.002)
    assert len(timed) >= 15 and all(called[at - 1] == called[at] for at in timed)
    turns = [called[at] for at in timed]
    assert {turns[at - 1] for at in range(1, len(turns)) if turns[at] == "b"} >= {"a", "c"}
