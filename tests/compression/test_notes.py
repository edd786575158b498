"""The notes of a search: what is kept, what belongs to which search, and the time that counts."""

import json
import os
from types import SimpleNamespace

import pytest

from micronet.compression import notes
from micronet.compression.bits import try_bits
from micronet.compression.costs import Deployment
from micronet.compression.goal import Goal
from micronet.compression.keys import open_notes
from micronet.compression.narrowing import Narrowing
from micronet.compression.notes import Notes
from micronet.compression.plan import Plan
from micronet.compression.point import Point
from micronet.compression.reports import Beating
from micronet.compression.workshop import Workshop
from micronet.core.progress import Silent
from micronet.errors import MicronetError
from micronet.stages.stage import find


def test_notes_are_kept_and_belong_to_one_search(tmp_path):
    Notes.open(tmp_path, "c")  # and nothing found: no reason to keep it
    found = Notes.open(tmp_path, "a")
    assert found.once("x", lambda: [1]) == [1]
    assert Notes.open(tmp_path, "a").once("x", lambda: [2]) == [1]
    with pytest.raises(MicronetError, match="a search with other settings"):
        Notes.open(tmp_path, "b")
    assert Notes.open(tmp_path, "b", force=True).once("x", lambda: [2]) == [2]
    assert Notes.open(tmp_path, "b", force=True).once("x", lambda: [3]) == [2]  # the same search goes on
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(MicronetError, match="a folder with other files"):
        Notes.open(tmp_path / "other", "a")
    (tmp_path / "search.json").write_text("{")
    with pytest.raises(MicronetError, match="is corrupted"):
        Notes.open(tmp_path, "b")


def test_another_goal_keeps_measurements_and_drops_decisions(tmp_path):
    found = Notes.open(tmp_path, "a", "30m")
    assert (found.once("candidate", lambda: 1), found.decide("time for it", lambda: False)) == (1, False)
    longer = Notes.open(tmp_path, "a", "60m")
    assert (longer.once("candidate", lambda: 2), longer.decide("time for it", lambda: True)) == (1, True)


@pytest.mark.parametrize(
    "damage",
    [
        {"found": []}, {"found": {"x": 1}}, {"found": {"x": {"value": 1, "seconds": 1}}}, {"lost": []},
        {"found": {"x": {"value": 1, "seconds": "1", "decided": False}}}, {"lost": {"x": -1e9}}, {"lost": {"x": None}},
    ],
    ids=str,
)  # fmt: skip
def test_damaged_notes_get_one_line(tmp_path, damage):
    path = tmp_path / "search.json"
    Notes.open(tmp_path, "a").once("x", lambda: 1)
    path.write_text(json.dumps({**json.loads(path.read_text()), **damage}))
    with pytest.raises(MicronetError, match="is corrupted; add --force"):
        Notes.open(tmp_path, "a")


class Clock:
    """The monotonic time, which passes when it is told to."""

    now = 1000.0

    def monotonic(self):
        return self.now


def test_what_fails_is_tried_again_and_its_time_counts(tmp_path, monkeypatch):
    """Killed or refused, and however old the files are."""
    clock = Clock()
    monkeypatch.setattr(notes, "time", clock)

    def ended(seconds, error):
        clock.now += seconds
        progress.step("training", 1, 2)
        clock.now += 1  # nothing shows it
        raise error

    for seconds, error, spent in ((50, KeyboardInterrupt, 50), (30, ValueError, 81)):
        found = Notes.open(tmp_path, "a")
        progress = Beating(Silent(), found)
        with pytest.raises(error):
            found.once("training", lambda: ended(seconds, error))  # noqa: B023
        os.utime(tmp_path / "search.json", (4e9, 4e9))
        clock.now += 7
        found = Notes.open(tmp_path, "a")
        assert found.seconds("training") == found.spent == spent
    assert found.once("training", lambda: 1) == 1
    assert found.seconds("training") == found.spent == 81


def test_the_time_of_decisions_for_another_goal_counts_once(tmp_path, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(notes, "time", clock)
    for goal, spent in (("30m", 9), ("60m", 18), ("30m", 27)):
        found = Notes.open(tmp_path, "a", goal)
        found.decide("layers timed", lambda: setattr(clock, "now", clock.now + 9))
        assert found.spent == spent
    found.settle()
    assert (found.spent, Notes.open(tmp_path, "a", "30m").spent, Notes.open(tmp_path, "a", "60m").spent) == (0, 0, 0)


def test_the_key_depends_on_files_of_tasks_and_not_on_what_is_asked_for(tmp_path):
    def key(recorded=None, **values):
        settings = {"artifact": tmp_path / "a.safetensors", "output": tmp_path / "out", **values}
        return open_notes(find("compress").configure(settings), Deployment("onnxruntime"), {"task": recorded}).key

    (tmp_path / "a.safetensors").touch()
    goals = ({}, {"target_size": 0.5}, {"target_macs": 0.5}, {"max_drop": 2.0}, {"no_training": True})
    assert len({key(**goal) for goal in goals}) == 1
    (tmp_path / "t.py").write_text("a = 1")
    task = f"{tmp_path / 't.py'}:Task"
    before = [key(task=task), key(recorded=task), key()]
    (tmp_path / "t.py").write_text("a = 2")
    after = [key(task=task), key(recorded=task), key()]
    assert [one == other for one, other in zip(before, after, strict=True)] == [False, False, True]


def test_only_a_budget_too_short_for_the_original_is_refused(tmp_path):
    """A search that has used its budget can be repeated."""
    given = (None, tmp_path, Notes.open(tmp_path, "a"), None, Deployment("onnxruntime"), Silent())
    workshop = Workshop(*given, budget=90.0, points=[Point("float", Plan(), minutes=1.0)])
    workshop.notes.found["others"] = {"value": 1, "seconds": 100.0, "decided": False}
    workshop.check_budget("90s")
    workshop.budget = 59.0
    with pytest.raises(MicronetError, match="to measure the original took 60 seconds"):
        workshop.check_budget("59s")


class Prediction:
    """Layers are timed as long as the budget lets them."""

    quantity, layers, table = "size", {}, SimpleNamespace(measure=list)

    def __call__(self, plan):
        return 1.0

    def fit(self, plan, measured):
        pass

    def prepare(self, plans):
        pass


def test_what_the_budget_cuts_short_is_a_decision(tmp_path):
    whole, found = Point("float", Plan(), size_bytes=1), Notes.open(tmp_path, "a")
    workshop = SimpleNamespace(
        points=[whole],
        notes=found,
        progress=Silent(),
        confirm=lambda *_: whole,
        attempt=lambda *_: True,
        deployment=Deployment("packed"),
    )
    try_bits(workshop, Prediction(), 0.01, dict)
    groups = SimpleNamespace(widths={0: 32}, multiples={0: 8}, uniform=lambda _: (16,), allows=lambda _: True)
    groups.plan_noise = lambda *_: 0.0
    Narrowing(workshop, Prediction(), groups, Goal("size", 0.01)).plans(Plan(), {})
    assert {"layers timed", "slow layers", "layers of uniform plans"} <= set(found.found)
    assert all(each["decided"] for each in found.found.values())
