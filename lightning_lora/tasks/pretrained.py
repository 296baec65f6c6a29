"""A pretrained transformers model inside a LightningModule: settings checked at once, weights loaded late."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from torch.optim import Optimizer
from torchmetrics import Metric
from typing_extensions import override

from lightning_lora.batch.token_loss import TokenWeightedLoss
from lightning_lora.checkpoints.verified_io import use_verified_checkpoints
from lightning_lora.errors import TaskSettingError, check_arguments
from lightning_lora.lora.config import LoRAConfig
from lightning_lora.lora.patterns import matches
from lightning_lora.lora.targets.resolve import resolve_targets
from lightning_lora.lora.vocabulary import vocabulary_size
from lightning_lora.memory.building import builds_without_memory
from lightning_lora.memory.other_settings import keep_activations, recompute
from lightning_lora.mixin.held_base import NORMS, autocast_dtype
from lightning_lora.mixin.lora_mixin import LoRAMixin
from lightning_lora.mixin.memory_settings import choices_of, settings_of
from lightning_lora.sharding import clip_gradient_norm
from lightning_lora.step_memory import StepMemory
from lightning_lora.tasks.attention.implementation import DENSE, check_attention
from lightning_lora.tasks.loading import check_dtype, context_length, load_model, read_config, read_tokenizer
from lightning_lora.tasks.optimizer import adamw, check_optimizer, with_schedule
from lightning_lora.tasks.placement import check_loadable, shard_model
from lightning_lora.tasks.quantised_loading import (
    check_quantization,
    check_strategy,
    loading_arguments,
    not_quantised,
    quantise_without_values,
    refuse_plugin,
)
from lightning_lora.tasks.running_mean import RunningMean

if TYPE_CHECKING:  # the module imports torchao, bitsandbytes and peft
    from transformers import PreTrainedModel


class PretrainedTask(LoRAMixin, TokenWeightedLoss):
    """Loads a transformers model in ``configure_model`` and trains it by the learning-rate rule.

    The constructor reads the model's config only: it builds the model without memory and resolves the LoRA settings
    against it, so that a wrong name is refused within a second. Weights are loaded in ``configure_model``. Name
    patterns are relative to the transformers model.

    A subclass sets ``auto_class``, defines the steps, and documents its own settings; it passes the shared ones on as
    ``**settings``.
    """

    auto_class: ClassVar[Any]
    """The transformers class that loads the model, such as ``AutoModelForCausalLM``."""
    new_head: ClassVar[bool] = False
    """Whether the output layer belongs to this task and may be missing from the pretrained weights."""
    # Arguments that are no hyperparameters: a checkpoint holds plain types only.
    _unsaved: ClassVar[tuple[str, ...]] = ()
    # The tokenizer of the latest run; None: the model's own, as it is.
    _trained_tokenizer: Any = None
    _keeps_float32 = " (dtype: float32 keeps float32)"
    step_memory_choices = ("gate", "activation_checkpointing")
    # Whether `use_step_memory` has switched activation checkpointing on.
    _checkpoints = False
    # Given the function that loads the weights, returns the model: arms side by side load one base. None: it is called.
    load_through: Callable[[Callable[[], Any]], Any] | None = None

    def __init__(
        self,
        model: str,
        learning_rate: float = 2e-5,
        lora: LoRAConfig | dict[str, Any] | None = None,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        schedule: str = "constant",
        dtype: str | None = None,
        quantization: str | None = None,
        attn_implementation: str | None = None,
        activation_checkpointing: bool | None = None,
        step_memory: StepMemory | dict[str, Any] | None = None,
    ) -> None:
        """Check the settings and read the model's config.

        Args:
            model: Folder of a model on this machine, or its hub name. Weights must be stored as safetensors.
            learning_rate: The learning rate *of full fine-tuning*. Adapters train at ``lora.lr_multiplier`` times this
                rate; modules trained in full, such as a new head, train at the rate itself.
            lora: LoRA settings. None trains the whole model (full fine-tuning).
            weight_decay: AdamW's weight decay for fully trained parameters. Adapters get none.
            warmup_steps: Optimizer steps over which the learning rate rises linearly from 0.
            schedule: Course of the learning rate after the warm-up: ``"constant"``, ``"linear"`` (down to 0) or
                ``"cosine"`` (down to 0).
            dtype: Type of the base weights: ``"float32"``, ``"bfloat16"`` or ``"float16"``. None takes the type of the
                trainer's precision, and with LoRA in ``bf16-mixed`` or ``16-mixed`` the type that these multiply in;
                modules trained in full stay in float32 there.
            quantization: ``"nf4"`` (4 bits) or ``"int8"`` (8 bits) quantises the base with bitsandbytes while loading;
                ``dtype`` is then the type it computes in. None loads the weights as they are stored.
            attn_implementation: How attention is computed, of those that transformers has: ``"eager"``, ``"sdpa"``,
                ``"flash_attention_2"``, ``"flash_attention_3"``, ``"flex_attention"``. None takes the model's default;
                on a GPU, packed rows then get FlashAttention 2 if it is installed, or else flex attention.
            activation_checkpointing: Whether to keep only the inputs of the model's blocks for the backward pass, and
                compute the rest again there: less memory, a second forward pass. None: as ``step_memory`` says.
            step_memory: What a step keeps in memory to be faster. None: on a GPU `MemoryChoice` chooses what fits.

        Raises:
            ConfigError: If a setting is refused, or the model cannot be found.
            TargetNotFoundError: If a LoRA pattern matches nothing in this model.
        """
        super().__init__(lora=lora, lora_root="model")
        check_optimizer(learning_rate, weight_decay, warmup_steps, schedule)
        check_dtype(dtype)
        check_arguments(PretrainedTask, locals(), TaskSettingError)
        check_attention(attn_implementation)
        self.save_hyperparameters(ignore=self._unsaved)
        self.step_memory = StepMemory.from_dict(step_memory).with_checkpointing(activation_checkpointing)
        settings_of(self)
        self.model_name = str(model)
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.warmup_steps, self.schedule = warmup_steps, schedule
        self.dtype_name = dtype
        self.lora_autocast_base = dtype is None
        self.quantization = quantization
        self.attn_implementation = attn_implementation
        self.mean_loss, self.mean_accuracy = RunningMean(), RunningMean()
        self.model_config = read_config(self.model_name, **self._config_overrides())
        check_quantization(quantization, lora, getattr(self.model_config, "quantization_config", None))
        stored = getattr(self.model_config, "dtype", None)
        self._lora_stored = stored if isinstance(stored, torch.dtype) else torch.float32
        # Tokens of the checkpoint; resize_token_embeddings changes the number in the config.
        self.num_pretrained_tokens = vocabulary_size(self.model_config)
        self.model: PreTrainedModel | None = None
        if self.lora is not None:
            self.lora = self._resolve_lora(LoRAConfig.from_dict(self.lora))

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer in the model's folder or repository."""
        return read_tokenizer(self.model_name)

    @property
    def trained_tokenizer(self) -> Any:
        """The tokenizer to write beside what was trained: that of the latest run, with its chat template."""
        return self.tokenizer if self._trained_tokenizer is None else self._trained_tokenizer

    @property
    def vocab_size(self) -> int:
        """Number of rows of the model's embedding table; resizing the table of a loaded model changes it."""
        config = self.model_config if self.model is None else self.model.config
        return config.get_text_config().vocab_size

    @property
    def context_length(self) -> int | None:
        """Most tokens of a row that the model was made for; None if its config sets no limit."""
        return context_length(self.model_config)

    @override
    def configure_model(self) -> None:
        """Load the base once, adapt it, and shard it if the strategy asks for that."""
        if self.model is not None:
            return
        self._check_trainer()
        self.model = model = self._load() if self.load_through is None else self.load_through(self._load)
        self.use_step_memory(choices_of(self))
        # transformers returns models in eval mode and Lightning leaves them so.
        model.train()
        self.apply_lora()
        self._model_is_whole()
        shard_model(model, self._trainer)

    @override
    def use_step_memory(self, memory: StepMemory) -> None:
        """Train with these choices from now on; those that are open are as if no device told its memory."""
        super().use_step_memory(memory)
        if self.model is not None and (memory.activation_checkpointing is True) is not self._checkpoints:
            self._checkpoints = not self._checkpoints
            (recompute if self._checkpoints else keep_activations)(self.model)

    @override
    def configure_optimizers(self) -> Any:
        """Make AdamW with the parameter groups of the learning-rate rule, and the schedule."""
        groups = self.lora_parameter_groups(self.learning_rate)
        optimizer = adamw(groups, self.learning_rate, self.weight_decay, self.trainer)
        return with_schedule(optimizer, self.schedule, self.warmup_steps, self.trainer)

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
        """Write and read checkpoints with `VerifiedCheckpointIO` unless the Trainer was given another plugin."""
        use_verified_checkpoints(self.trainer)

    @override
    def on_validation_epoch_start(self) -> None:
        """Reset the running means."""
        self._reset_metrics()

    @override
    def on_test_epoch_start(self) -> None:
        """Reset the running means."""
        self._reset_metrics()

    def _reset_metrics(self) -> None:
        """Reset all running metrics.

        This happens at the start of an evaluation, not at its end: ``validate`` runs in inference mode and ``fit`` does
        not, and the fresh tensors must belong to the mode in which they are updated.
        """
        for module in self.children():
            if isinstance(module, Metric):
                module.reset()

    def _model_is_whole(self) -> None:
        """Look at the weights once they are loaded and adapted, before a strategy shards them."""

    def _config_overrides(self) -> dict[str, Any]:
        """Entries of the model's config that this task sets."""
        return {}

    def _resolve_lora(self, config: LoRAConfig) -> LoRAConfig:
        """Resolve the settings against a model without memory; raises what injection would raise later."""
        meta_model = self._meta_model()
        config = dataclasses.replace(config, trainable=self._trainable_patterns(meta_model, config))
        known = config
        if not type(self).__module__.startswith("lightning_lora."):
            # A subclass may build modules of its own later, outside of the model: injection judges the other patterns.
            names = [name for name, _ in meta_model.named_modules()]
            inside = [pattern for pattern in config.trainable if any(matches(name, pattern) for name in names)]
            known = dataclasses.replace(config, trainable=inside)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # injection repeats the warnings, with the real model
            resolve_targets(meta_model, known)
        return config

    def _trainable_patterns(self, meta_model: nn.Module, config: LoRAConfig) -> tuple[str, ...]:
        """Name patterns of the modules to train in full."""
        return tuple(config.trainable)

    def _meta_model(self) -> nn.Module:
        """The model on the meta device, without memory for its weights."""
        with torch.device("meta"):
            return self.auto_class.from_config(self.model_config)

    def _check_trainer(self) -> None:
        refuse_plugin(self)
        if self.quantization is not None or getattr(self.model_config, "quantization_config", None) is not None:
            check_strategy(self._trainer)
        check_loadable(self._trainer)

    @property
    def loading_dtype(self) -> torch.dtype:
        """The type that weights are read in."""
        if self.dtype_name:
            return getattr(torch, self.dtype_name)
        held = autocast_dtype(self._trainer)
        # At once in that type if no weight is to stay in float32; bfloat16 has room for all values of float32.
        if held is torch.bfloat16 and self.lora is not None and not LoRAConfig.from_dict(self.lora).trainable:
            keeps_float32 = any(isinstance(module, NORMS) for module in self._meta_model().modules())
            return torch.float32 if keeps_float32 else torch.bfloat16
        return torch.get_default_dtype()

    def _load(self) -> PreTrainedModel:
        dtype = self.loading_dtype
        if builds_without_memory():
            return self._load_without_values(dtype)
        arguments = {"config": self.model_config, "dtype": dtype, **self._quantised_loading(dtype)}
        if self.attn_implementation is not None:  # None would replace what the config says
            arguments["attn_implementation"] = self.attn_implementation
        return load_model(self.auto_class, self.model_name, new_head=self.new_head, **arguments)

    def _load_without_values(self, dtype: torch.dtype) -> PreTrainedModel:
        """The model as `_load` returns it, for a trace: nothing is read, and weights have no values."""
        counted = {"attn_implementation": self.attn_implementation} if self.attn_implementation in DENSE else {}
        model = self.auto_class.from_config(self.model_config, dtype=dtype, **counted)
        quantization = self._quantised_loading(dtype)
        return quantise_without_values(model, quantization["quantization_config"]) if quantization else model

    def _quantised_loading(self, dtype: torch.dtype) -> dict[str, Any]:
        if self.quantization is None:
            return {}
        trained = LoRAConfig.from_dict(self.lora).trainable if self.lora is not None else ()
        plain = not_quantised(self._meta_model(), trained)
        return loading_arguments(self.quantization, dtype, plain, self._trainer)
