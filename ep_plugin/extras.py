"""The packages of each extra of `pyproject.toml`, for messages that say what to install.

The plugin itself is on no package index, so `pip install 'ep-plugin[...]'` would be wrong there.
"""

PACKAGES = {
    "megatron": ("megatron-core[training]>=0.16.1,<0.20", "sentencepiece"),
    "muon": ("emerging-optimizers>=0.3",),
    "hf": ("safetensors", "transformers>=5"),
    "report": ("matplotlib", "tensorboard"),
    "checkout": ("pybind11",),
    "te": ("transformer-engine[pytorch]",),
}
_BUILT = ("te",)  # against the torch that is installed


def pip_install(*extras: str) -> str:
    """Return the command that installs the packages of these extras."""
    packages = [package for extra in extras for package in PACKAGES[extra]]
    quoted = (package if package.isidentifier() else f"'{package}'" for package in packages)
    options = "--no-build-isolation " if {*extras} & {*_BUILT} else ""
    return f"pip install {options}{' '.join(quoted)}"
