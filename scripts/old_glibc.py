"""Lets a wheel that is linked here run on Linux distributions with an older glibc, as its tag says.

    export LDFLAGS=$(python scripts/old_glibc.py build/glibc 2.28)

writes to the folder what an older release of glibc looks like to the linker: its libraries' symbols, each in the newest
version that the release had, without any code. They are those of the glibc that is here, which keeps every version of a
symbol that there ever was. Prints the options that link against them, and the C++ runtime statically. Where glibc is
that old already, as in the containers in which releases are built, nothing is needed, and nothing printed.
"""

from __future__ import annotations

import platform
import re
import subprocess
import sys
from pathlib import Path

MERGED = ("libpthread.so.0", "libdl.so.2", "librt.so.1")
"""Libraries whose functions are in libc since 2.34: what is loaded with an older one must name them."""

LOADER = {"x86_64": "ld-linux-x86-64.so.2", "aarch64": "ld-linux-aarch64.so.1"}[platform.machine()]
"""It has functions, too; those that programs use are as old as itself."""

NEWER = """
#include <unistd.h>
// What the C++ library asks before it counts references without atomics; since 2.32. It is always right to say no.
__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;
// What its random devices draw from; since 2.36.
__attribute__((visibility("hidden"))) unsigned arc4random(void) {
    unsigned drawn;
    if (getentropy(&drawn, sizeof drawn)) __builtin_trap();
    return drawn;
}
"""
"""What the C++ library uses where it is there when that is compiled, and what older releases have not."""


def path_of(library: str) -> str:
    """Where the linker finds one that is here."""
    command = ["gcc", f"-print-file-name={library}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def versions_of(library: str, newest: tuple[int, ...]) -> dict[str, dict[str, str]]:
    """Of each version of the library that is no newer: the symbols that have it as their newest, and their kinds."""
    read = ["readelf", "--dyn-syms", "--wide", path_of(library)]
    found: dict[str, tuple[tuple[int, ...], str]] = {}
    for line in subprocess.run(read, capture_output=True, text=True, check=True).stdout.splitlines():
        matched = re.search(r"(FUNC|IFUNC|OBJECT|TLS) .* (\w+)@@?GLIBC_([\d.]+)$", line)
        if matched:
            kind, name, digits = matched.groups()
            version = tuple(map(int, digits.split(".")))
            if version <= newest:
                found[name] = max(found.get(name, ((), "")), (version, kind))
    versions: dict[str, dict[str, str]] = {}
    for name, (version, kind) in sorted(found.items(), key=lambda item: (item[1][0], item[0])):
        versions.setdefault("GLIBC_" + ".".join(map(str, version)), {})[name] = kind
    return versions


def write_library(folder: Path, library: str, versions: dict[str, dict[str, str]]) -> Path:
    """A shared library of this name with these symbols and nothing else."""
    lines, script, earlier = [".text"], "", ""
    for version, names in versions.items():
        for name, kind in names.items():
            of_type = {"OBJECT": "object", "TLS": "tls_object"}.get(kind, "function")
            section = '.section .tdata,"awT"' if kind == "TLS" else ".data" if kind == "OBJECT" else ".text"
            lines += [section, f".globl {name}", f".type {name}, %{of_type}", f"{name}: .8byte 0", f".size {name}, 8"]
        script += f"{version} {{ global: {'; '.join(names)}; }}{earlier};\n"
        earlier = f" {version}"
    source, map_, made = (folder / f"{library}{suffix}" for suffix in (".s", ".map", ""))
    source.write_text("\n".join([*lines, '.section .note.GNU-stack,"",%progbits', ""]))
    map_.write_text(script)
    options = ["-shared", "-nostdlib", f"-Wl,--version-script={map_}", f"-Wl,-soname={library}"]
    subprocess.run(["gcc", *options, str(source), "-o", str(made)], check=True)
    return made


def main(folder: Path, release: str) -> str:
    newest = tuple(map(int, release.split(".")))
    if tuple(map(int, platform.libc_ver()[1].split("."))) <= newest:
        return ""
    folder.mkdir(parents=True, exist_ok=True)
    libc, libm = (write_library(folder, name, versions_of(name, newest)) for name in ("libc.so.6", "libm.so.6"))
    source, compiled = folder / "newer.c", folder / "newer.o"
    source.write_text(NEWER)
    subprocess.run(["gcc", "-O2", "-fPIC", "-c", str(source), "-o", str(compiled)], check=True)
    # As the names that -lc and -lm look for.
    others = f"{compiled} {path_of('libc_nonshared.a')} AS_NEEDED ( {path_of(LOADER)} )"
    (folder / "libc.so").write_text(f"GROUP ( {libc} {others} )\n")
    (folder / "libm.so").write_text(f"GROUP ( {libm} )\n")
    merged = ",".join(f"-l:{name}" for name in MERGED)
    return f"-L{folder} -static-libstdc++ -Wl,--exclude-libs=ALL,--no-as-needed,{merged},--as-needed"


if __name__ == "__main__":
    print(main(Path(sys.argv[1]).absolute(), sys.argv[2]))
