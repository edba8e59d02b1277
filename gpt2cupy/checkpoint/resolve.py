"""From a name to a local path: embedded model, folder, llm.c file, alias or hub id."""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import CheckpointError, shown
from .stored import unreadable

EMBEDDED = {"shakespeare": Path(__file__).parent.parent / "models" / "shakespeare"}
ALIASES = {
    "gpt2": "openai-community/gpt2",
    "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-large": "openai-community/gpt2-large",
    "gpt2-xl": "openai-community/gpt2-xl",
    "distilgpt2": "distilbert/distilgpt2",
}
# What loading reads; repositories hold other frameworks' weights too.
_WANTED = [
    *(
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "model-*.safetensors",
        "model.safetensors.index.json",
    ),
    *("tokenizer.json", "tokenizer_config.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "encoder.json", "vocab.bpe"),
]
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


def resolve(name: str, revision: str | None) -> Path:
    """The folder or file that holds the checkpoint, downloaded if it is on the hub.

    A folder called like an alias goes before the alias, as in Hugging Face;
    nothing goes before the embedded model.
    """
    path = EMBEDDED.get(name) or _local(name)
    if path is not None:
        if revision is not None:
            raise CheckpointError(
                f"revision {shown(revision)} means nothing for local files",
                where=name,
                remedy="Only models of the hub have revisions; leave it out.",
            )
        return path
    repository = ALIASES.get(name, name)
    if not _HUB_ID.fullmatch(repository) or name.startswith("."):
        raise CheckpointError(
            f"there is no folder or file {shown(name)} and no model of that name",
            where="name_or_path",
            remedy=f"Known names: {', '.join([*EMBEDDED, *ALIASES])}; or a hub id owner/model.",
        )
    return _download(repository, revision)


def _local(name: str) -> Path | None:
    try:
        path = Path(name).expanduser()
        return path if name and path.exists() else None
    except (OSError, RuntimeError, ValueError) as error:
        raise unreadable(Path(name), error) from error


def _download(repository: str, revision: str | None) -> Path:
    """A folder of the hub's cache; the hub's own settings (HF_*) decide how it is filled."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=_WANTED))
    except Exception as error:
        # The hub's client lets errors of its HTTP library and of the disk through.
        what, remedy = _explain(error, repository, revision)
        raise CheckpointError(what, where=repository, remedy=remedy) from error


def _explain(error: Exception, repository: str, revision: str | None) -> tuple[str, str]:
    """What went wrong at the hub, and the remedy."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        page = f"https://huggingface.co/{repository}"
        return "the model is gated", f"Ask for access at {page}, then run: hf auth login."
    if isinstance(error, errors.RepositoryNotFoundError):
        remedy = "Check the name; for a private model run: hf auth login."
        return "the hub has no such model, or it is private", remedy
    if isinstance(error, errors.RevisionNotFoundError):
        return (
            f"there is no revision {shown(revision)}",
            "Give a branch, a tag or a commit, or none.",
        )
    if isinstance(error, errors.LocalEntryNotFoundError):
        return (
            "the model is not in the cache and the hub cannot be reached",
            "Check the network and HF_HUB_OFFLINE, or download the folder elsewhere and give its "
            "path; the model 'shakespeare' needs no network.",
        )
    text = (str(error).strip() or repr(error)).splitlines()[0]
    remedy = "Check the network and the disk, or download the folder and give its path."
    return f"the hub did not give the model: {text}", remedy
