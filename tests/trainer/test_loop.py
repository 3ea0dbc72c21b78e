"""The loop with an objective of one number, so that every step can be computed by hand."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlxft.config import Config, parse_config
from mlxft.errors import TrainingError
from mlxft.objectives.base import MicroBatch, Objective, Step, Terms
from mlxft.trainer.loop import Hooks, Loop, Progress, loop_state
from mlxft.trainer.optim import Optimizer


class Number(nn.Module):
    """One trainable number."""

    def __init__(self) -> None:
        super().__init__()
        self.w = mx.array(1.0)


@dataclass(frozen=True)
class Items:
    """(n,) items of a micro-batch."""

    t: mx.array


@dataclass
class Pull(Objective):
    """Loss of an item t is w t, so the gradient of a step is the mean of its items; a micro-batch has some items."""

    epoch: list[list[float]]
    valid: list[float] = field(default_factory=list)  # the losses that validations find, one after the other
    pulled: int = 0
    accumulate: int = 1

    def steps(self, model: nn.Module) -> Iterator[Step]:
        while True:
            at = self.pulled % len(self.epoch)
            chosen = range(at, min(at + self.accumulate, len(self.epoch)))
            self.pulled += len(chosen)
            batches = []
            for i in chosen:
                items = self.epoch[i]
                rows = tuple(f"x:{i}.{k}" for k in range(len(items)))
                batches.append(MicroBatch(Items(mx.array(items)), 2 * max(1, len(items)), len(items), rows))
            yield Step(batches, {"w": float(sum(b.trained_tokens for b in batches))}, chosen.stop == len(self.epoch))

    def loss(self, model: Number, data: Items) -> Terms:
        return Terms({"w": (model.w * data.t).sum()}, {"item": data.t.sum()})

    def valid_steps(self, model: nn.Module) -> Iterator[Step]:
        if self.valid:
            # The loss is w t / 1: choose t so that it is what the test asks for.
            yield Step([MicroBatch(Items(mx.array([self.valid.pop(0)]) / model.w), 1, 1)], {"w": 1.0})

    def steps_per_epoch(self, epoch: int = 0) -> int:
        return -(-sum(bool(b) for b in self.epoch) // self.accumulate)

    def state_dict(self) -> dict[str, Any]:
        return {"pulled": self.pulled}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.pulled = state["pulled"]


class Bench:
    """A loop over a Pull with plain gradient descent at rate 1, and what it told."""

    def __init__(self, objective: Pull, steps: int, progress: Progress | None = None, **run: Any) -> None:
        accumulate, lr, dtype = run.pop("accumulate", 1), run.pop("lr", 1.0), run.pop("dtype", mx.float32)
        config: Config = parse_config(
            {
                "model": {"path": "none"},
                "data": {"train": "none", "format": "text"},
                "batch": {"accumulate": accumulate},
                "optim": {"name": "sgd", "lr": lr, "schedule": "constant", "warmup": 0, "clip": None},
                "run": {"steps": steps, "report_every": 1, "save_every": 1000, **run},
            }
        )
        self.events: list[dict[str, Any]] = []
        self.saved: list[int] = []
        self.best: list[int] = []
        self.model = Number()
        self.model.set_dtype(dtype)
        hooks = Hooks(
            self.events.append,
            lambda p: self.saved.append(p.step),
            lambda p: self.best.append(p.step),
            lambda p: None,
        )
        optimizer = Optimizer(config.optim, self.model)
        objective.accumulate = accumulate
        self.loop = Loop(self.model, objective, optimizer, config, steps, progress or Progress(), hooks)

    def of(self, kind: str, key: str) -> list[Any]:
        return [e[key] for e in self.events if e["event"] == kind]


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
def test_gradients_of_many_micro_batches_add_up(dtype: mx.Dtype) -> None:
    """1,024 gradients of 1: a sum in bfloat16 would end at 256, and the mean at a quarter."""
    bench = Bench(Pull([[1.0]] * 1024), 1, accumulate=1024, dtype=dtype)
    bench.loop.run()
    assert bench.events[0]["grad_norm"] == 1.0
    assert bench.model.w.item() == 0.0


def test_a_step_divides_once_by_the_whole_weight():
    """Items 1, 2 and 6 in micro-batches of 2 and 1: the mean is 3 (the mean of means would be 3.75)."""
    bench = Bench(Pull([[1.0, 2.0], [6.0]]), steps=1, accumulate=2)
    assert bench.loop.run()
    assert bench.model.w.item() == pytest.approx(1 - 3)
    assert bench.of("train", "loss") == [pytest.approx(3.0)]
    assert bench.of("train", "item") == [pytest.approx(3.0)]
    assert bench.of("train", "grad_norm") == [pytest.approx(3.0)]
    assert (bench.of("train", "tokens"), bench.of("train", "trained_tokens")) == ([6], [3])


@dataclass
class TwoTerms(Pull):
    """Each item counts twice: as w t, over all items, and as w t^2 over all micro-batches."""

    def steps(self, model: nn.Module) -> Iterator[Step]:
        for step in super().steps(model):
            yield replace(step, per={**step.per, "square": float(len(step.micro_batches))})

    def loss(self, model: Number, data: Items) -> Terms:
        squares = data.t.square().sum()
        return Terms({"w": (model.w * data.t).sum(), "square": model.w * squares}, {"item": data.t.sum()})


def test_each_term_has_a_denominator_of_its_own():
    """Items 1, 2 and 6 in micro-batches of 2 and 1: 9 / 3 of the first term and 41 / 2 of the second."""
    bench = Bench(TwoTerms([[1.0, 2.0], [6.0]]), steps=1, accumulate=2)
    bench.loop.run()
    assert bench.model.w.item() == pytest.approx(1 - (3 + 20.5))
    assert bench.of("train", "loss") == [pytest.approx(3 + 20.5)]
    assert bench.of("train", "item") == [pytest.approx(3.0)]


def test_a_step_ends_with_its_epoch():
    """3 batches, accumulate 2: steps are (1, 2), (4), (1, 2), (4); nothing is dropped and none reaches over."""
    bench = Bench(Pull([[1.0], [2.0], [4.0]]), steps=4, accumulate=2)
    bench.loop.run()
    assert bench.of("train", "item") == [pytest.approx(x) for x in (1.5, 4.0, 1.5, 4.0)]
    assert bench.of("train", "epoch") == [0.5, 1.0, 1.5, 2.0]


def test_the_loop_never_takes_a_batch_too_early():
    """On-policy objectives roll out in `steps`: a step pulled ahead would come from older weights."""
    objective = Pull([[1.0]] * 5)
    seen = []
    bench = Bench(objective, steps=3)
    bench.loop.hooks.event = lambda e: seen.append((e["event"], e["step"], objective.pulled))
    bench.loop.run()
    assert [(step, pulled) for kind, step, pulled in seen if kind == "train"] == [(1, 1), (2, 2), (3, 3)]


def test_loss_is_reported_over_the_steps_since_the_last_report():
    """Reports at 2, 4 and, since it is the last, 5. The losses are w t with w = 1, 0, 0, 0, 0 and t = 1, 0, 0, ..."""
    bench = Bench(Pull([[1.0], [0.0], [0.0], [0.0], [0.0]]), steps=5, report_every=2)
    bench.loop.run()
    assert bench.of("train", "step") == [2, 4, 5]
    assert bench.of("train", "loss") == [pytest.approx(0.5), 0.0, 0.0]


def test_batches_with_nothing_to_train_are_skipped_and_counted():
    bench = Bench(Pull([[1.0], [], [3.0]]), steps=4)
    bench.loop.run()
    assert bench.of("train", "item") == [1.0, 3.0, 1.0, 3.0]
    assert [e.get("skipped_batches") for e in bench.events if e["event"] == "train"] == [None, 1, 1, 2]
    assert bench.model.w.item() == pytest.approx(1 - 8)


def test_skipped_batches_at_an_epochs_end_make_no_empty_step():
    """The second micro-batch of the epoch's last step is empty: the step has the first alone."""
    bench = Bench(Pull([[2.0], []]), steps=2, accumulate=2)
    bench.loop.run()
    assert bench.of("train", "item") == [2.0, 2.0]


def test_an_epoch_without_anything_to_train_is_an_error():
    with pytest.raises(TrainingError, match="no batch of a whole epoch has anything to train"):
        Bench(Pull([[], []]), steps=1).loop.run()


@pytest.mark.parametrize("report_every", [1, 10])
def test_a_loss_that_is_no_number_stops_with_step_rows_and_advice(report_every: int):
    bench = Bench(Pull([[1.0], [float("nan"), 1.0], [1.0]]), steps=3, report_every=report_every, save_every=2)
    with pytest.raises(TrainingError, match=r"step 2: the loss is nan\. Rows: x:1\.0, x:1\.1\. What was .*optim\.lr"):
        bench.loop.run()
    assert bench.saved == []


def test_many_rows_are_not_all_listed():
    bench = Bench(Pull([[float("inf")] * 11]), steps=1)
    with pytest.raises(TrainingError, match=r"x:0\.7 and 3 more\."):
        bench.loop.run()


def test_infinite_weights_are_never_saved():
    """The first step's loss is finite, its update is not: that checkpoint would be the only one, and useless."""
    bench = Bench(Pull([[1e18]]), steps=3, save_every=1, lr=1e30)
    with pytest.raises(TrainingError, match="step 1: the update made weights infinite or NaN"):
        bench.loop.run()
    assert bench.saved == []


def test_checkpoints_come_as_asked_and_at_the_end():
    bench = Bench(Pull([[0.0]] * 3), steps=7, save_every=3)
    bench.loop.run()
    assert bench.saved == [3, 6, 7]


def test_validation_comes_once_an_epoch_and_at_the_end():
    bench = Bench(Pull([[0.0]] * 3, valid=[5.0, 4.0, 4.5]), steps=7)
    bench.loop.run()
    assert bench.of("eval", "step") == [3, 6, 7]
    assert bench.of("eval", "loss") == [pytest.approx(x) for x in (5.0, 4.0, 4.5)]
    assert bench.best == [3, 6]
    assert (bench.loop.progress.best_step, bench.loop.progress.best_loss) == (6, pytest.approx(4.0))


def test_validation_as_asked():
    bench = Bench(Pull([[0.0]] * 3, valid=[5.0] * 9), steps=7, eval_every=2)
    bench.loop.run()
    assert bench.of("eval", "step") == [2, 4, 6, 7]


def test_patience_counts_validations_without_a_better_loss():
    """Best at 2; 3 and 4 are no better: with patience 2 the run ends at 4, and saves."""
    bench = Bench(Pull([[0.0]] * 9, valid=[5.0, 4.0, 4.0, 4.5, 1.0]), steps=9, eval_every=1, patience=2, report_every=3)
    assert bench.loop.run()
    assert bench.loop.progress.step == 4
    assert bench.loop.progress.stopped_early
    assert bench.saved == [4]
    assert bench.of("train", "step") == [3, 4]


def test_a_validation_loss_that_is_no_number_is_never_the_best():
    bench = Bench(Pull([[0.0]] * 9, valid=[float("nan"), 4.0, float("nan")]), steps=3, eval_every=1)
    bench.loop.run()
    assert bench.best == [2]
    assert bench.of("eval", "best") == [False, True, False]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_its_step_with_a_checkpoint(signum: signal.Signals):
    bench = Bench(Pull([[0.0]] * 3), steps=9)
    before = signal.getsignal(signum)

    def event(e: dict[str, Any]) -> None:
        if e["event"] == "train" and e["step"] == 4:
            os.kill(os.getpid(), signum)

    bench.loop.hooks.event = event
    assert not bench.loop.run()
    assert bench.saved == [4]
    assert signal.getsignal(signum) is before


def test_a_second_signal_ends_it_at_once():
    bench = Bench(Pull([[0.0]] * 3), steps=9)

    def event(e: dict[str, Any]) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    bench.loop.hooks.event = event
    with pytest.raises(KeyboardInterrupt):
        bench.loop.run()
    assert bench.saved == []


def test_the_state_of_a_loop_is_json_and_goes_on_in_the_same_window():
    """Stopped at 3 of a window of 4 steps: the report at 4 is what it would have been."""
    epoch = [[1.0, 2.0], [0.5], [3.0], [-1.0], [0.25]]
    whole = Bench(Pull(epoch), steps=8, report_every=4)
    whole.loop.run()

    first = Bench(Pull(epoch), steps=8, report_every=4, save_every=3)
    kept: dict[str, Any] = {}

    def checkpoint(p: Progress) -> None:
        kept.update(json.loads(json.dumps(loop_state(first.loop))), w=first.model.w)
        raise KeyboardInterrupt

    first.loop.hooks.checkpoint = checkpoint
    with pytest.raises(KeyboardInterrupt):
        first.loop.run()
    second = Bench(Pull(epoch), steps=8, progress=Progress(**kept["progress"]), report_every=4)
    second.loop.objective.load_state_dict(kept["objective"])
    second.model.w = kept["w"]
    second.loop.run()
    keys = ("step", "epoch", "loss", "item", "lr", "grad_norm", "tokens", "trained_tokens")
    assert [[e[k] for k in keys] for e in second.events] == [[e[k] for k in keys] for e in whole.events]
