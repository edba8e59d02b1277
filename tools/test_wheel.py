"""Build the sdist, the wheel from it, install that elsewhere, and use it there."""

import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
# What a checkout needs to build, test and measure; the sdist must have all of it.
FOLDERS = ("gpt2cupy", "cuda_src", "tests", "bench", "tools", "docs")
HEAVY = ("cupy", "torch", "transformers", "huggingface_hub")


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command to its end; its output, or an exit with it."""
    done = subprocess.run(command, cwd=cwd, text=True, capture_output=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def sources(*folders: str) -> set[str]:
    """Files of the checkout as git has them, relative to its root."""
    return set(run("git", "ls-files", "--", *folders, cwd=ROOT).splitlines())


def check_contents(dist: Path) -> None:
    """Exit with the names of what the sdist or the wheel lacks."""
    with tarfile.open(next(dist.glob("*.tar.gz"))) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    with zipfile.ZipFile(next(dist.glob("*.whl"))) as archive:
        installed = set(archive.namelist())
    wanted = sources("gpt2cupy") | {f"gpt2cupy/{name}" for name in sources("cuda_src")}
    for what, missing in (("sdist", sources(*FOLDERS) - packed), ("wheel", wanted - installed)):
        if missing:
            sys.exit(f"the {what} lacks {', '.join(sorted(missing))}")
    print(f"sdist and wheel are complete: {len(packed)} and {len(installed)} files")


def check_installed(wheel: Path, folder: Path) -> None:
    """Install the wheel in an environment of its own and use it from another folder."""
    venv.create(folder / "user", with_pip=True)
    user = folder / "user" / "bin"
    run(user / "python", "-m", "pip", "install", "--quiet", wheel, cwd=folder)
    away = folder / "away"
    away.mkdir()
    command = (user / "gpt2cupy", "generate", "ROMEO:", "--max-new-tokens", "20")
    text = run(*command, "--device", "cpu", cwd=away)
    if len(text.strip()) < 20:
        sys.exit(f"the installed command wrote only {text!r}")
    check = (
        "import sys, gpt2cupy\n"
        f"loaded = [name for name in {HEAVY} if name in sys.modules]\n"
        "sys.exit(f'import gpt2cupy loads {loaded}' if loaded else 0)"
    )
    run(user / "python", "-c", check, cwd=away)
    print("the wheel works elsewhere: the command wrote text, importing loads nothing heavy")


def main() -> None:
    """Everything in a temporary folder."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        venv.create(folder / "build", with_pip=True)
        build = folder / "build" / "bin" / "python"
        run(build, "-m", "pip", "install", "--quiet", "build", cwd=folder)
        # `build` makes the wheel from the sdist it has just made.
        run(build, "-m", "build", "--outdir", folder / "dist", ROOT, cwd=folder)
        check_contents(folder / "dist")
        check_installed(next((folder / "dist").glob("*.whl")), folder)


if __name__ == "__main__":
    main()
