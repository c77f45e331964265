"""Prune a language model three ways and measure what each costs: magnitude, Wanda, and 2:4 blocks with an update.

Uses the small GPT-2 that comes with the package and text that it writes itself; put any causal language model of
Hugging Face and any text in their place.
"""

import copy
from dataclasses import replace

from secateur import NM, data, evaluate, magnitude, model, prune_, sparsegpt, sparsity, wanda
from secateur.demo.language import model_folder

loaded = model.load(model_folder(), offline=True)
calibration = data.self_generated(loaded.model, loaded.tokenizer, context=128, samples=16, seed=0, batch=16)
text = data.stream(data.read_text("python-docs"), loaded.tokenizer)[:2048]
print(f"{'dense':24} {evaluate.perplexity(loaded.model, text, context=256)}")

recipes = {
    "magnitude, half": (0.5, magnitude),
    "Wanda, half": (0.5, wanda),
    "SparseGPT, 2 of 4 kept": (None, replace(sparsegpt, pattern=NM(2, 4))),
}
for name, (target, recipe) in recipes.items():
    pruned = copy.deepcopy(loaded.model)
    masks = prune_(pruned, target, recipe, data=calibration)
    print(f"{name:24} {evaluate.perplexity(pruned, text, context=256)}")
    assert masks.sparsity == 0.5
print(sparsity(pruned))
