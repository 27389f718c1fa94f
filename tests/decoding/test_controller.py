"""The controller against made-up machines: it finds the cheaper loop, none when drafts do not pay, and finds back."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.decoding.controller import FEW_ROWS, FIRST_PATIENCE, FREE_TOKENS, MAX_PATIENCE, Controller, Cost, Pace

MAX_DRAFTS = 8


@dataclass
class Machine:
    """Rows whose drafts hold with chance `luck` each, and steps whose time depends on their tokens."""

    num_rows: int
    luck: float
    knee: float = 300.0  # tokens at which a step costs twice what one token costs
    wait: float = 0.2  # what a loop that cannot run ahead loses, as a share of the smallest step
    hiccups: float = 0.0
    rng: random.Random = field(default_factory=lambda: random.Random(0))
    seconds: float = 0.0
    num_tokens: int = 0
    num_drafts: int = 0
    num_drafting_steps: int = 0

    def run(self, controller: Controller, num_steps: int) -> None:
        for _ in range(num_steps):
            is_on = controller.is_on(self.num_rows)
            wanted = [controller.num_drafts(row, self.num_rows) if is_on else 0 for row in range(self.num_rows)]
            assert all(0 <= num <= MAX_DRAFTS for num in wanted)
            gained = []
            for row, num in enumerate(wanted):
                held = 0
                while held < num and self.rng.random() < self.luck:
                    held += 1
                gained.append(1 + held)
                if num:
                    controller.note_row(row, num, held)
            seconds = self.cost(self.num_rows + sum(wanted), is_on)
            controller.note_step(self.num_rows, sum(gained), seconds, is_on)
            self.seconds += seconds
            self.num_tokens += sum(gained)
            self.num_drafts += sum(wanted)
            self.num_drafting_steps += is_on

    def cost(self, num_tokens: int, is_on: bool) -> float:
        seconds = 1 + num_tokens / self.knee + self.wait * is_on
        return seconds * (50 if self.rng.random() < self.hiccups else 1)

    @property
    def speed_over_plain(self) -> float:
        return self.num_tokens / self.seconds * self.cost(self.num_rows, False) / self.num_rows


@pytest.mark.parametrize("num_rows", [1, 4, 16, 64, 256])
@pytest.mark.parametrize("luck", [0.0, 0.1])
def test_drafts_that_do_not_hold_cost_little(num_rows: int, luck: float) -> None:
    machine = Machine(num_rows, luck)
    machine.run(Controller(MAX_DRAFTS), 512)
    assert machine.speed_over_plain >= 0.97


def test_a_trial_that_clearly_loses_takes_one_step_after_a_while_of_plain_ones() -> None:
    machine, controller = Machine(64, luck=0.3, knee=64.0), Controller(MAX_DRAFTS)
    machine.run(controller, FIRST_PATIENCE)
    assert machine.num_drafting_steps == 0
    machine.run(controller, 3 * FIRST_PATIENCE)
    assert machine.num_drafting_steps == 1
    assert machine.speed_over_plain >= 0.97


@pytest.mark.parametrize("num_rows", [1, 4, 16, 64])
def test_drafts_that_hold_are_kept(num_rows: int) -> None:
    machine = Machine(num_rows, luck=0.9, knee=3000.0)
    machine.run(Controller(MAX_DRAFTS), 512)
    assert machine.speed_over_plain >= 2.5


def test_the_same_drafts_pay_for_one_row_and_not_for_many() -> None:
    shares = []
    for num_rows in (1, 256):
        machine = Machine(num_rows, luck=0.6, knee=200.0)
        machine.run(Controller(MAX_DRAFTS), 1000)
        shares.append(machine.num_drafting_steps / 1000)
    assert shares[0] > 0.9 and shares[1] < 0.1


def test_a_new_text_has_another_chance_where_few_rows_are() -> None:
    controller = Controller(MAX_DRAFTS)
    for num_rows in (1, FEW_ROWS, 64):
        Machine(num_rows, luck=0.0).run(controller, 700)
    assert not any(map(controller.is_on, (1, FEW_ROWS, 64)))
    controller.forget(0)
    assert [controller.is_on(num_rows) for num_rows in (1, FEW_ROWS, 64)] == [True, True, False]


def test_they_fall_to_zero_and_come_back() -> None:
    controller = Controller(MAX_DRAFTS)
    machine = Machine(num_rows=16, luck=0.9, knee=1000.0)
    machine.run(controller, 200)
    assert controller.is_on(16)
    machine.luck, machine.num_drafts = 0.0, 0
    machine.run(controller, 200)
    assert not controller.is_on(16) and machine.num_drafts < 16 * 2 * MAX_DRAFTS
    machine.luck = 0.9
    machine.run(controller, 2 * MAX_PATIENCE)
    assert controller.is_on(16)


def test_sizes_of_the_batch_are_judged_apart() -> None:
    controller = Controller(MAX_DRAFTS)
    Machine(num_rows=64, luck=0.0).run(controller, 100)
    Machine(num_rows=1, luck=0.9).run(controller, 100)
    assert controller.is_on(1) and not controller.is_on(64)


def test_hiccups_of_the_machine_do_not_decide() -> None:
    controller, machine = Controller(MAX_DRAFTS), Machine(num_rows=4, luck=0.9, knee=3000.0, hiccups=0.02)
    machine.run(controller, 2000)
    assert machine.num_drafting_steps > 0.8 * 2000


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 256), st.floats(0, 1), st.floats(50, 5000), st.floats(0, 0.5), st.integers(0, 2**32))
def test_never_much_worse_than_plain(num_rows: int, luck: float, knee: float, wait: float, seed: int) -> None:
    machine = Machine(num_rows, luck, knee, wait, rng=random.Random(seed))
    machine.run(Controller(MAX_DRAFTS), 512)
    assert machine.speed_over_plain >= 0.9


def test_a_cost_leaves_the_slowest_step_out() -> None:
    cost = Cost()
    assert cost.per_token == float("inf")
    for seconds in (2.0, 90.0, 4.0):
        cost.note(seconds, 2.0)
    assert cost.per_token == 1.5


def test_a_few_tokens_are_free() -> None:
    controller = Controller(7)
    for _ in range(5):
        controller.note_row(1, 7, 0)
    assert controller.num_drafts(1, 2) == 7 and 2 * 8 <= FREE_TOKENS
    assert controller.num_drafts(1, 3) == 0


def test_a_pace_follows_what_holds() -> None:
    pace = Pace(8)
    assert pace.next() == 8
    pace.note(8, 2)
    assert pace.next() == 3
    pace.note(3, 3)
    assert pace.next() == 6
    pace.note(6, 0)
    assert pace.next() == 1
    pauses = []
    for _ in range(8):
        pace.note(1, 0)
        pauses.append(0)
        while pace.next() == 0:
            pauses[-1] += 1
    assert pauses == [1, 2, 4, 8, 16, 32, 32, 32]
    pace.note(1, 1)
    assert pace.next() == 2
