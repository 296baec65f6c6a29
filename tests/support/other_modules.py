"""LightningModules other than language models, written as users write them and not around LoRA."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    WhisperConfig,
    WhisperForAudioClassification,
)

from lightning_lora import LoRAMixin
from lightning_lora.mixin.optim import parameter_groups
from tests.architectures.plain import GAN as Networks
from tests.architectures.plain import ConvNet

LEARNING_RATE = 1e-2
SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    # No dropout: adapters must move within a few steps with any seed.
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


CLASSES: dict[str, Any] = {"num_labels": 5}


class Plain(LightningModule):
    """AdamW over all trainable parameters; validation logs the training loss."""

    def loss(self, batch: Any) -> Tensor:
        raise NotImplementedError

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=LEARNING_RATE)


class WithMixin(LoRAMixin, Plain):
    """The same module with the mixin, trained by the learning-rate rule."""

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.lora_parameter_groups(LEARNING_RATE / 10))


class ImageTransformer(Plain):
    """ViT as an image classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.net = ViTForImageClassification(ViTConfig(**SIZES, **CLASSES, image_size=8, patch_size=4)).train()

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images).logits

    def loss(self, batch: Any) -> Tensor:
        images, classes = batch
        return F.cross_entropy(self(images), classes)


class ImageConvNet(ImageTransformer):
    """A small ResNet whose batch norms keep their pretrained statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.net = ConvNet()
        for module in self.net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)


class Speech(WithMixin):
    """Whisper's encoder as a classifier of recordings."""

    def __init__(self, lora: Any) -> None:
        super().__init__()
        self.lora = lora
        sizes: dict[str, Any] = {
            "d_model": 16,
            "encoder_ffn_dim": 24,
            "encoder_layers": 2,
            "encoder_attention_heads": 2,
        }
        sound: dict[str, Any] = {"num_mel_bins": 8, "max_source_positions": 6}
        self.net = WhisperForAudioClassification(
            WhisperConfig(**sizes, **sound, **CLASSES, classifier_proj_size=12)
        ).train()

    def forward(self, features: Tensor) -> Tensor:
        return self.net(features).logits

    def loss(self, batch: Any) -> Tensor:
        features, classes = batch
        return F.cross_entropy(self(features), classes)


class Translation(WithMixin):
    """T5 as a model from one sequence of tokens to another."""

    def __init__(self, lora: Any) -> None:
        super().__init__()
        self.lora = lora
        sizes: dict[str, Any] = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
        tokens: dict[str, Any] = {"vocab_size": 64, "pad_token_id": 0, "decoder_start_token_id": 0}
        self.net = T5ForConditionalGeneration(T5Config(**sizes, **tokens, dropout_rate=0.0)).train()

    def forward(self, batch: Any) -> Tensor:
        source, target = batch
        return self.net(input_ids=source, labels=target).logits

    def loss(self, batch: Any) -> Tensor:
        source, target = batch
        return self.net(input_ids=source, labels=target).loss


class SentenceEncoder(WithMixin):
    """BERT's mean over a sentence, trained so that a sentence is nearest to its reversed self in the batch."""

    def __init__(self, lora: Any) -> None:
        super().__init__()
        self.lora = lora
        self.net = BertModel(BertConfig(**SIZES, vocab_size=64), add_pooling_layer=False).train()

    def forward(self, ids: Tensor) -> Tensor:
        return F.normalize(self.net(ids).last_hidden_state.mean(1), dim=-1)

    def loss(self, batch: Any) -> Tensor:
        one, other = batch
        scores = self(one) @ self(other).T / 0.1
        return F.cross_entropy(scores, torch.arange(len(scores)))


class Adversaries(LoRAMixin, LightningModule):
    """A GAN: two networks, two optimizers, and manual optimization."""

    def __init__(self, lora: Any) -> None:
        super().__init__()
        self.lora = lora
        self.automatic_optimization = False
        self.net = Networks()

    def forward(self, latent: Tensor) -> Tensor:
        return self.net(latent)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        latent, real = batch
        for_generator, for_discriminator = self.optimizers()  # pyright: ignore[reportGeneralTypeIssues]
        made = self.net.generator(latent)
        fooled = F.cross_entropy(self.net.discriminator(made), torch.zeros(len(made), dtype=torch.long))
        for_generator.zero_grad()
        self.manual_backward(fooled)
        for_generator.step()
        judged = self.net.discriminator(torch.cat([real, made.detach()]))
        is_made = torch.arange(2).repeat_interleave(len(real))
        for_discriminator.zero_grad()
        self.manual_backward(F.cross_entropy(judged, is_made))
        for_discriminator.step()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_score", self(batch[0])[:, 0].mean())

    def configure_optimizers(self) -> Any:
        networks = (self.net.generator, self.net.discriminator)
        return [torch.optim.Adam(parameter_groups(network, LEARNING_RATE)) for network in networks]


class ManyLosses(Plain):
    """One body with two heads: the class of a row, and a reconstruction of the row."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(16, 24), nn.ReLU())
        self.classify, self.rebuild = nn.Linear(24, 5), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        body = self.body(x)
        return self.classify(body), self.rebuild(body)

    def loss(self, batch: Any) -> Tensor:
        x, classes = batch
        logits, rebuilt = self(x)
        losses = {"class": F.cross_entropy(logits, classes), "rebuilding": F.mse_loss(rebuilt, x)}
        self.log_dict(losses)
        return losses["class"] + 0.5 * losses["rebuilding"]
