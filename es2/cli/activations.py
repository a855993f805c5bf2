"""What `es2 import --activations` does."""

from __future__ import annotations

from es2.cli.prompt_options import read_prompts
from es2.cli.terminal import emit, out, progress


def import_embeddings(file: str, prompts: str, json_: bool) -> None:
    """Take in embeddings that were read elsewhere as an activation set, and analyse them."""
    from es2.workflow.activation_import import import_activations

    prompt_set = read_prompts(prompts)
    with progress() as report:
        activations, analysis = import_activations(file, prompt_set, report)
    document = {
        "key": activations.key,
        "path": str(activations.path),
        "model": activations.model,
        "positions": list(activations.positions),
        "n_prompts": activations.n_prompts,
        "n_layers": activations.n_layers,
        "d_model": activations.d_model,
        "recommended": list(analysis.recommended),
    }

    def show() -> None:
        out.print(
            f"{activations.n_prompts} prompts × {activations.n_layers} layers × {activations.d_model} dimensions of "
            f"{activations.model}: {activations.path}",
            soft_wrap=True,
        )
        out.print(analysis.reason)

    emit(document, json_, show)
