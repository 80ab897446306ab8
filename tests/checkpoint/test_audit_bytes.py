"""What `audit` can know of bytes: checksums, a manifest; and that it reads each object once."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from stored import ITERATION, healthy, write
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from ep_plugin.checkpoint.audit import audit
from ep_plugin.checkpoint.formats._dcp_reader import Files
from ep_plugin.checkpoint.formats._iteration import COMMON_STATE
from ep_plugin.checkpoint.manifest import MANIFEST, seal
from ep_plugin.checkpoint.tensors import NewTensor, TensorInfo
from ep_plugin.cli import main

FOLDER = f"iter_{ITERATION:07d}"


def summary(root: Path, capsys: pytest.CaptureFixture[str]) -> str:
    main(["audit", str(root)])
    return capsys.readouterr().out


def test_missing_checksums_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(healthy(), tmp_path / "with")
    assert "saved without" not in summary(tmp_path / "with", capsys)
    torch.serialization.set_crc32_options(False)
    try:
        write(healthy(), tmp_path / "without")
    finally:
        torch.serialization.set_crc32_options(True)
    text = summary(tmp_path / "without", capsys)
    main(["audit", str(tmp_path / "without"), "--json"])
    report = json.loads(capsys.readouterr().out)
    assert report["without_checksums"] >= report["num_tensors"]
    assert f"{report['without_checksums']} tensors and objects were saved without" in text


def exchange(folder: Path) -> None:
    """Exchange where two tensors of one shape, dtype and length lie."""
    path = folder / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    of: dict[Any, list[Any]] = {}
    for index, stored in metadata.storage_data.items():
        entry = metadata.state_dict_metadata[index.fqn]
        if ".experts." not in index.fqn or "optimizer" in index.fqn:
            continue
        of.setdefault((index.fqn, stored.length, str(entry.properties.dtype)), []).append(index)
    one, other = next(found for found in of.values() if len(found) > 1)[:2]
    data = metadata.storage_data
    data[one], data[other] = data[other], data[one]
    path.write_bytes(pickle.dumps(metadata))


def sealed(root: Path) -> None:
    seal(root, {}, [NewTensor("a", TensorInfo((1,), torch.float32), lambda: iter(()))], {})


def test_an_exchange_is_seen_by_the_manifest_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(healthy(), tmp_path / "run")
    exchange(tmp_path / "run" / FOLDER)
    assert main(["audit", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    root = tmp_path / "converted"
    write(healthy(), root)
    sealed(root)
    assert main(["audit", str(root)]) == 0
    capsys.readouterr()
    exchange(root / FOLDER)
    for given in (root, root / FOLDER):
        assert main(["audit", str(given)]) == 1
        said = capsys.readouterr().out
        assert f"{MANIFEST}: {root / FOLDER / '.metadata'} has other bytes" in said


def test_a_run_may_go_on_beside_what_was_converted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(healthy(), tmp_path)
    sealed(tmp_path)
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    renamed = {name.replace(FOLDER, "iter_0000001"): f for name, f in manifest["files"].items()}
    (tmp_path / MANIFEST).write_text(json.dumps(manifest | {"files": renamed}))
    (tmp_path / "later").write_text("what a run leaves beside it")
    assert main(["audit", str(tmp_path)]) == 0
    (tmp_path / MANIFEST).write_text("{")
    assert main(["audit", str(tmp_path)]) == 1
    assert MANIFEST in capsys.readouterr().out


def test_each_object_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(healthy(), tmp_path)
    path = tmp_path / FOLDER / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    name = "chained.state/shard_0_1"  # where the run arguments lie, of which this is a copy
    stored = metadata.storage_data[MetadataIndex(COMMON_STATE)]
    metadata.storage_data[MetadataIndex(name)] = stored
    metadata.state_dict_metadata[name] = BytesStorageMetadata()
    path.write_bytes(pickle.dumps(metadata))
    names: list[str] = []
    read = Files.read_object
    monkeypatch.setattr(
        Files, "read_object", lambda files, name: (names.append(name), read(files, name))[1]
    )
    from ep_plugin.commands.audit import _progress

    audit(tmp_path, _progress)
    assert names == [name]
