"""What scores completions, in processes of their own with a time limit.

- `exact_answer`: 1 for the right final answer.
- `pattern`: 1 for a completion of the right form.
- `named`: a function of the user's own.
- `model_reward`: a reward model.
- `texts`: completions as texts.
- `pool`: batches of rows to several processes.
- `own_precision`: how a reward in the process that trains computes.
- `process`: a process, seen from the one that trains.
- `worker`: what runs in it.
"""

from lightning_lora.tasks.rl.rewards.exact_answer import ExactAnswer
from lightning_lora.tasks.rl.rewards.model_reward import ModelReward
from lightning_lora.tasks.rl.rewards.named import NamedReward
from lightning_lora.tasks.rl.rewards.pattern import Pattern
from lightning_lora.tasks.rl.rewards.pool import RewardPool

__all__ = ["ExactAnswer", "ModelReward", "NamedReward", "Pattern", "RewardPool"]
