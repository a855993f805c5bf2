#!/usr/bin/env bash
# peft 0.21.2: the exact name of one dense map puts an adapter on the experts of every block, and none on that map.
#
# Guess: target_modules=["model.layers.0.mlp.down_proj"] names one module, so that module gets the adapter and nothing
# else does. Seen, for DeepSeek-V3 in transformers 5: peft takes any target that ends in .down_proj for the former name of
# the fused experts, drops it, and adapts `experts.down_proj` wherever there is one. Block 0 of DeepSeek-V3 is dense: its
# own map, the only one that was named, gets nothing; the experts of blocks 1 and 2 get an adapter each. The shared
# expert of block 1, named exactly, ends in the same way. No message says so; the configuration that is saved says
# target_parameters={'down_proj'}.
#
# Who has one: anyone who adapts named layers of DeepSeek, GLM-4-MoE, ERNIE 4.5 or Qwen3-Next. Look at which parameters
# require a gradient after get_peft_model.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 transformers==5.23.0 peft==0.21.2
cat > "$folder/names.py" <<'PYTHON'
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, DeepseekV3Config

config = DeepseekV3Config(
    vocab_size=300, hidden_size=32, intermediate_size=64, moe_intermediate_size=16, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=4, n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=2,
    q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8, first_k_dense_replace=1,
)
for name in ("model.layers.0.mlp.down_proj", "model.layers.1.mlp.shared_experts.down_proj"):
    model = AutoModelForCausalLM.from_config(config)
    assert name in dict(model.named_modules())
    adapted = get_peft_model(model, LoraConfig(target_modules=[name]))
    trained = {weight for weight, parameter in adapted.named_parameters() if parameter.requires_grad}
    where = sorted({weight.partition(".lora_")[0].removeprefix("base_model.model.") for weight in trained})
    print(f"asked for {name}, adapted: {', '.join(where)}")
PYTHON
"$folder/venv/bin/python" "$folder/names.py" 2>/dev/null | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
asked for model.layers.0.mlp.down_proj, adapted: model.layers.1.mlp.experts, model.layers.2.mlp.experts
asked for model.layers.1.mlp.shared_experts.down_proj, adapted: model.layers.1.mlp.experts, model.layers.2.mlp.experts
SEEN
