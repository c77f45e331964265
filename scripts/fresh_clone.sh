#!/usr/bin/env bash
# A new user's first minutes: clone, run the README's demo, load the result with stock transformers, and, with
# --tests, run the README's test command too. Fails at the first thing that does not work.
set -euo pipefail
source=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

git clone --quiet "$source" "$work/secateur"
cd "$work/secateur"
began=$(date +%s)
make demo
echo "demo, installation included: $(($(date +%s) - began)) s"
test -s secateur-demo/report.html
.venv/bin/python - << 'PYTHON'
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("secateur-demo/wanda-50")
tokenizer = AutoTokenizer.from_pretrained("secateur-demo/wanda-50")
weight = model.transformer.h[0].mlp.c_fc.weight
sparsity = float((weight == 0).float().mean())
assert 0.499 < sparsity < 0.501, sparsity
assert len(tokenizer("Once upon a time").input_ids) < 10
print(f"stock transformers loads the pruned model; c_fc of block 0 has sparsity {sparsity:.4f}")
PYTHON
if [ "${1:-}" = --tests ]; then make test; fi
