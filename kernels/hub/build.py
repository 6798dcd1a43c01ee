"""Lay the Triton kernels out for Hugging Face's package `kernels`.

    python kernels/hub/build.py [--output FOLDER] [--backends cuda rocm]

The folder (default outputs/hub-kernels) is a project of kernel-builder: build.toml, CARD.md, torch-ext/. Its
subfolder build/ holds a variant for each backend, which `kernels.get_local_kernel(FOLDER)` loads. All kernels
come from kernels/fused_distill_kernels, and their options from python/fused_distill/config.py. A variant for
the backend cpu runs in Triton's interpreter only.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import re
import shutil
from pathlib import Path

HUB = Path(__file__).resolve().parent
ROOT = HUB.parents[1]
NAME = "fused-distill-kernels"
MODULE = NAME.replace("-", "_")
EXPORTS = '\nfrom .config import LossConfig, TopKLossConfig\n\n__all__ += ["LossConfig", "TopKLossConfig"]\n'


def sources() -> dict[str, str]:
    """Return the texts of the module's files by name."""
    files = {path.name: path.read_text() for path in sorted((ROOT / "kernels" / MODULE).glob("*.py"))}
    files["config.py"] = (ROOT / "python/fused_distill/config.py").read_text()
    files["__init__.py"] += EXPORTS
    return files


def metadata(files: dict[str, str], backend: str) -> dict[str, object]:
    """Return a variant's metadata. Its id is unique to the files, so that versions can be loaded together."""
    settings = (HUB / "build.toml").read_text()
    archs = re.search(rf"^{backend}-(?:capabilities|archs) = (\[.*\])", settings, re.MULTILINE)
    version = re.search(r"^version = (\d+)", settings, re.MULTILINE)
    digests = {name: hashlib.sha256(text.encode()).digest() for name, text in files.items()}
    unique = hashlib.sha256(b"".join(digests.values())).hexdigest()[:7]
    return {
        "name": NAME,
        "id": f"_{MODULE}_{backend}_{unique}",
        "version": int(version[1]) if version else 0,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": backend, **({"archs": json.loads(archs[1])} if archs else {})},
        "digest": {
            "algorithm": "sha256",
            "files": {name: base64.b64encode(digest).decode() for name, digest in digests.items()},
        },
    }


def write(folder: Path, files: dict[str, str]) -> None:
    """Write files into a new folder."""
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name).write_text(text)


def build(output: Path, backends: list[str]) -> None:
    """Write the project and its variants into a folder.

    Raises:
        ValueError: the folder exists and is not an earlier output.
    """
    if output.exists() and any(output.iterdir()) and not (output / "build.toml").exists():
        raise ValueError(f"--output: {output} exists and was not made by this script")
    shutil.rmtree(output, ignore_errors=True)
    files = sources()
    write(output / "torch-ext" / MODULE, files)
    for backend in backends:
        text = json.dumps(metadata(files, backend), indent=2) + "\n"
        write(output / "build" / f"torch-{backend}", {**files, "metadata.json": text})
    for name in ("build.toml", "CARD.md"):
        shutil.copy(HUB / name, output)


def main() -> None:
    """Parse the command line and build."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "outputs/hub-kernels", metavar="FOLDER")
    parser.add_argument("--backends", nargs="+", default=["cuda", "rocm"], choices=["cuda", "rocm", "cpu"])
    arguments = parser.parse_args()
    try:
        build(arguments.output, arguments.backends)
    except ValueError as error:
        parser.error(str(error))
    print(f"{arguments.output}: {', '.join(sorted(p.name for p in (arguments.output / 'build').iterdir()))}")


if __name__ == "__main__":
    main()
