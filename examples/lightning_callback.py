"""Gradual pruning as a Lightning callback; without Lightning, a stand-in of a few lines calls the same hooks."""

import types

import torch
from sklearn.datasets import load_digits
from torch import nn

from secateur import Gradual, LightningCallback, cubic, magnitude

EPOCHS = 6
digits = load_digits()
images, labels = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
torch.manual_seed(0)
network = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))


def make(module, optimizers, steps):
    every = steps // 12
    return Gradual(module, magnitude, cubic(0.0, 0.9), every, 9 * every, every, optimizer=optimizers)


def loss_of(rows):
    return nn.functional.cross_entropy(network(images[rows]), labels[rows])


def with_lightning(lightning, pruning):
    class Module(lightning.LightningModule):
        network = network

        def training_step(self, rows, _):
            return loss_of(rows)

        def configure_optimizers(self):
            return torch.optim.AdamW(network.parameters(), 3e-3)

    rows = torch.utils.data.DataLoader(range(1400), batch_size=64, shuffle=True)
    lightning.Trainer(max_epochs=EPOCHS, callbacks=[pruning], accelerator="cpu", logger=False).fit(
        Module(), rows
    )


def with_stand_in(pruning):
    optimizer = torch.optim.AdamW(network.parameters(), 3e-3)
    trainer = types.SimpleNamespace(
        global_step=0, optimizers=[optimizer], estimated_stepping_batches=22 * EPOCHS
    )
    pruning.on_train_start(trainer, network)
    for number in range(22 * EPOCHS):
        loss_of(torch.randint(1400, (64,))).backward()
        optimizer.step()
        optimizer.zero_grad()
        trainer.global_step += 1
        pruning.on_train_batch_end(trainer, network, None, None, number)


pruning = LightningCallback(make)
try:
    import lightning
except ImportError:
    with_stand_in(pruning)
else:
    with_lightning(lightning, pruning)
print(pruning.pruner)
assert pruning.pruner.masks.sparsity > 0.899
