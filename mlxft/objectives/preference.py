"""Direct preference training: a policy learns from judged answers without a reward model in between."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Literal

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from pydantic import Field, model_validator

from mlxft.config import Config, Settings
from mlxft.data.batching import Slot
from mlxft.data.dataset import EncodedAnswer, EncodedPair, build_answers, build_pairs, length
from mlxft.errors import DataError
from mlxft.model.cpu import as_trained
from mlxft.model.layers import probing
from mlxft.model.logits import Split, row_sums
from mlxft.model.memory import Outline
from mlxft.model.prefix import Sharing
from mlxft.model.roles import Reference
from mlxft.objectives import functional as F
from mlxft.objectives.base import Batch, LossSum
from mlxft.objectives.pairs import Answer, Judged, answers_of, check_recipe, encode_splits, stack, stack_pairs

REFERRED = ("dpo", "ipo", "hinge", "kto")  # measured against the policy that training began with
SMOOTHED = ("dpo", "cpo")


class PreferenceSettings(Settings):
    """The loss on judged answers."""

    loss: Literal["dpo", "ipo", "hinge", "simpo", "orpo", "cpo", "kto"] = Field(
        "dpo",
        description="The loss. ipo, simpo and orpo take the mean over an answer's tokens, the others their sum.",
    )
    beta: float | None = Field(
        None,
        gt=0,
        description="How firmly the reference holds the policy (ipo: a margin of 1 / (2 beta) nats a token is asked "
        "for); orpo: weight of the odds ratio. Default 0.1, simpo 2.",
    )
    label_smoothing: float | None = Field(
        None, ge=0, lt=0.5, description="dpo, cpo: share of the judgements taken to be wrong; default 0."
    )
    gamma: float | None = Field(None, ge=0, description="simpo: margin that is asked for; default 1.")
    nll: float | None = Field(
        None, ge=0, description="Weight of the chosen answer's mean NLL, added; default 1 for orpo and cpo, else 0."
    )
    good_weight: float | None = Field(None, gt=0, description="kto: what a good answer counts; default 1.")
    bad_weight: float | None = Field(None, gt=0, description="kto: what a bad answer counts; default 1.")
    precompute: bool = Field(
        False,
        description="Compute the reference's log-probabilities once, before training, and keep them in the run folder.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> PreferenceSettings:
        takes = {
            "label_smoothing": SMOOTHED,
            "gamma": ("simpo",),
            "nll": ("dpo", "ipo", "hinge", "simpo", "orpo", "cpo"),
            "good_weight": ("kto",),
            "bad_weight": ("kto",),
        }
        wrong = [k for k, names in takes.items() if getattr(self, k) is not None and self.loss not in names]
        if wrong:
            raise ValueError(f"loss {self.loss} has no {', '.join(wrong)}; it is for {', '.join(takes[wrong[0]])}")
        if self.precompute and self.loss not in REFERRED:
            raise ValueError(f"loss {self.loss} has no reference to precompute; it is for {', '.join(REFERRED)}")
        return self

    @property
    def strength(self) -> float:
        """`beta`, or the loss's default."""
        return self.beta if self.beta is not None else 2.0 if self.loss == "simpo" else 0.1

    @property
    def imitation(self) -> float:
        """`nll`, or the loss's default."""
        return self.nll if self.nll is not None else 1.0 if self.loss in ("orpo", "cpo") else 0.0


class _Policy:
    """The settings, the model taken apart, and the reference; what both kinds of rows share."""

    def __init__(self, config: Config) -> None:
        self.config, self.settings = config, config.section("preference", PreferenceSettings)
        self.sharing: Sharing | None = None
        self.reference: Reference | None = None

    def prepare(self, model: nn.Module, base: str = "") -> None:
        self.sharing = Sharing(Split(model))
        if self.settings.loss in REFERRED:
            # An adapter that is trained further began as it is now; a fresh one as the bare base.
            self.reference = Reference(self.sharing, self.config.model.adapter is not None)

    def held(self) -> list[mx.array]:
        """The reference's arrays."""
        return [] if self.reference is None else self.reference.held()

    def unasked(self) -> AbstractContextManager[None]:
        """Inside the block zeros stand for numbers of the reference that are yet to be computed beforehand."""
        return nullcontext() if self.reference is None else self.reference.unasked()

    def notes(self, answers: int) -> list[str]:
        """What there is to wait for before the first step, which may be long."""
        if not self.settings.precompute:
            return []
        return [f"the reference's log-probabilities of {answers:,} answers are computed before the first step"]

    def of(self, model: nn.Module) -> Sharing:
        if self.sharing is None or self.sharing.split.model is not model:
            self.sharing = Sharing(Split(model))
        return self.sharing

    def logprobs(self, model: nn.Module, a: dict[str, mx.array], grad: bool) -> mx.array:
        """Log-probabilities of the answers' tokens (N,)."""
        return self.of(model).logprobs(a, grad=grad)


class Preference:
    """Losses on pairs or, for KTO, on completions that are good or bad by themselves: which, the recipe's loss says.

    Raises:
        ConfigError, DataError: settings or rows do not fit.
    """

    sections: ClassVar[dict[str, type[Settings]]] = {"preference": PreferenceSettings}
    learning_rate = 1e-6  # of full fine-tuning, as TRL's DPOConfig; these losses move fast

    def __new__(cls, config: Config, tokenizer: Any) -> Preference:
        kto = config.section("preference", PreferenceSettings).loss == "kto"
        return object.__new__((_Single if kto else _Pairs) if cls is Preference else cls)

    @classmethod
    def outline(cls, config: Config) -> Outline:
        """For a plan of the memory it takes."""
        settings = config.section("preference", PreferenceSettings)
        # Precomputed, the reference is gone before the first step.
        kept = config.model.adapter is not None and settings.loss in REFERRED and not settings.precompute
        return Outline("logprobs", together=1 if settings.loss == "kto" else 2, copies=int(kept))


class _Pairs(Judged[EncodedPair], Preference):
    """Losses on pairs."""

    def __init__(self, config: Config, tokenizer: Any) -> None:
        check_recipe(config, ("preference", "ratings"))
        rows, counts, valid, _ = encode_splits(config, tokenizer, build_pairs)
        self._policy = _Policy(config)
        self._settings = self._policy.settings
        _refuse_ties([*rows, *valid], self._settings.loss)
        super().__init__(config, rows, counts, valid, per_row=2)
        self.notes += self._policy.notes(2 * len([*rows, *valid]))
        self.notes += _idle_margins(rows, self._settings.loss)

    def prepare(self, model: nn.Module, base: str = "") -> None:
        super().prepare(model, base)
        self._policy.prepare(model)
        if self._settings.precompute and self._policy.reference is not None:
            key = f"{self.ids_fingerprint()} {base} {self.config.model.model_dump_json()}"
            data = [[a for row in rows for a in answers_of(row)] for rows in (self.rows, self.valid)]
            self._policy.reference.precompute([_stacked(d, self.most) for d in data], self.config.run_dir, key)

    def rehearsed(self, model: nn.Module, slots: Sequence[Slot]) -> Iterator[Batch]:
        with self._policy.unasked():
            yield from super().rehearsed(model, slots)

    def held(self) -> list[mx.array]:
        return self._policy.held()

    def make(self, model: nn.Module, rows: Sequence[int], width: int, *, valid: bool, ends_epoch: bool) -> Batch:
        pairs = [(self.valid if valid else self.rows)[i] for i in rows]
        arrays = stack_pairs(pairs, width, self._policy.of(model))
        arrays["weights"] = mx.array([pair.weight for pair in pairs])
        if self._policy.reference is not None:
            # Numbers of a frozen role belong in the batch, computed before the step.
            places = [2 * i for i in rows] + [2 * i + 1 for i in rows]
            arrays["reference"] = self._policy.reference.logprobs(arrays, int(valid), places)
        tokens = sum(len(a.prompt) + len(a.reply) for pair in pairs for a in answers_of(pair))
        return Batch(arrays, tokens, len(arrays["labels"]), tuple(pair.where for pair in pairs), ends_epoch)

    def loss(self, model: nn.Module, batch: Batch) -> LossSum:
        a, s = batch.arrays, self._settings
        count = a["lengths"].size
        tokens = self._policy.logprobs(model, a, model.training)
        sums = row_sums(tokens, a["owners"], count)
        means = sums / a["lengths"]
        metrics: dict[str, mx.array] = {}
        w = a["weights"]
        if "reference" in a:
            ref = row_sums(a["reference"], a["owners"], count)
            per = a["lengths"] if s.loss == "ipo" else mx.ones(count)
            losses = self._referred(*_halves(sums / per), *_halves(ref / per))
            rewards = F.implicit_reward(sums / per, ref / per, s.strength)
            size = s.strength * (mx.abs(sums) + mx.abs(ref)) / per
            metrics["kl"] = (w * sum(_halves(_kl(tokens, a))) / 2).sum()
        else:
            rewards = s.strength * (sums if s.loss == "cpo" else means)
            size = mx.abs(rewards)
            losses = self._alone(_halves(sums), _halves(means))
        if s.imitation:
            chosen = _halves(means)[0]
            losses = losses - s.imitation * chosen
            metrics["nll"] = -(w * chosen).sum()
        return LossSum((w * losses).sum(), w.sum(), metrics | _rewards(rewards, size, w))

    def _alone(self, sums: tuple[mx.array, mx.array], means: tuple[mx.array, mx.array]) -> mx.array:
        s = self._settings
        if s.loss == "simpo":
            return F.simpo(*means, s.strength, 1.0 if s.gamma is None else s.gamma)
        if s.loss == "orpo":
            return F.odds_ratio(*means, s.strength)
        return F.cpo(*sums, s.strength, s.label_smoothing or 0.0)

    def _referred(self, chosen: mx.array, rejected: mx.array, ref_c: mx.array, ref_r: mx.array) -> mx.array:
        s = self._settings
        if s.loss == "dpo":
            return F.dpo(chosen, rejected, ref_c, ref_r, s.strength, s.label_smoothing or 0.0)
        return (F.ipo if s.loss == "ipo" else F.hinge)(chosen, rejected, ref_c, ref_r, s.strength)


class _Single(Judged[EncodedAnswer], Preference):
    """KTO: answers that are good or bad by themselves. Pairs are taken apart into both."""

    def __init__(self, config: Config, tokenizer: Any) -> None:
        check_recipe(config, ("unpaired", "preference"))
        idle: list[str] = []
        if config.data.format == "preference":
            pairs, counts, others, _ = encode_splits(config, tokenizer, build_pairs)
            _refuse_ties([*pairs, *others], "kto")
            rows, valid = _apart(pairs), _apart(others)
            counts = replace(counts, tokens=sum(map(length, rows)))  # a prompt is read with each of its answers
            idle = _idle_margins(pairs, "kto")
        else:
            rows, counts, valid, _ = encode_splits(config, tokenizer, build_answers)
        self._policy = _Policy(config)
        self._settings = self._policy.settings
        super().__init__(config, rows, counts, valid, per_row=1)
        self.notes += self._policy.notes(2 * len([*rows, *valid]))  # each prompt's own answer, and another's
        self.notes += idle
        good = sum(row.label for row in rows)
        if not 0 < good < len(rows):
            self.notes.append(f"all answers are {'good' if good else 'bad'}: there is nothing to tell them from")
        self._partners = [_partners(rows, config.run.seed), _partners(valid, config.run.seed)]
        if self._partners[0] == list(range(len(rows))):
            self.notes.append("all answers are to one prompt: kto's reference point, of other prompts' answers, is 0")
        self._point = mx.array(0.0)

    def prepare(self, model: nn.Module, base: str = "") -> None:
        super().prepare(model, base)
        self._policy.prepare(model)
        if self._settings.precompute and self._policy.reference is not None:
            key = f"{self.ids_fingerprint()} {base} {self.config.model.model_dump_json()} {self.config.run.seed}"
            data = []
            for rows, valid in ((self.rows, False), (self.valid, True)):
                own = [a for row in rows for a in answers_of(row)]
                data.append(_stacked([*own, *(self._mismatched(i, valid) for i in range(len(rows)))], self.most))
            self._policy.reference.precompute(data, self.config.run_dir, key)

    def _mismatched(self, row: int, valid: bool) -> Answer:
        """A row's prompt with another row's answer, no longer than rows may be."""
        rows = self.valid if valid else self.rows
        prompt, reply = rows[row].prompt_ids, rows[self._partners[valid][row]].completion_ids
        return Answer(prompt, reply[: max(1, self.config.data.max_length - len(prompt))])

    def rehearsed(self, model: nn.Module, slots: Sequence[Slot]) -> Iterator[Batch]:
        point = self._point
        with self._policy.unasked():
            yield from super().rehearsed(model, slots)
        self._point = point

    def held(self) -> list[mx.array]:
        return self._policy.held()

    def begin_step(self, model: nn.Module, slots: Sequence[Slot], *, valid: bool) -> None:
        """The reference point of a whole step: the mean log-ratio of answers to other prompts, by the policy of now."""
        assert self._policy.reference is not None
        every = len(self.valid if valid else self.rows)
        rows = [i for slot in slots for i in slot.rows if self._partners[valid][i] != i]
        total = mx.array(0.0)
        with probing(model):
            for places, arrays in _stacked([self._mismatched(i, valid) for i in rows], self.most):
                ref = self._policy.reference.logprobs(arrays, int(valid), [every + rows[i] for i in places])
                now = as_trained(partial(self._policy.logprobs, model, arrays, False))
                total = total + (now - ref).sum()
                mx.async_eval(total)  # one batch's activations at a time; the number stays on the device
        self._point = mx.maximum(total / max(1, len(rows)), 0.0)

    def make(self, model: nn.Module, rows: Sequence[int], width: int, *, valid: bool, ends_epoch: bool) -> Batch:
        chosen = [(self.valid if valid else self.rows)[i] for i in rows]
        answers = [answers_of(row)[0] for row in chosen]
        arrays = stack(answers, width)
        arrays["good"] = mx.array([float(row.label) for row in chosen])
        arrays["weights"] = mx.array([row.weight for row in chosen])
        arrays["point"] = self._point
        assert self._policy.reference is not None
        arrays["reference"] = self._policy.reference.logprobs(arrays, int(valid), list(rows))
        tokens = sum(len(a.prompt) + len(a.reply) for a in answers)
        return Batch(arrays, tokens, len(arrays["labels"]), tuple(row.where for row in chosen), ends_epoch)

    def loss(self, model: nn.Module, batch: Batch) -> LossSum:
        a, s = batch.arrays, self._settings
        count = a["lengths"].size
        tokens = self._policy.logprobs(model, a, model.training)
        ratios = row_sums(tokens - a["reference"], a["owners"], count)
        size = sum(mx.abs(row_sums(x, a["owners"], count)) for x in (tokens, a["reference"])) + a["point"]
        weights = [1.0 if given is None else given for given in (s.good_weight, s.bad_weight)]
        w, good = a["weights"], a["good"]
        losses = F.kto(ratios, good, a["point"], s.strength, *weights)
        rewards = s.strength * mx.stop_gradient(ratios)
        gain = rewards - s.strength * a["point"]
        signed = mx.where(good != 0, gain, -gain)
        values = {
            "accuracy": F.wins(signed, s.strength * mx.stop_gradient(size)),
            "margin": signed,
            "kl": _kl(tokens, a),
            "reference_point": a["point"],
        }
        if not model.training:
            bad = 1 - good
            values |= {"good/share": good, "good/chosen": good * rewards, "good/rejected": bad * rewards}
        return LossSum((w * losses).sum(), w.sum(), {name: (w * value).sum() for name, value in values.items()})

    def validated(self, means: dict[str, float]) -> dict[str, Any]:
        """Adds rewards_chosen and rewards_rejected, each over the answers of its kind."""
        found = {k: v for k, v in means.items() if "/" not in k}
        if share := means["good/share"]:
            found["rewards_chosen"] = means["good/chosen"] / share
        if share < 1:
            found["rewards_rejected"] = means["good/rejected"] / (1 - share)
        return found


def _halves(x: mx.array) -> tuple[mx.array, mx.array]:
    """The chosen answers' part and the rejected ones'."""
    half = x.shape[0] // 2
    return x[:half], x[half:]


def _kl(tokens: mx.array, a: dict[str, mx.array]) -> mx.array:
    """(N,), of each answer: KL to the reference, summed over its tokens.

    Second order in the log-ratio: an estimate over the data's own answers, which neither policy has drawn.
    """
    return row_sums(F.kl(mx.stop_gradient(tokens), a["reference"], "k2"), a["owners"], a["lengths"].size)


def _rewards(rewards: mx.array, size: mx.array, weights: mx.array) -> dict[str, mx.array]:
    """What the policy holds the answers for: sums over pairs.

    Args:
        rewards: (2n,) of the chosen answers and then of the rejected ones.
        size: (2n,) magnitude of the numbers that each was computed from.
    """
    chosen, rejected = _halves(mx.stop_gradient(rewards))
    difference = chosen - rejected
    values = {
        "rewards_chosen": chosen,
        "rewards_rejected": rejected,
        "accuracy": F.wins(difference, mx.add(*_halves(mx.stop_gradient(size)))),
        "margin": difference,
    }
    return {name: (weights * value).sum() for name, value in values.items()}


def _refuse_ties(rows: Sequence[EncodedPair], loss: str) -> None:
    """DataError: this loss has no ties."""
    ties = [row.where for row in rows if row.tie]
    if ties:
        more = f" and {len(ties) - 5} more" if len(ties) > 5 else ""
        raise DataError(
            f"{', '.join(ties[:5])}{more}: is a tie, which loss {loss} can not learn from; leave them out, or train a "
            "reward model (objective: reward), which can"
        )


def _idle_margins(rows: Sequence[EncodedPair], loss: str) -> list[str]:
    """That the rows' margins do not act, if they have any."""
    margins = sum(row.margin is not None for row in rows)
    return [f"{margins:,} rows have a margin, which loss {loss} does not use"] if margins else []


def _apart(pairs: Sequence[EncodedPair]) -> list[EncodedAnswer]:
    """The answers of pairs, each once and with its pairs' weight: of several rejected ones each counts for a part."""
    found: dict[Any, EncodedAnswer] = {}
    for pair in pairs:
        for answer, label in zip(answers_of(pair), (True, False)):
            key = (pair.where, answer.reply.tobytes(), label)
            before = found.get(key, EncodedAnswer(answer.prompt, answer.reply, label, pair.where, 0.0))
            found[key] = before._replace(weight=before.weight + pair.weight)
    return list(found.values())


def _partners(rows: Sequence[EncodedAnswer], seed: int) -> list[int]:
    """For each row another one whose prompt differs, the same for the whole run; itself where there is none."""
    order = np.random.default_rng([seed, 1]).permutation(len(rows)).tolist()
    prompts = [row.prompt_ids.tobytes() for row in rows]
    partners = list(range(len(rows)))
    for at, row in enumerate(order):
        around = (order[(at + step) % len(order)] for step in range(1, len(order)))
        partners[row] = next((other for other in around if prompts[other] != prompts[row]), row)
    return partners


def _stacked(answers: Sequence[Answer], tokens: int) -> Iterator[tuple[list[int], dict[str, mx.array]]]:
    """Answers of like length together, with their places: no batch larger than those that are trained on."""
    sizes = [len(a.prompt) + len(a.reply) for a in answers]
    places: list[int] = []
    for i in sorted(range(len(answers)), key=sizes.__getitem__):
        if places and (len(places) + 1) * sizes[i] > tokens:
            yield places, stack([answers[j] for j in places])
            places = []
        places.append(i)
    if places:
        yield places, stack([answers[j] for j in places])
