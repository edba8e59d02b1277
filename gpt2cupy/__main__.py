"""``python -m gpt2cupy`` is the command ``gpt2cupy``."""

from .cli import main

if __name__ == "__main__":
    main()
