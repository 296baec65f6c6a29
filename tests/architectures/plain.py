"""Modules of plain torch, as users write them, without hints of a library about their layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.architectures.entry import HALVED, NO_EQUAL, ROUTER, TABLE, Architecture, called, noise, seeded, tokens

FAMILY = "plain torch"


class Residual(nn.Module):
    """Two convolutions with batch norm, and a shortcut around them."""

    def __init__(self, num_in: int, num_out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(num_in, num_out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(num_out)
        self.conv2 = nn.Conv2d(num_out, num_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(num_out)
        self.shortcut = nn.Conv2d(num_in, num_out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(y + self.shortcut(x))


class ConvNet(nn.Module):
    """A ResNet of two blocks."""

    def __init__(self, num_channels: int = 3, num_classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Conv2d(num_channels, 8, 3, padding=1)
        self.blocks = nn.Sequential(Residual(8, 8), Residual(8, 16, stride=2))
        self.classifier = nn.Linear(16, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.blocks(self.stem(x)).mean((-2, -1)))


class UNet(nn.Module):
    """A strided convolution down, a transposed one up, and a skip connection."""

    def __init__(self) -> None:
        super().__init__()
        self.inward = nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect")
        self.down = nn.Conv2d(8, 16, 2, stride=2, groups=2)
        self.up = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.outward = nn.Conv2d(16, 3, 3, padding=2, dilation=2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.inward(x))
        return self.outward(torch.cat([x, torch.relu(self.up(torch.relu(self.down(x))))], dim=1))


class Decoder(nn.Module):
    """An embedding, torch's decoder with a memory, and an output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, 16)
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 2, 24, 0.0, batch_first=True), 2)
        self.unembedding = nn.Linear(16, 64)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        return self.unembedding(self.decoder(x, x.flip(1)))


class Recurrent(nn.Module):
    """An embedding, an LSTM and a linear classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, 16)
        self.lstm = nn.LSTM(16, 16, num_layers=2, bidirectional=True, batch_first=True)
        self.classifier = nn.Linear(32, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.classifier(self.lstm(self.embedding(ids))[0].mean(1))


class GAN(nn.Module):
    """A generator and a discriminator, which gives a generated sample two logits: real and fake."""

    def __init__(self, num_latent: int = 8, num_pixels: int = 16) -> None:
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(num_latent, 24), nn.ReLU(), nn.Linear(24, num_pixels))
        self.discriminator = nn.Sequential(nn.Linear(num_pixels, 24), nn.LeakyReLU(0.2), nn.Linear(24, 2))

    def forward(self, latent: Tensor) -> Tensor:
        return self.discriminator(self.generator(latent))


class Experts(nn.Module):
    """A mixture of four MLPs; the router chooses and weighs two for each row."""

    def __init__(self) -> None:
        super().__init__()
        self.top_k = 2
        self.gate = nn.Linear(16, 4, bias=False)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16)) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.gate(x).softmax(-1).topk(self.top_k)
        share = torch.zeros(*x.shape[:-1], 4).scatter(-1, chosen, weights)
        return x + sum(share[..., i, None] * expert(x) for i, expert in enumerate(self.experts))


class TwoTowers(nn.Module):
    """Users and items embedded in one space; the output is the score of every user and item."""

    def __init__(self) -> None:
        super().__init__()
        self.users = nn.Sequential(nn.Embedding(64, 16), nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8))
        self.items = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8))

    def forward(self, users: Tensor, items: Tensor) -> Tensor:
        return self.users(users).mean(1) @ self.items(items).T


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.1, batch_first=True)
    return nn.TransformerEncoder(layer, 2)


IMAGES = noise(3, 3, 8, 8)

PLAIN = [
    Architecture(
        "MLP",
        FAMILY,
        seeded(lambda: nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))),
        noise(3, 16),
        called,
    ),
    Architecture("Convolutional ResNet", FAMILY, seeded(ConvNet), IMAGES, called),
    Architecture(
        "U-Net",
        FAMILY,
        seeded(UNet),
        IMAGES,
        called,
        peft="no: PEFT computes grouped, dilated, transposed and reflecting convolutions otherwise",
        save_warns=NO_EQUAL,
    ),
    Architecture(
        "nn.TransformerEncoder",
        FAMILY,
        seeded(encoder),
        noise(3, 5, 16),
        called,
        peft="no: torch's fast path passes PEFT's layers by in eval",
        save_warns=HALVED,
    ),
    Architecture(
        "nn.TransformerDecoder",
        FAMILY,
        seeded(Decoder),
        tokens(),
        called,
        {"embedding.*": TABLE},
        save_warns=HALVED,
    ),
    Architecture(
        "LSTM classifier",
        FAMILY,
        seeded(Recurrent),
        tokens(),
        called,
        {"embedding.*": TABLE},
        peft="no: PEFT has no recurrent layers",
        save_warns=NO_EQUAL,
    ),
    Architecture("GAN", FAMILY, seeded(GAN), noise(3, 8), called),
    Architecture("Module-list experts", FAMILY, seeded(Experts), noise(8, 16), called, {"gate.*": ROUTER}),
    Architecture(
        "Two towers",
        FAMILY,
        seeded(TwoTowers),
        lambda: tokens("users")() | noise(3, 16, name="items")(),
        called,
        {"users.0.*": TABLE},
    ),
]
