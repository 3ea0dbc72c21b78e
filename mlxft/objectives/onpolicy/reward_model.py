"""A reward run as a source of rewards: a role on the policy's base, or a model of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
from mlx.utils import tree_flatten

from mlxft.data.encode import Ids, Reply
from mlxft.data.formats import tools_of
from mlxft.errors import ConfigError, RewardError
from mlxft.model.adapters import base_noted, load_with_adapter, read_adapter_config
from mlxft.model.fingerprint import fits_base
from mlxft.model.heads import find_head, load_head, read_head
from mlxft.model.load import base_fingerprint
from mlxft.model.load import load as load_model
from mlxft.model.logits import Split
from mlxft.model.random import probing
from mlxft.model.roles import Roles
from mlxft.model.scorer import Scorer
from mlxft.model.source import resolve
from mlxft.recipe import load_config
from mlxft.text import home_path

if TYPE_CHECKING:
    from mlxft.objectives.onpolicy.rewards import Item

ROLE = "reward"


@dataclass(frozen=True)
class RewardRun:
    """A reward run on the disk.

    Attributes:
        folder: its adapter, or its whole model.
        chat: whether its prompts and answers went through the chat template.
        mean, std: of its scores on its validation rows, None where it had none.
    """

    folder: Path
    chat: bool
    mean: float | None
    std: float | None


def find_reward_run(path: str, normalize: bool) -> RewardRun:
    """The reward run that `rewards.adapter` names; nothing is loaded but its head's file.

    Raises:
        ConfigError: not there, no reward run, or `normalize` and it stored no mean and standard deviation.
        ModelError: its head can not be read.
    """
    place = home_path(path)
    file = find_head(path)
    if file is None:
        if not place.exists():
            raise ConfigError(f"rewards.adapter: no such run or folder: {path}")
        raise ConfigError(
            f"rewards.adapter: {path} has no head: not a reward run, or one without a result yet; name a run of "
            "objective: reward"
        )
    about = read_head(file).about
    noted = about.get("reward", {})
    mean, std = noted.get("mean"), noted.get("std")
    if normalize and (mean is None or not std):
        seen = f"its std is {std}" if std is not None else "it was trained without data.valid"
        raise ConfigError(
            f"rewards.normalize: {path} has no mean and standard deviation to normalise by: {seen}; leave normalize out"
        )
    return RewardRun(file.parent, reads_chat(place, about), mean, std)


def reads_chat(folder: Path, about: dict[str, Any]) -> bool:
    """Whether a reward model was trained on texts as turns of the chat template: its head says so, or else its run.

    Args:
        folder: the run, its adapter, or a model.
        about: noted with the head; before heads noted it, the run alone knew.
    """
    runs = [place for place in (folder, folder.parent) if (place / "config.yaml").is_file()]
    template = about.get("template") or (
        load_config(runs[0] / "config.yaml", looked_at=True).data.template if runs else "auto"
    )
    return bool(template == "auto")


class RewardModel:
    """A reward run ready to score.

    Args:
        roles: of the policy's model; the role "reward" comes to it where the run is of the same base.
        split: of that model.
        fingerprint, base: of the policy's base, and its name.
    Attributes:
        role: its name among `roles`; None: it is a model of its own.
    Raises:
        ModelError: it can not be loaded.
    """

    def __init__(
        self, run: RewardRun, tokenizer: Any, roles: Roles, split: Split, fingerprint: str | None, base: str | None
    ) -> None:
        self.role: str | None = None
        self._roles = roles
        moments = (run.mean, run.std)
        if same_base(run.folder, fingerprint, base):
            role = roles.load(ROLE, run.folder, fingerprint)
            mx.eval(roles.weights(ROLE), role.head.weight if role.head else [])
            self.role = ROLE
            self._scorer = Scorer(split, tokenizer, run.chat, *moments)
            return
        if (run.folder / "adapter_config.json").is_file():
            loaded = load_with_adapter(run.folder, run.folder, {})
        else:
            loaded = load_model(str(run.folder))
        own = Split(loaded.model)
        load_head(own, run.folder / "head.safetensors", base_fingerprint(loaded))
        loaded.model.freeze()
        loaded.model.eval()
        mx.eval(loaded.model.parameters())
        self._scorer = Scorer(own, loaded.tokenizer, run.chat, *moments)

    def held(self) -> list[mx.array]:
        """Its arrays: of its role, or of the model that it is."""
        if self.role is None:
            return [value for _, value in tree_flatten(self._scorer.split.model.parameters())]
        head = self._roles[self.role].head
        return [*self._roles.weights(self.role).values(), *([head.weight] if head is not None else [])]

    def score(self, items: Sequence[Item], tokens: int) -> list[float]:
        """Scores of completions, in batches of at most `tokens` tokens.

        Raises:
            DataError: a completion can not be encoded for the model.
            RewardError: a score that is no number.
        """
        if self.role is not None:
            answers = [Reply(item.prompt_ids, self._sampled(item)) for item in items]
            with probing(self._roles.model), self._roles.use(self.role):
                scores = self._scorer.scores(answers, tokens)
        else:
            scores = self._scorer.scores([self._encode(item) for item in items], tokens)
        for item, score in zip(items, scores):
            if score - score != 0:  # NaN or infinite
                raise RewardError(f"rewards.adapter: {item.where}: the reward model's score is {score}")
        return scores

    def _sampled(self, item: Item) -> Ids:
        """A completion's own ids; of one that a stop text ended those of the text before it, ended as answers are."""
        ended = item.finished and item.reply_ids[-1] not in self._scorer.tokenizer.eos_token_ids
        return self._encode(item).reply if ended else item.reply_ids

    def _encode(self, item: Item) -> Reply:
        """Prompt and completion as this model's own tokenizer and template have them."""
        scorer = self._scorer
        prompt = item.prompt if item.asked is None else item.asked
        if not isinstance(prompt, str) and not (scorer.chat and scorer.tokenizer.has_chat_template):
            prompt = item.prompt
        reply: Any = item.completion
        if not isinstance(prompt, str):
            reply = {"role": "assistant", "content": reply}
        found = scorer.encode(prompt, reply, item.where, tools_of(item.row))
        # The token that ends an answer says that it is complete.
        return found if item.finished else Reply(found.prompt, found.reply[:-1])


def same_base(folder: Path, fingerprint: str | None, base: str | None) -> bool:
    """Whether the run can be a role: an adapter, of a base with the same shapes and, as far as is known, weights."""
    if fingerprint is None or not (folder / "adapter_config.json").is_file():
        return False
    recorded = base_noted(read_adapter_config(folder))
    if "fingerprint" not in recorded or not fits_base(recorded["fingerprint"], fingerprint):
        return False
    name = recorded.get("model")
    # A fine-tuned and fused base has the shapes of its origin: on it the reward's adapter would mean something else.
    return base is None or name is None or name == base or _place(name) == _place(base)


def _place(name: str) -> Path:
    return resolve(name, weights=False).resolve()
