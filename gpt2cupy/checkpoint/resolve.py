"""From a name to a local path: embedded model, folder, llm.c file, alias or hub id."""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import CheckpointError, shown
from .folder import forms, has_weights
from .stored import exists, unreadable

EMBEDDED = {"shakespeare": Path(__file__).parent.parent / "models" / "shakespeare"}
ALIASES = {
    "gpt2": "openai-community/gpt2",
    "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-large": "openai-community/gpt2-large",
    "gpt2-xl": "openai-community/gpt2-xl",
    "distilgpt2": "distilbert/distilgpt2",
}
# What loading reads beside the weights; repositories hold other frameworks' weights too.
_WANTED = [
    *(
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "added_tokens.json",
    ),
    *("special_tokens_map.json", "vocab.json", "merges.txt", "encoder.json", "vocab.bpe"),
    "adapter_config.json",
    *("vocab.txt", "tokenizer.model", "spiece.model"),  # not read: an error names them
]
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


def resolve(name: str, revision: str | None, variant: str | None = None) -> Path:
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
    return _download_model(repository, revision, variant)


def resolve_adapter(name: str) -> Path:
    """The folder of an adapter, downloaded if it is on the hub."""
    path = _local(name)
    if path is None and not _HUB_ID.fullmatch(name):
        raise CheckpointError(
            f"there is no folder {name!r} with an adapter"[:200],
            where="adapter",
            remedy="Pass a folder that PEFT saved, or a hub id owner/adapter.",
        )
    if path is None:
        for weights in ADAPTER_WEIGHTS:
            path = _download(name, None, [ADAPTER_CONFIG, weights])
            if exists(path / weights):
                break
    assert path is not None
    if not exists(path / ADAPTER_CONFIG):
        raise CheckpointError(
            f"the folder has no {ADAPTER_CONFIG}",
            where=str(path),
            remedy="Pass a folder that PEFT's save_pretrained wrote; a whole model is loaded by "
            "its own name.",
        )
    return path


def _local(name: str) -> Path | None:
    try:
        path = Path(name).expanduser()
        return path if name and path.exists() else None
    except (OSError, RuntimeError, ValueError) as error:
        raise unreadable(Path(name), error) from error


def _download_model(repository: str, revision: str | None, variant: str | None) -> Path:
    """The model in the one format that is there, safetensors before pytorch_model.bin."""
    for form in forms(variant):
        weights = [form.single, form.shards, form.index]
        folder = _download(repository, revision, [*_WANTED, *weights])
        if has_weights(folder, form):
            break
    return folder


def _download(repository: str, revision: str | None, wanted: list[str]) -> Path:
    """A folder of the hub's cache; the hub's own settings (HF_*) decide how it is filled."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=wanted))
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
