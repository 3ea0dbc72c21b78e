"""Preference training: a policy learns from pairs or labelled completions, without a reward model in between."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any, ClassVar, Literal

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from pydantic import Field, model_validator

from mlxft.config import Config, Settings
from mlxft.data.dataset import (
    Counts,
    EncodedCompletion,
    EncodedLabelled,
    EncodedPair,
    Slot,
    encode_labelled,
    encode_pairs,
    length,
)
from mlxft.distributed import assign, current
from mlxft.errors import ConfigError, DataError
from mlxft.model.cpu import as_trained
from mlxft.model.frozen import FrozenModels, FrozenSource, Reference
from mlxft.model.layers import probing
from mlxft.model.logits import row_sums
from mlxft.model.memory import Outline
from mlxft.model.prefix import Completions
from mlxft.objectives import functional as F
from mlxft.objectives.base import MakesStep, MicroBatch, Step, Terms
from mlxft.objectives.pairs import (
    CompletionObjective,
    _Row,
    check_completion_recipe,
    completions_of,
    encode_splits,
    halves,
    implicit_rewards,
    micro_batch,
    stack,
    stack_pairs,
)
from mlxft.text import counted

REFERRED = ("dpo", "ipo", "hinge", "kto")  # losses that compare with the policy before training
SMOOTHED = ("dpo", "cpo")


class PreferenceSettings(Settings):
    """The section `preference`."""

    loss: Literal["dpo", "ipo", "hinge", "simpo", "orpo", "cpo", "kto"] = Field(
        "dpo",
        description="The loss. ipo, simpo and orpo take the mean over a completion's tokens, the others their sum.",
    )
    beta: float | None = Field(
        None,
        gt=0,
        description="How strongly the policy is held to the reference (ipo: the wanted margin is 1 / (2 beta) nats a "
        "token); orpo: weight of the odds ratio. Default 0.1, simpo 2.",
    )
    label_smoothing: float | None = Field(
        None, ge=0, lt=0.5, description="dpo, cpo: assumed share of pairs with swapped labels; default 0."
    )
    gamma: float | None = Field(None, ge=0, description="simpo: target margin; default 1.")
    nll: float | None = Field(
        None,
        ge=0,
        description="Weight of the chosen completion's mean NLL; default 1 for orpo and cpo, else 0.",
    )
    good_weight: float | None = Field(None, gt=0, description="kto: weight of a good completion; default 1.")
    bad_weight: float | None = Field(None, gt=0, description="kto: weight of a bad completion; default 1.")
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
        """Return `beta`, or the loss's default."""
        return self.beta if self.beta is not None else 2.0 if self.loss == "simpo" else 0.1

    @property
    def imitation(self) -> float:
        """Return `nll`, or the loss's default."""
        return self.nll if self.nll is not None else 1.0 if self.loss in ("orpo", "cpo") else 0.0


@dataclass(frozen=True, kw_only=True)
class PairBatch(Completions):
    """n pairs, the chosen completions before the rejected ones.

    Attributes:
        weights: (n,) of the pairs.
        reference: (N,) log-probabilities by the reference; None where the loss reads none.
    """

    weights: mx.array
    reference: mx.array | None = None


@dataclass(frozen=True, kw_only=True)
class KTOBatch(Completions):
    """B completions, each good or bad.

    Attributes:
        good, weights: (B,) 1 for good ones, else 0; and the weight of each.
        point: () the step's reference point.
        reference: (N,) log-probabilities by the reference.
    """

    good: mx.array
    weights: mx.array
    point: mx.array
    reference: mx.array | None = None


class Preference(CompletionObjective[_Row]):
    """Losses on pairs or, for KTO, on labelled completions, as the recipe's loss says."""

    sections: ClassVar[dict[str, type[Settings]]] = {"preference": PreferenceSettings}
    learning_rate = 1e-6  # of full fine-tuning, as TRL's DPOConfig; these losses move fast

    def __new__(cls, config: Config, tokenizer: Any) -> Preference[_Row]:
        kto = config.section("preference", PreferenceSettings).loss == "kto"
        return object.__new__((_Single if kto else _Pairs) if cls is Preference else cls)  # type: ignore[arg-type]

    def __init__(
        self,
        config: Config,
        tokenizer: Any,
        rows: Sequence[_Row],
        counts: Counts,
        valid: Sequence[_Row],
        per_row: int,
    ) -> None:
        self.settings = config.section("preference", PreferenceSettings)
        super().__init__(config, tokenizer, rows, counts, valid, per_row)  # type: ignore[arg-type]
        if self.settings.precompute:
            count = 2 * (len(rows) + len(valid))  # for kto each prompt's own completion, and another prompt's
            what = "completions are computed before the first step"
            self.notes.append(f"the reference's log-probabilities of {count:,} {what}")
        self.reference: Reference | None = None

    @classmethod
    def formats(cls, config: Config) -> Sequence[str]:
        kto = config.section("preference", PreferenceSettings).loss == "kto"
        return ("unpaired", "preference") if kto else ("preference", "ratings")

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
        if self.settings.loss not in REFERRED:
            return
        models = FrozenModels(model, base, self.config.model.path)
        self.reference = Reference(models, models.start("reference", self.config), self.sharing(model))
        if self.settings.precompute:
            key = f"{self.ids_fingerprint()} {base} {self.config.model.model_dump_json()}{self._key()}"
            data = [_stacked(self._referred_to(valid), self.most) for valid in (False, True)]
            self.reference.precompute(data, self.config.run_dir, key)

    def _key(self) -> str:
        """Return what else the reference's numbers depend on."""
        return ""

    def _referred_to(self, valid: bool) -> list[EncodedCompletion]:
        """Return all completions whose log-probabilities by the reference are read."""
        return [completion for row in (self.valid if valid else self.rows) for completion in completions_of(row)]

    def _asked(self, rows: Completions, valid: bool, places: Sequence[int]) -> mx.array:
        """Return the reference's log-probabilities of completions, which have these places among all."""
        assert self.reference is not None
        return self.reference.logprobs(rows, int(valid), places)

    def _refer(self, valid: bool, places: Sequence[int], data: Any) -> Any:
        """Return a batch with the reference's log-probabilities."""
        return replace(data, reference=self._asked(data, valid, places))

    def largest(self, model: nn.Module) -> list[MakesStep]:
        def unasked(make: MakesStep) -> Step:
            # Zeros stand for numbers of the reference that are not precomputed yet.
            with nullcontext() if self.reference is None else self.reference.unasked():
                step = make()
                return replace(step, micro_batches=[batch.finished() for batch in step.micro_batches])

        return [partial(unasked, make) for make in super().largest(model)]

    def held(self) -> list[mx.array]:
        return [] if self.reference is None else self.reference.arrays()


class _Pairs(Preference[EncodedPair]):
    """Losses on pairs."""

    def __init__(self, config: Config, tokenizer: Any) -> None:
        check_completion_recipe(config, self.formats(config))
        settings = config.section("preference", PreferenceSettings)
        if config.data.stream and settings.precompute:
            raise ConfigError("preference.precompute: holds numbers of all rows in memory; leave it or data.stream out")
        rows, counts, valid, _ = encode_splits(config, tokenizer, encode_pairs, EncodedPair)
        loss = settings.loss
        _refuse_ties(chain(rows, valid), loss)
        super().__init__(config, tokenizer, rows, counts, valid, per_row=2)
        self.notes += _idle_margins(rows, loss)

    def make(
        self, model: nn.Module, rows: Sequence[int], width: int, point: mx.array | None, valid: bool
    ) -> MicroBatch:
        if self.reference is not None:
            self.reference.settle()
        pairs = self.chosen_rows(rows, valid)
        stacked = stack_pairs(pairs, width, self.sharing(model))
        weights = mx.array([pair.weight for pair in pairs])
        made = micro_batch(PairBatch(**vars(stacked), weights=weights), pairs, len(stacked.labels))
        places = [2 * i for i in rows] + [2 * i + 1 for i in rows]
        return made if self.reference is None else made.with_finish(partial(self._refer, valid, places))

    def loss(self, model: nn.Module, data: PairBatch) -> Terms:
        s = self.settings
        count = data.lengths.size
        tokens = self.sharing(model).logprobs(data, grad=model.training)
        sums = row_sums(tokens, data.owners, count)
        means = sums / data.lengths
        metrics: dict[str, mx.array] = {}
        w = data.weights
        if data.reference is not None:
            ref = row_sums(data.reference, data.owners, count)
            per = data.lengths if s.loss == "ipo" else mx.ones(count)
            losses = self._referred(*halves(sums / per), *halves(ref / per))
            rewards = F.implicit_reward(sums / per, ref / per, s.strength)
            size = s.strength * (mx.abs(sums) + mx.abs(ref)) / per
            metrics["kl"] = (w * sum(halves(_kl(tokens, data.reference, data))) / 2).sum()
        else:
            rewards = s.strength * (sums if s.loss == "cpo" else means)
            size = mx.abs(rewards)
            losses = self._alone(halves(sums), halves(means))
        if s.imitation:
            chosen = halves(means)[0]
            losses = losses - s.imitation * chosen
            metrics["nll"] = -(w * chosen).sum()
        return Terms({"preference": (w * losses).sum()}, metrics | implicit_rewards(rewards, size, w))

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
    """KTO: completions that are good or bad, each on its own. A pair becomes two of them."""

    def __init__(self, config: Config, tokenizer: Any) -> None:
        check_completion_recipe(config, self.formats(config))
        idle: list[str] = []
        if wrong := [name for name in ("stream", "mix") if getattr(config.data, name)]:
            raise ConfigError(
                f"data.{wrong[0]}: loss kto scores each prompt with the completion of another row, drawn from all rows "
                "of one source in memory; leave it out, or choose a loss on pairs"
            )
        if config.data.format == "preference":
            pairs, counts, others, _ = encode_splits(config, tokenizer, encode_pairs, EncodedPair)
            _refuse_ties(chain(pairs, others), "kto")
            rows, valid = _apart(pairs), _apart(others)
            counts = replace(counts, tokens=sum(map(length, rows)))  # a prompt is read with each of its completions
            idle = _idle_margins(pairs, "kto")
        else:
            labelled, counts, held_out, _ = encode_splits(config, tokenizer, encode_labelled, EncodedLabelled)
            rows, valid = list(labelled), list(held_out)
        super().__init__(config, tokenizer, rows, counts, valid, per_row=1)
        self.notes += idle
        good = sum(row.label for row in rows)
        if not 0 < good < len(rows):
            self.notes.append(f"all completions are {'good' if good else 'bad'}: there is no contrast to learn from")
        self._partners = [_partners(rows, config.run.seed), _partners(valid, config.run.seed)]
        if self._partners[0] == list(range(len(rows))):
            self.notes.append("all rows have one prompt: kto's reference point, of other prompts' completions, is 0")

    def _key(self) -> str:
        return f" {self.config.run.seed}"

    def _referred_to(self, valid: bool) -> list[EncodedCompletion]:
        count = len(self.valid if valid else self.rows)
        return [*super()._referred_to(valid), *(self._mismatched(i, valid) for i in range(count))]

    def _mismatched(self, row: int, valid: bool) -> EncodedCompletion:
        """Return a row's prompt with another row's completion, cut to data.max_length."""
        rows = self.valid if valid else self.rows
        prompt, reply = rows[row].prompt_ids, rows[self._partners[valid][row]].completion_ids
        return EncodedCompletion(prompt, reply[: max(1, self.config.data.max_length - len(prompt))])

    def reference_point(self, model: nn.Module, slots: Sequence[Slot], valid: bool) -> mx.array:
        """Return the current policy's mean log-ratio of other prompts' completions (Ethayarajh et al. 2024)."""
        assert self.reference is not None
        self.reference.settle()
        every = len(self.valid if valid else self.rows)
        rows = [i for slot in slots for i in slot.rows if self._partners[valid][i] != i]
        ranks = current()
        total = mx.array(0.0)
        with probing(model):
            batches = list(_stacked([self._mismatched(i, valid) for i in rows], self.most))
            owners = assign([batch.ids.size for _, batch in batches], ranks.weights)
            for (places, batch), counts in ranks.own(batches, owners):
                ref = self._asked(batch, valid, [every + rows[i] for i in places])
                now = as_trained(partial(self.sharing(model).logprobs, batch, grad=False))
                total = total + counts * (now - ref).sum()
                mx.async_eval(total)  # one batch's activations at a time; the number stays on the device
        if ranks.size > 1:
            total = mx.array(math.fsum(ranks.gather(float(total))))
        return mx.maximum(total / max(1, len(rows)), 0.0)

    def make(
        self, model: nn.Module, rows: Sequence[int], width: int, point: mx.array | None, valid: bool
    ) -> MicroBatch:
        assert point is not None
        labelled = self.chosen_rows(rows, valid)
        stacked = stack([completions_of(row)[0] for row in labelled], width)
        data = KTOBatch(
            **vars(stacked),
            good=mx.array([float(row.label) for row in labelled]),
            weights=mx.array([row.weight for row in labelled]),
            point=point,
        )
        made = micro_batch(data, labelled, len(data.labels))
        return made.with_finish(partial(self._refer, valid, list(rows)))

    def loss(self, model: nn.Module, data: KTOBatch) -> Terms:
        s = self.settings
        assert data.reference is not None
        count = data.lengths.size
        tokens = self.sharing(model).logprobs(data, grad=model.training)
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
        """Add rewards_chosen and rewards_rejected, each over the completions of its kind."""
        found = {k: v for k, v in means.items() if "/" not in k}
        if share := means["good/share"]:
            found["rewards_chosen"] = means["good/chosen"] / share
        if share < 1:
            found["rewards_rejected"] = means["good/rejected"] / (1 - share)
        return found


def _kl(tokens: mx.array, reference: mx.array, data: Completions) -> mx.array:
    """Return (B,) estimates of each completion's KL to the reference, summed over its tokens.

    Second order in the log-ratio, since neither policy has sampled the data's completions.
    """
    return row_sums(F.kl(mx.stop_gradient(tokens), reference, "k2"), data.owners, data.lengths.size)


def _refuse_ties(rows: Iterable[EncodedPair], loss: str) -> None:
    """Raise DataError for ties, which this loss cannot learn from."""
    ties = [row.where for row in rows if row.tie]
    if ties:
        more = f" and {len(ties) - 5} more" if len(ties) > 5 else ""
        raise DataError(
            f"{', '.join(ties[:5])}{more}: is a tie, which loss {loss} cannot learn from; leave ties out, or train a "
            "reward model (objective: reward), which can"
        )


def _idle_margins(rows: Sequence[EncodedPair], loss: str) -> list[str]:
    """Return a note if rows have margins, which the loss ignores."""
    margins = sum(row.margin is not None for row in rows)
    return [counted(margins, f"rows have a margin, which loss {loss} does not use")] if margins else []


def _apart(pairs: Sequence[EncodedPair]) -> list[EncodedLabelled]:
    """Return the completions of pairs, each once with the sum of its pairs' weights."""
    found: dict[Any, EncodedLabelled] = {}
    for pair in pairs:
        for (prompt, reply), label in zip(completions_of(pair), (True, False)):
            key = (pair.where, reply.tobytes(), label)
            before = found.get(key, EncodedLabelled(prompt, reply, label, pair.where, 0.0))
            found[key] = before._replace(weight=before.weight + pair.weight)
    return list(found.values())


def _partners(rows: Sequence[EncodedLabelled], seed: int) -> list[int]:
    """Return for each row another row whose prompt differs, itself where there is none; fixed by the seed."""
    order = np.random.default_rng([seed, 1]).permutation(len(rows)).tolist()
    prompts = [row.prompt_ids.tobytes() for row in rows]
    partners = list(range(len(rows)))
    for at, row in enumerate(order):
        around = (order[(at + step) % len(order)] for step in range(1, len(order)))
        partners[row] = next((other for other in around if prompts[other] != prompts[row]), row)
    return partners


def _stacked(completions: Sequence[EncodedCompletion], tokens: int) -> Iterator[tuple[list[int], Completions]]:
    """Yield batches of completions of like length, with their indices: none larger than those that are trained on."""
    sizes = [len(completion.prompt) + len(completion.reply) for completion in completions]
    places: list[int] = []
    for i in sorted(range(len(completions)), key=sizes.__getitem__):
        if places and (len(places) + 1) * sizes[i] > tokens:
            yield places, stack([completions[j] for j in places])
            places = []
        places.append(i)
    if places:
        yield places, stack([completions[j] for j in places])
