#!/usr/bin/env bash
# transformers 5.23.0: one file in additional_chat_templates/ takes away the chat template in tokenizer_config.json.
#
# Guess: a named template is added to the one that is there, so a prompt without a name is rendered as before. Seen: as
# soon as the folder has any template file, the entry in tokenizer_config.json is not read. A tokenizer whose template
# lies there (as most published before 2025 do) then has the named one alone and no default, and apply_chat_template
# raises ValueError.
#
# Who meets it: people who drop a template for tools or documents into a model's folder. Save the template of
# tokenizer_config.json as chat_template.jinja first.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet transformers==5.23.0 tokenizers==0.23.3 jinja2==3.1.6
cat > "$folder/named.py" <<'PYTHON'
import sys
from pathlib import Path

from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

folder = Path(sys.argv[1])
tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]")))
tokenizer.chat_template = "chat: {{ messages[0].content }}"
tokenizer.save_pretrained(folder, save_jinja_files=False)


def say(when):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    try:
        prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=False)
    except ValueError as error:
        prompt = f"ValueError, {str(error).split('!')[0]}"
    print(f"{when}: {prompt}", flush=True)


say("template in tokenizer_config.json alone")
(folder / "additional_chat_templates").mkdir()
(folder / "additional_chat_templates" / "rag.jinja").write_text("rag: {{ messages[0].content }}")
say("and additional_chat_templates/rag.jinja")
(folder / "chat_template.jinja").write_text(tokenizer.chat_template)
say("and chat_template.jinja")
PYTHON
"$folder/venv/bin/python" "$folder/named.py" "$folder/model" 2>/dev/null | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
template in tokenizer_config.json alone: chat: Hello
and additional_chat_templates/rag.jinja: ValueError, This model has multiple chat templates with no default specified
and chat_template.jinja: chat: Hello
SEEN
