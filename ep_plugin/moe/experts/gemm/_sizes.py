"""The check of sizes that backends share."""

from ep_plugin.errors import ConfigError


def check_multiples(
    gemm: str, in_features: int, out_features: int, unit: int, where: str = ""
) -> None:
    """Raise ConfigError unless both sizes are multiples of `unit` features.

    `where` ends the demand: such as " in torch.bfloat16", where the unit depends on the dtype.
    """
    for name, features in (("in_features", in_features), ("out_features", out_features)):
        if features % unit:
            raise ConfigError(
                f"<gemm={gemm}> needs <{name}> ({features}) to be a multiple of {unit}{where}; use "
                "<gemm=loop>"
            )
