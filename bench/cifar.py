"""One-shot pruning of a real CIFAR-10 ResNet: accuracy of every method at every sparsity, no retraining.

    python bench/cifar.py --depth 20 --shared ../shared --images 2000

Needs the folder of real models and data, pyarrow and pillow. Calibration: 512 training images.
"""

from __future__ import annotations

import argparse
import copy
import io
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from secateur import evaluate, prune_
from secateur.recipes import METHODS

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Block(nn.Module):
    """Two convolutions beside a shortcut without weights (option A of He et al. 2015)."""

    def __init__(self, channels: int, out: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.stride, self.pad = stride, (out - channels) // 2

    def forward(self, x: Tensor) -> Tensor:
        """Add the shortcut, its channels padded by zeros where they grow."""
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride > 1 or self.pad:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(x + y)


class ResNet(nn.Module):
    """6 n + 2 layers for images of 32 x 32."""

    def __init__(self, depth: int):
        super().__init__()
        n = (depth - 2) // 6
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*[Block(16, 16, 1) for _ in range(n)])
        self.layer2 = nn.Sequential(*[Block(32 if i else 16, 32, 1 if i else 2) for i in range(n)])
        self.layer3 = nn.Sequential(*[Block(64 if i else 32, 64, 1 if i else 2) for i in range(n)])
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of ten classes."""
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.linear(x.mean((2, 3)))


def images(path: Path, count: int, batch: int) -> list[tuple[Tensor, Tensor]]:
    import pyarrow.parquet as parquet
    from PIL import Image

    rows = parquet.read_table(path).slice(0, count)
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(jpeg))) for jpeg in rows["jpeg"].to_pylist()])
    scaled = ((pixels / 255 - MEAN) / STD).transpose(0, 3, 1, 2).astype(np.float32)
    x, y = torch.from_numpy(scaled), torch.tensor(rows["label"].to_pylist())
    return list(zip(x.split(batch), y.split(batch), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--depth", type=int, choices=(20, 56), default=20)
    parser.add_argument("--shared", type=Path, default=Path(__file__).resolve().parents[2] / "shared")
    parser.add_argument("--images", type=int, default=2000, help="of the test set")
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.5, 0.7, 0.8, 0.9])
    parser.add_argument(
        "--methods", nargs="+", default=["magnitude", "global-magnitude", "wanda", "sparsegpt", "alps"]
    )
    args = parser.parse_args()

    dense = ResNet(args.depth).eval()
    weights = args.shared / "models" / f"cifar10_resnet{args.depth}_jpegft" / "model.safetensors"
    dense.load_state_dict(load_file(weights))
    test = images(args.shared / "data" / "images" / "cifar10_jpeg_test.parquet", args.images, 250)
    calibration = images(args.shared / "data" / "images" / "cifar10_jpeg_train.parquet", 512, 128)
    base = evaluate.accuracy(dense, test).value
    print(
        f"ResNet-{args.depth}, first {args.images} test images, {torch.get_num_threads()} thread(s); dense {base:.2%}\n"
    )
    print("| method | " + " | ".join(f"{s:.0%}" for s in args.sparsities) + " | seconds |")
    print("|---|" + "---|" * (len(args.sparsities) + 1))
    for method in args.methods:
        cells, began = [], time.process_time()
        for sparsity in args.sparsities:
            model = copy.deepcopy(dense)
            masks = prune_(model, sparsity, METHODS[method], data=calibration)
            assert abs(masks.sparsity - sparsity) < 1e-5
            cells.append(f"{evaluate.accuracy(model, test).value:.2%}")
        print(f"| {method} | " + " | ".join(cells) + f" | {time.process_time() - began:.0f} |", flush=True)


if __name__ == "__main__":
    main()
