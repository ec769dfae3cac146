"""Checks a folder with one wheel and one sdist against the checkout: python .ci/check_dist.py DIST.

Every file of the package that git knows (or, without git, that lies there) must be in both with the same sha256, the
demo model among them, and each archive must be under 30 MB. hatchling leaves out, without a word, what `.gitignore`
matches: that is what this is for.
"""

import hashlib
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MODEL = "lens_neurons/demo/model/model.safetensors"
LARGEST = 30_000_000


def digest(data: bytes) -> str:
    """Return the sha256 of some bytes."""
    return hashlib.sha256(data).hexdigest()


def expected() -> dict[str, str]:
    """Return the files of the package in the checkout and their sha256."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "lens_neurons"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    names = set(filter(None, listed.stdout.split("\0")))
    if not names:
        names = {str(path.relative_to(ROOT)) for path in (ROOT / "lens_neurons").rglob("*") if path.is_file()}
        names = {name for name in names if "__pycache__" not in name}
    # The model counts even where an ignore rule hides it from git.
    files = {ROOT / name for name in names} | {ROOT / MODEL}
    return {path.relative_to(ROOT).as_posix(): digest(path.read_bytes()) for path in files if path.is_file()}


def contents(archive: Path) -> dict[str, str]:
    """Return the files in a wheel or sdist, named as in the checkout, and their sha256."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as opened:
            return {name: digest(opened.read(name)) for name in opened.namelist() if not name.endswith("/")}
    found: dict[str, str] = {}
    with tarfile.open(archive) as opened:
        for member in opened.getmembers():
            stream = opened.extractfile(member) if member.isfile() else None
            if stream is not None:
                found[member.name.split("/", 1)[1]] = digest(stream.read())
    return found


def main() -> int:
    """Return 0 if both archives are complete."""
    folder = Path(sys.argv[1])
    archives = [*folder.glob("*.whl"), *folder.glob("*.tar.gz")]
    if len(archives) != 2:
        print(f"{folder} must hold one wheel and one sdist; it holds {[path.name for path in archives]}")
        return 1
    want = expected()
    problems = [] if MODEL in want else [f"the checkout has no {MODEL}"]
    for archive in archives:
        have = contents(archive)
        size = archive.stat().st_size
        print(f"{archive.name}: {size / 1e6:.1f} MB, {len(have)} files, model sha256 {have.get(MODEL, 'absent')}")
        if size >= LARGEST:
            problems.append(f"{archive.name} has {size} bytes; under {LARGEST} are allowed")
        problems += [f"{archive.name} lacks {name}" for name in want if name not in have]
        problems += [f"{archive.name}: {name} differs" for name in want if name in have and have[name] != want[name]]
    print("\n".join(problems) or "both archives are complete")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
