"""Gradual pruning in a loop of Hugging Face accelerate: accumulation, clipping, checkpoints that hold the masks."""

import tempfile

import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from secateur import Gradual, cubic, magnitude

torch.manual_seed(0)
digits = load_digits()
images, labels = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
train = DataLoader(TensorDataset(images[:1400], labels[:1400]), batch_size=32, shuffle=True)

accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, mixed_precision="bf16")
model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
model, optimizer, train = accelerator.prepare(model, optimizer, train)

pruner = Gradual(model, magnitude, cubic(0.0, 0.9), 22, 110, 11, optimizer=optimizer)
accelerator.register_for_checkpointing(pruner)  # save_state and load_state take the masks along

with tempfile.TemporaryDirectory() as folder:
    for epoch in range(8):
        for inputs, targets in train:
            with accelerator.accumulate(model):
                loss = nn.functional.cross_entropy(model(inputs), targets)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                pruner.step()
        if epoch == 5:
            accelerator.save_state(folder)
            saved = pruner.steps
    masks = pruner.masks
    accelerator.load_state(folder)
    assert pruner.steps == saved

print(f"{masks} after {saved} steps and more")
with torch.no_grad():
    accuracy = (model(images[1400:]).argmax(1) == labels[1400:]).float().mean().item()
print(f"accuracy {accuracy:.1%}")
assert masks.sparsity > 0.899
