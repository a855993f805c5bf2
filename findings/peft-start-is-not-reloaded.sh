#!/usr/bin/env bash
# peft 0.21.2: adapters begun with "pissa_niter_…" or "lora_ga" are another model once saved and loaded.
#
# Guess: save_pretrained and from_pretrained give the model that was saved, whatever init_lora_weights was. Seen: some
# starts take a part of the base's weights into the adapter, and loading takes it out of the base again by making the
# start anew. OLoRA and PiSSA make the same one. The fast PiSSA makes it from other random numbers, and LoRA-GA has no
# gradients then and takes nothing out, so that this part counts twice. Nothing is said in either case, and the same
# holds for what is merged.
#
# Who has one: adapter_config.json says so in init_lora_weights. Save them with path_initial_model_for_weight_conversion
# instead, which makes plain LoRA of them.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet peft==0.21.2 torch==2.13.0 transformers==5.23.0 numpy==2.4.6
cat > "$folder/reload.py" <<'PYTHON'
import copy
import tempfile

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraGAConfig, preprocess_loraga

torch.manual_seed(0)
base = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Tanh(), torch.nn.Linear(64, 64))
inputs = torch.randn(8, 64)
for start in (True, "olora", "pissa", "pissa_niter_16", "lora_ga"):
    model = copy.deepcopy(base)
    config = LoraConfig(r=4, target_modules=["0", "2"], init_lora_weights=start)
    if start == "lora_ga":
        config.lora_ga_config = LoraGAConfig()
        preprocess_loraga(model, config, lambda: model(inputs).square().mean().backward())
    tuned = get_peft_model(model, config)
    optimizer = torch.optim.SGD([weight for weight in tuned.parameters() if weight.requires_grad], lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        (tuned(inputs) - 1).square().mean().backward()
        optimizer.step()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        tuned.save_pretrained(folder)
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), folder)
        apart = float((loaded(inputs) - tuned(inputs)).norm() / tuned(inputs).norm())
    print(f"{start}: {'the model that was saved' if apart < 1e-4 else 'another model'}", flush=True)
PYTHON
"$folder/venv/bin/python" "$folder/reload.py" 2>/dev/null | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
True: the model that was saved
olora: the model that was saved
pissa: the model that was saved
pissa_niter_16: another model
lora_ga: another model
SEEN
