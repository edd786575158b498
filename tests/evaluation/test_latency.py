"""Latencies are those of the calls."""

import time

import numpy as np

from micronet.evaluation.latency import time_calls


def test_time_in_which_other_work_runs_does_not_count_in_one_thread():
    def interrupted(_):
        time.sleep(0.005)

    given = np.zeros(1, np.float32)
    [alone], [whole] = (time_calls([interrupted], [given], 0.02, one_thread=each) for each in (True, False))
    assert float(np.median(alone)) < 0.0025
    assert min(whole) >= 0.005
