#!/usr/bin/env bash
# transformer-lens 4.3.0: a Falcon with the new decoder (40B, 180B, Falcon 2 11B) cannot be bridged.
#
# Guess: FalconForCausalLM is on the list of supported architectures, so every published Falcon boots. Seen: the bridge
# splits query_key_value into all heads' queries, one key and one value, as Falcon 7B (multi_query) has them. The new
# decoder has a key and a value for every group of heads, interleaved, so boot_transformers() raises RuntimeError from
# torch.split. Hooks on model.transformer.h work.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 transformers==5.23.0 transformer-lens==4.3.0
cat > "$folder/falcon.py" <<'PYTHON'
import sys

from tokenizers import Tokenizer, models
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoTokenizer, FalconConfig, FalconForCausalLM, PreTrainedTokenizerFast

sizes = dict(vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, bos_token_id=0, eos_token_id=0)
for name, settings in (
    ("7B's decoder, one key and value", {"multi_query": True}),
    ("new decoder, two keys and values", {"new_decoder_architecture": True, "num_kv_heads": 2}),
):
    folder = f"{sys.argv[1]}/{'new' if 'new' in name else 'old'}"
    FalconForCausalLM(FalconConfig(**sizes, **settings)).save_pretrained(folder)
    inner = Tokenizer(models.WordLevel({"<end>": 0, "a": 1}, unk_token="<end>"))
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", pad_token="<end>").save_pretrained(folder)
    try:
        model = FalconForCausalLM.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        TransformerBridge.boot_transformers(folder, hf_model=model, tokenizer=tokenizer, device="cpu")
        print(f"{name}: boots")
    except RuntimeError as error:
        print(f"{name}: {str(error).partition(' (')[0]}")
PYTHON
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" "$folder/falcon.py" "$folder" 2>/dev/null | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
7B's decoder, one key and value: boots
new decoder, two keys and values: split_with_sizes expects split_sizes to sum exactly to 64
SEEN
