#!/usr/bin/env bash
# torch 2.13.0: destroy_process_group() does not free a group that existed when torch.distributed.nn was first imported.
#
# Guess: after destroy_process_group() nothing of the group is left. Seen: the functions of torch.distributed.nn take the
# group of that moment as a default argument. Imported before the group is made, they hold None. Imported while it
# exists (transformers and torch._dynamo import it on first use), they hold the group, and gloo's two threads run until
# the interpreter is torn down. A process that ends in that state now and then aborts after its work is done: "terminate
# called without an active exception", once in about 40 launches of ours.
#
# Who has one: anything that makes the group first and imports models afterwards. Import torch.distributed.nn first.
# Needs Linux (/proc).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cat > "$folder/threads.py" <<'PYTHON'
import sys
from pathlib import Path

import torch.distributed as dist

if sys.argv[1] == "before":
    import torch.distributed.nn
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=0, world_size=1)
if sys.argv[1] == "while":
    import torch.distributed.nn
dist.destroy_process_group()
names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
print(f"imported {sys.argv[1]} the group existed: {names.count('pt_gloo_runloop')} threads of gloo left", flush=True)
PYTHON
for when in before while; do
  "$folder/venv/bin/python" "$folder/threads.py" "$when" "$folder/$when" 2>/dev/null
done | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
imported before the group existed: 0 threads of gloo left
imported while the group existed: 2 threads of gloo left
SEEN
