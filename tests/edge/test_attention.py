"""Which attention will run is asked of Transformer Engine; a stand-in of its interface answers."""

import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from documents import megatron_parser
from loop import MODEL, MOE, OURS, SCRIPT
from warm import run_script

from ep_plugin.commands import doctor
from ep_plugin.errors import ConfigError
from ep_plugin.megatron.seams import attention

pytestmark = pytest.mark.megatron
FOLDER = "transformer_engine/pytorch/attention/dot_product_attention"
UTILS = '''
import os
from dataclasses import dataclass

@dataclass
class AttentionParams:
    """Has fewer parameters than we know, as an older release."""
    qkv_layout: str = "sbh3d"
    num_heads: int = 16
    head_dim_qk: int = 64
    attn_mask_type: str = "no_mask"
    window_size: tuple = None

def get_attention_backend(params):
    assert params.attn_mask_type == "causal" and params.window_size == (-1, 0), params
    flash, fused, unfused = (os.environ.get(f"NVTE_{name}_ATTN", "1") == "1"
                             for name in ("FLASH", "FUSED", "UNFUSED"))
    fused = fused and params.head_dim_qk <= 128
    flash = flash and not fused
    return flash, None, fused, 1, unfused and not flash and not fused, [flash, fused, unfused]
'''


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A stand-in of Transformer Engine; returns the file that chooses."""
    (tmp_path / FOLDER).mkdir(parents=True)
    for parent in (tmp_path / FOLDER, *list((tmp_path / FOLDER).parents)[:3]):
        (parent / "__init__.py").touch()
    (tmp_path / FOLDER / "utils.py").write_text(UTILS)
    (tmp_path / "transformer_engine" / "pytorch" / "utils.py").write_text(
        "def get_cudnn_version():\n    return 9, 1, 0\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.startswith("transformer_engine")]:
        monkeypatch.delitem(sys.modules, name)
    yield tmp_path / FOLDER / "utils.py"
    for name in [name for name in sys.modules if name.startswith("transformer_engine")]:
        del sys.modules[name]


@pytest.mark.parametrize(
    ("off", "heads_of", "chosen"),
    [
        ("", 128, "fused"),
        ("", 256, "flash"),
        ("FLASH", 256, "unfused"),
        ("FLASH FUSED", 128, "unfused"),
        ("FUSED", 64, "flash"),
        ("FLASH FUSED UNFUSED", 64, "no"),
    ],
)
def test_its_choice_is_said_with_the_cudnn_that_is_loaded(
    off: str, heads_of: int, chosen: str, engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in off.split():
        monkeypatch.setenv(f"NVTE_{name}_ATTN", "0")
    text = attention.describe({**attention.USUAL, "head_dim_qk": heads_of, "unknown": 1})
    assert text.startswith(f"{chosen} attention of Transformer Engine ")
    assert "cuDNN 9.1.0" in text
    assert ("LD_LIBRARY_PATH" in text, "is slow" in text) == (chosen == "unfused",) * 2
    assert ("will fail" in text) == (chosen == "no")


@pytest.mark.parametrize(
    ("old", "new"),
    [("AttentionParams", "Params"), ("get_attention_backend", "choose"), ("import os", "1 / 0")],
)
def test_another_interface_is_said_and_ends_nothing(old: str, new: str, engine: Path) -> None:
    engine.write_text(UTILS.replace(old, new))
    assert "cannot be asked (" in attention.describe()


def test_what_is_asked_is_the_runs_own() -> None:
    parser = megatron_parser()
    args = parser.parse_args(
        shlex.split(
            "--num-attention-heads 32 --group-query-attention --num-query-groups 4 "
            "--kv-channels 96 --seq-length 512 --micro-batch-size 3 "
            "--tensor-model-parallel-size 2 --context-parallel-size 2 --cp-comm-type a2a "
            "--attention-dropout 0.2"
        )
    )
    args.params_dtype = torch.bfloat16  # made by validation
    shape = attention.shape_of(args)
    wanted = {
        **{"num_heads": 16, "num_gqa_groups": 2, "head_dim_qk": 96, "head_dim_v": 96},
        **{"max_seqlen_q": 512, "max_seqlen_kv": 512, "batch_size": 3, "cp_size": 2},
        **{"cp_comm_type": "a2a", "context_parallel": True, "attention_dropout": 0.2},
        **{"qkv_dtype": torch.bfloat16, "deterministic": False, "window_size": (-1, 0)},
    }
    assert {name: shape[name] for name in wanted} == wanted
    args = parser.parse_args(
        shlex.split(
            "--num-attention-heads 8 --multi-latent-attention --qk-head-dim 128 "
            "--qk-pos-emb-head-dim 64 --v-head-dim 112 --deterministic-mode --window-size 63,0"
        )
    )
    args.params_dtype = torch.float16
    shape = attention.shape_of(args)
    assert (shape["head_dim_qk"], shape["head_dim_v"], shape["num_gqa_groups"]) == (192, 112, 8)
    assert (shape["deterministic"], shape["window_size"]) == (True, (63, 0))


@pytest.mark.parametrize("there", ["works", "is not installed", "cannot be imported here"])
@pytest.mark.parametrize("implementation", ["transformer_engine", "local"])
@pytest.mark.parametrize("spec", [None, ["my.module", "spec"]])
@pytest.mark.parametrize("cpu", [True, False])
def test_only_a_run_that_needs_it_is_refused_without_it(
    there: str,
    implementation: str,
    spec: list[str] | None,
    cpu: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    extension = attention.import_module(attention.EXTENSION)
    monkeypatch.setattr(extension, "HAVE_TE", there == "works")
    found = None if there == "is not installed" else object()
    monkeypatch.setattr(attention, "find_spec", lambda name: found)
    monkeypatch.setattr(attention.cpu_mode, "wanted", lambda: cpu)
    args = SimpleNamespace(transformer_impl=implementation, spec=spec)
    if there == "works" or cpu or spec or implementation == "local":
        attention.check_installed(args)
        return
    with pytest.raises(ConfigError, match=f"which {there}") as refused:
        attention.check_installed(args)
    assert attention.LOCAL in str(refused.value)
    assert attention.INSTALL in str(refused.value)


AS_ON_A_GPU = """
import runpy
from types import SimpleNamespace
from ep_plugin.megatron.seams import attention
attention.cpu_mode = SimpleNamespace(wanted=lambda: False)
runpy.run_path({script!r}, run_name="__main__")
"""


def test_without_it_a_run_on_gpus_ends_in_one_sentence_and_the_flags_it_names_parse(
    tmp_path: Path,
) -> None:
    if attention.find_spec("transformer_engine") is not None:
        pytest.skip("Transformer Engine is installed")
    (script := tmp_path / "as_on_a_gpu.py").write_text(AS_ON_A_GPU.format(script=SCRIPT))
    flags = [*MODEL, *MOE, "--train-iters", "1"]
    done = run_script(1, [*OURS, str(script), *flags], dict(os.environ))
    assert done.returncode == 2, done.stderr
    said = [line for line in done.stderr.splitlines() if "error: " in line]
    assert len(said) == 1
    assert "--transformer-impl (transformer_engine), Megatron's default on GPUs, needs" in said[0]
    assert megatron_parser().parse_args(attention.LOCAL.split()).transformer_impl == "local"


def test_doctor_and_the_readme_say_the_same_line(
    engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, _, purpose = doctor.PACKAGES[0]
    assert name == "transformer-engine"
    assert attention.INSTALL in purpose
    assert attention.INSTALL in (Path(__file__).parents[2] / "README.md").read_text()
    gpu, cpu = (doctor.Finding("device", "ok", text) for text in ("1 x GPU with NCCL", "CPU mode"))
    there = doctor.Finding(name, "ok", "2.0")
    assert doctor._attention([cpu], there) == []
    assert doctor._attention([gpu], doctor.Finding(name, "absent", "")) == []
    path = [str(Path(__file__).parents[2]), str(engine.parents[3].parent)]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
    (found,) = doctor._attention([gpu], there)
    assert (found.name, found.status) == ("attention", "ok")
    assert found.text.startswith("fused attention of Transformer Engine ")
    monkeypatch.setenv("NVTE_FUSED_ATTN", "0")
    monkeypatch.setenv("NVTE_FLASH_ATTN", "0")
    (found,) = doctor._attention([gpu], there)
    assert (found.status, found.text[:8]) == ("absent", "unfused ")
