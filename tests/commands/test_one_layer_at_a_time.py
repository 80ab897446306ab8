"""The comparison holds one layer of one model at a time, and computes what whole models do."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import hf_models
import pytest
import torch
import transformers

from ep_plugin.checkpoint.formats import megatron_dist
from ep_plugin.cli import main
from ep_plugin.commands.convert import run_hf

transformers.utils.logging.disable_progress_bar()
LAYERS = 4
needs_megatron = pytest.mark.skipif(
    importlib.util.find_spec("megatron") is None, reason="needs megatron-core"
)
TOKENS = torch.randint(hf_models.VOCAB, (2, 24), generator=torch.Generator().manual_seed(5))


def save(case: str, folder: Path) -> Path:
    changes: dict[str, Any] = {"num_hidden_layers": LAYERS}
    if getattr(hf_models.settings(case), "layer_types", None):
        changes["layer_types"] = ["full_attention"] * LAYERS
    return hf_models.save(case, folder, **changes)


@torch.no_grad()
@pytest.mark.parametrize("case", [c for c in hf_models.CASES if not c.endswith(("half", "best"))])
def test_transformers(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each model that transformers builds has one layer; the bits are those of the whole."""
    folder = save(case, tmp_path / "hf")
    kind = transformers.AutoModelForCausalLM
    eager = dict.fromkeys(("attn_implementation", "experts_implementation"), "eager")
    whole = kind.from_pretrained(folder, dtype=torch.float32, **eager).eval()
    outputs: list[Any] = []
    for layer in whole.model.layers:
        layer.register_forward_hook(lambda _, __, output: outputs.append(output))
    logits = whole(TOKENS, use_cache=False).logits
    run, sizes = run_hf._run, []
    monkeypatch.setattr(
        run_hf, "_run", lambda model, *rest: sizes.append(size(model)) or run(model, *rest)
    )
    found, layers = run_hf.trace(folder, TOKENS)
    assert torch.equal(found, logits)
    for layer, output in zip(layers, outputs, strict=True):
        assert torch.equal(layer, output[0] if isinstance(output, tuple) else output)
    largest = max(size(layer) for layer in whole.model.layers)
    ends = size(whole) - size(whole.model.layers)
    assert len(sizes) == LAYERS
    assert all(found <= largest + ends for found in sizes)
    assert all(found < largest + ends / 2 for found in sizes[1:-1])


@pytest.mark.parametrize("case", ["llama", "qwen3_moe"])
def test_nothing_is_fetched_or_imported_for_a_key(case: str, tmp_path: Path) -> None:
    """Keys of config.json that name kernels, packages or code of the folder are set aside."""
    folder = save(case, tmp_path / "hf")
    expected, _ = run_hf.trace(folder, TOKENS)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "attn_implementation": "somebody/kernels",
        "_attn_implementation": "somebody/kernels",
        "experts_implementation": "sonicmoe",
        "_experts_implementation": "deepgemm",
        "use_kernels": True,
        "kernel_config": {"RMSNorm": "somebody/kernels:RMSNorm"},
        "quantization_config": {"quant_method": "gptq", "bits": 4},
        "fusion_config": {"patch_embeddings": True},
        "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Model"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text("raise SystemExit('run')\n")
    found, _ = run_hf.trace(folder, TOKENS)
    assert torch.equal(found, expected)


def size(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.megatron
@needs_megatron
@torch.no_grad()
@pytest.mark.parametrize("case", ["qwen3_moe", "llama-tied", "gemma", "deepseek_v3"])
def test_megatron(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One layer has memory when it is called, and none but what lies outside before and after."""
    from ep_plugin.megatron.workers import layer_by_layer, model_run

    source = save(case, tmp_path / "hf")
    skip = ["--skip-parity", "--from", str(source), "--to", str(tmp_path / "run")]
    assert main(["convert", *skip]) == 0
    folder = megatron_dist.open_checkpoint(tmp_path / "run").folder
    models: list[Any] = []
    with_memory: list[list[int]] = []
    build, load = model_run.build, layer_by_layer.move

    def remembered(args: Any) -> Any:
        models.append(build(args))
        assert all(parameter.is_meta for parameter in models[-1].parameters())
        return models[-1]

    def watched(module: Any, device: str, but: Any = None) -> None:
        load(module, device, but)
        layers = models[-1].decoder.layers
        with_memory.append(
            [n for n, layer in enumerate(layers) if not all(p.is_meta for p in layer.parameters())]
        )

    with monkeypatch.context() as patch:
        patch.setattr(model_run, "build", remembered)
        patch.setattr(layer_by_layer, "move", watched)
        patch.setattr(model_run, "move", watched)
        one_by_one = model_run.trace(folder, TOKENS, 1)
    assert with_memory == [[], *(part for n in range(LAYERS) for part in ([n], []))]

    whole_load = model_run.load_weights

    def whole(*args: Any, layers: Any) -> None:
        if not layers:
            layer_by_layer.move(models[-1].decoder.layers, "cpu")
            whole_load(*args)

    models.clear()
    monkeypatch.setattr(model_run, "build", lambda args: models.append(build(args)) or models[-1])
    monkeypatch.setattr(model_run, "load_weights", whole)
    monkeypatch.setattr(model_run, "load_when_called", lambda *_: None)
    at_once = model_run.trace(folder, TOKENS, 1)
    assert torch.equal(one_by_one.logits, at_once.logits)
    assert all(map(torch.equal, one_by_one.layers, at_once.layers))
    assert one_by_one.logits.abs().max() > 1e-3
