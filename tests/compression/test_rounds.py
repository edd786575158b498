"""Training in rounds: the better half goes on, and nothing begins that does not fit the budget."""

import pytest

from micronet.compression.goal import Goal
from micronet.compression.notes import Notes
from micronet.compression.plan import Plan
from micronet.compression.point import Point
from micronet.compression.rounds import MOST_EPOCHS, Rounds
from micronet.compression.workshop import Workshop as RealWorkshop
from micronet.core.progress import Silent

SAMPLES = 50_000
FIXED, EPOCH = 10.0, 5.0  # seconds of a candidate besides its training, and of an epoch


class Workshop:
    """Makes candidates at once, and notes the seconds that they would take; the drop is halved with every epoch."""

    def __init__(self, path, drops, budget):
        self.budget, self.left_out = budget, []
        self.notes, self.progress, self.drops = Notes(path / "search.json", ""), Silent(), drops
        self.points = [Point("float", Plan()), Point("int8", Plan(bits=8), minutes=FIXED / 60)]

    has_time, is_made = RealWorkshop.has_time, RealWorkshop.is_made

    @property
    def remaining(self):
        return self.budget - self.notes.spent

    def confirm(self, name, plan):
        seconds = FIXED + EPOCH * plan.epochs[-1]
        self.notes.found[name] = {"value": 0, "seconds": seconds, "decided": False}
        drop = self.drops[plan.widths] / 2 ** sum(plan.epochs)
        self.points.append(Point(name, plan, drop, minutes=seconds / 60))
        return self.points[-1]


def run(path, drops, budget):
    """Return the rounds, and the widths and epochs of what was trained."""
    plans = [(f"candidate {widths[0]}", Plan(widths=widths, bits=8)) for widths in drops]
    rounds = Rounds(Workshop(path, drops, budget), EPOCH, Goal("size", 0.01), SAMPLES)
    rounds.run(plans)
    return rounds, [(point.plan.widths[0], point.plan.epochs) for point in rounds.workshop.points[2:]]


def test_the_half_that_is_closest_to_the_drop_goes_on(tmp_path):
    _, trained = run(tmp_path, {(4,): 0.0, (3,): 0.05, (2,): 0.3, (1,): 0.9}, budget=1e4)
    first, second, third = MOST_EPOCHS
    assert trained[:4] == [(4, (first,)), (3, (first,)), (2, (first,)), (1, (first,))]
    assert trained[4:6] == [(3, (first, second)), (2, (first, second))]  # at 0.0125 and 0.075; 4 is there already
    assert trained[6:] == [(2, (first, second, third))]


@pytest.mark.parametrize(("error", "rounds"), [(0.09, 2), (0.11, 3)], ids=["surely", "perhaps"])
def test_what_gets_worse_trains_no_further(tmp_path, error, rounds):
    """As on small data, where each further epoch fits the training samples alone."""
    workshop, made = Workshop(tmp_path, {}, 1e4), []

    def confirm(name, plan):
        made.append(Point(name, plan, 0.1 * len(plan.epochs), drop_error=error))
        return made[-1]

    workshop.confirm = confirm
    Rounds(workshop, EPOCH, Goal("size", 0.01), SAMPLES).run([("a", Plan(widths=(1,)))])
    assert len(made) == rounds


def test_with_a_target_only_what_meets_it_trains_on(tmp_path):
    """However large its drop still is: what misses the target cannot be chosen."""
    workshop = Workshop(tmp_path, {}, 0)
    workshop.points[0] = Point("float", Plan(), size_bytes=100)
    rounds = Rounds(workshop, EPOCH, Goal("size", 0.01, target=0.5), SAMPLES)
    large, small, smaller = (Point("", Plan(), drop, size_bytes=size) for drop, size in ((0, 60), (0.2, 50), (0.3, 40)))
    assert sorted([smaller, large, small], key=rounds._rank) == [small, smaller, large]


@pytest.mark.parametrize("budget", [0, 14, 15, 31, 60, 100, 200, 1000])
def test_nothing_begins_that_does_not_fit(tmp_path, budget):
    rounds, trained = run(tmp_path, {(3,): 0.1, (2,): 0.3, (1,): 0.9}, budget)
    assert rounds.workshop.notes.spent <= budget
    assert bool(trained) == (budget >= FIXED + EPOCH)
    missing = 3 - len({widths for widths, _ in trained})
    assert bool(missing) == any(
        "no time to train" in line and "longer" not in line for line in rounds.workshop.left_out
    )


def test_small_data_get_more_epochs_and_few_seconds_fewer_candidates(tmp_path):
    """Rather than a few steps each; how long, the time decides only where it is short."""
    workshop = Workshop(tmp_path, {}, 1e4)
    small = Rounds(workshop, EPOCH, Goal("size", 0.01), samples=500)
    assert small._share(4, 6) == (4, 6)
    workshop.budget = 150.0  # half of it: three candidates of 10 + 2 * 5 seconds
    assert small._share(4, 6) == (3, 3)
    workshop.budget = 31.0
    assert small._share(4, 6) == (1, 1)


def test_the_first_training_shows_how_long_an_epoch_takes(tmp_path):
    rounds, _ = run(tmp_path, {(2,): 0.3}, budget=1e4)
    rounds.epoch = 1e-3
    rounds._train("candidate 2", Plan(widths=(2,), bits=8), 2)
    assert rounds.epoch == pytest.approx(EPOCH)


def test_between_candidates_the_same_training_is_given_and_its_own_time_asked_for(tmp_path):
    """Bisection compares networks: all must be trained alike, bits too, and a rehearsal's time is not theirs."""
    workshop = Workshop(tmp_path, {(3,): 0.1, (2,): 0.5, (1,): 0.5}, budget=1e4)
    workshop.confirm("wide", Plan((3,), bits=8, epochs=(1, 2), trained_bits=True))
    workshop.confirm("narrow", Plan((1,), bits=8, epochs=(1,), trained_bits=True))
    workshop.notes.decide("time for middle", lambda: False)
    following = iter([("middle", Plan((2,), bits=8)), None])
    Rounds(workshop, EPOCH, Goal("size", 0.01), SAMPLES).refine(lambda: next(following))
    assert workshop.points[-1].name == "middle, 1+2 epochs"
    assert workshop.points[-1].plan == Plan((2,), bits=8, epochs=(1, 2), trained_bits=True)
