"""Build the sdist, the wheel from it, install that elsewhere, and use it there."""

import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, text=True, capture_output=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        venv.create(folder / "build", with_pip=True)
        build = folder / "build" / "bin" / "python"
        run(build, "-m", "pip", "install", "--quiet", "build", cwd=folder)
        # `build` makes the wheel from the sdist it has just made.
        run(build, "-m", "build", "--outdir", folder / "dist", ROOT, cwd=folder)
        wheel = next((folder / "dist").glob("*.whl"))
        names = zipfile.ZipFile(wheel).namelist()
        sources = [p.name for p in (ROOT / "cuda_src").glob("*.cu*")]
        missing = [s for s in sources if f"gpt2cupy/cuda_src/{s}" not in names]
        missing += [s for s in ("gpt2cupy/py.typed",) if s not in names]
        if missing:
            sys.exit(f"the wheel lacks {missing}")

        venv.create(folder / "user", with_pip=True)
        user = folder / "user" / "bin"
        run(user / "python", "-m", "pip", "install", "--quiet", wheel, cwd=folder)
        away = folder / "away"
        away.mkdir()
        text = run(
            user / "gpt2cupy", "generate", "ROMEO:", "--max-new-tokens", "20", "--device", "cpu",
            cwd=away,
        )  # fmt: skip
        if len(text.strip()) < 20:
            sys.exit(f"the installed command wrote only {text!r}")
        check = (
            "import gpt2cupy, sys; "
            "assert not {'cupy', 'torch', 'huggingface_hub'} & set(sys.modules)"
        )
        run(user / "python", "-c", check, cwd=away)
    print(f"wheel: {len(sources)} kernel sources inside, the installed command wrote text")


if __name__ == "__main__":
    main()
