"""What a server is started with, as its processes pass it on."""

from __future__ import annotations

from pathlib import Path

import msgspec


class Settings(msgspec.Struct, kw_only=True, frozen=True):
    """Options of ``gpt2cupy serve``; its help says what each is for.

    Times are in seconds, sizes in bytes. ``folder`` is private to this server (mode 0700): it
    holds the sockets between its processes and the counters of :mod:`gpt2cupy.server.metrics`.
    """

    model: str = "shakespeare"
    served_name: str = ""
    dtype: str = "auto"
    device: str = "auto"
    revision: str | None = None
    variant: str | None = None
    adapter: str | None = None
    tokenizer: str | None = None
    quantize: str | None = None
    batch_invariant: bool = False
    decode: str = "auto"
    gemv: str | None = None
    slots: int = 0
    prefix_cache: bool = True
    capacity: int = 0
    host: str = "127.0.0.1"
    port: int = 8000
    workers: int = 1
    coalesce: float = 0.0
    event_tokens: int = 0
    api_key_file: str | None = None
    chat_template: str | None = None
    max_body: int = 4 << 20
    max_choices: int = 1024
    max_waiting: int = 16384
    request_seconds: float = 600.0
    receive_seconds: float = 30.0
    slow_reader_seconds: float = 30.0
    drain_seconds: float = 60.0
    log_prompts: bool = False
    quiet: bool = False
    engine: str = ""
    folder: str = ""

    def to_json(self) -> str:
        return msgspec.json.encode(self).decode()

    @classmethod
    def from_json(cls, text: str) -> Settings:
        return msgspec.json.decode(text, type=cls)

    @property
    def name(self) -> str:
        """What requests call the model."""
        return self.served_name or self.model

    def engine_address(self, generation: int) -> str:
        """The ipc address of the engine process; each one that is started has its own."""
        return f"ipc://{Path(self.folder) / f'engine-{generation}'}"
