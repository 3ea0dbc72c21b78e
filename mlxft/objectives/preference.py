"""Direct preference training: a policy learns from judged answers without a reward model in between."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from pydantic import Field, model_validator

from mlxft.config import Config, Settings
from mlxft.data.dataset import EncodedLabelled, EncodedPair, PairCounts, Slot, encode_labelled, encode_pairs, length
from mlxft.errors import DataError
from mlxft.model.cpu import as_trained
from mlxft.model.frozen import FrozenModels, FrozenSource, Reference
from mlxft.model.layers import probing
from mlxft.model.logits import Split, row_sums
from mlxft.model.memory import Outline
from mlxft.model.prefix import Completions, Sharing
from mlxft.objectives import functional as F
from mlxft.objectives.base import MakesStep, MicroBatch, Step, Terms
from mlxft.objectives.pairs import (
    Answer,
    CompletionObjective,
    _Row,
    check_completion_recipe,
    completions_of,
    encode_splits,
    stack,
    stack_pairs,
)

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


@dataclass(frozen=True, kw_only=True)
class PairBatch(Completions):
    """n pairs, the chosen completions before the rejected ones.

    Attributes:
        weights: (n,) of the pairs.
        reference: (N,) the reference's log-probabilities; None where the loss asks none.
    """

    weights: mx.array
    reference: mx.array | None = None


@dataclass(frozen=True, kw_only=True)
class KTOBatch(Completions):
    """B completions that are good or bad by themselves.

    Attributes:
        good, weights: (B,) 1 for good ones, else 0; and what each counts.
        point: () the step's reference point.
        reference: (N,) the reference's log-probabilities.
    """

    good: mx.array
    weights: mx.array
    point: mx.array
    reference: mx.array


class Preference(CompletionObjective[_Row]):
    """Losses on pairs or, for KTO, on completions that are good or bad by themselves: which, the recipe's loss says."""

    sections: ClassVar[dict[str, type[Settings]]] = {"preference": PreferenceSettings}
    learning_rate = 1e-6  # of full fine-tuning, as TRL's DPOConfig; these losses move fast

    def __new__(cls, config: Config, tokenizer: Any) -> Preference[_Row]:
        kto = config.section("preference", PreferenceSettings).loss == "kto"
        return object.__new__((_Single if kto else _Pairs) if cls is Preference else cls)  # type: ignore[arg-type]

    def __init__(
        self, config: Config, tokenizer: Any, rows: list[_Row], counts: PairCounts, valid: list[_Row], per_row: int
    ) -> None:
        self.settings = config.section("preference", PreferenceSettings)
        super().__init__(config, tokenizer, rows, counts, valid, per_row)  # type: ignore[arg-type]
        if self.settings.precompute:
            count = 2 * len([*rows, *valid])  # of kto each prompt's own completion, and another's
            said = "answers are computed before the first step"
            self.notes.append(f"the reference's log-probabilities of {count:,} {said}")
        self.sharing: Sharing | None = None
        self.reference: Reference | None = None

    @classmethod
    def outline(cls, config: Config) -> Outline:
        kto = config.section("preference", PreferenceSettings).loss == "kto"
        return Outline("logprobs", together=1 if kto else 2)

    @classmethod
    def frozen(cls, config: Config) -> list[FrozenSource]:
        settings = config.section("preference", PreferenceSettings)
        # Precomputed, the reference is gone before the first step.
        return [FrozenSource("reference")] if settings.loss in REFERRED and not settings.precompute else []

    def prepare(self, model: nn.Module, base: str = "") -> None:
        super().prepare(model, base)
        self.sharing = Sharing(Split(model))
        if self.settings.loss not in REFERRED:
            return
        models = FrozenModels(model, base, self.config.model.path)
        self.reference = Reference(models, models.start("reference", self.config), self.sharing)
        if self.settings.precompute:
            key = f"{self.ids_fingerprint()} {base} {self.config.model.model_dump_json()}{self._key()}"
            data = [_stacked(self._referred_to(valid), self.most) for valid in (False, True)]
            self.reference.precompute(data, self.config.run_dir, key)

    def _key(self) -> str:
        """What else the reference's numbers depend on."""
        return ""

    def _referred_to(self, valid: bool) -> list[Answer]:
        """All answers that the reference is asked for."""
        return [answer for row in (self.valid if valid else self.rows) for answer in completions_of(row)]

    def _refer(self, rows: Completions, valid: bool, places: Sequence[int]) -> mx.array:
        assert self.reference is not None
        return self.reference.logprobs(rows, int(valid), places)

    def largest(self, model: nn.Module) -> list[MakesStep]:
        def unasked(make: MakesStep) -> Step:
            # Zeros stand for numbers of the reference that are yet to be computed beforehand.
            with nullcontext() if self.reference is None else self.reference.unasked():
                return make()

        return [partial(unasked, make) for make in super().largest(model)]

    def held(self) -> list[mx.array]:
        return [] if self.reference is None else self.reference.arrays()

    def of(self, model: nn.Module) -> Sharing:
        """The model taken apart."""
        if self.sharing is None or self.sharing.split.model is not model:
            self.sharing = Sharing(Split(model))
        return self.sharing


class _Pairs(Preference[EncodedPair]):
    """Losses on pairs."""

    def __init__(self, config: Config, tokenizer: Any) -> None:
        check_completion_recipe(config, ("preference", "ratings"))
        rows, counts, valid, _ = encode_splits(config, tokenizer, encode_pairs)
        loss = config.section("preference", PreferenceSettings).loss
        _refuse_ties([*rows, *valid], loss)
        super().__init__(config, tokenizer, rows, counts, valid, per_row=2)
        self.notes += _idle_margins(rows, loss)

    def make(
        self, model: nn.Module, rows: Sequence[int], width: int, point: mx.array | None, valid: bool
    ) -> MicroBatch:
        pairs = [(self.valid if valid else self.rows)[i] for i in rows]
        stacked = stack_pairs(pairs, width, self.of(model))
        reference = None
        if self.reference is not None:
            # Numbers of a frozen role belong in the batch, computed before the step.
            reference = self._refer(stacked, valid, [2 * i for i in rows] + [2 * i + 1 for i in rows])
        weights = mx.array([pair.weight for pair in pairs])
        data = PairBatch(**vars(stacked), weights=weights, reference=reference)
        tokens = sum(len(a.prompt) + len(a.reply) for pair in pairs for a in completions_of(pair))
        return MicroBatch(data, tokens, len(data.labels), tuple(pair.where for pair in pairs))

    def loss(self, model: nn.Module, data: PairBatch) -> Terms:
        s = self.settings
        count = data.lengths.size
        tokens = self.of(model).logprobs(data, grad=model.training)
        sums = row_sums(tokens, data.owners, count)
        means = sums / data.lengths
        metrics: dict[str, mx.array] = {}
        w = data.weights
        if data.reference is not None:
            ref = row_sums(data.reference, data.owners, count)
            per = data.lengths if s.loss == "ipo" else mx.ones(count)
            losses = self._referred(*_halves(sums / per), *_halves(ref / per))
            rewards = F.implicit_reward(sums / per, ref / per, s.strength)
            size = s.strength * (mx.abs(sums) + mx.abs(ref)) / per
            metrics["kl"] = (w * sum(_halves(_kl(tokens, data.reference, data))) / 2).sum()
        else:
            rewards = s.strength * (sums if s.loss == "cpo" else means)
            size = mx.abs(rewards)
            losses = self._alone(_halves(sums), _halves(means))
        if s.imitation:
            chosen = _halves(means)[0]
            losses = losses - s.imitation * chosen
            metrics["nll"] = -(w * chosen).sum()
        return Terms({"preference": (w * losses).sum()}, metrics | _rewards(rewards, size, w))

    def _alone(self, sums: tuple[mx.array, mx.array], means: tuple[mx.array, mx.array]) -> mx.array:
        s = self.settings
        if s.loss == "simpo":
            return F.simpo(*means, s.strength, 1.0 if s.gamma is None else s.gamma)
        if s.loss == "orpo":
            return F.odds_ratio(*means, s.strength)
        return F.cpo(*sums, s.strength, s.label_smoothing or 0.0)

    def _referred(self, chosen: mx.array, rejected: mx.array, ref_c: mx.array, ref_r: mx.array) -> mx.array:
        s = self.settings
        if s.loss == "dpo":
            return F.dpo(chosen, rejected, ref_c, ref_r, s.strength, s.label_smoothing or 0.0)
        return (F.ipo if s.loss == "ipo" else F.hinge)(chosen, rejected, ref_c, ref_r, s.strength)


class _Single(Preference[EncodedLabelled]):
    """KTO: answers that are good or bad by themselves. Pairs are taken apart into both."""

    def __init__(self, config: Config, tokenizer: Any) -> None:
        check_completion_recipe(config, ("unpaired", "preference"))
        idle: list[str] = []
        if config.data.format == "preference":
            pairs, counts, others, _ = encode_splits(config, tokenizer, encode_pairs)
            _refuse_ties([*pairs, *others], "kto")
            rows, valid = _apart(pairs), _apart(others)
            counts = replace(counts, tokens=sum(map(length, rows)))  # a prompt is read with each of its answers
            idle = _idle_margins(pairs, "kto")
        else:
            rows, counts, valid, _ = encode_splits(config, tokenizer, encode_labelled)
        super().__init__(config, tokenizer, rows, counts, valid, per_row=1)
        self.notes += idle
        good = sum(row.label for row in rows)
        if not 0 < good < len(rows):
            self.notes.append(f"all answers are {'good' if good else 'bad'}: there is nothing to tell them from")
        self._partners = [_partners(rows, config.run.seed), _partners(valid, config.run.seed)]
        if self._partners[0] == list(range(len(rows))):
            self.notes.append("all answers are to one prompt: kto's reference point, of other prompts' answers, is 0")

    def _key(self) -> str:
        return f" {self.config.run.seed}"

    def _referred_to(self, valid: bool) -> list[Answer]:
        count = len(self.valid if valid else self.rows)
        return [*super()._referred_to(valid), *(self._mismatched(i, valid) for i in range(count))]

    def _mismatched(self, row: int, valid: bool) -> Answer:
        """A row's prompt with another row's answer, no longer than rows may be."""
        rows = self.valid if valid else self.rows
        prompt, reply = rows[row].prompt_ids, rows[self._partners[valid][row]].completion_ids
        return Answer(prompt, reply[: max(1, self.config.data.max_length - len(prompt))])

    def reference_point(self, model: nn.Module, slots: Sequence[Slot], valid: bool) -> mx.array:
        """Return the mean log-ratio of answers to other prompts, by the policy of now (Ethayarajh et al. 2024)."""
        every = len(self.valid if valid else self.rows)
        rows = [i for slot in slots for i in slot.rows if self._partners[valid][i] != i]
        total = mx.array(0.0)
        with probing(model):
            for places, answers in _stacked([self._mismatched(i, valid) for i in rows], self.most):
                ref = self._refer(answers, valid, [every + rows[i] for i in places])
                now = as_trained(partial(self.of(model).logprobs, answers, grad=False))
                total = total + (now - ref).sum()
                mx.async_eval(total)  # one batch's activations at a time; the number stays on the device
        return mx.maximum(total / max(1, len(rows)), 0.0)

    def make(
        self, model: nn.Module, rows: Sequence[int], width: int, point: mx.array | None, valid: bool
    ) -> MicroBatch:
        assert point is not None
        chosen = [(self.valid if valid else self.rows)[i] for i in rows]
        answers = [completions_of(row)[0] for row in chosen]
        stacked = stack(answers, width)
        data = KTOBatch(
            **vars(stacked),
            good=mx.array([float(row.label) for row in chosen]),
            weights=mx.array([row.weight for row in chosen]),
            point=point,
            reference=self._refer(stacked, valid, list(rows)),
        )
        tokens = sum(len(a.prompt) + len(a.reply) for a in answers)
        return MicroBatch(data, tokens, len(data.labels), tuple(row.where for row in chosen))

    def loss(self, model: nn.Module, data: KTOBatch) -> Terms:
        s = self.settings
        count = data.lengths.size
        tokens = self.of(model).logprobs(data, grad=model.training)
        ratios = row_sums(tokens - data.reference, data.owners, count)
        size = sum(mx.abs(row_sums(x, data.owners, count)) for x in (tokens, data.reference)) + data.point
        weights = [1.0 if given is None else given for given in (s.good_weight, s.bad_weight)]
        w, good = data.weights, data.good
        losses = F.kto(ratios, good, data.point, s.strength, *weights)
        rewards = s.strength * mx.stop_gradient(ratios)
        gain = rewards - s.strength * data.point
        signed = mx.where(good != 0, gain, -gain)
        values = {
            "accuracy": F.wins(signed, s.strength * mx.stop_gradient(size)),
            "margin": signed,
            "kl": _kl(tokens, data.reference, data),
            "reference_point": data.point,
        }
        if not model.training:
            bad = 1 - good
            values |= {"good/share": good, "good/chosen": good * rewards, "good/rejected": bad * rewards}
        return Terms({"preference": (w * losses).sum()}, {name: (w * value).sum() for name, value in values.items()})

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


def _kl(tokens: mx.array, reference: mx.array, data: Completions) -> mx.array:
    """(N,), of each answer: KL to the reference, summed over its tokens.

    Second order in the log-ratio: an estimate over the data's own answers, which neither policy has drawn.
    """
    return row_sums(F.kl(mx.stop_gradient(tokens), reference, "k2"), data.owners, data.lengths.size)


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


def _apart(pairs: Sequence[EncodedPair]) -> list[EncodedLabelled]:
    """The answers of pairs, each once and with its pairs' weight: of several rejected ones each counts for a part."""
    found: dict[Any, EncodedLabelled] = {}
    for pair in pairs:
        for answer, label in zip(completions_of(pair), (True, False)):
            key = (pair.where, answer.reply.tobytes(), label)
            before = found.get(key, EncodedLabelled(answer.prompt, answer.reply, label, pair.where, 0.0))
            found[key] = before._replace(weight=before.weight + pair.weight)
    return list(found.values())


def _partners(rows: Sequence[EncodedLabelled], seed: int) -> list[int]:
    """For each row another one whose prompt differs, the same for the whole run; itself where there is none."""
    order = np.random.default_rng([seed, 1]).permutation(len(rows)).tolist()
    prompts = [row.prompt_ids.tobytes() for row in rows]
    partners = list(range(len(rows)))
    for at, row in enumerate(order):
        around = (order[(at + step) % len(order)] for step in range(1, len(order)))
        partners[row] = next((other for other in around if prompts[other] != prompts[row]), row)
    return partners


def _stacked(answers: Sequence[Answer], tokens: int) -> Iterator[tuple[list[int], Completions]]:
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
