"""Settings refuse what their annotations do not allow, for every field there is."""

import dataclasses
import math
from typing import Annotated, Any, get_type_hints

import hostile_settings as hostile
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ep_plugin import ConfigError, MoEConfig, MoELayer, ParallelConfig, RoutingConfig
from ep_plugin.megatron.edge_settings import EdgeSettings
from ep_plugin.typed import Typed, Within, typed
from ep_plugin.untrusted import shown


def few(examples: int) -> settings:
    """The same examples in every run."""
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


SIZES: dict[str, Any] = {"hidden_size": 8, "ffn_hidden_size": 8, "num_experts": 4}


@pytest.mark.parametrize("owner", hostile.SETTINGS, ids=lambda owner: owner.__name__)
def test_a_value_of_any_type_is_taken_as_annotated_or_refused(owner: type) -> None:
    hints = get_type_hints(owner)

    @few(200)
    @given(hostile.cases(owner))
    def check(case: hostile.Case) -> None:
        made = hostile.run(case)
        for field in dataclasses.fields(owner) if made is not None else ():
            assert hostile.allows(hints[field.name], getattr(made, field.name)), field.name

    check()


@few(200)
@given(hostile.calls())
def test_a_function_that_takes_settings_does_so_too(case: hostile.Case) -> None:
    hostile.run(case)


def test_what_is_accepted_builds_a_layer_or_the_layer_refuses_it() -> None:
    ran: list[bool] = []

    @few(100)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        ran.append(build_and_run(data))

    check()
    assert sum(ran) > 10


def build_and_run(data: st.DataObject) -> bool:
    """Whether settings that are drawn were accepted, by a layer too, and it ran."""
    routing = data.draw(hostile.arguments_of(RoutingConfig, wide=True))
    layer = data.draw(hostile.arguments_of(MoEConfig, wide=True)) | data.draw(
        st.sampled_from(({}, SIZES))
    )
    layer.pop("routing", None)
    try:
        config = MoEConfig(**layer, routing=RoutingConfig(**routing))
    except ConfigError:
        return False
    if config.num_experts > 4096:  # each is filled by itself
        return False
    small = config.hidden_size * config.ffn_hidden_size * config.num_experts < 1 << 16
    try:
        module = MoELayer(config, device="cpu" if small else "meta")
        if small:
            hidden = torch.randn(6, 2, config.hidden_size, requires_grad=True)
            module(hidden).sum().backward()
            module.eval()(hidden)
    except ConfigError:
        return False
    return small


OPTION = "the name of an option, or a module of your own such as my_package.my_option"
COUNT = "an integer of at least 1"
WRONG = [
    ({"hidden_size": None}, f"hidden_size must be {COUNT}; got None; use hidden_size=1024"),
    ({"hidden_size": 64.0}, f"hidden_size must be {COUNT}; got 64.0; use hidden_size=64$"),
    ({"bias": "x"}, "bias must be True or False; got 'x'; use bias=False"),
    ({"bias": 1}, "bias must be True or False; got 1; use bias=False"),
    ({"num_experts": True}, f"num_experts must be {COUNT}; got True; use num_experts=8"),
    ({"num_experts": 10**9}, "num_experts must be at most 1048576; got 1000000000; use num_exp"),
    ({"dispatcher": 3.5}, f"dispatcher must be {OPTION}; got 3.5; use dispatcher='auto'"),
    ({"router": "a\nb"}, r"router must be .*; got 'a\\nb'; use router='topk'"),
    ({"routing": {}},
     r"routing must be a RoutingConfig; got {}; use routing=RoutingConfig\(\.\.\.\)$"),
    ({"fp8": hostile.Word.TOPK}, r"fp8 must be one of off, rowwise, blockwise; got "
     r"<Word.TOPK: 'topk'> \(hostile_settings.Word\); use fp8='off'"),
    ({"num_moe_layers": np.int64(3)}, rf"num_moe_layers must be {COUNT}; got np.int64\(3\) "
     r"\(numpy.int64\); use num_moe_layers=3"),
    ({"tokens": torch.tensor(3)}, r"tokens must .* got tensor\(3\) \(torch.Tensor\); use tokens=3"),
    ({"num_moe_layers": "9" * 5000}, "got '9{20,30}\\.\\.\\.9{20,30}'; use num_moe_layers=1"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_a_message_names_field_value_and_what_is_right(
    change: dict[str, Any], message: str
) -> None:
    for make in (
        lambda: MoEConfig(**(SIZES | change)),
        lambda: dataclasses.replace(MoEConfig(**SIZES), **change),
    ):
        with pytest.raises(ConfigError, match=message):
            make()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"topk": "2"}, "topk must be an integer of at least 1; got '2'; use topk=2"),
        ({"scaling_factor": math.nan}, "scaling_factor must be positive and finite; got nan"),
        ({"aux_loss_coeff": 10**30}, "aux_loss_coeff must be at most 1000000; got 1000000"),
        (
            {"further_losses": [("sequence", 0.1)]},
            r"further_losses must be a tuple; got \[\('sequence', 0.1\)\]; use "
            r"further_losses=tuple\(\[\('sequence', 0.1\)\]\)$",
        ),
        (
            {"further_losses": [("sequence", "x")]},
            r"further_losses must be a tuple, each of it a tuple of one of micro_batch, .* and "
            r"a finite number; got \[\('sequence', 'x'\)\]",
        ),
    ],
)
def test_the_same_for_routing(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RoutingConfig(**change)
    with pytest.raises(ConfigError, match=message):
        EdgeSettings(routing=change)


def test_a_float_of_a_subclass_becomes_a_plain_one() -> None:
    made = RoutingConfig(
        scaling_factor=np.float64(2.5), further_losses=(("sequence", np.float64(0.1)),)
    )
    assert (made.scaling_factor, type(made.scaling_factor)) == (2.5, float)
    assert (made.further_losses, type(made.further_losses[0][1])) == ((("sequence", 0.1),), float)
    with pytest.raises(ConfigError, match=r"topk must be an integer .* use topk=2$"):
        RoutingConfig(topk=np.float64(2.0))  # type: ignore[arg-type]

    @typed
    def half(number: float) -> float:
        return number / 2

    assert type(half(np.float64(3.0))) is float


def test_a_routing_setting_of_no_such_name_is_refused() -> None:
    with pytest.raises(ConfigError, match="'top_k' is no setting; use one of topk, "):
        EdgeSettings(routing={"top_k": 2})


def test_integers_are_numbers_and_plain_values_pass() -> None:
    assert RoutingConfig(scaling_factor=2).scaling_factor == 2
    assert ParallelConfig(world_size=4, ep=2, etp=None).expert_tp == 1


def test_a_field_without_rules_of_its_own_is_checked_and_so_is_a_subclass() -> None:
    @dataclasses.dataclass(frozen=True)
    class New(Typed):
        count: Annotated[int, Within(1, 4)]
        names: tuple[str, ...] = ()

    @dataclasses.dataclass(frozen=True)
    class More(New):
        factor: float = 1.0

    with pytest.raises(ConfigError, match="count must be at most 4; got 5"):
        New(5)
    with pytest.raises(ConfigError, match="names must be a tuple, each of it a text of one line"):
        New(1, names=("a", "b\n"))
    with pytest.raises(ConfigError, match="factor must be a finite number; got 'x'"):
        More(1, factor="x")
    assert More(1, factor=2).count == 1


def test_a_function_checks_its_arguments_and_keeps_its_name() -> None:
    @typed
    def twice(number: int, times: Annotated[int, Within(1, 3)] = 2) -> int:
        return number * times

    assert (twice(2), twice(2, times=3), twice.__name__) == (4, 6, "twice")
    with pytest.raises(ConfigError, match="times must be at most 3; got 4; use times=2"):
        twice(1, 4)


def test_values_are_shown_on_one_short_line() -> None:
    def said(value: Any) -> str:
        return str(ConfigError(shown(value)))

    assert said("a\nb") == "'a\\nb'"
    assert said("<topk>") == "'<topk>'"
    assert said(hostile.Unprintable()).startswith("<Unprintable instance at")
    assert said(10**5000) == "<int>"
    assert "\n" not in shown(hostile.TwoLines())
    assert len(shown(hostile.TwoLines())) < 120


def test_every_dataclass_of_settings_is_checked() -> None:
    """Where users' settings lie, a dataclass that is not checked is a result, and stands here."""
    results = {"LayerParams", "Load", "Forecast", "Fit", "HybridFit", "Kind", "Held", "Gain"}
    homes = {owner.__module__ for owner in hostile.SETTINGS}
    for home in homes:
        for name, value in vars(__import__(home, fromlist=["_"])).items():
            if (
                isinstance(value, type)
                and dataclasses.is_dataclass(value)
                and value.__module__ == home
            ):
                assert issubclass(value, Typed) or name in results, name


def test_a_device_or_dtype_that_weights_cannot_have_is_refused() -> None:
    config = MoEConfig(**SIZES)
    with pytest.raises(ConfigError, match="device must be one of this machine's; got 'gpu'"):
        MoELayer(config, device="gpu")
    with pytest.raises(ConfigError, match=r"dtype must be torch\.bfloat16, .* got torch.int64"):
        MoELayer(config, dtype=torch.int64)
    large = dataclasses.replace(config, hidden_size=1 << 24, ffn_hidden_size=1 << 24)
    with pytest.raises(
        ConfigError, match=r"num_experts \(4\) of hidden_size .* take 12582912.* GiB"
    ):
        MoELayer(large)
