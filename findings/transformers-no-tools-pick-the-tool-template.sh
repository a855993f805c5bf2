#!/usr/bin/env bash
# transformers 5.23.0: an empty list of tools renders a prompt under the template for tools.
#
# Guess: tools=[] is the same as no tools. Seen: of a model with the named templates `default` and `tool_use`, the second
# is taken whenever tools is not None, so a program that always passes its list of tools, empty here, gets another
# prompt (and other embeddings) than one that passes none, without a warning.
#
# Who meets it: users of command-r, Hermes and other models with a template for tools. Pass `tools or None`.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet transformers==5.23.0 tokenizers==0.23.3 jinja2==3.1.6
cat > "$folder/tools.py" <<'PYTHON'
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]")))
tokenizer.chat_template = {
    "default": "{{ messages[0].content }}",
    "tool_use": "Call one of {{ tools | length }} tools. {{ messages[0].content }}",
}
for tools in (None, []):
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], tools=tools, tokenize=False)
    print(f"tools={tools}: {prompt}", flush=True)
PYTHON
"$folder/venv/bin/python" "$folder/tools.py" 2>/dev/null | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
tools=None: Hello
tools=[]: Call one of 0 tools. Hello
SEEN
