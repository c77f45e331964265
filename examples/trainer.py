"""Gradual pruning inside transformers' Trainer: a vision transformer learns digits and loses 80 % of its weights."""

import tempfile

import torch
from sklearn.datasets import load_digits
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

from secateur import Gradual, cubic, magnitude, trainer_callback

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
rows = [
    {"pixel_values": image, "labels": int(label)} for image, label in zip(images, digits.target, strict=True)
]

torch.manual_seed(0)
config = ViTConfig(
    image_size=8,
    patch_size=2,
    num_channels=1,
    hidden_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=96,
    num_labels=10,
)
model = ViTForImageClassification(config)


def make(model, optimizer, steps):
    """Called when training begins; Trainer has made its optimizer then."""
    every = max(1, steps // 20)
    return Gradual(model, magnitude, cubic(0.0, 0.8), every, 11 * every, every, optimizer=optimizer)


pruning = trainer_callback(make)
with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        folder,
        num_train_epochs=5,
        per_device_train_batch_size=32,
        gradient_accumulation_steps=1,
        learning_rate=4e-3,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(
        model, arguments, train_dataset=rows[:1400], eval_dataset=rows[1400:], callbacks=[pruning]
    )
    trainer.train()
    predicted = trainer.predict(rows[1400:])

accuracy = (predicted.predictions.argmax(1) == predicted.label_ids).mean()
print(f"accuracy {accuracy:.1%}, {pruning.pruner.masks}")
assert pruning.pruner.done
assert pruning.pruner.masks.sparsity > 0.799
