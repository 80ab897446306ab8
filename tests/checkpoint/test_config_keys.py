"""Each key of config.json is consumed, known to be without effect, or refused by its name.

The keys are those of transformers' own classes, so that a new one cannot pass in silence."""

import copy
import json
from collections.abc import Iterator
from typing import Any

import hf_models
import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ep_plugin.checkpoint import family
from ep_plugin.checkpoint.config_keys import READ_WITH_WEIGHTS, WITHOUT_EFFECT, Keys
from ep_plugin.errors import ConfigError

Config = dict[str, Any]
CASES = [case for case in hf_models.CASES if case not in ("llama-tied", "qwen3_moe-unnormalised")]


def config_of(case: str) -> Config:
    """Return config.json as transformers writes it, with every attribute of its class."""
    kind, own = hf_models.CASES[case]
    settings = kind(**hf_models.SHARED | own | {"num_hidden_layers": 4})
    text: Config = json.loads(settings.to_json_string(use_diff=False))
    return text


def family_of(case: str) -> family.Family:
    return family.load(hf_models.model_type(case))


def without_effect(case: str) -> set[str]:
    """Return the keys of a case that the table, or the other keys, leave without effect."""
    keys = Keys(family_of(case).defaults | config_of(case))
    family_of(case).read(keys)
    return {*WITHOUT_EFFECT, *READ_WITH_WEIGHTS, *keys.passed}


def others(value: Any) -> Iterator[Any]:
    """Yield legal-looking values beside `value`."""
    match value:
        case bool():
            yield not value
        case int() | float():
            yield from (value + 1, value * 2 + 1, 0.5)
        case str():
            yield from ("relu", "another")
        case list():
            yield from (["sliding_attention", "full_attention"], [1])
        case dict():
            yield {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}
        case None:
            yield from (True, 3, "another", [1])


def outcome(case: str, config: Config) -> Any:
    """Return the arguments, or the sentence of the refusal."""
    try:
        return vars(family_of(case).args(config))
    except ConfigError as error:
        return str(error)


@pytest.mark.parametrize("case", CASES)
def test_every_key_of_the_class_is_seen(case: str) -> None:
    """Another value changes the arguments, is refused by the key's name, or is known to do
    nothing."""
    config = config_of(case)
    usual = outcome(case, config)
    assert isinstance(usual, dict), usual
    silent, known = [], without_effect(case)
    for key, value in config.items():
        for other in others(value):
            found = outcome(case, config | {key: other})
            seen = key in found if isinstance(found, str) else found != usual
            if not seen and key not in known:
                silent.append((key, other, found if isinstance(found, str) else ""))
    assert silent == []


@pytest.mark.parametrize("case", [c for c in CASES if "rope_type" in str(hf_models.CASES[c])])
def test_every_inner_key_is_seen(case: str) -> None:
    config = config_of(case)
    usual = outcome(case, config)
    inner = config["rope_parameters"]
    assert len(inner) > 4
    for key, value in inner.items():
        for other in others(value):
            found = outcome(case, config | {"rope_parameters": inner | {key: other}})
            assert (key in found) if isinstance(found, str) else found != usual, (key, other, found)


@pytest.mark.parametrize("case", CASES)
def test_a_key_that_is_missing_means_what_transformers_means(case: str) -> None:
    """Its default, or a refusal that names the key."""
    config, kind = config_of(case), hf_models.CASES[case][0]
    for key in config:
        fewer = {name: value for name, value in config.items() if name != key}
        found = outcome(case, fewer)
        if isinstance(found, str):
            assert key in found, found
            continue
        filled = json.loads(kind(**copy.deepcopy(fewer)).to_json_string(use_diff=False))
        assert found == outcome(case, filled), key


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
def test_every_kind_of_rotary_embedding_is_served_or_refused(case: str, spelling: str) -> None:
    config = config_of(case)
    config |= {"rope_parameters": None, "rope_theta": 5000.0}
    usual = outcome(case, config)
    assert {"linear", "dynamic", "yarn", "longrope", "llama3"} <= {*ROPE_INIT_FUNCTIONS}
    for kind in (*ROPE_INIT_FUNCTIONS, "of next year"):
        for word in ("rope_type", "type"):
            found = outcome(case, config | {spelling: {word: kind, "factor": 2.0}})
            named = isinstance(found, str) and spelling in found
            assert named or (kind == "default") == (found == usual), (kind, found)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("value", [True, 0.5, "another", [1], {"a": 1}])
def test_an_unknown_key_is_refused(case: str, value: Any) -> None:
    """At the top and inside; the sentence has key, value, and what helps."""
    config = config_of(case)
    inner = {"rope_parameters": config["rope_parameters"] | {"of_next_year": value}}
    for changed, name in (({"of_next_year": value}, ""), (inner, "rope_parameters.")):
        found = outcome(case, config | changed)
        assert f"config.json has {name}of_next_year = {value!r}, of which nothing is known" in found
        assert "take it out of config.json if the model computes the same without it" in found
    assert isinstance(outcome(case, config | {"of_next_year": None}), dict)


@pytest.mark.parametrize("case", CASES)
def test_every_broken_value_is_refused_by_name(case: str) -> None:
    """No key that is read ends in another error than ours, whatever stands there."""
    config = config_of(case)
    for key in [*config, "rope_scaling", "rope_theta", "aux_loss_alpha"]:
        for value in (None, True, -1, 0, 0.3, 1e400, float("nan"), "x", [], ["x"], {}, {"x": 1}):
            found = outcome(case, config | {key: value})
            assert isinstance(found, dict) or key in found or value is None, (key, value, found)


@torch.no_grad()
@pytest.mark.parametrize("case", [c for c in CASES if "-" not in c or c.endswith("groups")])
def test_what_is_called_without_effect_has_none(case: str) -> None:
    """transformers computes the same logits whatever these keys say."""
    config, kind = config_of(case), hf_models.CASES[case][0]
    tokens = torch.randint(hf_models.VOCAB, (1, 24), generator=torch.Generator().manual_seed(3))
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(kind(**copy.deepcopy(config))).eval()
    logits, tried = model(tokens).logits, 0
    skipped = {"model_type", "architectures", "dtype", "torch_dtype", "auto_map"}
    # transformers reads these from the config when it is called, and returns something else.
    skipped |= {"return_dict", "problem_type", "id2label", "label2id", "transformers_version"}
    for key in sorted(set(config) & without_effect(case) - skipped):
        for other in others(config[key]):
            try:
                settings = kind(**(copy.deepcopy(config) | {key: other}))
                again = transformers.AutoModelForCausalLM.from_config(settings).eval()
            except Exception:  # transformers refuses the value
                continue
            again.load_state_dict(model.state_dict())
            assert torch.equal(again(tokens).logits, logits), (key, other)
            tried += 1
    assert tried >= 5
