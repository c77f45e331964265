"""Tiny random models of many architectures: (model, args, kwargs, output) per name, no weights to download.

Sizes are chosen so that no two axes have the same width by accident. Every model gets perturbed norms and
biases, and query/key weights scaled by 8, so that attention is far from uniform and a head cut across its
borders shows in the output.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

Case = tuple[nn.Module, tuple[Any, ...], dict[str, Any], str | None]


class BasicBlock(nn.Module):
    """The residual block of the CIFAR ResNets; a 1×1 convolution where the width changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        same = stride == 1 and inputs == outputs
        self.skip = (
            nn.Identity()
            if same
            else nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Two convolutions and the skip."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.skip(x))


class ResNet(nn.Module):
    """CIFAR ResNet with 6·blocks + 2 layers (ResNet-56 has 9 blocks a stage)."""

    def __init__(self, blocks: int = 2, *, option_a: bool = False) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
        width = 16
        for stage, outputs in enumerate((16, 32, 64)):
            for block in range(blocks):
                layers.append(BasicBlock(width, outputs, 2 if stage and not block else 1))
                if option_a and outputs != width:
                    layers[-1].skip = ShortcutA(outputs - width)
                width = outputs
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Class scores."""
        return self.head(self.body(x).mean((2, 3)))


class ShortcutA(nn.Module):
    """The shortcut without weights of the CIFAR ResNets (option A): every second pixel, channels padded."""

    def __init__(self, more: int) -> None:
        super().__init__()
        self.more = more

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Half the map, more channels."""
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.more // 2, self.more // 2))


class InvertedResidual(nn.Module):
    """MobileNetV2's block: expand 1×1, depthwise 3×3, project 1×1."""

    def __init__(self, inputs: int, outputs: int, stride: int, expand: int) -> None:
        super().__init__()
        hidden = inputs * expand
        self.block = nn.Sequential(
            nn.Conv2d(inputs, hidden, 1, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(inplace=True),
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(inplace=True),
            nn.Conv2d(hidden, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.same = stride == 1 and inputs == outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The block, with its skip where shapes allow."""
        return x + self.block(x) if self.same else self.block(x)


class MobileNet(nn.Module):
    """MobileNetV2 in small."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 12, 3, 2, 1, bias=False),
            nn.BatchNorm2d(12),
            nn.ReLU6(),
            InvertedResidual(12, 16, 1, 2),
            InvertedResidual(16, 16, 1, 4),
            InvertedResidual(16, 24, 2, 4),
            InvertedResidual(24, 24, 1, 4),
            nn.Conv2d(24, 80, 1, bias=False),
            nn.BatchNorm2d(80),
            nn.ReLU6(),
        )
        self.head = nn.Sequential(nn.Dropout(0.2), nn.Linear(80, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Class scores."""
        return self.head(F.adaptive_avg_pool2d(self.body(x), 1).flatten(1))


class DenseNet(nn.Module):
    """Three dense layers that concatenate, a transition, three more."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 1, 1)

        def layer(width: int) -> nn.Sequential:
            return nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 12, 3, 1, 1))

        self.first = nn.ModuleList(layer(16 + 12 * i) for i in range(3))
        self.transition = nn.Conv2d(52, 26, 1)
        self.second = nn.ModuleList(layer(26 + 12 * i) for i in range(3))
        self.norm = nn.BatchNorm2d(62)
        self.head = nn.Linear(62, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Class scores."""
        x = self.stem(x)
        for part in self.first:
            x = torch.cat([x, part(x)], 1)
        x = F.avg_pool2d(self.transition(x), 2)
        for part in self.second:
            x = torch.cat([x, part(x)], 1)
        return self.head(F.relu(self.norm(x)).mean((2, 3)))


class VGG(nn.Module):
    """Convolutions, then a flatten of 4×4 maps into a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 18, 3, 1, 1),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(18, 30, 3, 1, 1),
            nn.BatchNorm2d(30),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(30 * 16, 44), nn.ReLU(), nn.Linear(44, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Class scores."""
        return self.head(self.body(x))


class ShuffleNet(nn.Module):
    """Grouped convolutions, channel shuffle, and a chunk whose halves meet again."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, 1, 1)
        self.group1 = nn.Conv2d(32, 64, 1, groups=4)
        self.norm = nn.BatchNorm2d(64)
        self.group2 = nn.Conv2d(64, 48, 3, 1, 1, groups=4)
        self.branch = nn.Conv2d(24, 24, 3, 1, 1)
        self.head = nn.Linear(48, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Class scores."""
        x = F.relu(self.norm(self.group1(self.stem(x))))
        b, c, h, w = x.shape
        x = x.view(b, 4, c // 4, h, w).transpose(1, 2).reshape(b, c, h, w)
        left, right = self.group2(x).chunk(2, 1)
        x = torch.cat([left, F.relu(self.branch(right))], 1)
        return self.head(x.mean((2, 3)))


class C2f(nn.Module):
    """The block of YOLOv8: split, a chain of bottlenecks, everything concatenated."""

    def __init__(self, inputs: int, outputs: int, n: int) -> None:
        super().__init__()
        self.c = outputs // 2
        self.cv1 = nn.Conv2d(inputs, 2 * self.c, 1)
        self.cv2 = nn.Conv2d((2 + n) * self.c, outputs, 1)
        self.m = nn.ModuleList(
            nn.Sequential(nn.Conv2d(self.c, self.c, 3, 1, 1), nn.SiLU(), nn.Conv2d(self.c, self.c, 3, 1, 1))
            for _ in range(n)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Split, chain, concatenate."""
        y = list(self.cv1(x).chunk(2, 1))
        for block in self.m:
            y.append(y[-1] + block(y[-1]))
        return self.cv2(torch.cat(y, 1))


class Yolo(nn.Module):
    """Two C2f blocks, SPPF-like pooling and an upsampling path."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 20, 3, 2, 1)
        self.c1 = C2f(20, 28, 2)
        self.down = nn.Conv2d(28, 36, 3, 2, 1)
        self.c2 = C2f(36, 44, 1)
        self.pool = nn.Conv2d(44 * 2, 40, 1)
        self.head = nn.Conv2d(68, 10, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Dense class scores."""
        low = self.c1(F.silu(self.stem(x)))
        high = self.c2(F.silu(self.down(low)))
        high = self.pool(torch.cat([high, F.max_pool2d(high, 5, 1, 2)], 1))
        return self.head(torch.cat([F.interpolate(high, scale_factor=2.0, mode="nearest"), low], 1))


class Decoder(nn.Module):
    """GroupNorm, ConvTranspose and PixelShuffle, with a per-channel buffer and an unwrapped parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 24, 3, 1, 1)
        self.norm = nn.GroupNorm(4, 24)
        self.up = nn.ConvTranspose2d(24, 20, 2, 2)
        self.mix = nn.Parameter(torch.randn(20, 28) * 0.2)
        self.shuffle = nn.Sequential(nn.Conv2d(28, 36, 3, 1, 1), nn.PixelShuffle(2))
        self.register_buffer("scale", torch.rand(9, 1, 1) + 0.5)
        self.head = nn.Conv2d(9, 3, 3, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """A larger image."""
        y = F.gelu(self.up(F.silu(self.norm(self.conv(x)))))
        y = (y.permute(0, 2, 3, 1) @ self.mix).permute(0, 3, 1, 2)
        return self.head(self.shuffle(y) * self.scale)


class Recurrent(nn.Module):
    """Embedding, a recurrent layer, a classifier over the last step."""

    def __init__(
        self, kind: type[nn.LSTM] | type[nn.GRU], layers: int = 1, bidirectional: bool = False
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(53, 22)
        self.rnn = kind(22, 30, num_layers=layers, bidirectional=bidirectional, batch_first=True)
        self.head = nn.Linear(60 if bidirectional else 30, 10)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Class scores."""
        return self.head(self.rnn(self.embed(ids))[0][:, -1])


class Encoder(nn.Module):
    """nn.TransformerEncoderLayer twice."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(48, 6, 84, batch_first=True)
        self.embed = nn.Embedding(53, 48)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(48, 10)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Class scores."""
        return self.head(self.body(self.embed(ids)).mean(1))


def _image(size: int = 16) -> torch.Tensor:
    return torch.randn(2, 3, size, size)


def _ids(length: int = 11, vocab: int = 53) -> torch.Tensor:
    return torch.randint(3, vocab, (2, length))


PLAIN: dict[str, Callable[[], Case]] = {
    "resnet": lambda: (ResNet(), (_image(),), {}, None),
    "resnet-option-a": lambda: (ResNet(option_a=True), (_image(),), {}, None),
    "mobilenetv2": lambda: (MobileNet(), (_image(),), {}, None),
    "densenet": lambda: (DenseNet(), (_image(),), {}, None),
    "vgg-flatten": lambda: (VGG(), (_image(),), {}, None),
    "shufflenet": lambda: (ShuffleNet(), (_image(8),), {}, None),
    "c2f-yolo": lambda: (Yolo(), (_image(),), {}, None),
    "decoder": lambda: (Decoder(), (_image(7),), {}, None),
    "transformer-encoder": lambda: (Encoder(), (_ids(),), {}, None),
    "lstm": lambda: (Recurrent(nn.LSTM), (_ids(),), {}, None),
    "lstm-2-bidirectional": lambda: (Recurrent(nn.LSTM, 2, True), (_ids(),), {}, None),
    "gru": lambda: (Recurrent(nn.GRU), (_ids(),), {}, None),
}


PEAKED = ("q_proj", "k_proj", "query", "key", "q_lin", "k_lin", "c_attn", "qkv", "q_b_", "kv_b_", "self_attn")


def perturb_(model: nn.Module) -> nn.Module:
    """Make every norm, bias and statistic non-trivial and attention peaked, in place."""
    with torch.no_grad():
        for name, module in model.named_modules():
            last = name.rsplit(".", 1)[-1].lower()
            peaked = last in ("q", "k") or any(word in last for word in PEAKED)
            for key, value in module.named_parameters(recurse=False):
                if value.dim() == 1:
                    value.add_(torch.randn_like(value) * 0.2)
                elif peaked and "weight" in key:
                    value.mul_(8.0)
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_var is not None:
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 1.5)
    return model


def build(name: str, seed: int = 0) -> Case:
    """The named architecture in eval mode, randomly initialised from `seed`, with example inputs."""
    torch.manual_seed(seed)
    if name in PLAIN:
        model, args, kwargs, output = PLAIN[name]()
    else:
        from zoo_hf import HF  # transformers is loaded only when asked for

        model, args, kwargs, output = HF[name]()
    return perturb_(model.eval()), args, kwargs, output


def names() -> list[str]:
    """Every architecture that `build` knows."""
    from zoo_hf import HF

    return [*PLAIN, *HF]
