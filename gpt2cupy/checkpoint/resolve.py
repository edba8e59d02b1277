"""From a name to a local folder: embedded model, folder, alias or hub id."""

from __future__ import annotations

from pathlib import Path

from ..errors import CheckpointError

EMBEDDED = {"shakespeare": Path(__file__).parent.parent / "models" / "shakespeare"}
ALIASES = {
    "gpt2": "openai-community/gpt2",
    "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-large": "openai-community/gpt2-large",
    "gpt2-xl": "openai-community/gpt2-xl",
    "distilgpt2": "distilbert/distilgpt2",
}
# What a forward pass and a tokenizer need; repositories hold other frameworks' weights too.
_WANTED = ["config.json", "*.safetensors", "model.safetensors.index.json", "vocab.json"]
_WANTED += ["merges.txt", "tokenizer.json"]


def resolve(name: str, revision: str | None) -> Path:
    """The folder that holds the checkpoint, downloaded if it is on the hub."""
    if name in EMBEDDED:
        return EMBEDDED[name]
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(
            "this is a file, not a checkpoint folder",
            where=name,
            remedy="Give the folder that holds config.json and model.safetensors.",
        )
    repository = ALIASES.get(name, name)
    if repository.count("/") != 1 or name.startswith((".", "/", "~")):
        raise CheckpointError(
            f"there is no folder and no known model called {name!r}",
            remedy=f"Known names: {', '.join([*EMBEDDED, *ALIASES])}; or a hub id owner/model.",
        )
    return _download(repository, revision)


def _download(repository: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=_WANTED))
    except Exception as error:
        # The hub's client raises many kinds (HTTP, cache, validation); the text says which.
        raise CheckpointError(
            f"the hub did not give {repository}: {str(error).splitlines()[0]}",
            where=f"revision {revision}" if revision else repository,
            remedy="Check the name and the network, or download the folder and give its path.",
        ) from error
