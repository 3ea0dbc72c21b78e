"""The task of closed_form.py by the last PPOTrainer that TRL had, to compare the time that it takes.

python closed_form_trl.py [--cost .05] [--seed 0]
Runs in an environment of its own: pip install torch==2.13.0 trl==1.12.0. The same model, 150 rollouts of 128, four
updates on each; the rest is TRL's. Seconds are of training, and with the start.
"""

from __future__ import annotations

import argparse
import json
import time
from types import SimpleNamespace
from typing import Any

BEGAN = time.perf_counter()

import torch  # noqa: E402
from common import TINY  # noqa: E402
from datasets import Dataset  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import (  # noqa: E402
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer  # noqa: E402

ROLLOUTS, ROWS, LAST, PLACES, TOKENS, TARGET = 150, 128, 30, 8, 32, 7
# A word more than the answers have: the prompts' pad, which the model can not give.
SIZES: dict[str, Any] = {**TINY, "vocab_size": TOKENS + 1, "pad_token_id": TOKENS}
SIZES |= {"bos_token_id": None, "eos_token_id": None}


def policy() -> Any:
    """Every token is equally likely; the same weights each time."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    model.lm_head = torch.nn.Linear(SIZES["hidden_size"], TOKENS, bias=False)
    torch.nn.init.zeros_(model.lm_head.weight)
    return model


class Share(torch.nn.Module):  # type: ignore[misc]
    """In the form of a reward model: the share of one token so far, the prompt of one token aside."""

    base_model_prefix = "backbone"

    def __init__(self) -> None:
        super().__init__()
        self.nothing = torch.nn.Parameter(torch.zeros(1), requires_grad=False)

    def backbone(self, input_ids: Any, **_: Any) -> Any:
        """Hidden states (B, T, 1)."""
        hits = (input_ids == TARGET).float()
        hits[:, 0] = 0
        return SimpleNamespace(hidden_states=[hits.cumsum(1)[:, :, None] / PLACES])

    def score(self, hidden: Any) -> Any:
        """They are the scores."""
        return hidden


class Keep(TrainerCallback):  # type: ignore[misc]
    """Score and KL of each rollout."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, float]] = []

    def on_log(self, *_: Any, logs: Any = None, **__: Any) -> None:
        """As TRL reports them."""
        if logs and "objective/kl" in logs:
            self.seen.append((logs["objective/scores"], logs["objective/kl"]))


def tokenizer() -> Any:
    """A word a token; pad and EOS are none of the model's."""
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(TOKENS + 2)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": f"w{TOKENS}", "eos_token": f"w{TOKENS + 1}"}
    return PreTrainedTokenizerFast(tokenizer_object=words, padding_side="left", **special)


def main() -> None:
    """One run; its numbers as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--cost", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    value = LlamaForSequenceClassification(LlamaConfig(**SIZES, num_labels=1))
    torch.nn.init.zeros_(value.score.weight)
    data = Dataset.from_dict({"input_ids": [[1]] * ROWS})
    args = PPOConfig(
        output_dir="closed-form-trl",
        per_device_train_batch_size=ROWS,
        local_rollout_forward_batch_size=ROWS,
        gradient_accumulation_steps=1,
        total_episodes=ROWS * ROLLOUTS,
        learning_rate=1e-3,
        lr_scheduler_type="linear",
        kl_coef=asked.cost,
        vf_coef=0.5,
        temperature=1.0,
        response_length=PLACES,
        num_sample_generations=0,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        seed=asked.seed,
    )
    keep = Keep()
    roles = {"model": policy(), "ref_model": policy(), "reward_model": Share(), "value_model": value}
    trainer = PPOTrainer(
        args=args, processing_class=tokenizer(), train_dataset=data, eval_dataset=data, callbacks=[keep], **roles
    )
    started = time.perf_counter()
    trainer.train()
    ended = time.perf_counter()
    score, kl = (sum(column) / LAST for column in zip(*keep.seen[-LAST:]))
    times = {"seconds": ended - started, "with_start": ended - BEGAN}
    print(json.dumps({"J": score - asked.cost * kl, "score": score, "kl": kl, **times}))


if __name__ == "__main__":
    main()
