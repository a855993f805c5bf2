#!/usr/bin/env bash
# transformer-lens 4.3.0: booting a bridge over a multimodal model may run pip and change the environment it runs in.
#
# Guess: TransformerBridge.boot_transformers only reads a model. Seen: where the folder's image processor cannot be
# loaded and torchvision is not there, it runs `python -m pip install torchvision -q` (or uv), without a word and
# without a pin. The newest torchvision asks for the newest torch, so a pinned torch is replaced under the running
# process; here 2.13.0 for the CPU became 2.14.1 with CUDA's libraries. A text-only use of the model needs neither.
#
# Here the command is shown, not run. Who has one: a folder of Gemma 3's layout with a tokenizer and no processor.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 transformers==5.23.0 transformer-lens==4.3.0
cat > "$folder/boot.py" <<'PYTHON'
import subprocess
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, models
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, PreTrainedTokenizerFast
from transformer_lens.model_bridge import TransformerBridge

folder = sys.argv[1]
text = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8)
vision = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28,
              patch_size=14)
torch.manual_seed(0)
model = Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4))
model.eval().save_pretrained(folder)
tokens = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
PreTrainedTokenizerFast(tokenizer_object=tokens, unk_token="w0").save_pretrained(folder)

ran = []
subprocess.check_call = lambda command, **_: ran.append([Path(command[0]).name.rstrip("0123456789."), *command[1:]])
tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
TransformerBridge.boot_transformers(folder, hf_model=model, tokenizer=tokenizer, dtype=torch.float32, device="cpu")
print("transformer-lens 4.3.0 ran:", *ran, flush=True)
PYTHON
"$folder/venv/bin/python" "$folder/boot.py" "$folder/model" 2>"$folder/log" | grep '^transformer-lens' | tee "$folder/seen" ||
  { tail -5 "$folder/log"; exit 1; }
diff "$folder/seen" - <<'SEEN'
transformer-lens 4.3.0 ran: ['python', '-m', 'pip', 'install', 'torchvision', '-q']
SEEN
