"""A pretrained transformers model inside a LightningModule: checked first, loaded late, optimized by one rule."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from safetensors import SafetensorError
from torch import nn
from torch.optim import Optimizer
from torchmetrics import Metric
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig
from typing_extensions import override

from lightning_lora.batch.token_loss import TokenWeightedLoss
from lightning_lora.checkpoints.verified_io import use_verified_checkpoints
from lightning_lora.errors import ConfigError, did_you_mean, first_five
from lightning_lora.hub import offline_hint, prepare_hub
from lightning_lora.lora.config import LoRAConfig
from lightning_lora.lora.patterns import matches_any
from lightning_lora.lora.targets.resolve import resolve_targets
from lightning_lora.lora.targets.roles import module_roles
from lightning_lora.mixin.lora_mixin import LoRAMixin
from lightning_lora.mixin.optim import check_learning_rate
from lightning_lora.mixin.precision import bitsandbytes_plugin
from lightning_lora.sharding import clip_gradient_norm
from lightning_lora.tasks.placement import check_loadable, divide
from lightning_lora.tasks.quantised_loading import check_quantization, check_strategy, quantized_loading

if TYPE_CHECKING:  # the module imports torchao, bitsandbytes and peft
    from transformers import PreTrainedModel

SCHEDULES = ("constant", "linear", "cosine")
DTYPES = ("float32", "bfloat16", "float16")


class PretrainedTask(LoRAMixin, TokenWeightedLoss):
    """Loads a transformers model in ``configure_model`` and trains it by the learning-rate rule.

    Before any weight is read, the model is built without memory and the LoRA settings are resolved against it, so
    that a wrong name costs a second. Name patterns are those of the transformers model.

    Args:
        model: Folder of a model on this machine, or its hub name. Weights are read as safetensors only.
        learning_rate: The learning rate *of full fine-tuning*; adapters train at ``lora.lr_multiplier`` times it.
        lora: LoRA settings, or None for full fine-tuning.
        weight_decay: AdamW's decay of fully trained parameters; adapters have none.
        warmup_steps: Optimizer steps over which the learning rate rises linearly.
        schedule: Learning rate after the warm-up: ``"constant"``, ``"linear"`` or ``"cosine"`` down to zero.
        dtype: Type of the base weights: ``"float32"``, ``"bfloat16"`` or ``"float16"``. None: that of the trainer's
            precision.
        quantization: ``"nf4"`` or ``"int8"`` loads the base in 4 or 8 bits (needs bitsandbytes; ``dtype`` is then the
            type of the arithmetic). None: as it is stored.

    Raises:
        ConfigError: If a setting is refused, or the model cannot be found.
        TargetNotFoundError: If a LoRA pattern matches nothing in this model.
    """

    auto_class: ClassVar[Any]
    # Whether the output layer is this task's own and may be missing from the pretrained weights.
    new_head: ClassVar[bool] = False

    def __init__(
        self,
        model: str,
        learning_rate: float,
        lora: LoRAConfig | dict[str, Any] | None,
        weight_decay: float,
        warmup_steps: int,
        schedule: str,
        dtype: str | None,
        quantization: str | None = None,
    ) -> None:
        super().__init__(lora=lora, lora_root="model")
        check_learning_rate(learning_rate)
        if not isinstance(weight_decay, (int, float)) or not 0 <= weight_decay < math.inf:
            raise ConfigError(f"weight_decay must be a finite number of at least 0, got {weight_decay!r}.")
        if not isinstance(warmup_steps, int) or isinstance(warmup_steps, bool) or warmup_steps < 0:
            raise ConfigError(f"warmup_steps must be an integer of at least 0, got {warmup_steps!r}.")
        if schedule not in SCHEDULES:
            raise ConfigError(
                f"schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}{did_you_mean(schedule, SCHEDULES)}"
            )
        if dtype is not None and dtype not in DTYPES:
            raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}{did_you_mean(dtype, DTYPES)}")
        self.model_name = str(model)
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.warmup_steps = warmup_steps
        self.schedule = schedule
        self.dtype_name = dtype
        self.quantization = quantization
        self.model_config = self._read_config()
        check_quantization(quantization, lora, getattr(self.model_config, "quantization_config", None))
        self.model: PreTrainedModel | None = None
        if self.lora is not None:
            self.lora = self._settle(LoRAConfig.from_dict(self.lora))

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer beside the model."""
        try:
            return AutoTokenizer.from_pretrained(self.model_name)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ConfigError(f"there is no usable tokenizer beside model {self.model_name!r}: {reason}") from error

    @property
    def vocab_size(self) -> int:
        """Rows of the model's embedding table."""
        return self.model_config.get_text_config().vocab_size

    @override
    def configure_model(self) -> None:
        """Load the base once, adapt it, and shard it where the strategy asks for that."""
        if self.model is not None:
            return
        self._check_trainer()
        self.model = self._load()
        # transformers hands models out in eval mode and Lightning leaves them so.
        self.model.train()
        self.apply_lora()
        divide(self.model, self._trainer)

    @override
    def configure_optimizers(self) -> Any:
        """AdamW by the learning-rate rule, fused where the precision allows it."""
        optimizer = torch.optim.AdamW(
            self.lora_parameter_groups(self.learning_rate),
            lr=self.learning_rate,
            betas=(0.9, 0.95),
            weight_decay=self.weight_decay,
            # A fused step unscales gradients itself, which Lightning cannot combine with clipping.
            fused=self.trainer.precision != "16-mixed",
        )
        if self.schedule == "constant" and not self.warmup_steps:
            return optimizer
        steps = int(self.trainer.estimated_stepping_batches)
        if self.warmup_steps >= steps:
            rank_zero_warn(f"warmup_steps={self.warmup_steps}, but the run has {steps} steps: it never leaves warm-up.")
        name = "constant_with_warmup" if self.schedule == "constant" else self.schedule
        from transformers import get_scheduler  # imports torchao, bitsandbytes and peft: not for `fit --help`

        scheduler = get_scheduler(name, optimizer, num_warmup_steps=self.warmup_steps, num_training_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    @override
    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by norm under FSDP1 too, which Lightning refuses."""
        by_norm = gradient_clip_val is not None and gradient_clip_algorithm in (None, "norm")
        if not (by_norm and clip_gradient_norm(self, float(gradient_clip_val or 0))):
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)

    @override
    def setup(self, stage: str) -> None:
        """Write and read checkpoints by `VerifiedCheckpointIO`, where the Trainer was given no other."""
        use_verified_checkpoints(self.trainer)

    @override
    def on_validation_epoch_start(self) -> None:
        """Start the means anew."""
        self._reset_metrics()

    @override
    def on_test_epoch_start(self) -> None:
        """Start the means anew."""
        self._reset_metrics()

    def _reset_metrics(self) -> None:
        """Empty the running metrics.

        Done where an evaluation starts, not where it ends: ``validate`` runs in inference mode, ``fit`` does not, and
        the fresh tensors must belong to the mode that fills them.
        """
        for module in self.children():
            if isinstance(module, Metric):
                module.reset()

    def _model_kwargs(self) -> dict[str, Any]:
        """What this task adds to the model's config."""
        return {}

    def _settle(self, config: LoRAConfig) -> LoRAConfig:
        """Resolve the settings against a model without memory; raises what injection would raise later."""
        skeleton = self._skeleton()
        config = dataclasses.replace(config, trainable=self._trained_modules(skeleton, config))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # injection says it again, with the real model
            resolve_targets(skeleton, config)
        return config

    def _trained_modules(self, skeleton: nn.Module, config: LoRAConfig) -> tuple[str, ...]:
        """Name patterns of the modules to train in full."""
        return tuple(config.trainable)

    def _skeleton(self) -> nn.Module:
        with torch.device("meta"):
            return self.auto_class.from_config(self.model_config)

    def _read_config(self) -> PreTrainedConfig:
        if self._is_path() and not Path(self.model_name).is_dir():
            raise ConfigError(f"model {self.model_name!r} is not a folder on this machine.")
        prepare_hub(self.model_name)
        try:
            return AutoConfig.from_pretrained(self.model_name, **self._model_kwargs())
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ConfigError(
                f"model {self.model_name!r} cannot be used: {reason} Give a folder with config.json and safetensors "
                f"weights, or a hub name.{offline_hint(self.model_name)}"
            ) from error

    def _is_path(self) -> bool:
        # A hub name is "name" or "owner/name"; anything with another shape can only be a path.
        return self.model_name.startswith((".", "/", "~")) or self.model_name.count("/") > 1

    def _check_trainer(self) -> None:
        if bitsandbytes_plugin(self) is not None:
            raise ConfigError(
                f"BitsandbytesPrecision quantises layers as they are built, and transformers then loads plain weights "
                f"into them: drop the plugin and give {type(self).__name__} quantization='nf4' or 'int8'."
            )
        if self._is_quantised:
            check_strategy(self._trainer)
        check_loadable(self._trainer)

    @property
    def _is_quantised(self) -> bool:
        return self.quantization is not None or getattr(self.model_config, "quantization_config", None) is not None

    def _quantized_loading(self, dtype: torch.dtype) -> dict[str, Any]:
        if self.quantization is None:
            return {}
        skeleton = self._skeleton()
        heads = [name for name, role in module_roles(skeleton).items() if role == "head"]
        trained = LoRAConfig.from_dict(self.lora).trainable if self.lora is not None else ()
        plain = [name for name, _ in skeleton.named_modules() if name in heads or matches_any(name, trained)]
        return quantized_loading(self.quantization, dtype, plain, self._trainer)

    def _load(self) -> PreTrainedModel:
        dtype = getattr(torch, self.dtype_name) if self.dtype_name else torch.get_default_dtype()
        try:
            model, loading = self.auto_class.from_pretrained(
                self.model_name,
                config=self.model_config,
                dtype=dtype,
                use_safetensors=True,
                output_loading_info=True,
                **self._quantized_loading(dtype),
            )
        except (OSError, SafetensorError) as error:
            raise ConfigError(
                f"the weights of {self.model_name!r} cannot be read: {str(error).strip().splitlines()[0]} Only "
                f"safetensors files are loaded."
            ) from error
        self._check_complete(model, loading["missing_keys"])
        return model

    def _check_complete(self, model: PreTrainedModel, missing: Iterable[str]) -> None:
        """Transformers fills missing weights with random ones and only logs it; a new head is all we want of that."""
        heads = tuple(f"{name}." for name, role in module_roles(model).items() if role == "head")
        lost = sorted(name for name in missing if not (self.new_head and name.startswith(heads)))
        if lost:
            raise ConfigError(
                f"{self.model_name!r} lacks {len(lost)} weights of a {type(model).__name__} ({first_five(lost)}); they "
                f"would be random."
            )
