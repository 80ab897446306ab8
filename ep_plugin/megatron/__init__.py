"""The edge: Megatron builds our block where it would build its own. `install()` is the interface.

Seams, each an attribute that Megatron looks up when it is called:

    moe_module_specs.MoELayer             the class every MoE layer spec is made of
    arguments.add_megatron_arguments      gains the --ep-* flags
    arguments.validate_args               checks ours first; a mistake exits there and then
    TransformerConfig.__post_init__       sets the activation of --ep-dense-activation
    MoEMetricsTracker.report              also writes the load of every expert; track_moe_metrics
                                          until 0.17
    ChainedOptimizer.load_state_dict      resumes where experts had no optimizer of their own
    training.save_checkpoint              audits what it saved, under --ep-audit-save
    training.train_step                   keeps what it computed, for `ep-plugin parity`

Nothing is copied, no function is replaced by a rewrite, and `uninstall()` puts each attribute back.
What differs between releases stands in `versions/`, one file each.
"""

from typing import TYPE_CHECKING

from ep_plugin.errors import ConfigError

if TYPE_CHECKING:
    from ep_plugin.megatron.settings import EdgeSettings

__all__ = ["install", "uninstall"]


def install(settings: "EdgeSettings | None" = None) -> None:
    """Install the plugin into Megatron; call it before `pretrain`. A second call does nothing.

    A training loop of your own over megatron-core, which parses no Megatron arguments, gives
    `settings` in place of the --ep-* flags.

    A Megatron we do not know is one sentence on rank 0 and exit code 2 on every rank.
    """
    from ep_plugin.megatron.seams import install
    from ep_plugin.megatron.seams.refusal import refuse

    try:
        install.install(settings)
    except ConfigError as error:
        refuse(error)


def uninstall() -> None:
    """Put back every attribute that `install` replaced, CPU mode included, if it did."""
    from ep_plugin.megatron.seams import install

    install.uninstall()
