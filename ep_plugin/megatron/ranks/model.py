"""What ranks must hold alike once the model is built: parameters, layers, experts, its settings.

Ranks of one place in the model (tensor, pipeline, expert) hold the same parameters by name, shape
and dtype; of parameters outside the experts, the place in expert parallelism does not count. Over
the stages each layer is there once, and over the expert ranks each layer has all its experts.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from importlib import import_module
from typing import Any

import torch

from ep_plugin.megatron.arguments.digest import hash_of, text_of
from ep_plugin.megatron.ranks.answers import Answer, Subject, ranges
from ep_plugin.megatron.ranks.sentence import Difference, Flags, differences, said, sentence
from ep_plugin.megatron.ranks.switches import switch_facts
from ep_plugin.megatron.seams.model_family import family_of
from ep_plugin.moe.experts.experts import Experts
from ep_plugin.moe.parallel import degree

Facts = dict[str, str]


@dataclass(frozen=True)
class Held:
    """What one rank holds."""

    dense: Facts  # name -> shape and dtype
    experts: Facts
    config: Facts  # field of TransformerConfig -> value; torch's switches, set since the start too
    place: Mapping[str, int]  # "tp", "pp", "ep", "etp" -> rank
    layers: Sequence[int]  # numbers of the decoder's layers here, from 1
    local_experts: Mapping[str, int]  # number of a layer -> its experts here
    all_experts: Mapping[str, int]  # number of a layer -> its experts on all ranks
    num_layers: int  # 0: layers are not counted

    def record(self) -> dict[str, Any]:
        """Return what is compared first."""
        return {
            **{name: hash_of(getattr(self, name)) for name in ("dense", "experts", "config")},
            **{"place": dict(self.place), "layers": list(self.layers)},
            **{"local": dict(self.local_experts), "all": dict(self.all_experts)},
            "num_layers": self.num_layers,
        }

    def whole(self) -> dict[str, Any]:
        """Return what is sent where hashes differ."""
        return {name: getattr(self, name) for name in ("dense", "experts", "config")}


def held(chunks: Sequence[torch.nn.Module]) -> Held:
    """Return what this rank holds in its chunks of the model."""
    dense: Facts = {}
    experts: Facts = {}
    layers: list[int] = []
    local: dict[str, int] = {}
    every: dict[str, int] = {}
    counted = True
    for number, chunk in enumerate(chunks):
        for name, parameter in chunk.named_parameters():
            name = name.replace("module.", "")
            found = experts if not getattr(parameter, "allreduce", True) else dense
            prefix = f"chunk {number}, " if len(chunks) > 1 else ""
            dtype = str(parameter.dtype).removeprefix("torch.")
            found[f"{prefix}{name}"] = f"{list(parameter.shape)} {dtype}"
        found_layers = _decoder_layers(chunk)
        counted = counted and found_layers is not None
        for module in found_layers or ():
            layers.append(module.layer_number)
            for part in module.modules():
                if isinstance(part, Experts):
                    local[str(module.layer_number)] = part.num_local_experts
                    every[str(module.layer_number)] = part.config.num_experts
    config = _config(chunks)
    return Held(
        *(dense, experts, _facts(config) | switch_facts(), _place()),
        layers=layers if counted else [],
        local_experts=local if counted else {},
        all_experts=every if counted else {},
        num_layers=int(getattr(config, "num_layers", 0) or 0) if counted else 0,
    )


def subject(name: str) -> Subject:
    """Return the comparison as what a meeting is about."""
    return Subject(name, _representatives, _decide)


def _bare(module: Any) -> Any:
    while hasattr(module, "module"):
        module = module.module
    return module


def _config(chunks: Sequence[Any]) -> Any:
    return getattr(_bare(chunks[0]), "config", None)


def _decoder_layers(chunk: Any) -> list[Any] | None:
    """Return the layers of a GPT's decoder; None of other models, which number theirs otherwise."""
    gpt = import_module("megatron.core.models.gpt.gpt_model").GPTModel
    model = _bare(chunk)
    if not isinstance(model, gpt) or family_of(model.modules()) is not None:
        return None
    layers = list(getattr(getattr(model, "decoder", None), "layers", ()))
    return layers if all(hasattr(layer, "layer_number") for layer in layers) else None


def _facts(config: Any) -> Facts:
    """Return the fields of a config as facts."""
    if not is_dataclass(config):
        return {}
    return {f"config:{one.name}": text_of(getattr(config, one.name)) for one in fields(config)}


def _place() -> dict[str, int]:
    state = import_module("megatron.core.parallel_state")
    return {
        "tp": state.get_tensor_model_parallel_rank(),
        "pp": state.get_pipeline_model_parallel_rank(),
        "ep": state.get_expert_model_parallel_rank(),
        "etp": state.get_expert_tensor_parallel_rank(),
    }


def _groups(records: Sequence[Any], part: str) -> dict[str, list[int]]:
    """Return the ranks that must have this part alike, by their place."""
    of = {"dense": ("tp", "pp"), "experts": ("pp", "ep", "etp"), "config": ()}[part]
    found: dict[str, list[int]] = {}
    for rank, record in enumerate(records):
        words = [f"{name} {record['place'][name]}" for name in of]
        found.setdefault(", ".join(words), []).append(rank)
    return found


def _representatives(records: Sequence[Any]) -> Collection[int]:
    """Return one rank of each kind where a part differs; rank 0 alone where only sums are wrong."""
    asked: set[int] = set()
    for part in ("dense", "experts", "config"):
        for ranks in _groups(records, part).values():
            first = {records[rank][part]: rank for rank in reversed(ranks)}
            if len(first) > 1:
                asked.update(first.values())
    return asked or ({0} if _sums(records) else set())


def _decide(records: Sequence[Any], wholes: dict[int, Any]) -> Answer:
    parts: list[str] = []
    for part in ("dense", "experts"):
        for where, ranks in _groups(records, part).items():
            found = differences(_kinds(records, part, ranks, wholes))
            if found:
                parts.append(_of_parameters(found, where))
    found = differences(_kinds(records, "config", range(len(records)), wholes))
    if found:
        text = sentence(found, Flags(), {}).removeprefix("the ranks must be alike in ")
        of_config = any(one.kind == "config" for one in found)
        parts.append(f"{text} (TransformerConfig)" if of_config else text)
    parts += _sums(records)
    more = f"; and {len(parts) - 3} more" if len(parts) > 3 else ""
    return Answer(False, f"the ranks have built other models: {'; '.join(parts[:3])}{more}")


def _kinds(
    records: Sequence[Any], part: str, ranks: Sequence[int], wholes: Mapping[int, Any]
) -> list[tuple[list[int], Facts]]:
    kinds: dict[str, list[int]] = {}
    for rank in ranks:
        kinds.setdefault(records[rank][part], []).append(rank)
    if len(kinds) == 1:
        return []
    known = {records[rank][part]: whole[part] for rank, whole in wholes.items()}
    return [(there, known[kind]) for kind, there in kinds.items()]


def _of_parameters(found: Sequence[Difference], where: str) -> str:
    """Say the first two parameters that differ; a name with a colon in it is cut nowhere."""
    named = [
        said(Difference("files", f"{one.kind}{one.name}", one.values), Flags(), {})
        for one in found[:2]
    ]
    more = f" and {len(found) - 2} more" if len(found) > 2 else ""
    return f"at {where}, {', '.join(named)}{more}"


def _sums(records: Sequence[Any]) -> list[str]:
    """Return a sentence for a layer that is nowhere or twice, and for experts that are missing."""
    stages: dict[int, list[int]] = {}
    local: dict[str, dict[int, int]] = {}  # layer -> rank in expert parallelism -> experts
    for record in records:
        stages.setdefault(record["place"]["pp"], record["layers"])
        for layer, number in record["local"].items():
            local.setdefault(layer, {})[record["place"]["ep"]] = number
    layers = sorted(layer for found in stages.values() for layer in found)
    wanted = records[0]["num_layers"]
    if not all(record["num_layers"] for record in records):
        return []
    parts = []
    if layers and layers != list(range(1, wanted + 1)):
        parts.append(
            f"the stages hold {len(layers)} layers ({ranges(sorted(set(layers)))}), and the model "
            f"has {wanted}"
        )
    every = {layer: number for record in records for layer, number in record["all"].items()}
    for layer, by_rank in sorted(local.items(), key=lambda pair: int(pair[0])):
        # A layer with few experts has each on several ranks.
        wanted = every[layer] * len(by_rank) // degree(len(by_rank), every[layer])
        if sum(by_rank.values()) != wanted:
            parts.append(
                f"layer {layer} has {sum(by_rank.values())} experts on all ranks together, and "
                f"should have {wanted}"
            )
    return parts
