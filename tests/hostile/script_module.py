"""A TorchScript module whose code makes a file while it is loaded: torch's own loader runs it."""

import io
import warnings
import zipfile
from functools import cache

import torch


class Planted(torch.nn.Module):
    """Writes where its state says: `aten::from_file` with `shared` makes the file."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path
        self.words = torch.zeros(8, dtype=torch.uint8)

    @torch.jit.export
    def __getstate__(self) -> tuple[str, bool]:
        return self.path, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[str, bool]) -> None:
        self.path = state[0]
        self.training = state[1]
        # Kept, else the compiler leaves out what nobody uses.
        self.words = torch.from_file(self.path, True, 8, dtype=torch.uint8).fill_(65)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@cache
def records(path: str) -> dict[str, bytes]:
    """Return the records of an archive that makes the file `path` when `torch.load` opens it."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated, and torch.load still opens it
        torch.jit.save(torch.jit.script(Planted(path)), buffer)
    with zipfile.ZipFile(buffer) as archive:
        return {info.filename: archive.read(info) for info in archive.infolist()}
