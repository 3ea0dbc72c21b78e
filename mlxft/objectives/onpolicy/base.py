"""What on-policy objectives share: prompts, rollouts with the newest weights, their scores, minibatches, evaluation.

`batches` is a generator that the loop pulls: it samples and scores a rollout, and then yields its minibatches, each a
step, for some epochs. All that frozen roles say of a completion is in its batch, computed when it was sampled.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Generic, TypeVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from mlxft.config import Config
from mlxft.data.dataset import fingerprint
from mlxft.data.encode import Encoded, turn_end
from mlxft.data.formats import tools_of
from mlxft.data.splits import load_splits
from mlxft.data.thoughts import decode_completion, opening_after, until_stop
from mlxft.errors import ConfigError, TrainingError
from mlxft.model.batch_sample import sample_batch
from mlxft.model.cpu import as_trained
from mlxft.model.logits import Split
from mlxft.model.logprobs import Draw, ahead, rows_logprobs, rows_logprobs_entropy
from mlxft.model.random import probing
from mlxft.model.roles import Roles
from mlxft.model.sample import Sampling, never_drawn
from mlxft.model.source import trusting
from mlxft.objectives.base import Batch, LossSum, Summary
from mlxft.objectives.onpolicy.draw import Drawn
from mlxft.objectives.onpolicy.held_out import HeldOut
from mlxft.objectives.onpolicy.prompts import NO_DROPOUT, Method, check_kl, check_recipe, encode_prompts
from mlxft.objectives.onpolicy.rewards import Item, Rewards, Scores
from mlxft.objectives.onpolicy.rolled import RolloutSettings
from mlxft.objectives.onpolicy.rollout import EncodedPrompt, Rollout, micro_batches, minibatches
from mlxft.objectives.onpolicy.settings import RewardsSettings
from mlxft.objectives.pairs import Answer, stack

M = TypeVar("M", bound=Method)
FAR = "approx_kl_k3"  # metric of a token: KL from the policy that sampled, never below 0 (k3); approx_kl is k1
_IDLE = 8  # rollouts with nothing to train on, one after the other, that are at least put up with


class OnPolicy(Generic[M]):
    """An objective over completions of its own. A subclass says what the tokens' advantages are, and the loss.

    Args:
        section: the method's own settings.
    Raises:
        ConfigError, DataError: settings or rows do not fit.
    """

    traceable = False  # PPO's loss asks what a batch trains; and hardly two batches of completions have one shape
    compiled = False
    grouped = False  # whether completions are compared with others of their prompt

    def __init__(self, config: Config, tokenizer: Any, section: type[M]) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.settings = config.section(config.objective, section)
        self.rollouts = config.section("rollout", RolloutSettings)
        self.notes = check_recipe(config, self.rollouts, self.grouped)
        self.rewards = Rewards(config.section("rewards", RewardsSettings), tokenizer)
        train, valid, said = load_splits(config.data, config.run.seed, tokenizer=tokenizer, reads=self.rewards.columns)
        self.notes += said
        self._data = fingerprint(train, valid)
        self.prompts, self.valid = encode_prompts(train, valid, config, tokenizer, self.notes)
        self.rewards.check_rows([(p.where, p.row) for p in (*self.prompts, *self.valid)])
        s = self.rollouts
        filters = s.top_p, s.top_k, s.min_p
        self.sampling = Sampling(s.max_tokens, s.temperature, *filters, tuple(s.stop), s.stop_at_eos, True)
        self.how = Draw(s.temperature, never_drawn(tokenizer, self.sampling))
        self.kl_coef: float = self.settings.kl_coef
        self._number, self._step = 0, 0  # of the rollout, and its next step
        self._rollout: Rollout | None = None
        # KL from the policy that sampled, over the pass at hand: sum and weight, and those of steps not looked at yet.
        self._apart = [0.0, 0.0]
        self._unread: list[tuple[mx.array, mx.array]] = []
        self._held_out = HeldOut(self)
        self._model: nn.Module | None = None

    # Roles

    def prepare(self, model: nn.Module, base: str = "") -> None:
        """Take note of the policy as it is: the reference, where anything asks it."""
        self._model = model
        self.split = Split(model)
        self.roles = Roles(model, adopt="policy")
        moved = self.config.tune.method == "full" or self.config.model.adapter is not None
        self.reference = "reference" if moved else None  # a fresh adapter's reference is the bare base
        self.has_reference = self.settings.refers or not moved
        if moved and self.settings.refers:
            self.roles.copy("policy", "reference")
        with trusting(self.config.model.trust_remote_code):
            self.rewards.prepare(self.roles, self.split, base, self.config.model.path)
        replaced = sorted(self.roles["policy"].whole) if self.config.model.adapter is not None else []
        if self.rewards.role is not None and replaced:
            seen = f"rewards.adapter: reads the base, of which model.adapter has replaced {replaced[0]}"
            raise ConfigError(f"{seen}; fuse model.adapter and train from the folder")
        layers = [layer for role in self.roles.names for layer in self.roles[role].layers.values()]
        self.notes += NO_DROPOUT.take_out(model, *layers)

    def parts(self) -> dict[str, float]:
        return {}

    # Data

    @property
    def _per_pass(self) -> int:
        """Rollouts that go once over the prompts."""
        return -(-len(self.prompts) // self.rollouts.prompts)

    def _chosen(self, number: int) -> list[int]:
        """The prompts of a rollout."""
        turn, at = divmod(number, self._per_pass)
        order = np.random.default_rng([self.config.run.seed, 1, turn]).permutation(len(self.prompts))
        return order[at * self.rollouts.prompts : (at + 1) * self.rollouts.prompts].tolist()

    def seed_of(self, number: int, turn: int = 0, valid: bool = False) -> int:
        return int(np.random.default_rng([self.config.run.seed, 3 + valid, number, turn]).integers(1 << 32))

    def cut(self, rows: Sequence[int], lengths: Any) -> list[list[int]]:
        most = self.config.batch.rows
        return micro_batches(rows, lengths, tokens=None if most else self.config.batch.budget, most=most)

    def _steps(self, rollout: Rollout, lengths: Any) -> list[list[list[int]]]:
        """The micro-batches of each step; none where nothing of the rollout is trained on."""
        found = []
        kept = self.kept(rollout)
        for epoch in range(self.settings.epochs if kept else 0):
            drawn = {"seed": self.config.run.seed, "rollout": rollout.number, "epoch": epoch}
            parts = minibatches(len(kept), self.settings.minibatches, **drawn)
            found += [self.cut([kept[i] for i in part], lengths) for part in parts]
        return found

    def kept(self, rollout: Rollout) -> list[int]:
        """The completions that are trained on, by what is known once they are scored."""
        return list(range(len(rollout)))

    def why_idle(self, rollouts: int) -> str:
        """What to say where nothing was kept of so many rollouts."""
        return f"nothing of {rollouts} rollouts is trained on"

    def _arrays(self, rollout: Rollout, rows: Sequence[int], prompts: Sequence[EncodedPrompt]) -> dict[str, mx.array]:
        """ids, positions, labels and last of some completions."""
        arrays = stack([Answer(prompts[rollout.prompts[i]].ids, rollout.replies[i]) for i in rows])
        return {name: arrays[name] for name in ("ids", "positions", "labels", "last")}

    # Rollouts

    def sample(
        self, prompts: Sequence[EncodedPrompt], chosen: list[int], samples: int, number: int, seed: int
    ) -> Rollout:
        """Completions of some prompts by the role that is active."""
        assert self._model is not None
        asked = [prompts[i].ids.tolist() for i in chosen]
        found = sample_batch(
            self._model, self.tokenizer, asked, self.sampling, samples=samples, seed=seed, rows=self.rollouts.rows
        )
        answers = [answer for of_one in found for answer in of_one]
        return Rollout(
            number,
            [i for i in chosen for _ in range(samples)],
            [np.array(answer.ids, dtype=np.int32) for answer in answers],
            [answer.finish != "length" for answer in answers],
        )

    def score(self, rollout: Rollout, prompts: Sequence[EncodedPrompt]) -> Scores:
        """Rewards of the completions."""
        items = []
        for i, reply, finished in zip(rollout.prompts, rollout.replies, rollout.finished):
            p, opening = prompts[i], self.opening(prompts[i])
            text = self.text(reply, opening)
            items.append(Item(p.ids, reply, p.text, text, p.row, finished, p.where, p.asked, opening))
        return self.rewards.score(items, tokens=self.config.batch.budget)

    def opening(self, prompt: EncodedPrompt) -> str:
        """The mark by which a prompt has opened a thought, or ''."""
        return opening_after(self.tokenizer, prompt.ids.tolist())

    def text(self, reply: Any, opening: str = "") -> str:
        """A completion as rewards read it: without a text that ended it."""
        text = decode_completion(self.tokenizer, reply.tolist())
        return until_stop(text, self.sampling.stop, opening, self.sampling.stop_in_answer)

    def measure(self, rollout: Rollout, prompts: Sequence[EncodedPrompt], micro: Sequence[Sequence[int]]) -> float:
        """Keep the tokens' log-probabilities, by the policy and the reference if it is asked; return the mean entropy.

        Args:
            micro: completions of which each batch is made: those of the first steps, so that their ratio is 1 to the
                last bit.
        """
        assert self._model is not None
        with probing(self._model):
            self.keep(rollout, prompts, micro, self.read)
            if self.settings.refers:
                with self.roles.use(self.reference):
                    self.keep(rollout, prompts, micro, lambda a: {"ref_logprobs": self.logprobs(a, grad=False)})
        entropy = rollout.tokens.pop("entropy")
        return float(np.concatenate(entropy).mean(dtype=np.float64))

    def read(self, a: dict[str, mx.array]) -> dict[str, mx.array]:
        """What the policy of now says of each token, (N,): entropy, old_logprobs, and what else a subclass keeps."""
        asked = (self.split, a["ids"], a["positions"], a["labels"])
        logprobs, entropy = rows_logprobs_entropy(*asked, draw=self.how)
        return {"old_logprobs": logprobs, "entropy": entropy}

    def keep(
        self,
        rollout: Rollout,
        prompts: Sequence[EncodedPrompt],
        micro: Sequence[Sequence[int]],
        read: Callable[[dict[str, mx.array]], dict[str, mx.array]],
    ) -> None:
        """Keep what `read` gives of each token, by name: (N,) of the arrays of each batch of completions."""
        batches = ((rows, self._arrays(rollout, rows, prompts)) for rows in micro)
        for rows, found in ahead(batches, lambda arrays: as_trained(lambda: read(arrays))):
            ends = np.cumsum(rollout.sizes[list(rows)])[:-1]
            for name, values in found.items():
                kept = rollout.tokens.setdefault(name, [np.zeros(0, np.float32)] * len(rollout))
                for i, part in zip(rows, np.split(np.array(values), ends)):
                    kept[i] = part

    def advise(self, rollout: Rollout, micro: Sequence[Sequence[int]]) -> dict[str, float]:
        """Set what the loss reads of each token (`advantages`), from scores and log-probabilities.

        Returns:
            What is worth reporting.
        """
        raise AssertionError(f"{type(self).__name__} has no advantages")

    def draw(self, number: int) -> Drawn:
        """The completions of a rollout, with their scores."""
        return self.sampled(self._chosen(number), number, self.seed_of(number))

    def sampled(self, chosen: list[int], number: int, seed: int) -> Drawn:
        """Completions of prompts to train on, with their scores."""
        began = time.perf_counter()
        rollout = self.sample(self.prompts, chosen, self.rollouts.samples, number, seed)
        seconds = time.perf_counter() - began
        return Drawn(rollout, self.score(rollout, self.prompts), int(rollout.sizes.sum()), seconds, {})

    def roll(self, model: nn.Module) -> tuple[Rollout, dict[str, Any]]:
        """The next rollout, ready to be trained on, and what is reported of it."""
        number = self._number
        mx.eval(model.trainable_parameters())  # what is left of the last step is not sampling
        began = time.perf_counter()
        drawn = self.draw(number)
        rollout, scores = drawn.rollout, drawn.scores
        rollout.scores = scores.total
        lengths = self._lengths(rollout)
        first = [rows for step in self._steps(rollout, lengths)[: self._per_epoch(rollout)] for rows in step]
        if rest := sorted({*range(len(rollout))}.difference(*first)):
            first += self.cut(rest, lengths)
        entropy = self.measure(rollout, self.prompts, first)
        kl = self.kl_of(rollout)
        event: dict[str, Any] = {
            "event": "rollout",
            "rollout": number,
            "reward": float(scores.total.mean()),
            "reward_std": float(scores.total.std()),
            **{f"reward/{name}": float(values.mean()) for name, values in scores.components.items()},
            **kl,
            "kl_coef": self.kl_coef,
            "entropy": entropy,
            "response_tokens": float(rollout.sizes.mean()),
            "eos_share": float(np.mean(rollout.finished)),
            **drawn.event,
            **self.advise(rollout, first),
            "sampling_tokens_per_s": drawn.tokens / max(drawn.seconds, 1e-9),
            "sampling_s": drawn.seconds,
            "scoring_s": time.perf_counter() - began - drawn.seconds,
        }
        if not any(rollout.finished) and self.rollouts.stop_at_eos:
            event["warning"] = "every completion was cut off: raise rollout.max_tokens, or say where to stop"
        if kl:
            a_token = kl["kl"] / float(rollout.sizes.mean())
            check_kl(a_token, self.config.objective, self.settings.highest_kl, bool(self.valid))
            self.settle(kl["kl"], len(rollout))
        return rollout, event

    def settle(self, kl: float, count: int) -> None:
        """After a rollout of `count` completions is ready, of known `kl`: what changes for the next one."""

    def _lengths(self, rollout: Rollout) -> Any:
        return rollout.sizes + np.array([len(self.prompts[i].ids) for i in rollout.prompts])

    def _per_epoch(self, rollout: Rollout) -> int:
        return min(self.settings.minibatches, len(self.kept(rollout)))

    @staticmethod
    def kls(rollout: Rollout) -> npt.NDArray[np.float64]:
        """(B,) log policy - log reference of each completion, in nats."""
        apart = zip(rollout.tokens["old_logprobs"], rollout.tokens["ref_logprobs"])
        return np.array([(old.astype(np.float64) - ref).sum() for old, ref in apart])

    def kl_of(self, rollout: Rollout) -> dict[str, float]:
        """`kl`, nats from the reference of a completion, mean over completions; nothing where it is not asked."""
        return {"kl": float(self.kls(rollout).mean())} if self.settings.refers else {}

    # What the loop asks for

    def batches(self, model: nn.Module) -> Iterator[Batch]:
        idle, owed = 0, False  # owed: a pass has ended where no step did; the next one ends it
        while True:
            event, spent = None, 0.0
            if self._rollout is None:
                self._rollout, event = self.roll(model)
                spent = event["sampling_s"] + event["scoring_s"]
            rollout = self._rollout
            steps = self._steps(rollout, self._lengths(rollout))
            last_of_pass = (rollout.number + 1) % self._per_pass == 0
            idle = 0 if steps else idle + 1
            if not steps:
                self._number, self._rollout, owed = self._number + 1, None, owed or last_of_pass
                yield Batch({}, 0, 0, (), event=event, before_s=spent)  # only to report it
            if idle >= max(_IDLE, 2 * self._per_pass):
                raise TrainingError(self.why_idle(idle))
            while self._rollout is rollout:
                at = self._step
                if at % self._per_epoch(rollout) == 0 and self._strayed() and at:
                    self._number, self._step, self._rollout = self._number + 1, 0, None
                    owed = owed or last_of_pass
                    break
                yielded = [b for rows in steps[at] for b in self.micro(rollout, rows)]
                final = at + 1 == len(steps)
                for k, batch in enumerate(yielded):
                    end = k + 1 == len(yielded)
                    if end:
                        self._step = at + 1
                        if final:
                            self._number, self._step, self._rollout = self._number + 1, 0, None
                    ends = end and (owed or (final and last_of_pass))
                    yield replace(batch, ends_step=end, ends_epoch=ends, event=event, before_s=spent)
                    event, spent = None, 0.0
                owed = False

    def micro(self, rollout: Rollout, rows: Sequence[int]) -> list[Batch]:
        """The batches, one after the other, that some completions are trained by."""
        arrays = self._arrays(rollout, rows, self.prompts)
        names = [n for n in rollout.tokens if n != "ref_logprobs" or self.needs_reference]
        arrays |= {name: rollout.flat(name, rows) for name in names}
        tokens = int(self._lengths(rollout)[list(rows)].sum())
        where = tuple(dict.fromkeys(self.prompts[rollout.prompts[i]].where for i in rows))
        return [Batch(arrays, tokens, int(rollout.sizes[list(rows)].sum()), where)]

    needs_reference = False  # whether the loss reads ref_logprobs
    reads: tuple[str, ...] = ("old_logprobs", "advantages")  # of each token, by the loss, beside ref_logprobs

    def rehearsed(self, chosen: Sequence[Sequence[int]]) -> Iterator[Batch]:
        """The batches of a step over made-up completions, each as long as may be.

        Args:
            chosen: of each micro-batch the prompts of its completions.
        """
        most = self.rollouts.max_tokens
        for prompts in chosen:
            rollout = Rollout(
                max(self._number, self.first_whole), [*prompts], [np.zeros(most, np.int32)] * len(prompts), []
            )
            names = (*self.reads, "ref_logprobs") if self.needs_reference else self.reads
            rollout.tokens = {name: [np.zeros(most, np.float32)] * len(prompts) for name in names}
            yield from self.micro(rollout, range(len(prompts)))

    first_whole = 0  # the first rollout by which all is trained

    def rebatch(self, config: Config) -> None:
        """Make micro-batches as this recipe has it from now on, which differs in batch.tokens only."""
        self.config = config

    def held(self) -> list[mx.array]:
        """Arrays that it holds beside the model's own: of its roles, and of the reward model."""
        return [*self.roles.arrays(), *self.rewards.held()]

    def _strayed(self) -> bool:
        """Whether the policy was too far from the one that sampled, in the mean over the pass that ends here."""
        total, weight = self._read_apart()
        self._apart = [0.0, 0.0]
        most = self.settings.target_kl
        return most is not None and weight > 0 and total / weight > 1.5 * most

    def _read_apart(self) -> list[float]:
        """Sum and weight of KL from the policy that sampled, over the steps of the pass so far."""
        for total, weight in self._unread:
            self._apart = [self._apart[0] + float(total), self._apart[1] + float(weight)]
        self._unread.clear()
        return self._apart

    def stepped(self, sums: LossSum) -> None:
        if self.settings.target_kl is not None and FAR in sums.metrics:
            self._unread.append((sums.metrics[FAR], sums.weight))

    def loss(self, model: nn.Module, batch: Batch) -> LossSum:
        raise AssertionError(f"{type(self).__name__} has no loss")

    def logprobs(self, a: dict[str, mx.array], grad: bool = True) -> mx.array:
        """(N,) of a batch's tokens, by the role of now."""
        asked = (self.split, a["ids"], a["positions"], a["labels"])
        return rows_logprobs(*asked, grad=grad, draw=self.how)

    def steps_per_epoch(self, accumulate: int, epoch: int = 0) -> int:
        """At most: epochs over a rollout end early where `target_kl` says so."""
        full, rest = divmod(len(self.prompts), self.rollouts.prompts)
        sizes = [self.rollouts.prompts * self.rollouts.samples] * full + [rest * self.rollouts.samples] * bool(rest)
        return sum(self.settings.epochs * min(self.settings.minibatches, size) for size in sizes)

    def state_dict(self) -> dict[str, Any]:
        apart = self._read_apart()
        return {"rollout": self._number, "step": self._step, "apart": apart, "kl_coef": self.kl_coef}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._number, self._step = state["rollout"], state["step"]
        self._apart, self.kl_coef = state.get("apart", [0.0, 0.0]), state["kl_coef"]

    def arrays(self) -> dict[str, mx.array]:
        return self._rollout.arrays() if self._rollout is not None else {}

    def load_arrays(self, arrays: dict[str, mx.array]) -> None:
        self._rollout = Rollout.of(arrays) if arrays else None

    def valid_batches(self, model: nn.Module) -> Iterator[Batch]:
        return iter(())

    def validated(self, means: dict[str, float]) -> dict[str, Any]:
        return dict(means)

    def about(self) -> dict[str, Any]:
        return {}

    def fingerprint(self) -> str:
        return self._data

    def summary(self) -> Summary:
        counts: dict[str, int | float] = {
            "prompts": len(self.prompts),
            "prompt tokens": sum(len(p.ids) for p in self.prompts),
            "rollouts a pass": self._per_pass,
            "completions a rollout": min(self.rollouts.prompts, len(self.prompts)) * self.rollouts.samples,
        }
        if self.valid:
            counts["held-out prompts"] = len(self.valid)
        first = self.prompts[0]
        asked = first.asked if isinstance(first.asked, list) else None
        chat = self.config.data.template == "auto"
        ends = turn_end(self.tokenizer, asked, tools_of(first.row)) if chat else ()
        return Summary(counts, self.notes, bool(self.valid), ends=frozenset(ends))

    def previews(self, n: int) -> list[Encoded]:
        """The first prompts; nothing of them is trained."""
        return [Encoded(p.ids, np.zeros(len(p.ids), dtype=bool), p.where) for p in self.prompts[:n]]

    def evaluate(self, model: nn.Module) -> dict[str, Any] | None:
        return self._held_out.measure() if self.valid else {}
