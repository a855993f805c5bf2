"""Data sets of the Hugging Face Hub, read into rows."""

from __future__ import annotations

from pathlib import Path

from es2.core.errors import InputError, MachineError
from es2.prompts.rows import Row
from es2.prompts.tables import read_table


def read_hub_rows(name: str, split: str) -> list[Row]:
    """Rows of a Hub data set, from the Hub's own Parquet copy of it, so that no data set's code runs.

    Args:
        name: `owner/name`.
        split: a split, or `configuration/split`.

    Raises:
        InputError: when there is no such data set or split, or it may not be read.
        MachineError: when the Hub cannot be reached.
    """
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import HFValidationError, HTTPError, RepositoryNotFoundError

    branch = "refs/convert/parquet"
    try:
        files = HfApi().list_repo_files(name, repo_type="dataset", revision=branch)
        wanted = sorted(file for file in files if file.endswith(".parquet") and f"/{split}/" in f"/{file}")
        if not wanted:
            found = sorted({Path(file).parent.name for file in files if file.endswith(".parquet")})
            raise InputError(f"The data set {name!r} has no split {split!r}; it has: {', '.join(found) or 'none'}.")
        rows: list[Row] = []
        for file in wanted:
            local = hf_hub_download(name, file, repo_type="dataset", revision=branch)
            rows += [(f"{file}, {place}", row) for place, row in read_table(Path(local).read_bytes(), file)]
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise InputError(
            f"The Hugging Face Hub has no data set {name!r} that you may read; "
            "check the name, or log in if it is a gated one."
        ) from error
    except (HTTPError, OSError) as error:
        raise MachineError(
            f"The Hugging Face Hub cannot be reached for the data set {name!r} ({type(error).__name__}); "
            "check the network, or download the data set and give the file's path."
        ) from error
    return rows
